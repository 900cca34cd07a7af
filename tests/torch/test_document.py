"""docs/pytorch.md does what it says: the diff runs as printed, and every test that it names is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import optwire
from optwire_server import testing

pytest.importorskip("torch", reason="torch is an optional test dependency; `make test` installs it")

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "pytorch.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("side", "-+")
def test_the_diff_runs_as_printed_on_both_sides(server: testing.Serving, client: optwire.Client, side: str) -> None:
    diff = re.search("```diff\n(.*?)```", TEXT, re.DOTALL)
    assert diff
    lines = [line[1:] for line in diff[1].splitlines() if not line or line[0] in (" ", side)]
    before = {info.name for info in client.list_sessions()}
    code = "\n".join(lines).replace("localhost:50051", server.target)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("loss 0.0"), result.stderr
    made = {info.name for info in client.list_sessions()} - before
    assert len(made) == (side == "+")
    for name in made:
        client.delete_session(name)


def test_every_test_it_names_is_there() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    named = re.findall("`(test_[a-z0-9_]+)`", TEXT)
    assert len(named) == 12
    assert [name for name in named if f"def {name}(" not in tests] == []
