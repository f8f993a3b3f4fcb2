"""Evaluations at the command line."""
