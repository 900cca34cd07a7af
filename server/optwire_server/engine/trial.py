"""Reads and tries a client's program in a child process, so that what it does there is done to the child only.

Two errands: ``read`` parses a file with the native parsers that such a file can crash, and ``run`` compiles a listing
and runs it once. The child has limits of memory, processor time and files of its own, and gets no environment; what is
too slow or too large dies with it. Bytes go in over stdin, JSON comes back over stdout, one line for each stage and one
for the answer.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

from optwire_proto import errors, tensors, trees
from optwire_server.engine import listing

# Starting Python and JAX takes one to two seconds, several on a busy machine.
_START_S = 30.0
# One child at a time: programs are rare, and the processors belong to the sessions that run.
_TURN = threading.BoundedSemaphore(1)


def read(data: bytes, platform: str, limits: listing.Limits) -> listing.Listing:
    """The listing in a file, parsed in a child process.

    Raises:
      SpecError: the file is not a program that is served, or took more than the limits allow.
      LimitError: other programs were being tried for too long.
    """
    answer = _ask("read", {"platform": platform}, data, limits, limits.read_s)
    return listing.Listing.from_json(_text(answer, "listing"))


def run(program: listing.Listing, leaves: Sequence[trees.LeafSpec], limits: listing.Limits) -> None:
    """Compiles and runs a program once for leaves of these shapes, in a child process.

    Raises:
      SpecError: it took more than the limits allow, or did not survive.
      LimitError: other programs were being tried for too long.
    """
    counts = collections.Counter((leaf.shape, leaf.dtype) for leaf in leaves)
    shapes = [[shape, dtype, count] for (shape, dtype), count in counts.items()]
    data = json.dumps(shapes).encode() + b"\n" + program.to_json().encode()
    _ask("run", {}, data, limits, limits.compile_s + limits.step_s)


# ---------------------------------------------------------------------------------------------------------------------
# The server's side.


def _ask(errand: str, request: dict[str, Any], data: bytes, limits: listing.Limits, work_s: float) -> dict[str, Any]:
    """The child's answer."""
    if not _TURN.acquire(timeout=limits.wait_s):
        raise errors.LimitError(
            f"other programs were being tried for {limits.wait_s:g} s, the limit of waiting; try again later",
            subject="program",
            retry_after_s=limits.wait_s,
        )
    try:
        request = {**request, "limits": dataclasses.asdict(limits)}
        output, status = _spawn([errand, json.dumps(request)], data, _START_S + work_s)
    finally:
        _TURN.release()
    answers = list(_parsed(output))
    answer = answers[-1] if answers else {}
    if "refused" in answer:
        raise listing.refusal(_text(answer, "expected"), _text(answer, "got"), problem=_text(answer, "refused"))
    if "unable" in answer:
        raise errors.UnsupportedError(f"this server cannot read programs: {_text(answer, 'unable')}")
    if "stage" in answer or not answer:
        raise _death(_text(answer, "stage"), status, limits)
    return answer


