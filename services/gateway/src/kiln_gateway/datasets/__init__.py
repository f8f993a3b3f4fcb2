"""Uploaded training data: its rows, their checks, and what jobs make of them."""
