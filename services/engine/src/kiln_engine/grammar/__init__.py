"""Grammars: compiled once, followed by each completion, and what they allow as bits.

llguidance reads JSON schemas, regular expressions and Lark, and says by name what it does not
support; a parser of our own would be a project of its own.
"""

from kiln_engine.grammar.compiler import ThreadedCompiler
from kiln_engine.grammar.matching import MaskWriter, TokenMatcher

__all__ = ["MaskWriter", "ThreadedCompiler", "TokenMatcher"]
