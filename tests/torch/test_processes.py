"""Two processes under DistributedDataParallel: what each way to distribute promises. Local torch is the oracle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import optwire
from optwire_server import testing

torch = pytest.importorskip("torch", reason="torch is an optional test dependency; `make test` installs it")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

RANKS = 2


def run(server: testing.Serving, case: str, directory: Path) -> list[dict[str, str]]:
    """What each rank printed, by the first word of a line."""
    command = [sys.executable, str(Path(__file__).with_name("rank.py")), server.target, case]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(RANKS), str(directory / case)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    told = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        told.append({line.partition(" ")[0]: line.partition(" ")[2] for line in out.splitlines()})
    return told


def params(directory: Path, case: str, rank: int) -> list[Any]:
    loaded: list[Any] = torch.load(directory / f"{case}.{rank}", weights_only=True)
    return loaded


@pytest.fixture(scope="module")
def expected(server: testing.Serving, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Parameters after local torch trained."""
    directory = tmp_path_factory.mktemp("local")
    run(server, "local", directory)
    return params(directory, "local", 0)


def test_without_a_choice_it_is_an_error_that_lists_the_choices(server: testing.Serving, tmp_path: Path) -> None:
    for told in run(server, "unsaid", tmp_path):
        assert all(choice in told["refused"] for choice in ("2 processes", "'replicated'", "'workers'", "'shards'"))


def test_replicated_pushes_once_and_all_ranks_get_the_same(
    server: testing.Serving, client: optwire.Client, expected: list[Any], tmp_path: Path
) -> None:
    told = run(server, "replicated", tmp_path)
    assert told[0]["params"] == told[1]["params"]
    assert [rank["step"] for rank in told] == ["5", "5"]
    assert told[0]["handle"] == told[1]["handle"]
    for ours, theirs in zip(params(tmp_path, "replicated", 1), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with client.attach("replicated") as session:
        assert session.info().step == 5
        assert len(session.info().changes) == 4, "the scheduler's edits, once each"
    client.delete_session("replicated")


def test_a_failure_of_rank_0_is_raised_on_every_rank(server: testing.Serving, tmp_path: Path) -> None:
    told = run(server, "failing", tmp_path)
    assert "rank 0: " not in told[0]["raised"]
    assert told[1]["raised"].startswith("rank 0: ")
    assert [rank["then"] for rank in told] == ["2", "2"]


def test_workers_push_their_own_gradients_and_the_server_averages(
    server: testing.Serving, expected: list[Any], tmp_path: Path
) -> None:
    told = run(server, "workers", tmp_path)
    assert told[0]["params"] == told[1]["params"]
    assert [rank["step"] for rank in told] == ["5", "5"]
    for ours, theirs in zip(params(tmp_path, "workers", 0), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
