"""Writes the client that blocks, client.py and data.py of libs/kiln_client, from the one to await.

.venv/bin/python scripts/generate_sync_client.py          # write it
.venv/bin/python scripts/generate_sync_client.py --check  # exit 1 when it is out of date
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "libs" / "kiln_client" / "src" / "kiln"
SOURCES = {"client.py": "aio.py", "data.py": "aio_data.py"}
FIRST_LINE = '"""For the client that blocks; written from {} by scripts/generate_sync_client.py."""'
REPLACEMENTS = (
    (r"import asyncio\n", "import time\n"),
    (r"\nimport time\n(.*?)\nimport time\n", r"\nimport time\n\1\n"),
    (r"\bkiln\.aio_data\b", "kiln.data"),
    (r"\bkiln\.aio\b", "kiln.client"),
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


def sync_source(target: str, source: str) -> str:
    text = re.sub(r'\A""".*?"""', FIRST_LINE.format(source), (PACKAGE / source).read_text(), flags=re.DOTALL)
    for pattern, replacement in REPLACEMENTS:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    # Shorter names move line breaks and the order of imports.
    for command in (["check", "--select", "I", "--fix-only"], ["format"]):
        ruff = [Path(sys.executable).with_name("ruff"), *command, "--quiet"]
        name = ["--stdin-filename", PACKAGE / target, "-"]
        done = subprocess.run([*ruff, *name], input=text, capture_output=True, text=True, check=True)
        text = done.stdout
    return text


def main() -> int:
    stale = []
    for target, source in SOURCES.items():
        path, text = PACKAGE / target, sync_source(target, source)
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(target)
    if stale:
        print(f"out of date, run make docs: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
