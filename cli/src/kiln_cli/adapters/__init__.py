"""Adapters at the command line."""
