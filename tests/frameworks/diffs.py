"""What a program changes that goes over to a server: the examples as diffs, and docs/frameworks.md, which shows them.

`python -m tests.frameworks.diffs` writes the diffs into the document.
"""

from __future__ import annotations

import difflib
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
REMOTE = ROOT / "examples" / "frameworks"
LOCAL = REMOTE / "local"
DOCUMENT = ROOT / "docs" / "frameworks.md"
NAMES = sorted(path.stem for path in REMOTE.glob("*.py"))
_BLOCK = re.compile(r"```diff\n--- examples/frameworks/local/(\w+)\.py\n.*?```", re.DOTALL)


def diff(name: str) -> list[str]:
    """As `diff -U1` has it, without times."""
    local, remote = LOCAL / f"{name}.py", REMOTE / f"{name}.py"
    sides = (local.read_text().splitlines(), remote.read_text().splitlines())
    files = (str(local.relative_to(ROOT)), str(remote.relative_to(ROOT)))
    return [line.rstrip() for line in difflib.unified_diff(*sides, *files, lineterm="", n=1)]


def changed(name: str) -> int:
    """Lines that are new or other."""
    return sum(line.startswith("+") for line in diff(name)[2:])


def block(name: str) -> str:
    """The diff as the document shows it."""
    return "\n".join(["```diff", *diff(name), "```"])


def shown() -> dict[str, str]:
    """The blocks of the document by example."""
    return {found[1]: found[0] for found in _BLOCK.finditer(DOCUMENT.read_text())}


if __name__ == "__main__":
    DOCUMENT.write_text(_BLOCK.sub(lambda found: block(found[1]), DOCUMENT.read_text()))
