"""What the measured processes do: step on command. ``python -m optwire_bench.roles KIND [ARGUMENT...]``.

A line of JSON in, a line of JSON out. Each role is a process of its own, so that neither its memory nor its interpreter
lock is counted against another. A program of anyone's that speaks the same lines can take part (``--beside``):

    {"do": "open", "model": "25M", "tensors": 0}   -> facts: "pids": other processes whose work is this one's; "says":
                                                      for the report; "reference": whether it brings one of its own;
                                                      "path": how far it may be from that, as in ``cases.Check``
    {"do": "open", ..., "rank": 0, "workers": 4,   -> the same, as one of several workers, whose gradients are averaged;
     "meeting": "/tmp/..."}                           "meeting": a folder in which those of one group find each other
    {"do": "step", "count": 3}                     -> {"seconds": [...], "cpu_s": 0.1, "faults": 12}; "starts": when
                                                      each began, by the clock that processes share; of workers only
    {"do": "save", "path": "...", "what": ""}      -> null; parameters of all leaves, one after the other, float32;
                                                      "reference": what they should be, where it brings that
    {"do": "close"}                                -> null

All workers of a group are told to open, or to step, before one of them is waited for.

A step is what the caller of an optimizer waits for: from gradients at hand to new parameters at hand. Between two steps
the gradients are multiplied by the next of ``models.FACTORS``, which is not timed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import pathlib
import platform
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from optwire_bench import models

# How long workers wait for the first of them.
_MEETING_S = 120.0


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Which of several workers a process is.

    Attributes:
      rank: from 0.
      workers: how many there are.
      meeting: a folder that all of them know, and nobody else uses.
    """

    rank: int
    workers: int
    meeting: str

    def tell(self, text: str) -> None:
        """Leaves a line for the others; the worker of rank 0 does, once."""
        new = pathlib.Path(self.meeting, "new")
        new.write_text(text, encoding="utf-8")
        new.rename(new.with_name("told"))

    def told(self) -> str:
        """What the worker of rank 0 has left; waits for it, and raises TimeoutError."""
        told, deadline = pathlib.Path(self.meeting, "told"), time.monotonic() + _MEETING_S
        while not told.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"worker 0 left nothing in {self.meeting} within {_MEETING_S:g} s")
            time.sleep(0.01)
        return told.read_text(encoding="utf-8")


class Stepping(Protocol):
    """What takes steps on command."""

    def open(self, model: models.Model) -> dict[str, Any]:
        """Makes parameters, slots and gradients; returns facts, such as the ``pids`` of others."""
        ...

    def step(self) -> None:
        """What is timed."""
        ...

    def produce(self, factor: float) -> None:
        """Multiplies the gradients: what a backward pass would do."""
        ...

    def saved(self, what: str) -> Iterable[np.ndarray]:
        """The parameters, leaf after leaf; ``what``: "" for what the step gave, "master" for what the server holds."""
        ...

    def close(self) -> None:
        """Frees all of it."""
        ...


@runtime_checkable
class Working(Stepping, Protocol):
    """What takes steps together with others."""

    def join(self, model: models.Model, place: Place) -> dict[str, Any]:
        """Does what ``open`` does, as one of several; its gradients are those of its rank."""
        ...


