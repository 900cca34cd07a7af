"""`optwire bench`: it runs, says what it measured, and fails when parameters are not what they should be."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optwire_bench import cases, command, fairness, models, stepping

# A local step at another learning rate.
WRONG = """
import sys
from optwire_bench import models, roles
models.LEARNING_RATE = float(sys.argv[1])
roles.serve(roles.Local())
"""
MACHINE = {"cores", "processor", "memory_gib", "kernel", "versions"}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "optwire_server", "bench", *arguments], capture_output=True, text=True, timeout=200
    )


def table(text: str) -> list[dict[str, str]]:
    """The rows of the one Markdown table of a report, by the names of the columns."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head, rule, *rows = lines
    assert all(set(cell) <= {"-", ":"} for cell in rule)
    assert {len(row) for row in rows} == {len(head)}
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], pathlib.Path]:
    """The report, the figures and the folder of a quick run."""
    folder = tmp_path_factory.mktemp("bench")
    program = folder / "right.py"
    program.write_text(WRONG)
    done = bench(
        *("step", "--quick", "--no-progress", "--json", f"{folder}/step.json", "--plot", f"{folder}/step.png"),
        *("--beside", f"another={sys.executable} {program} {models.LEARNING_RATE}"),
        *("--beside", f"absent={sys.executable} -m no_such_peer"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout, json.loads((folder / "step.json").read_text()), folder


def test_the_quick_run_measures_every_case_beside_the_local_step(quick: tuple[str, dict[str, Any], pathlib.Path]):
    _, found, folder = quick
    assert found["machine"].keys() >= MACHINE
    assert found["kind"] == "step"
    assert (found["rounds"], found["warm_up"]) == (2, stepping.WARM_UP)
    (entry,) = found["models"]
    assert (entry["model"], entry["parameters"], entry["tensors"]) == ("100k", 100_000, 16)
    rows = {row["case"]: row for row in entry["rows"]}
    assert {"local", "stream", "stream bf16", "stream int8", "unix", "naive", "another"} <= rows.keys()
    for row in rows.values():
        assert 0 < row["best_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] <= row["worst_ms"]
        assert len(row["rounds_ms"]) == 2
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["cpu_s_a_step"] > 0
        assert row["faults_a_step"] >= 0
    assert rows["local"]["ratio"] == 1.0
    assert (folder / "step.png").read_bytes()[:4] == b"\x89PNG"


def test_f32_is_the_local_step_bit_for_bit(quick: tuple[str, dict[str, Any], pathlib.Path]):
    rows = {row["case"]: row for row in quick[1]["models"][0]["rows"]}
    for name in ("stream", "unix", "naive", "another"):
        assert rows[name]["difference"]["unequal"] == 0
    assert rows["stream bf16"]["difference"]["unequal"] == 0  # its gradients are bfloat16 to begin with
    assert 0 < rows["stream int8"]["difference"]["path"] < 0.25


def test_shared_memory_is_measured_or_the_report_says_why_not(quick: tuple[str, dict[str, Any], pathlib.Path]):
    _, found, _ = quick
    ran = "shared_memory" in [row["case"] for row in found["models"][0]["rows"]]
    assert ran or any(line.startswith("shared_memory, 100k: over stream instead: ") for line in found["left_out"])


def test_a_peer_that_is_not_installed_is_left_out_in_a_line(quick: tuple[str, dict[str, Any], pathlib.Path]):
    report, found, _ = quick
    (line,) = [line for line in found["left_out"] if line.startswith("absent")]
    assert line.endswith("No module named no_such_peer")
    assert f"* Left out: {line}" in report.splitlines()


def test_the_report_is_a_table_of_the_figures(quick: tuple[str, dict[str, Any], pathlib.Path]):
    report, found, _ = quick
    rows = table(report)
    assert [row["step"] for row in rows] == [row["case"] for row in found["models"][0]["rows"]]
    for row, figures in zip(rows, found["models"][0]["rows"], strict=True):
        assert float(row["median ms"]) == pytest.approx(figures["median_ms"], rel=0.01)
        assert row["ratio to local (min–max)"].startswith(f"{figures['ratio']:.2f} (")
        assert row["checked"]
    first = report.splitlines()[0]
    assert first.startswith(f"{found['machine']['cores']} cores")
    assert f"jax {found['machine']['versions']['jax']}" in first


def test_a_wrong_parameter_fails_the_run(tmp_path: pathlib.Path):
    """Quotes the issue: parameters are checked against the reference every round."""
    program = tmp_path / "wrong.py"
    program.write_text(WRONG)
    done = bench(
        *("step", "--quick", "--no-progress", "--params", "1k", "--transport", "unary", "--against", "local"),
        *("--beside", f"wrong={sys.executable} {program} {models.LEARNING_RATE * 1.01}"),
    )
    assert done.returncode == 1
    assert "wrong, 1k: parameters differ from the reference after 2 steps: " in done.stderr
    assert "expected within 4e-07 a step" in done.stderr


def test_the_limits_are_shares_of_raw_tcp(tmp_path: pathlib.Path):
    done = bench("limits", "--quick", "--no-progress", "--json", f"{tmp_path}/limits.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "limits.json").read_text())
    assert {(row["case"], row["way"]) for row in found["rows"]} == {
        ("memcpy", "memcpy"),
        *((name, way) for name in ("raw TCP", "stream") for way in ("up", "down", "duplex")),
    }
    for row in found["rows"]:
        assert row["bytes"] == 4_000_000
        assert row["gb_s"] > 0
        assert row["cpu_s_a_gb"] > 0
    assert len(table(done.stdout)) == len(found["rows"])


def test_fairness_measures_a_tiny_session_in_three_states(tmp_path: pathlib.Path):
    done = bench("fairness", "--quick", "--no-progress", "--json", f"{tmp_path}/fairness.json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "fairness.json").read_text())["rows"]
    assert row["heavy_steps"] > 0
    for state in fairness.STATES:
        assert 0 < row[f"{state}_p50_ms"] <= row[f"{state}_p99_ms"]
    assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    (line,) = table(done.stdout)
    assert line["transport"] == "1M over stream"


def test_a_second_session_of_another_shape_compiles_nothing(tmp_path: pathlib.Path):
    done = bench(
        *("cold", "--no-progress", "--rounds", "1", "--params", "100k", "--tensors", "200"),
        *("--json", f"{tmp_path}/cold.json"),
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "cold.json").read_text())["rows"]
    assert row["first"]["compilations"] > 0
    assert row["second"]["compilations"] == 0
    assert [line["session"] for line in table(done.stdout)] == ["first", "second"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("step --params 25X", "'25X': expected a number such as 1k, 25M or 100M, or gpt2"),
        ("step --params 3", "'3': expected 16 to 2G parameters"),
        ("step --params 1k,1k", "the same twice"),
        ("step --params ,", "expected at least one"),
        ("step --transport pigeon", "no transport 'pigeon'; there are stream, unary, unix, shared_memory"),
        ("step --grads-codec f8", "no codec 'f8'; there are f32, bf16, f16, int8, top_k(0.01), sign"),
        ("step --against ray", "no case 'ray'"),
        ("step --beside command", "'command': expected NAME=COMMAND"),
        ("step --rounds 0", "'0': expected a whole number from 1 to 1,000"),
        ("limits --bytes 16MB", "expected a number such as"),
        ("fairness --params tiny", "expected a number such as"),
        ("cold --tensors 0", "expected a whole number from 1 to 65,536"),
        ("race", "invalid choice: 'race'"),
        ("", "required: kind"),
    ],
)
def test_nonsense_is_an_error_that_says_what_was_expected(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_gpt2_is_the_124_million_parameters_of_148_arrays():
    model = models.model("gpt2")
    assert len(model.shapes) == 148
    assert model.parameters == 124_439_808


def test_a_cycle_of_gradients_ends_where_it_began():
    assert np.prod(models.FACTORS) == 1.0
    assert all(abs(np.log2(abs(factor))) % 1 == 0 for factor in models.FACTORS)


def test_rounding_is_that_of_ml_dtypes():
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    halves = np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000  # every tie
    values = np.concatenate([values, halves.view(np.float32)])
    values = values[np.isfinite(values)]
    assert np.array_equal(cases.rounded(values, "bf16"), values.astype(ml_dtypes.bfloat16).astype(np.float32))


START = np.zeros(100, np.float32)
REFERENCE = np.full(100, 1.0, np.float32)


@pytest.mark.parametrize(
    ("change", "check", "wrong"),
    [
        (0.0, cases.Check(), False),
        (1.2e-7, cases.Check(), True),
        (3e-7, cases.ANOTHER_PROGRAM, False),
        (5e-7, cases.ANOTHER_PROGRAM, True),
        (float("nan"), cases.ANOTHER_PROGRAM, True),
        (2.0, cases.Check(path=0.25), False),  # one of a hundred goes three times as far: 20 % of the way
        (3.0, cases.Check(path=0.25), True),
        (float("nan"), cases.Check(path=0.25), True),
        (1e-2, cases.Check(rounded="bf16"), True),
    ],
)
def test_one_parameter_is_as_far_off_as_its_check_allows(change: float, check: cases.Check, wrong: bool):
    found = np.array(REFERENCE)
    found[37] += np.float32(change)

    def compared() -> dict[str, float]:
        return cases.compare(found, REFERENCE, START, check, steps=1, where="here")

    if wrong:
        with pytest.raises(cases.Wrong, match="here: parameters differ from the reference after 1 steps"):
            compared()
    else:
        assert compared()["unequal"] == (change != 0.0)


def test_memory_decides_how_many_take_turns_at_a_time():
    taken = [cases.remote(way) for way in ("stream", "unix", "shared_memory")]
    grouped = stepping.groups(taken, models.model("25M"), available_bytes=5 << 30)
    assert [[case.name for case in group] for group in grouped] == [["stream", "unix"], ["shared_memory"]]
    assert stepping.groups(taken, models.model("1k"), available_bytes=4 << 30) == [taken]
