"""The demonstration loop: its task, its reward and the run itself."""
