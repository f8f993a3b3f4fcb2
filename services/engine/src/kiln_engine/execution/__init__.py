"""Carrying out plans with torch: runner, sampler, adapters, memory."""
