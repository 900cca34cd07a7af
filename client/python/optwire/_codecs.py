"""What a handle keeps of what codecs leave behind: the residual of its gradients, and its copy of the replica.

Knows neither gRPC nor protobuf. Used under the handle's lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from optwire import _deadlines, _payload
from optwire_proto import codecs, digests, errors, payloads, sessions, tensors, trees

Floats = npt.NDArray[np.float32]


class Encoded(_payload.Outgoing):
    """Gradients of one push as they travel.

    Args:
      arrays: the gradients.
      encoded: what they became; held until the outcome of the push is known, so that a retry has the same bytes.
      left: for each leaf of the session, what the codec left behind; None where it has no gradient, or is not encoded.
      scale: what the gradients were multiplied by, and so what was left behind.
    """

    def __init__(
        self,
        arrays: Sequence[tensors.Array],
        encoded: Sequence[tensors.Array],
        left: Sequence[Floats | None],
        scale: float,
    ) -> None:
        super().__init__(arrays)
        self.length = sum(array.nbytes for array in encoded)
        self.left = left
        self.scale = scale
        self._encoded = encoded

    def views(self) -> Iterator[list[memoryview]]:
        return payloads.views(list(self._encoded))

    def whole(self) -> tuple[bytes, sessions.Digest]:
        return _joined(self)

    def digest(self) -> sessions.Digest:
        """Of the payload."""
        digester = digests.Digester()
        for array in self._encoded:
            digester.update(tensors.wire_bytes(array))
        return digester.digest()


class Cast(_payload.Outgoing):
    """Gradients that are cast as they leave, each time anew.

    Args:
      how: the codec.
      arrays: the gradients.
      leaves: one for each.
    """

    def __init__(self, how: codecs.Codec, arrays: Sequence[tensors.Array], leaves: Sequence[trees.LeafSpec]) -> None:
        super().__init__(arrays)
        self.length = sum(map(how.encoded_bytes, leaves))
        self._codec = how

    def views(self) -> Iterator[list[memoryview]]:
        return codecs.payload_views(self._codec, list(self.arrays))

    def whole(self) -> tuple[bytes, sessions.Digest]:
        return _joined(self)


def _joined(payload: _payload.Outgoing) -> tuple[bytes, sessions.Digest]:
    data = b"".join(map(b"".join, payload.views()))
    return data, digests.digest(data)


@dataclasses.dataclass(frozen=True, slots=True)
class _Pending:
    """A push of unknown outcome; without ``payload`` where there were several under one seq, with other bytes."""

    seq: int
    digest: sessions.Digest | None
    payload: Encoded | None


class Up:
    """How a handle's gradients travel, and their residual: what was left behind, to be added to the next ones.

    The residual changes with the push that it belongs to, and only once that is known to be applied. Until then the
    same gradients make the same bytes, so that a push made again is the same push. One that was refused, or that the
    server skipped for gradients that are not finite, leaves the residual as it was.

    Args:
      how: the codec.
      tree: of the session.
    """

    def __init__(self, how: codecs.Codec, tree: trees.TreeSpec) -> None:
        self.codec = how
        self._leaves = tree.leaves
        self._residuals: list[Floats | None] = [None] * len(tree.leaves)  # None: nothing
        self._scales = [1.0] * len(tree.leaves)  # of the gradients that the residual is of
        self._spare: list[Floats | None] = [None] * len(tree.leaves)  # memory for the next one
        self._pending: _Pending | None = None

    @property
    def residuals(self) -> list[Floats | None]:
        """Of each leaf, flat, in units of a gradient that is not scaled; None: nothing was left behind so far."""
        return [
            None if residual is None else residual / np.float32(scale)
            for residual, scale in zip(self._residuals, self._scales, strict=True)
        ]

    def outgoing(self, arrays: Sequence[tensors.Array | None], scale: float) -> _payload.Outgoing:
        """The payload of a push.

        Args:
          arrays: one for each leaf, as ``trees.match_present`` returns them; read as long as the payload is used.
          scale: what they were multiplied by.
        """
        present = [array for array in arrays if array is not None]
        if self.codec == codecs.RAW:
            return _payload.Outgoing(present)
        if self.codec.casts:
            leaves = [leaf for leaf, array in zip(self._leaves, arrays, strict=True) if array is not None]
            return Cast(self.codec, present, leaves)
        encoded: list[tensors.Array] = []
        left: list[Floats | None] = [None] * len(arrays)
        for index, (leaf, array) in enumerate(zip(self._leaves, arrays, strict=True)):
            if array is None:
                continue
            if not self.codec.bears_on(leaf.dtype):
                encoded.append(array)
                continue
            parts = [np.empty(part.shape, tensors.numpy_dtype(part.dtype)) for part in self.codec.encoded(leaf)]
            behind, self._spare[index] = self._spare[index], None
            behind = left[index] = np.empty(leaf.elements, np.float32) if behind is None else behind
            read = codecs.reader(array.reshape(-1), self._residuals[index], scale / self._scales[index])
            self.codec.encode(leaf.elements, read, parts, behind)
            encoded += parts
        return Encoded(present, encoded, left, scale)

    @contextlib.contextmanager
    def settling(self, seq: int, payload: _payload.Outgoing) -> Iterator[None]:
        """Inside, a push is made; whatever is raised decides about what was left behind of it."""
        try:
            yield
        except BaseException as exc:
            if isinstance(payload, Encoded):
                self._failed(seq, payload, exc)
            raise

    def applied(self, payload: _payload.Outgoing, ack: sessions.Ack) -> None:
        """A push is known to be applied."""
        if isinstance(payload, Encoded):
            self._pending = None
            if ack.metrics.get("skipped"):
                self._discard(payload)
            else:
                self._keep(payload)

    def learned(self, seq: int) -> None:
        """The worker's last applied push is known, whatever became of the answer to it."""
        if self._pending is None or self._pending.seq != seq:
            return
        pending, self._pending = self._pending, None
        if pending.payload is not None:
            self._keep(pending.payload)
        else:  # one of several: what was left behind is given up rather than sent twice
            self.forget()

    def forget(self) -> None:
        """The history that the residual belongs to is none any more."""
        self._residuals = [None] * len(self._leaves)
        self._pending = None

    def _failed(self, seq: int, payload: Encoded, exc: BaseException) -> None:
        pending = self._pending
        if isinstance(exc, errors.OptwireError) and not isinstance(exc, _deadlines.OUTCOME_UNKNOWN):
            self._discard(payload)
            if isinstance(exc, errors.DivergentRetryError) and pending and exc.expected == str(pending.digest):
                self.learned(pending.seq)
            return
        digest = payload.digest()
        if pending is None or pending.seq != seq:
            self._pending = _Pending(seq, digest, payload)
        elif pending.digest != digest:
            self._pending = _Pending(seq, None, None)

    def _keep(self, payload: Encoded) -> None:
        for index, left in enumerate(payload.left):
            if left is not None:
                self._spare[index], self._residuals[index] = self._residuals[index], left
                self._scales[index] = payload.scale

    def _discard(self, payload: Encoded) -> None:
        for index, left in enumerate(payload.left):
            if left is not None:
                self._spare[index] = left


