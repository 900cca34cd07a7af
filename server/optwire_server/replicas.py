"""Replicas: what the clients of a session have of its parameters, where they are not sent those whole.

A codec that loses much cannot send parameters, but it can send how they differ from what was sent before, if what it
left behind goes out with the next difference. So the server keeps what a client has that decoded all of them: the
replica. A difference is what parameters are beyond the replica, encoded; whoever has the replica of the step that it
starts from is sent that, everybody else the replica as a whole. Of one step, all who are sent the same set of leaves
have the same bits, whatever way they came by them. A set that shares leaves with one that came before it has no
replica: it is sent the parameters themselves, which a replica only follows.

Works on the threads of calls, outside of the device's. Knows neither protobuf nor sessions.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence

import numpy as np

from optwire_proto import codecs, tensors, trees

Arrays = list[np.ndarray]


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What a reply carries.

    Attributes:
      step: whose parameters they are.
      arrays: in the order of the payload.
      is_difference: whether they are a difference; otherwise they are whole.
    """

    step: int
    arrays: Arrays
    is_difference: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Difference:
    """What took the replica from one step to the one it is of, encoded."""

    from_step: int
    arrays: Sequence[np.ndarray]


class Replica:
    """The replica of one session, in parts: one for each set of leaves that replies carry. Thread-safe.

    No leaf is in two parts, so that all of them together are no larger than the parameters: where a set shares leaves
    with one that came before it, its replies are whole.

    Args:
      how: the codec of differences.
      tree: of the session.
    """

    def __init__(self, how: codecs.Codec, tree: trees.TreeSpec) -> None:
        self._codec = how
        self._tree = tree
        self._lock = threading.Lock()
        self._parts: dict[tuple[int, ...], _Part] = {}
        self._taken: set[int] = set()  # leaves that are in a part

    def answer(
        self,
        params: Arrays,
        *,
        absent: tuple[int, ...],
        incarnation: int,
        step: int,
        view_step: int | None,
        room: Callable[[], Arrays],
    ) -> Answer:
        """What to send of the parameters of a step.

        The replica follows where it is of an earlier step. Where it is of a later one, another reply was faster, and
        this one is of that step, too.

        Args:
          params: the parameters, in pieces in the order of the payload; emptied, unless they are the answer.
          absent: positions of the leaves that are not among them.
          incarnation: of the session, at that step.
          step: number of updates applied.
          view_step: of the replica that the client has; None: it has none.
          room: gives arrays for a copy of the replica.
        """
        part = self._part(absent)
        if part is None:
            return Answer(step, params, is_difference=False)
        return part.answer(params, incarnation=incarnation, step=step, view_step=view_step, room=room)

    def _part(self, absent: tuple[int, ...]) -> _Part | None:
        with self._lock:
            if absent not in self._parts:
                leaves = set(range(len(self._tree.leaves))).difference(absent)
                if leaves & self._taken:
                    return None
                self._taken |= leaves
                self._parts[absent] = _Part(self._codec, self._tree.without(absent) if absent else self._tree)
            return self._parts[absent]


