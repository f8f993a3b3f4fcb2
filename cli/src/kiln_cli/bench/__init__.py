"""`kiln bench`: how fast a running server answers."""
