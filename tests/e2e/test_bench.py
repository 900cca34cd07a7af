"""`optwire bench`: it runs, says what it measured, and fails when parameters are not what they should be."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optwire_bench import cases, command, fairness, folders, models, processes, scaling, stepping

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
        *("--beside", "chatty=echo hi"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout, json.loads((folder / "step.json").read_text()), folder


def test_the_quick_run_measures_every_case_beside_the_local_step(quick: tuple[str, dict[str, Any], pathlib.Path]):
    _, found, folder = quick
    assert found["machine"].keys() >= MACHINE
    assert found["kind"] == "step"
    assert found["warm_up"] == stepping.WARM_UP
    (entry,) = found["models"]
    assert entry["rounds"] == 2
    assert {row["group"] for row in entry["rows"]} == {0}
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
    left_out = found["models"][0]["left_out"]
    assert ran or any(line.startswith("shared_memory, 100k: over stream instead: ") for line in left_out)


def test_a_peer_that_is_not_installed_is_left_out_in_a_line(quick: tuple[str, dict[str, Any], pathlib.Path]):
    report, found, _ = quick
    left_out = found["models"][0]["left_out"]
    (line,) = [line for line in left_out if line.startswith("absent")]
    assert line.endswith("No module named no_such_peer")
    assert f"* Left out: {line}" in report.splitlines()
    assert "chatty, 100k: chatty: answered 'hi', expected JSON" in left_out


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


def test_an_update_keeps_the_sizes_that_are_not_measured_again(
    quick: tuple[str, dict[str, Any], pathlib.Path], tmp_path: pathlib.Path
):
    path = tmp_path / "step.json"
    path.write_text((quick[2] / "step.json").read_text())
    few = ("--transport", "stream", "--against", "local", "--json", f"{path}", "--update", "--no-progress")
    for rounds, sizes in (("1", "16"), ("3", "16,1M")):
        done = bench("step", "--no-extras", "--rounds", rounds, "--steps", "1", "--params", sizes, *few)
        assert done.returncode == 0, done.stderr
    smallest, kept, largest = json.loads(path.read_text())["models"]
    assert [(entry["model"], entry["rounds"]) for entry in (smallest, largest)] == [("16", 3), ("1M", 3)]
    assert kept == quick[1]["models"][0]
    assert "rounds in which all take turns: 3 on 16, 2 on 100k, 3 on 1M;" in done.stdout
    assert {row["model"] for row in table(done.stdout)} == {"16", "100k", "1M"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no figures to update: "),
        ("[]", "no figures to update: "),
        ('{"kind": "cold", "machine": {}}', "figures of 'cold', expected those of 'step'"),
        (
            '{"kind": "step", "machine": {"cores": 0, "processor": "P", "memory_gib": 1, "versions": {"jax": "0"}}}',
            "of 0 cores, P, 1 GiB; jax 0; this is ",
        ),
    ],
)
def test_figures_that_cannot_be_joined_are_refused_before_anything_is_measured(
    content: str | None, message: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "step.json"
    if content is not None:
        path.write_text(content)
    assert command.main(["step", "--update", "--json", f"{path}"]) == 1
    assert f"optwire bench step: {path}: {message}" in capsys.readouterr().err
    assert (path.read_text() if path.exists() else None) == content


def test_fairness_measures_a_tiny_session_in_four_states(tmp_path: pathlib.Path):
    done = bench("fairness", "--quick", "--no-progress", "--json", f"{tmp_path}/fairness.json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "fairness.json").read_text())["rows"]
    assert row["heavy_steps"] > 0
    for state in ("alone", "beside", "half", "busy"):
        assert 0 < row[f"{state}_p50_ms"] <= row[f"{state}_p99_ms"]
    for name in ("ratio", "busy_ratio", "beside_over_busy"):
        assert row[f"{name}_min"] <= row[name] <= row[f"{name}_max"]
    (line,) = table(done.stdout)
    assert line["transport"] == "1M over stream"
    assert line["busy p50"] == f"{row['busy_p50_ms']:.2f}"
    assert line["p99 beside/busy (min–max)"].startswith(f"{row['beside_over_busy']:.2f} (")


# A peer whose workers do not average: each goes on with its own gradients.
ALONE = """
from optwire_bench import roles
class Alone(roles.Local):
    def join(self, model, place):
        return self.open(model)
