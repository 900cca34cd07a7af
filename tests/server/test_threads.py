"""The promise: elementwise and clipped updates give the same bits whatever the number of XLA's threads.

``benchmarks/threads.py`` says so of twenty processes; here are four.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "threads.py"


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU: XLA has no second thread")
def test_one_and_two_threads_give_the_same_bits() -> None:
    command = [sys.executable, str(SCRIPT), "--processes", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "elementwise and clipped updates in 4 processes: the same bits"
