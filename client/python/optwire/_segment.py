"""Segments: memory shared with a server on this host, as the client holds it. No gRPC, no protobuf.

Takes what a server hands over only where it cannot harm: a size that is sealed, leaves that lie inside.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import sys
import time
import weakref
from collections.abc import Sequence
from typing import Final

import numpy as np

from optwire import _payload
from optwire_proto import handover, limits, tensors, trees

_HANDOVER_S: Final = 10.0  # in which a segment must be handed over; the server has to find the memory first
_MESSAGE_S: Final = 5.0
_MOMENT_S: Final = 1e-3  # 0 would mean not to wait at all, in other words
_PAGE: Final = mmap.PAGESIZE


class Segment:
    """Memory shared with the server, and the connection that it is held by.

    Attributes:
      slot: what a push names it by.
      grads: one array a leaf, to write gradients to.
      params: one array a leaf, where the server writes the parameters of its replies to.
      is_in_use: whether the server may be reading and writing it.
      is_filled: whether gradients were copied to it.
    """

    def __init__(
        self, connection: socket.socket, grant: handover.Grant, memory: mmap.mmap, tree: trees.TreeSpec
    ) -> None:
        self.slot = grant.slot
        self.is_in_use = self.is_filled = False
        whole = np.frombuffer(memory, np.uint8)
        whole[::_PAGE] = 0  # its pages are entered here, and not during the first step
        self._first = whole.ctypes.data
        self._nbytes = grant.nbytes
        self.grads = _views(whole[: grant.params], grant.offsets, tree)
        self._addresses = [_address(array) for array in self.grads]  # asking takes a while, for thousands of leaves
        self.params = _views(whole[grant.params :], grant.offsets, tree)
        self._connection = connection
        self._asked = False  # whether an answer to the question for quiet is on its way
        self._end = weakref.finalize(self, connection.close)

    def fill(self, arrays: Sequence[tensors.Array], absent: Sequence[int]) -> None:
        """Copies gradients to where they belong, except those that are there."""
        moved = self._moved(arrays, absent)
        self.is_filled = self.is_filled or bool(moved)
        # What lies elsewhere in the segment is saved first: it might be written over before it is copied.
        saved = [(own, array.copy() if self._has(array) else array) for own, array in moved]
        for own, array in saved:
            np.copyto(wire_view(own), array)

    def holds(self, arrays: Sequence[tensors.Array], absent: Sequence[int]) -> bool:
        """Whether all gradients are where they belong."""
        return not self._moved(arrays, absent)

    def empty(self) -> None:
        """Makes zeros of all gradients."""
        for own in self.grads:
            wire_view(own)[...] = 0
        self.is_filled = False

    def read(self, incoming: _payload.Incoming, absent: Sequence[int] = ()) -> list[tensors.Array]:
        """Copies the arrays of a reply to where they are wanted, except those that are wanted where they are.

        Those at the positions ``absent`` are not wanted.
        """
        gone = frozenset(absent)
        wanted = (own for index, own in enumerate(self.params) if index not in gone)
        for own, array in zip(wanted, incoming.arrays, strict=True):
            if _address(own) != _address(array):
                np.copyto(wire_view(array), wire_view(own))
        return list(incoming.arrays)

    def quiet(self, timeout_s: float) -> bool:
        """Takes the memory back from pushes that were made before; waits for those that have begun.

        Returns:
          Whether they are over. If not, ask again.

        Raises:
          OSError, HandoverError: the connection is of no further use.
        """
        if not self._asked:
            handover.send(self._connection, handover.ASK_QUIET, _MESSAGE_S)
            self._asked = True
        self._connection.settimeout(max(timeout_s, _MOMENT_S))
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return False
        answer = handover.receive(self._connection, limits.HANDOVER_REPLY_BYTES_MAX, _MESSAGE_S)
        quiet = handover.Quiet.from_json(answer)
        self._asked, self.slot = False, quiet.slot
        return quiet.is_quiet

    def close(self) -> None:
        """Ends the connection, and with it the server's side."""
        self._end()

    def _moved(
        self, arrays: Sequence[tensors.Array], absent: Sequence[int]
    ) -> list[tuple[tensors.Array, tensors.Array]]:
        """Where gradients belong, and they, of those that are elsewhere."""
        gone = frozenset(absent)
        there = [own for index, own in enumerate(zip(self.grads, self._addresses, strict=True)) if index not in gone]
        pairs = zip(there, arrays, strict=True)
        return [(own, array) for (own, address), array in pairs if array.nbytes and address != _address(array)]

    def _has(self, array: tensors.Array) -> bool:
        return self._first - array.nbytes < _address(array) < self._first + self._nbytes


