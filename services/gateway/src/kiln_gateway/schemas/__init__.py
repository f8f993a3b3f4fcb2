"""Request bodies: every field the HTTP contract names, and nothing else."""
