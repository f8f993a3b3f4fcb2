"""Adapter archives as they come in and go out."""
