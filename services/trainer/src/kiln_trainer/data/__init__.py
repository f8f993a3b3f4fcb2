"""Documents, their per-token streams, and how they are packed into micro-batches."""
