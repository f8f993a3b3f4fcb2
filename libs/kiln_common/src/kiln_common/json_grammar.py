"""How JSON text is set that a grammar demands, in llguidance's words, and how long a grammar may be."""

from __future__ import annotations

from typing import Any

MOST_GRAMMAR_BYTES = 256 * 1024
# Between its parts: nothing, a space, or a line break and its indentation. Any run of white space
# would be as valid, and some models never end one.
JSON_WHITE_SPACE: dict[str, Any] = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"(\n[ ]{0,40}|[ ])?",
}
