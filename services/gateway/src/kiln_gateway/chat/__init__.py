"""From messages to tokens and from tokens back to answers."""
