"""Quantising a checkpoint: the calibration text in tokens, and the process that computes."""
