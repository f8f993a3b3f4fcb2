"""Speculative decoding without a tensor: what to propose from the text, how much, and how it went."""
