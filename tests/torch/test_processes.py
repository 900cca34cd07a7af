"""Two processes under DistributedDataParallel: what each way to distribute promises. Local torch is the oracle."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import optwire
from optwire_server import testing

torch = pytest.importorskip("torch", reason="torch is an optional test dependency; `make test` installs it")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

RANKS = 2


class Outcome:
    """What every rank said of every case, and the parameters it ended with."""

    def __init__(self, directory: Path, told: list[dict[tuple[str, str], str]]) -> None:
        self._directory = directory
        self._told = told

    def said(self, case: str, what: str) -> list[str]:
        return [rank[case, what] for rank in self._told]

    def params(self, case: str) -> list[list[Any]]:
        files = [self._directory / f"{case}.{rank}" for rank in range(RANKS)]
        return [torch.load(file, weights_only=True) for file in files]


@pytest.fixture(scope="module")
def outcome(server: testing.Serving, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    directory = tmp_path_factory.mktemp("ranks")
    with optwire.connect(server.target) as client:
        before = {info.name for info in client.list_sessions()}
    script = str(Path(__file__).with_name("rank.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, script, server.target, str(rank), str(RANKS), str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        printed = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), printed
    told = []
    for out, _ in printed:
        lines = [line.split(" ", 2) for line in out.splitlines()]
        told.append({(case, what): value for case, what, value in lines})
    yield Outcome(directory, told)
    with optwire.connect(server.target) as client:
        for info in client.list_sessions():
            if info.name not in before:
                client.delete_session(info.name)


def test_without_a_choice_it_is_an_error_that_lists_the_choices(outcome: Outcome) -> None:
    for message in outcome.said("unsaid", "refused"):
        assert all(choice in message for choice in ("2 processes", "'replicated'", "'workers'", "'shards'"))


def test_replicated_pushes_once_and_all_ranks_get_the_same(outcome: Outcome, client: optwire.Client) -> None:
    _are_alike(outcome.params("replicated"), outcome.params("local")[0])
    assert outcome.said("replicated", "step") == ["5", "5"]
    assert len(set(outcome.said("replicated", "handle"))) == 1
    with client.attach("replicated") as session:
        assert session.info().step == 5
        assert len(session.info().changes) == 4, "the scheduler's edits, once each"


def test_a_failure_of_rank_0_is_raised_on_every_rank(outcome: Outcome) -> None:
    first, second = outcome.said("failing", "raised")
    assert second == f"rank 0: {first}"
    assert "finite" in first
    assert outcome.said("failing", "step") == ["2", "2"]
    assert all(map(torch.equal, *outcome.params("failing")))


def test_workers_push_their_own_gradients_and_the_server_averages(outcome: Outcome, client: optwire.Client) -> None:
    _are_alike(outcome.params("workers"), outcome.params("local")[0])
    assert outcome.said("workers", "step") == ["5", "5"]
    with client.attach("workers") as session:
        assert str(session.info().aggregation) == "sync(2)"


def test_overlapping_workers_end_with_the_same_bits(outcome: Outcome) -> None:
    assert outcome.said("overlapped", "step") == ["5", "5"]
    assert outcome.said("overlapped", "late") == ["True", "True"]
    for params in outcome.params("overlapped"):
        assert all(map(torch.equal, params, outcome.params("workers")[0]))


@pytest.mark.parametrize("way", ["replicated", "workers"])
def test_a_checkpoint_of_torch_is_resumed_from_before_and_after_there_is_a_session(outcome: Outcome, way: str) -> None:
    case = f"resumed_{way}"
    assert outcome.said(case, "step") == ["5", "5"]
    assert outcome.said(case, "again") == ["4", "4"]
    assert outcome.said(case, "same") == ["True", "True"]
    assert outcome.said(case, "near") == ["True", "True"]


@pytest.mark.parametrize("way", ["replicated", "workers"])
def test_a_group_is_added_and_a_gradient_is_absent_on_all_ranks(outcome: Outcome, way: str) -> None:
    """By hand: momentum 0.9 of gradients of one, at rates 0.1 and 0.5."""
    case = f"grown_{way}"
    assert outcome.said(case, "step") == ["3", "3"]
    assert outcome.said(case, "0.weight") == [str([-round(0.1 * (1 + 1.9 + 2.71), 4)])] * RANKS
    assert outcome.said(case, "0.bias") == [str([-round(0.1 * (1 + 1.9), 4)])] * RANKS
    assert outcome.said(case, "2.weight") == [str([-round(0.5 * (1 + 1.9), 4)])] * RANKS


def test_infinity_on_one_rank_is_no_step_of_any(outcome: Outcome) -> None:
    assert outcome.said("scaled", "step") == ["3", "3"]
    assert outcome.said("scaled", "scale") == ["16.0", "8.0"], "each scaler knows of its own rank only"
    _are_alike(outcome.params("scaled"), outcome.params("unscaled")[0])


def test_scalers_that_leave_out_steps_by_themselves_are_refused_to_workers(outcome: Outcome) -> None:
    for message in outcome.said("refused", "error"):
        assert "amp='server'" in message


def test_ctrl_c_on_rank_0_is_heard_of_by_the_others(outcome: Outcome) -> None:
    assert outcome.said("interrupted", "raised") == ["KeyboardInterrupt", "RuntimeError"]
    assert "KeyboardInterrupt" in outcome.said("interrupted", "said")[1]


def _are_alike(ranks: list[list[Any]], expected: list[Any]) -> None:
    """Bit for bit between ranks; as close to local torch as two sums of gradients are."""
    for params in ranks:
        assert all(map(torch.equal, params, ranks[0]))
        for ours, theirs in zip(params, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