class Local:
    """Adam by a jitted, donated update of one flat array in this process: what all others are compared with."""

    def open(self, model: models.Model) -> dict[str, Any]:
        return self._opened(model, _flat(models.grads(model)))

    def join(self, model: models.Model, place: Place) -> dict[str, Any]:
        """Does with the mean of all gradients, in the order of ranks, what the workers do together."""
        total = _flat(models.grads(model))
        for rank in range(1, place.workers):
            total += _flat(models.grads(model, rank))
        return self._opened(model, total / np.float32(place.workers))

    def _opened(self, model: models.Model, grads: np.ndarray) -> dict[str, Any]:
        import jax

        from optwire_server import optimizers

        init, update, self._get = optimizers.adam(models.LEARNING_RATE, models.B1, models.B2, models.EPS)
        self._jax = jax
        self._update = jax.jit(update, donate_argnums=2)
        self._scale = jax.jit(lambda grads, factor: grads * factor, donate_argnums=0)
        self._state = init(jax.numpy.array(_flat(models.params(model))))
        self._grads = jax.numpy.array(grads)
        self._index = 0
        return {}

    def step(self) -> None:
        self._state = self._jax.block_until_ready(self._update(self._index, self._grads, self._state))
        self._index += 1

    def produce(self, factor: float) -> None:
        self._grads = self._jax.block_until_ready(self._scale(self._grads, np.float32(factor)))

    def saved(self, what: str) -> Iterable[np.ndarray]:
        return [np.asarray(self._get(self._state))]

    def close(self) -> None:
        del self._state, self._grads


class LocalOptax:
    """optax's Adam over the leaves in one jitted, donated call, in this process.

    "ordered" is ``(grads, state) -> state``: what is donated comes back in the same order, so every output takes the
    place of its own input. "common" is ``(grads, state, params) -> (params, state)``, as most programs have it: XLA
    pairs donated inputs with outputs by position among equal shapes, gives each the buffer of another, and copies.
    """

    def __init__(self, form: str) -> None:
        self._form = form

    def open(self, model: models.Model) -> dict[str, Any]:
        import jax
        import optax

        rule = optax.adam(models.LEARNING_RATE, models.B1, models.B2, models.EPS)

        def ordered(grads: Any, state: Any) -> Any:
            params, slots = state
            updates, slots = rule.update(grads, slots, params)
            return optax.apply_updates(params, updates), slots

        def common(grads: Any, slots: Any, params: Any) -> Any:
            updates, slots = rule.update(grads, slots, params)
            return optax.apply_updates(params, updates), slots

        self._jax = jax
        self._update = jax.jit(ordered, donate_argnums=1) if self._form == "ordered" else None
        self._common = jax.jit(common, donate_argnums=(1, 2))
        self._scale = jax.jit(lambda grads, factor: jax.tree.map(lambda leaf: leaf * factor, grads), donate_argnums=0)
        params = jax.tree.map(jax.numpy.array, models.params(model))
        self._state = (params, rule.init(params))
        self._grads = jax.tree.map(jax.numpy.array, models.grads(model))
        self._names = [name for name, _ in model.shapes]
        return {}

    def step(self) -> None:
        if self._update is not None:
            self._state = self._update(self._grads, self._state)
        else:
            params, slots = self._state
            self._state = self._common(self._grads, slots, params)
        self._jax.block_until_ready(self._state)

    def produce(self, factor: float) -> None:
        self._grads = self._jax.block_until_ready(self._scale(self._grads, np.float32(factor)))

    def saved(self, what: str) -> Iterable[np.ndarray]:
        return [np.asarray(self._state[0][name]) for name in self._names]

    def close(self) -> None:
        del self._state, self._grads


