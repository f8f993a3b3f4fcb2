"""The kiln command: runs every service on one machine, and talks to a running one."""

__version__ = "0.1.0"