class Downs:
    """Where parameters go that come with replies: a ``Down`` for each set of leaves that replies carry.

    Copies of a replica are kept as the server keeps its parts: of sets that share no leaves, the first to come.

    Attributes:
      codec: of the parameters.

    Args:
      how: the codec.
      tree: of the session.
    """

    def __init__(self, how: codecs.Codec, tree: trees.TreeSpec) -> None:
        self.codec = how
        self._tree = tree
        self._kept: dict[tuple[int, ...], Down] = {}
        self._taken: set[int] = set()  # leaves that are in one of those kept

    def of(self, absent: tuple[int, ...]) -> Down:
        """For replies that carry all leaves but those at some positions."""
        if (kept := self._kept.get(absent)) is not None:
            return kept
        down = Down(self.codec, self._tree.without(absent) if absent else self._tree)
        leaves = set(range(len(self._tree.leaves))).difference(absent)
        if not leaves & self._taken:
            self._taken |= leaves
            self._kept[absent] = down
        return down

    def forget(self) -> None:
        """The history that the copies belong to is none any more."""
        for down in self._kept.values():
            down.forget()


class Down:
    """Where parameters go that come with replies, and a copy of the replica, where those carry differences.

    Attributes:
      codec: of the parameters.
      step: whose replica the copy is; None: there is none, and the next reply must be whole.

    Args:
      how: the codec.
      tree: of the leaves that replies carry.
    """

    def __init__(self, how: codecs.Codec, tree: trees.TreeSpec) -> None:
        self.codec = how
        self.step: int | None = None
        self._tree = tree
        self._arrays: list[tensors.Array] = []

    def receiving(
        self, filled: Sequence[tensors.Array], *, is_params: bool
    ) -> Callable[[sessions.Ack | None], _payload.Incoming]:
        """Where the arrays of a reply go, once its ack is known, or where they come before it (None).

        Args:
          filled: arrays for them, decoded.
          is_params: whether they are parameters; others travel as they are.
        """
        return functools.partial(self._incoming, filled) if is_params else lambda _: _payload.Incoming(filled)

    def _incoming(self, filled: Sequence[tensors.Array], ack: sessions.Ack | None) -> _payload.Incoming:
        """Where parameters go.

        Raises:
          UnavailableError: they are encoded in another way than the session says; or the codec needs the ack.
        """
        if ack is None:
            if self.codec.loses:
                raise _payload.damaged("their first frame", "an ack", "a chunk")
            return _Decoded(self.codec, self._tree, filled) if self.codec.casts else _payload.Incoming(filled)
        if ack.params_codec is codecs.Kind.RAW:
            return _Whole(self, filled, ack.step) if self.codec.loses else _payload.Incoming(filled)
        if ack.params_codec is not self.codec.kind:
            raise _payload.damaged("their codec", self.codec, ack.params_codec.name.lower())
        if self.codec.casts:
            return _Decoded(self.codec, self._tree, filled)
        if self.step is None:
            raise _payload.damaged("what they differ from", "nothing, they being whole", "parameters that are not here")
        return _Difference(self, filled, ack.step)

    def forget(self) -> None:
        """The history that the copy belongs to is none any more."""
        self.step = None

    def take(self, arrays: Sequence[tensors.Array], step: int) -> None:
        """Takes whole parameters."""
        self.step = None
        if not self._arrays:
            self._arrays = _payload.fresh(self._tree)
        for own, array in zip(self._arrays, arrays, strict=True):
            np.copyto(own, array)
        self.step = step

    def encoded(self) -> list[tensors.Array]:
        """New arrays for a difference."""
        parts = [part for leaf in self._tree.leaves for part in self.codec.encoded(leaf)]
        return [np.empty(part.shape, tensors.numpy_dtype(part.dtype)) for part in parts]

    def add(self, difference: Sequence[tensors.Array], filled: Sequence[tensors.Array], step: int) -> None:
        """Adds a difference to the copy, and writes the parameters that come of it to ``filled``.

        Raises:
          UnavailableError: it means no values; the copy is as it was.
        """
        rest, parts_of = iter(difference), []
        for leaf in self._tree.leaves:  # all of it, before anything is added: a part of it would be added twice
            parts = [next(rest) for _ in self.codec.encoded(leaf)]
            parts_of.append(parts)
            if self.codec.bears_on(leaf.dtype):
                try:
                    self.codec.check(parts, leaf.elements, codecs.where("params", leaf))
                except errors.PayloadError as exc:
                    raise _payload.damaged(f"{exc.subject}, a value", exc.expected, exc.got) from exc
        self.step = None
        for leaf, parts, own, array in zip(self._tree.leaves, parts_of, self._arrays, filled, strict=True):
            if self.codec.bears_on(leaf.dtype):
                self.codec.add(parts, own.reshape(-1), codecs.where("params", leaf))
            else:
                np.copyto(own, parts[0])
            np.copyto(array, own)
        self.step = step


