"""Compiled updates outlive the server's process."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from optwire_server.engine import compilations

PROGRAM = """
import json, sys, pathlib
import jax
from optwire_server.engine import compilations, engine
from optwire_proto import trees
from optwire import optimizers as opt
assert compilations.keep(pathlib.Path(sys.argv[1]))
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
running = engine.Engine()
running.compile(opt.adam(0.1), trees.TreeSpec((trees.LeafSpec("w", (5,), "f32"),)))
print(json.dumps([events.count(f"/jax/compilation_cache/cache_{what}") for what in ("hits", "misses")]))
"""


@pytest.fixture(autouse=True)
def not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names no folder for JAX, as that of the tests does."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)


def test_an_environment_that_names_a_folder_has_its_way(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert compilations.keep(tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_a_second_process_compiles_nothing(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "deep" / "kept"
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, timeout=120, check=True
        )
        counts.append(json.loads(done.stdout.splitlines()[-1]))
    assert counts[0][0] == 0
    assert counts[0][1] > 0
    assert counts[1] == [counts[0][1], 0]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_write_is_not_used(tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o777)
    assert not compilations.keep(tmp_path)


def test_where_no_folder_can_be_made_the_server_does_without(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    assert not compilations.keep(tmp_path / "file" / "folder")


def test_the_oldest_files_go_first(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    for age in range(4):
        path = tmp_path / str(age)
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(compilations, "_BYTES_MAX", 250)
    compilations._prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
