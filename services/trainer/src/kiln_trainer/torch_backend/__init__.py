"""Runs training jobs in torch, on weights mapped from the engine."""
