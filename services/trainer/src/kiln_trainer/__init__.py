"""Trains LoRA adapters on weights mapped read-only from the engine."""
