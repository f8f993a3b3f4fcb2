"""Adapter names, immutable versions, aliases and content-addressed bytes."""
