"""A checkpoint's tensors: their canonical names, how they are read, and the one arena they live in."""
