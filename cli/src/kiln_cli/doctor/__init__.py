"""`kiln doctor`: what this machine and a running server are like, and what to do about it."""
