"""`kiln agent`: a model with tools, whose code runs in the sandbox."""
