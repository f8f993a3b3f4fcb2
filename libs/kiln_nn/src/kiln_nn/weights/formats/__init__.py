"""Quantised checkpoints as they are stored: which formats are read, and what a matrix is made of there."""

from kiln_nn.weights.formats.from_config import stored_format
from kiln_nn.weights.formats.stored_matrix import StoredFormat, StoredMatrix, gather_matrices

__all__ = ["StoredFormat", "StoredMatrix", "gather_matrices", "stored_format"]
