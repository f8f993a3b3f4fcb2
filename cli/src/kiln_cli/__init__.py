"""The kiln command: runs every service on one machine, and talks to a running one."""
