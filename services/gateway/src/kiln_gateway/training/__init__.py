"""From scored text to the token ids the trainer learns from."""