def attach(path: str, session_id: str, worker: str, tree: trees.TreeSpec, timeout_s: float) -> Segment:
    """A segment from the server whose handover socket is at ``path``, within ``timeout_s``.

    Raises:
      RefusedError: there is none, and why.
    """
    if sys.platform != "linux":
        raise RefusedError(f"shared memory is handed over on Linux, this is {sys.platform}")
    if not path:
        raise RefusedError("the server shares no memory")
    end_s = time.monotonic() + min(timeout_s, _HANDOVER_S)

    def left_s() -> float:
        return max(end_s - time.monotonic(), _MOMENT_S)

    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    files: list[int] = []
    try:
        connection.settimeout(left_s())
        connection.connect(path)
        user = handover.peer_user(connection)
        if user != os.geteuid():
            raise RefusedError(f"the server is of user {user}, this process of user {os.geteuid()}")
        with contextlib.suppress(BrokenPipeError):  # a server that is full refuses before it listens
            handover.send(connection, handover.Request(session_id, worker).to_json(), left_s())
        answer = handover.receive(connection, limits.HANDOVER_REPLY_BYTES_MAX, left_s(), files=files)
        if "refused" in answer:
            why = f"the server refused: {answer['refused']}"[: limits.ERROR_MESSAGE_BYTES_MAX]
            raise RefusedError(why, answer.get("reason", ""), is_said=True)
        grant = handover.Grant.from_json(answer)
        if len(files) != 1:
            raise handover.HandoverError(f"{len(files)} file descriptors, expected one")
        _check(grant, files[0], tree)
        return Segment(connection, grant, mmap.mmap(files[0], grant.nbytes), tree)
    except BaseException as exc:
        connection.close()
        if isinstance(exc, FileNotFoundError | ConnectionRefusedError):
            raise RefusedError(
                f"no socket of the server at {path} here: another host, or a container that does not share its folder"
            ) from exc
        if isinstance(exc, OSError | handover.HandoverError | ValueError):
            raise RefusedError(f"{path}: {exc}") from exc
        raise
    finally:
        for file in files:
            os.close(file)


def wire_view(array: tensors.Array) -> tensors.Array:
    """An array as ``trees.match`` gives it: bf16 as its bits."""
    return array.view(np.uint16) if tensors.is_bf16(array.dtype) else array


def _check(grant: handover.Grant, file: int, tree: trees.TreeSpec) -> None:
    """Raises HandoverError where the segment is not what the tree needs, or could shrink under us."""
    import fcntl  # not at the top: Windows has none

    sealed = fcntl.fcntl(file, fcntl.F_GET_SEALS)
    if not sealed & fcntl.F_SEAL_SHRINK or os.fstat(file).st_size < grant.nbytes:
        raise handover.HandoverError("the segment's size is not sealed, or less than was said")
    if len(grant.offsets) != len(tree.leaves):
        raise handover.HandoverError(
            f"{len(grant.offsets)} offsets, expected one for each of {len(tree.leaves)} leaves"
        )
    end = 0
    for start, leaf in sorted(zip(grant.offsets, tree.leaves, strict=True), key=lambda pair: pair[0]):
        if leaf.nbytes and (start < end or start % tensors.itemsize(leaf.dtype)):
            raise handover.HandoverError(f"leaf {leaf.name!r} overlaps another, or is not aligned")
        end = max(end, start + leaf.nbytes)
    if end > grant.params or grant.params + end > grant.nbytes or grant.params % limits.ALIGNMENT_BYTES:
        raise handover.HandoverError("the leaves reach beyond the segment")


def _views(memory: tensors.Array, offsets: Sequence[int], tree: trees.TreeSpec) -> list[tensors.Array]:
    return [
        memory[start : start + leaf.nbytes].view(tensors.numpy_dtype(leaf.dtype)).reshape(leaf.shape)
        for start, leaf in zip(offsets, tree.leaves, strict=True)
    ]


def _address(array: tensors.Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


class RefusedError(Exception):
    """There is no segment; says why, for people.

    Attributes:
      reason: that of the server's error, where it gave one.
      is_said: whether the server said so.
    """

    def __init__(self, why: str, reason: object = "", *, is_said: bool = False) -> None:
        super().__init__(why)
        self.reason = reason
        self.is_said = is_said
