"""Training data: a catalogue and blobs of its own, apart from those of adapters."""