class _Part:
    """The replica of some leaves. Thread-safe; made without arrays, as the first reply is whole anyway."""

    def __init__(self, how: codecs.Codec, tree: trees.TreeSpec) -> None:
        self._codec = how
        self._tree = tree
        self._lock = threading.Lock()
        self._incarnation = 0
        self._step = 0
        self._arrays: Arrays = []
        self._newest: _Difference | None = None

    def answer(
        self, params: Arrays, *, incarnation: int, step: int, view_step: int | None, room: Callable[[], Arrays]
    ) -> Answer:
        """As ``Replica.answer``."""
        with self._lock:
            if incarnation < self._incarnation:  # of a history that is none any more: its client will be told
                return Answer(step, params, is_difference=False)
            if incarnation > self._incarnation or not self._arrays:
                self._arrays = self._copied(params)
                self._incarnation, self._step, self._newest = incarnation, step, None
                return Answer(step, params, is_difference=False)
            if step > self._step:
                self._newest = _Difference(self._step, self._follow(params))
                self._step = step
            params.clear()
            if self._newest is not None and view_step == self._newest.from_step:
                return Answer(self._step, list(self._newest.arrays), is_difference=True)
            copies = room()
            for copy, array in zip(copies, self._arrays, strict=True):
                np.copyto(copy, array)
            return Answer(self._step, copies, is_difference=False)

    def _copied(self, params: Arrays) -> Arrays:
        pieces = _Pieces(list(params))
        copies = []
        for leaf in self._tree.leaves:
            flat = np.empty(leaf.elements, tensors.numpy_dtype(leaf.dtype))
            pieces.copy(flat)
            copies.append(flat.reshape(leaf.shape))
        return copies

    def _follow(self, params: Arrays) -> Arrays:
        """Takes the replica towards the parameters, and returns the encoded difference. Empties ``params``."""
        pieces = _Pieces(params)
        # Whatever may be raised, half of it would have moved, and the next reply must be whole.
        arrays, self._arrays, self._newest = self._arrays, [], None
        encoded = []
        for leaf, replica in zip(self._tree.leaves, arrays, strict=True):
            flat = replica.reshape(-1)
            if not self._codec.bears_on(leaf.dtype):
                pieces.copy(flat)
                encoded.append(replica.copy())
                continue
            parts = [np.empty(part.shape, tensors.numpy_dtype(part.dtype)) for part in self._codec.encoded(leaf)]
            self._codec.encode(leaf.elements, _reader(pieces, flat), parts)
            self._codec.add(parts, flat, codecs.where("params", leaf))
            encoded += parts
        self._arrays = arrays
        return encoded


def replica(how: codecs.Codec, tree: trees.TreeSpec) -> Replica | None:
    """The replica of a new session; None for codecs that need none."""
    return Replica(how, tree) if how.loses else None


def state_bytes(how: codecs.Codec, tree: trees.TreeSpec) -> int:
    """Bytes that the replica of a session holds, and the newest difference with it; 0 for codecs that need none."""
    return tree.payload_bytes + sum(map(how.encoded_bytes, tree.leaves)) if how.loses else 0


def held_bytes(how: codecs.Codec, tree: trees.TreeSpec) -> int:
    """As ``state_bytes``, and what encoding a difference takes for the time: a leaf after the other, of one reply."""
    encoding = (how.encoding_bytes(leaf.elements) for leaf in tree.leaves if how.bears_on(leaf.dtype))
    return state_bytes(how, tree) + max(encoding, default=0)


def _reader(pieces: _Pieces, replica: np.ndarray) -> codecs.Read:
    def read(start: int, stop: int, out: np.ndarray) -> None:
        for at, values in pieces.take(stop - start):
            ours = replica[start + at : start + at + values.size]
            np.subtract(values, ours, out=out[at : at + values.size], casting="same_kind")

    return read


class _Pieces:
    """Parameters cut somewhere, read in order; a piece is let go of once it was read."""

    def __init__(self, pieces: Arrays) -> None:
        self._pieces = pieces
        pieces.reverse()
        self._rest = np.empty(0, np.uint8)

    def take(self, count: int) -> list[tuple[int, np.ndarray]]:
        """The next ``count`` elements, as (position of the first one, flat view) pairs."""
        found, at = [], 0
        while at < count:
            if not self._rest.size:
                self._rest = self._pieces.pop().reshape(-1)
            part = self._rest[: count - at]
            self._rest = self._rest[part.size :]
            found.append((at, part))
            at += part.size
        if not self._rest.size:
            self._rest = np.empty(0, np.uint8)
        return found

    def copy(self, out: np.ndarray) -> None:
        """The next elements, as many as ``out`` has, bit for bit."""
        bits = out.view(np.uint8)
        for at, values in self.take(out.size):
            start = at * out.itemsize
            bits[start : start + values.nbytes] = values.view(np.uint8)
