"""Writes libs/kiln_client/src/kiln/client.py, the client that blocks, from aio.py, the one to await.

.venv/bin/python scripts/generate_sync_client.py          # write it
.venv/bin/python scripts/generate_sync_client.py --check  # exit 1 when it is out of date
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "libs" / "kiln_client" / "src" / "kiln"
FIRST_LINE = '"""The client that blocks; written from aio.py by scripts/generate_sync_client.py."""'
REPLACEMENTS = (
    (r'\A""".*?"""', FIRST_LINE),
    (r"import asyncio\nimport contextlib", "import contextlib"),
    (r"import functools\n", "import functools\nimport time\n"),
    (r"await asyncio\.sleep", "time.sleep"),
    (r"\bawait ", ""),
    (r"\basync (def|with|for)\b", r"\1"),
    (r"\bAsync(?=[A-Z])", ""),
    (r"\basynccontextmanager\b", "contextmanager"),
    (r"\baclosing\b", "closing"),
    (r"\baclose\b", "close"),
    (r"\baread\b", "read"),
    (r"\baiter_(lines|bytes)\b", r"iter_\1"),
    (r"__a(enter|exit)__", r"__\1__"),
)


def sync_source() -> str:
    text = (PACKAGE / "aio.py").read_text()
    for pattern, replacement in REPLACEMENTS:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    # Shorter names move line breaks and the order of imports.
    for command in (["check", "--select", "I", "--fix-only"], ["format"]):
        ruff = [Path(sys.executable).with_name("ruff"), *command, "--quiet"]
        name = ["--stdin-filename", PACKAGE / "client.py", "-"]
        done = subprocess.run([*ruff, *name], input=text, capture_output=True, text=True, check=True)
        text = done.stdout
    return text


def main() -> int:
    path, text = PACKAGE / "client.py", sync_source()
    if "--check" not in sys.argv:
        path.write_text(text)
    elif not path.exists() or path.read_text() != text:
        print(f"out of date, run {Path(__file__).name}: {path.name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
