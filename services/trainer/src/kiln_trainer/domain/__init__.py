"""The trainer's words and ports. Standard library only."""
