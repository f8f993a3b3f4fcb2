"""How JSON text is set that a grammar demands, in llguidance's words."""

from __future__ import annotations

from typing import Any

# Between its parts: nothing, a space, or a line break and its indentation. Any run of white space
# would be as valid, and some models never end one.
JSON_WHITE_SPACE: dict[str, Any] = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"(\n[ ]{0,40}|[ ])?",
}