class Remote:
    """The thin client: gradients in the buffers that the session lends, parameters into the ones it lends."""

    def __init__(self, target: str, transport: str, grads_codec: str, params_codec: str) -> None:
        import optwire

        self._client = optwire.connect(target, transport=transport, timeout=120.0)
        self._client.server_info()
        self._codecs: dict[str, Any] = {"grads_codec": grads_codec, "params_codec": params_codec}

    def open(self, model: models.Model) -> dict[str, Any]:
        self._owns = True
        self._session = self._client.create_session(models.params(model), _adam(), **self._codecs)
        return self._opened(model)

    def join(self, model: models.Model, place: Place) -> dict[str, Any]:
        self._owns = place.rank == 0
        if self._owns:
            aggregation = f"sync({place.workers}, lease_s=inf)"
            self._session = self._client.create_session(
                models.params(model), _adam(), aggregation=aggregation, worker=0, **self._codecs
            )
            place.tell(self._session.name)
        else:
            self._session = self._client.attach(place.told(), worker=place.rank)
            self._session.params()  # so that it knows the step
        return self._opened(model, place.rank)

    def _opened(self, model: models.Model, rank: int = 0) -> dict[str, Any]:
        self._grads, self._params = self._session.grad_buffers(), self._session.param_buffers()
        for name, leaf in models.grads(model, rank).items():
            self._grads[name][...] = leaf
        self._names = [name for name, _ in model.shapes]
        return {}

    def step(self) -> None:
        self._params = self._session.step(self._grads, out=self._params)

    def produce(self, factor: float) -> None:
        _multiply(self._grads.values(), factor)

    def saved(self, what: str) -> Iterable[np.ndarray]:
        params = self._session.params() if what == "master" else self._params
        return [params[name] for name in self._names]

    def transport(self) -> tuple[str, str]:
        """Which transport is in use, and why: a client falls back by itself."""
        info = self._session.info()
        return info.transport, info.transport_reason

    def close(self) -> None:
        name = self._session.name
        del self._grads, self._params
        self._session.close()
        if self._owns:
            self._client.delete_session(name)
        gc.collect()
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)  # so that what comes next is not served from memory that was free


def measured(step: Callable[[], None], count: int, between: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """When each of ``count`` steps began, and its seconds; CPU seconds and minor page faults of this process in all."""
    starts, seconds, cpu_s, faults = [], [], 0.0, 0
    for _ in range(count):
        before, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
        starts.append(started)
        cpu_s += time.process_time() - cpu
        faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        between()
    return {"starts": starts, "seconds": seconds, "cpu_s": cpu_s, "faults": faults}


def serve(role: Stepping) -> None:
    """Answers commands until the input ends; what is open then is closed."""
    steps, is_open = 0, False

    def produce() -> None:
        nonlocal steps
        role.produce(models.factor(steps))
        steps += 1

    for command in commands():
        answer: Any = None
        match command["do"]:
            case "open":
                steps = 0
                answer = _opened(role, command)
                is_open = True
            case "step":
                answer = measured(role.step, command["count"], produce)
            case "save":
                with open(command["path"], "wb") as file:
                    for leaf in role.saved(command["what"]):
                        file.write(np.ascontiguousarray(leaf, np.float32).data.cast("B"))
            case "transport":
                answer = role.transport() if isinstance(role, Remote) else ("", "")
            case "close":
                role.close()
                is_open = False
        reply(answer)
    if is_open:
        role.close()


def _opened(role: Stepping, command: Mapping[str, Any]) -> dict[str, Any]:
    model = models.model(command["model"], command["tensors"])
    if "workers" not in command:
        return role.open(model)
    if not isinstance(role, Working):
        sys.exit(f"{type(role).__name__} works alone")
    return role.join(model, Place(command["rank"], command["workers"], command["meeting"]))


def end_with_input() -> None:
    """Has this process end when its input does: for one that a role has started, which may die."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def commands() -> Iterable[Mapping[str, Any]]:
    """What is asked, line by line."""
    for line in sys.stdin:
        yield json.loads(line)


def reply(answer: object) -> None:
    """Answers what was asked last. On the descriptor itself: a framework may have its own mind about sys.stdout."""
    data = json.dumps(answer).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


def _adam() -> Any:
    from optwire import optimizers

    return optimizers.adam(models.LEARNING_RATE, models.B1, models.B2, models.EPS)


def _flat(leaves: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([leaf.reshape(-1) for leaf in leaves.values()])


def _multiply(leaves: Iterable[np.ndarray], factor: float) -> None:
    for leaf in leaves:
        np.multiply(leaf, np.float32(factor), out=leaf)


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    roles: dict[str, Callable[..., Stepping]] = {"local": Local, "optax": LocalOptax, "remote": Remote}
    serve(roles[kind](*arguments))
