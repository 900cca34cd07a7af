"""Every numbered example runs as a reader would run it, and so does the training of the thin client."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))


def output_of(*arguments: str) -> str:
    """What a Python process prints; it must end well, in two minutes, without a word on standard error."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_without_arguments(example):
    assert output_of(str(example)).strip()


def test_the_quickstart_takes_the_address_of_a_server(server):
    assert "w = [ 2.  -1.   0.5], b = 3.0" in output_of("examples/01_quickstart_numpy.py", server.target)


def test_the_thin_client_trains_without_jax(server):
    output = output_of("-I", "tests/thin/train_thin.py", server.target)
    assert "none of them jax jaxlib ml_dtypes torch optwire_server" in output