def _spawn(arguments: list[str], data: bytes, wall_s: float) -> tuple[bytes, int]:
    """What the child wrote, and its status."""
    # The modules of this process and nothing else: a child that a file has taken over finds no secrets here.
    environment = {
        "JAX_PLATFORMS": "cpu",
        "MALLOC_ARENA_MAX": "2",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "optwire_server.engine.trial", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    timer = threading.Timer(wall_s, child.kill)
    timer.start()
    try:
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(data)
        with child.stdout:
            output = child.stdout.read(listing.TEXT_BYTES_MAX)
    finally:
        # Whatever it still does, it has answered; and it is gone before the next one starts.
        timer.cancel()
        child.kill()
        status = child.wait()
    return output, status


def _death(stage: str, status: int, limits: listing.Limits) -> errors.OptwireError:
    """The error for a child that ended without an answer."""
    most_s = {"read": limits.read_s, "compile": limits.compile_s, "run": limits.step_s}.get(stage)
    if most_s is None:
        return errors.InternalError("the process that tries programs did not start")
    if status in (-signal.SIGALRM, -signal.SIGKILL, -signal.SIGXCPU):
        problem = f"took longer to {stage} than {most_s:g} s, the limit"
        return listing.refusal(f"at most {most_s:g} s to {stage}", "more", problem=problem)
    expected = f"a program that survives to {stage} in {limits.memory_bytes} bytes of memory"
    problem = f"the process that had to {stage} it died of it; the file is damaged, or needs more than the limit of "
    return listing.refusal(expected, "a dead process", problem=f"{problem}{limits.memory_bytes} bytes of memory")


def _parsed(output: bytes) -> Iterator[dict[str, Any]]:
    """The lines that are answers; a child that was ended may leave half of one."""
    for line in output.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                yield answer


def _text(answer: dict[str, Any], key: str) -> str:
    return str(answer.get(key, ""))


# ---------------------------------------------------------------------------------------------------------------------
# The child's side.


def main() -> None:
    """Does one errand and answers."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    errand, request = sys.argv[1], json.loads(sys.argv[2])
    limits = listing.Limits(**request["limits"])
    try:
        answer = _run(limits, answers) if errand == "run" else _read(request["platform"], limits, answers)
    except errors.SpecError as exc:
        answer = {"refused": str(exc).removeprefix("program: "), "expected": exc.expected, "got": exc.got}
    except ImportError as exc:
        answer = {"unable": str(exc)}
    except Exception as exc:  # noqa: BLE001 - the boundary to parsers and compilers that were given anything at all
        answer = _failure(exc, limits)
    _say(answers, answer)


def _failure(exc: Exception, limits: listing.Limits) -> dict[str, Any]:
    """The answer to what libraries raise. Their words may name files of this machine, so they stay here."""
    if isinstance(exc, MemoryError) or "RESOURCE_EXHAUSTED" in str(exc):
        expected = f"at most {limits.memory_bytes} bytes of memory"
        return {"refused": f"needs more than the limit of {limits.memory_bytes} bytes of memory", "expected": expected}
    problem = "no update exported with jax.export, or one made by a version that this server does not read"
    return {"refused": problem, "expected": "an exported update", "got": type(exc).__name__}


def _read(platform: str, limits: listing.Limits, answers: IO[str]) -> dict[str, Any]:
    # Imported here, and nowhere else: it holds the parsers that a file can crash.
    from optwire_server.engine import artifact

    data = sys.stdin.buffer.read(limits.bytes_max)
    _confine(limits.memory_bytes, limits.read_s)
    with _stage("read", limits.read_s, answers):
        return {"listing": artifact.read(data, platform, limits.ops_max).to_json()}


def _run(limits: listing.Limits, answers: IO[str]) -> dict[str, Any]:
    import jax

    shapes = json.loads(sys.stdin.buffer.readline())
    program = listing.Listing.from_json(sys.stdin.buffer.read())
    jax.devices()
    largest = max((math.prod(shape) * tensors.itemsize(dtype) for shape, dtype, _ in shapes), default=0)
    # The inputs, the results, and as much again for what a compiler keeps between them.
    _confine(limits.memory_bytes + 3 * largest * (listing.INPUTS + program.slots), limits.compile_s + limits.step_s)
    compile_s, step_s = 0.0, 0.0
    for shape, dtype, count in shapes:
        with jax.enable_x64(dtype == "f64"):
            began = time.monotonic()
            with _stage("compile", limits.compile_s - compile_s, answers):
                update = _compile(program, tuple(shape), dtype, limits)
            compile_s += time.monotonic() - began
            with _stage("run", limits.step_s - step_s, answers):
                step_s += count * _time(update, program, tuple(shape), dtype)
    if step_s > limits.step_s:
        problem = f"one step took {step_s:.3g} s, the limit is {limits.step_s:g} s"
        raise listing.refusal(f"at most {limits.step_s:g} s a step", f"{step_s:.3g} s", problem=problem)
    return {"compile_s": compile_s, "step_s": step_s}


def _compile(program: listing.Listing, shape: tuple[int, ...], dtype: str, limits: listing.Limits) -> Any:
    import jax

    leaf = jax.ShapeDtypeStruct(shape, tensors.numpy_dtype(dtype))
    scalars = [jax.ShapeDtypeStruct((), "int32"), jax.ShapeDtypeStruct((), "float32")]
    update = jax.jit(lambda *inputs: program.update(inputs, limits))
    return update.lower(*scalars, *[leaf] * (2 + program.slots)).compile()


def _time(update: Any, program: listing.Listing, shape: tuple[int, ...], dtype: str) -> float:
    """Seconds of one update of one leaf, the better of two runs."""
    import jax
    import jax.numpy as jnp

    kind = tensors.numpy_dtype(dtype)
    leaves = [jnp.ones(shape, kind)] * 2 + [jnp.zeros(shape, kind)] * program.slots
    inputs = [jnp.int32(0), jnp.float32(0.001), *leaves]
    times = []
    for _ in range(2):
        began = time.monotonic()
        jax.block_until_ready(update(*inputs))
        times.append(time.monotonic() - began)
    return min(times)


def _confine(memory_bytes: int, work_s: float) -> None:
    """Takes rights away: memory over what the process has now, processor time, files, priority."""
    os.nice(10)
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    # Should the server be killed, nobody but the kernel ends this process.
    used_s = time.process_time()
    limits[resource.RLIMIT_CPU] = math.ceil(used_s + 2 * (work_s + 1) * (os.cpu_count() or 1))
    # Address space is what can be limited, and JAX reserves much of it before it does anything: so what is there now
    # is allowed in addition. Systems without /proc have no limit of memory here.
    with contextlib.suppress(FileNotFoundError), open("/proc/self/statm", encoding="ascii") as statm:
        limits[resource.RLIMIT_AS] = int(statm.read().split()[0]) * resource.getpagesize() + memory_bytes
    for name, most in limits.items():
        hard = resource.getrlimit(name)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(name, (most, most))


@contextlib.contextmanager
def _stage(name: str, most_s: float, answers: IO[str]) -> Iterator[None]:
    """Says what begins, and lets the kernel end the process if it is not over in time: native code hears no other."""
    _say(answers, {"stage": name})
    signal.setitimer(signal.ITIMER_REAL, max(most_s, 0.001))
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


def _say(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