roles.serve(Alone())
"""


def test_several_workers_are_measured_beside_one_and_checked_against_their_mean(tmp_path: pathlib.Path):
    program = tmp_path / "solitary.py"
    program.write_text("from optwire_bench import naive, roles\nroles.serve(naive.Naive('tree'))")
    done = bench(
        *("workers", "--quick", "--no-progress", "--only", "scaling", "--workers", "2,3"),
        *("--json", f"{tmp_path}/workers.json", "--plot", f"{tmp_path}/workers.png"),
        *("--beside", f"solitary={sys.executable} {program}"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "workers.json").read_text())["scaling"]
    rows = {(row["of"], row["workers"], row["case"]): row for row in found["rows"]}
    ours = ["stream", "stream bf16", "shared_memory"]
    ran = {case for _, _, case in rows} - {"local"}
    assert ran == set(ours) or all(line.startswith(("solitary", "shared_memory")) for line in found["left_out"])
    for count in (2, 3):
        assert (
            f"solitary, {count} workers: solitary, worker 0: its process ended with 1: Naive works alone"
            in found["left_out"]
        )
        for case in ran:
            row = rows[count, count, case]
            assert 0 < row["best_ms"] <= row["median_ms"] <= row["worst_ms"]
            assert len(row["rounds_ms"]) == 2
            ratio = row["over"]["one worker"]
            one = rows[count, 1, case]["rounds_ms"]
            assert ratio["max"] == pytest.approx(max(a / b for a, b in zip(row["rounds_ms"], one, strict=True)))
            assert ratio["min"] <= ratio["median"] <= ratio["max"]
            assert row["cpu_s_a_step"] > 0
    lines = table(done.stdout)
    assert [(line["step"], line["workers"]) for line in lines] == [
        (row["case"], str(row["workers"])) for row in found["rows"]
    ]
    assert (tmp_path / "workers.png").read_bytes()[:4] == b"\x89PNG"


def test_workers_that_do_not_average_fail_the_run(tmp_path: pathlib.Path):
    program = tmp_path / "alone.py"
    program.write_text(ALONE)
    done = bench(
        *("workers", "--quick", "--no-progress", "--only", "scaling", "--transport", "stream", "--params", "1k"),
        *("--beside", f"alone={sys.executable} {program}"),
    )
    assert done.returncode == 1
    assert "alone, worker 0: parameters differ from the reference after 2 steps: " in done.stderr


def test_fast_workers_are_counted_beside_a_slow_one_and_without_it(tmp_path: pathlib.Path):
    done = bench(
        *("workers", "--quick", "--no-progress", "--only", "stragglers", "--rounds", "1", "--gradient-ms", "30"),
        *("--json", f"{tmp_path}/workers.json", "--plot", f"{tmp_path}/workers.png"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "workers.json").read_text())["stragglers"]
    rows = {row["mode"]: row for row in found["rows"]}
    for row in rows.values():
        assert row["fast_alone_a_s"] > 0
        assert row["share"] == pytest.approx(row["fast_a_s"] / row["fast_alone_a_s"])
    # Who waits for the slow one gets a fifth done; bounds that leave room for a busy machine.
    assert rows["sync(4)"]["share"] < 0.6
    assert rows["sync(4)"]["slow_late_a_s"] == rows["async"]["slow_late_a_s"] == 0.0
    assert rows["async"]["share"] > rows["sync(4)"]["share"]
    assert [line["mode"] for line in table(done.stdout)] == list(rows)


def test_crews_that_do_not_fit_in_memory_are_measured_in_groups_with_the_first():
    taken = [cases.remote(way) for way in ("stream", "unix", "shared_memory")] + [cases.beside("peer=true")]
    model = models.model("25M")
    grouped = scaling.groups(taken, model, 4, available_bytes=10 << 30)
    assert [case.name for group in grouped for case in group if case is not taken[0]] == [
        "unix",
        "shared_memory",
        "peer",
    ]
    assert len(grouped) > 1
    assert all(group[0] is taken[0] and len(group) > 1 for group in grouped)
    assert scaling.groups(taken, model, 4, available_bytes=1 << 40) == [taken]


def test_processes_that_only_compute_do_so_until_they_are_ended():
    before = set(_children(os.getpid()))
    with fairness.computing(2):
        begun = set(_children(os.getpid())) - before
        assert len(begun) == 2
        for pid in begun:
            _until(lambda pid=pid: time.clock_gettime((~pid << 3) | 2) > 1.0)  # CPU seconds of a process
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in begun)


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
        ("step --grads-codec f8", "'f8', expected one of f32, bf16, f16, int8, top_k(0.01), sign"),
        ("step --grads-codec top_k(nonsense", "'top_k(nonsense', expected one of f32"),
        ("step --params-codec top_k(2)", "'top_k(2)', expected one of f32"),
        ("step --against ray", "no case 'ray'"),
        ("step --beside command", "'command': expected NAME=COMMAND"),
        ("step --beside name=/nonexistent", "there is no program '/nonexistent'"),
        ("limits --bytes 0", "'0': expected 4 to 8G bytes"),
        ("step --rounds 0", "'0': expected a whole number from 1 to 1,000"),
        ("limits --bytes 16MB", "expected a number such as"),
        ("fairness --params tiny", "expected a number such as"),
        ("cold --tensors 0", "expected a whole number from 1 to 65,536"),
        ("workers --workers 1", "'1': expected a whole number from 2 to 64"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--json", "/proc/no/where.json"), "/proc/no"),
        (("--json", "."), "Is a directory"),
        (("--plot", "plot.txt"), "--plot plot.txt: expected the name of a PNG file, such as plot.png"),
    ],
)
def test_a_file_that_cannot_be_written_is_found_before_anything_is_measured(
    arguments: tuple[str, str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
    monkeypatch: Any,
):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    started = time.monotonic()
    assert command.main(["step", *arguments]) == 1
    assert time.monotonic() - started < 5
    assert capsys.readouterr().err.startswith("optwire bench step: ")
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list(tmp_path.iterdir())


def test_a_killed_benchmark_leaves_no_process_and_the_next_one_clears_its_folders(
    tmp_path: pathlib.Path, monkeypatch: Any
):
    arguments = ["step", "--quick", "--rounds", "1000", "--params", "1k", "--transport", "stream", "--against", "local"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-m", "optwire_server", "bench", *arguments, "--no-progress"], env=environment
    ) as running:
        try:
            children = _until(lambda: len(found := _children(running.pid)) == 3 and found)  # the server and two roles
        finally:
            running.kill()
    _until(lambda: not any(pathlib.Path(f"/proc/{pid}").exists() for pid in children))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = [found for where in (tmp_path, pathlib.Path("/dev/shm")) for found in where.glob("optwire-bench-*")]
    assert any(found.parent == tmp_path for found in left)
    for found in left:
        with contextlib.suppress(FileNotFoundError):  # of a run beside this one
            os.utime(found, (0, 0))
    folders.sweep()
    assert not list(tmp_path.iterdir())


def _until(condition: Any) -> Any:
    ends = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < ends
        time.sleep(0.05)
    return found


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(text) for text in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def test_folders_of_runs_that_are_gone_are_cleared_away(tmp_path: pathlib.Path, monkeypatch: Any):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with folders.folder() as used:
        young, old, other = (tmp_path / name for name in ("optwire-bench-young", "optwire-bench-old", "other"))
        for each in (young, old, other):
            each.mkdir()
            (each / "file").write_bytes(bytes(10))
        for each in (used, old, other):
            os.utime(each, (0, 0))
        folders.sweep()
        assert (used.exists(), young.exists(), old.exists(), other.exists()) == (True, True, False, True)
    assert not used.exists()


def test_scratch_is_in_memory_where_there_is_room(tmp_path: pathlib.Path, monkeypatch: Any):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(folders, "_MEMORY", str(tmp_path / "absent"))
    with folders.folder(scratch_bytes=1000) as found:
        assert found.parent == tmp_path
    with pytest.raises(OSError, match="bytes are free"), folders.folder(scratch_bytes=1 << 60):
        pass


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import time; time.sleep(60)", "peer: no answer within 1 s"),
        ("print('[1]', flush=True); input()", r'peer: answered "open" with \[1\], expected an object'),
        ("print('{', flush=True); input()", "peer: answered '{', expected JSON"),
        ("raise SystemExit('broken')", "peer: its process ended with 1: broken"),
    ],
)
def test_a_peer_that_does_not_speak_the_lines_is_an_error(program: str, message: str):
    role = processes.Role("peer", [sys.executable, "-c", program], answer_s=1.0 if "sleep" in program else 60.0)
    try:
        with pytest.raises(processes.BenchError, match=message):
            role.facts(model="1k", tensors=0)
    finally:
        role.end()


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
