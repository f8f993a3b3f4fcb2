"""Tells whoever asked to be told that a job has ended: signed, again until it arrives, to no private address."""