class _Whole(_payload.Incoming):
    """Whole parameters, of which a copy is to be kept."""

    def __init__(self, down: Down, filled: Sequence[tensors.Array], step: int) -> None:
        super().__init__(filled)
        self._down = down
        self._step = step

    def finish(self, length: int) -> list[tensors.Array]:
        arrays = super().finish(length)
        self._down.take(arrays, self._step)
        return arrays


class _Difference(_payload.Incoming):
    """A difference, which is added once all of it is there."""

    def __init__(self, down: Down, filled: Sequence[tensors.Array], step: int) -> None:
        super().__init__(down.encoded())
        self._down = down
        self._filled = list(filled)
        self._step = step

    def _tell(self) -> None:
        """Nothing of the parameters is there yet."""

    def finish(self, length: int) -> list[tensors.Array]:
        self._down.add(super().finish(length), self._filled, self._step)
        self._say(sum(array.nbytes for array in self._filled))
        return self._filled


class _Decoded(_payload.Incoming):
    """Parameters that are cast as they come."""

    def __init__(self, how: codecs.Codec, tree: trees.TreeSpec, filled: Sequence[tensors.Array]) -> None:
        super().__init__(filled)
        self._decoder = codecs.Decoder(how, tree.leaves, filled, "params")
        self._length = self._decoder.payload_bytes

    def _take(self, data: bytes | memoryview) -> None:
        self._decoder.write(data)

    def _tell(self) -> None:
        """Offsets are those of the encoded payload."""

    def finish(self, length: int) -> list[tensors.Array]:
        arrays = super().finish(length)
        self._say(sum(array.nbytes for array in arrays))
        return arrays
