"""How pushes of several workers become steps, as data and as text. Standard library only."""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Mapping
from typing import Any, Final

from optwire_proto import errors, limits

_TEXT = re.compile(r"([a-z_]{1,32})(?:\(([^()]{0,400})\))?")
_WHOLE = re.compile(r"0|[1-9][0-9]{0,9}")
_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]{1,3})?|inf")


class Mode(enum.StrEnum):
    """The rule by which pushes become steps.

    SINGLE: every push that fits the newest step is one step. SYNC: one push of each worker together are one step.
    K_OF_N: the first ``k`` of ``workers`` are (backup workers, arXiv:1604.00981). QUORUM: those of all workers that are
    there, from ``k`` to ``workers`` of them; after ``deadline_s`` those that have come, if ``k`` have. ASYNC: every
    push is a step, whatever it was computed on. BOUNDED_STALENESS: so it is up to a staleness of ``staleness_max``
    (SSP, NeurIPS 2013). BUFFERED: every ``k`` pushes, of whomever, are one step (FedBuff, arXiv:2106.06639).
    """

    SINGLE = "single"
    SYNC = "sync"
    K_OF_N = "k_of_n"
    QUORUM = "quorum"
    ASYNC = "async"
    BOUNDED_STALENESS = "bounded_staleness"
    BUFFERED = "buffered"


class Policy(enum.StrEnum):
    """What becomes of a push whose staleness would exceed the bound.

    REJECT: it is refused. WAIT: it never comes to that, as pushes of fast workers wait for the slow ones.
    """

    REJECT = "reject"
    WAIT = "wait"


class Damping(enum.StrEnum):
    """What gradients of staleness s are multiplied by.

    NONE: 1. INVERSE: 1 / (1 + s) (arXiv:1511.05950). SQRT: 1 / sqrt(1 + s) (FedBuff, arXiv:2106.06639).
    """

    NONE = "none"
    INVERSE = "inverse"
    SQRT = "sqrt"

    def factor(self, staleness: int) -> float:
        """What gradients of a staleness, in steps, are multiplied by."""
        if self is Damping.INVERSE:
            return 1.0 / (1.0 + staleness)
        return 1.0 / math.sqrt(1.0 + staleness) if self is Damping.SQRT else 1.0


class Combine(enum.StrEnum):
    """What several pushes of one step become: their mean, weighted by what each says, or their weighted sum."""

    MEAN = "mean"
    SUM = "sum"


LEASE_S: Final = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class Aggregation:
    """How pushes of several workers become steps. As text: "single", "sync(4)", "quorum(2, 8, deadline_s=5)".

    Attributes:
      mode: the rule.
      workers: how many there are at most, in SYNC, K_OF_N and QUORUM; in the first two those of the ids
        ``worker_id(0)`` up to ``worker_id(workers - 1)``. 0 in other modes.
      k: how many pushes close a step, in K_OF_N and BUFFERED; how many at least, in QUORUM. 0 in other modes.
      staleness_max: largest accepted number of steps since those a push was computed on; None: any. Required in
        BOUNDED_STALENESS, possible in BUFFERED.
      policy: what becomes of a push beyond it. WAIT in BOUNDED_STALENESS only.
      damping: what stale gradients are multiplied by, in ASYNC, BOUNDED_STALENESS and BUFFERED.
      combine: what several pushes become.
      deadline_s: how long a step waits for more than ``k`` pushes after its first, in seconds, in QUORUM. 0: for ever.
      lease_s: seconds after which a worker that has joined is lost, unless it was heard of; infinite: never.
      compensation: of delays, in ASYNC and BOUNDED_STALENESS: gradients g become g + compensation * g * g * (newest
        parameters - those it was computed on), elementwise (DC-ASGD, arXiv:1609.08326). 0: none.

    Raises:
      InvalidArgumentError: a value that the mode cannot have.
    """

    mode: Mode = Mode.SINGLE
    workers: int = 0
    k: int = 0
    staleness_max: int | None = None
    policy: Policy = Policy.REJECT
    damping: Damping = Damping.NONE
    combine: Combine = Combine.MEAN
    deadline_s: float = 0.0
    lease_s: float = 0.0
    compensation: float = 0.0

    def __post_init__(self) -> None:
        if self.lease_s == 0 and self.mode is not Mode.SINGLE:
            object.__setattr__(self, "lease_s", LEASE_S)
        for name, modes in _CHOICES.items():
            value = getattr(self, name)
            if value is not _DEFAULTS[name] and self.mode not in modes:
                raise errors.InvalidArgumentError(
                    f"aggregation.{name}: {value}, expected {_DEFAULTS[name]} in mode {self.mode}",
                    subject=f"aggregation.{name}",
                    expected=str(_DEFAULTS[name]),
                    got=str(value),
                )
        for name, (least, most) in self._bounds().items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                expected = f"{least:g} to {most:g}" if most > least else f"{least:g}" if least < math.inf else "none"
                raise errors.InvalidArgumentError(
                    f"aggregation.{name}: {value}, expected {expected} in mode {self.mode}",
                    subject=f"aggregation.{name}",
                    expected=expected,
                    got=str(value),
                )

    def _bounds(self) -> Mapping[str, tuple[float, float]]:
        mode, most = self.mode, limits.WORKERS_MAX
        counted = mode in (Mode.SYNC, Mode.K_OF_N, Mode.QUORUM)
        found: dict[str, tuple[float, float]] = {"workers": (1, most) if counted else (0, 0)}
        if mode in (Mode.K_OF_N, Mode.QUORUM):
            found["k"] = (1, self.workers)
        else:
            found["k"] = (1, most) if mode is Mode.BUFFERED else (0, 0)
        if mode is Mode.BOUNDED_STALENESS or self.staleness_max is not None:
            found["staleness_max"] = (0, limits.STEP_MAX)
        found["deadline_s"] = (0, limits.LEASE_S_MAX) if mode is Mode.QUORUM else (0, 0)
        found["lease_s"] = (0, 0) if mode is Mode.SINGLE else (limits.LEASE_S_MIN, math.inf)
        found["compensation"] = (0, 1e6) if mode in (Mode.ASYNC, Mode.BOUNDED_STALENESS) else (0, 0)
        return found

    def __str__(self) -> str:
        shown = [str(getattr(self, name)) for name in _POSITIONAL[self.mode]]
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if name in _POSITIONAL[self.mode] or value == (LEASE_S if name == "lease_s" and value else default):
                continue
            shown.append(f"{name}={repr(value).removesuffix('.0')}" if isinstance(value, float) else f"{name}={value}")
        return f"{self.mode}({', '.join(shown)})" if shown else str(self.mode)

    @property
    def gathers(self) -> bool:
        """Whether pushes wait for those of others, to be one step together."""
        return self.mode in (Mode.SYNC, Mode.K_OF_N, Mode.QUORUM)

    @property
    def waits(self) -> bool:
        """Whether a push may have to wait: for others of its step, or for slow workers."""
        return self.gathers or self.policy is Policy.WAIT

    @property
    def is_ranked(self) -> bool:
        """Whether its workers are ranks, known from the beginning."""
        return self.mode in (Mode.SYNC, Mode.K_OF_N)

    @property
    def takes_stale(self) -> bool:
        """Whether gradients may be of an older step than the newest."""
        return self.mode in (Mode.ASYNC, Mode.BOUNDED_STALENESS, Mode.BUFFERED)

    @property
    def kept_max(self) -> int:
        """Most payloads that wait at a time, or are summed into one that does."""
        if self.mode is Mode.K_OF_N:
            return self.k
        if self.policy is Policy.WAIT and self.staleness_max is not None:
            return min(self.staleness_max, limits.WORKERS_MAX)  # of one worker more, one can always be applied
        return self.workers or min(self.k, 1)

    def includes(self, worker: str) -> bool:
        """Whether the worker of an id may push."""
        return not self.is_ranked or int(worker, 16) < self.workers


_POSITIONAL: Final[Mapping[Mode, tuple[str, ...]]] = {
    Mode.SINGLE: (),
    Mode.SYNC: ("workers",),
    Mode.K_OF_N: ("k", "workers"),
    Mode.QUORUM: ("k", "workers"),
    Mode.ASYNC: (),
    Mode.BOUNDED_STALENESS: ("staleness_max",),
    Mode.BUFFERED: ("k",),
}
_DEFAULTS: Final[Mapping[str, Any]] = {
    field.name: field.default for field in dataclasses.fields(Aggregation) if field.name != "mode"
}
# Modes in which a choice may be another one than its default.
_CHOICES: Final[Mapping[str, frozenset[Mode]]] = {
    "staleness_max": frozenset({Mode.BOUNDED_STALENESS, Mode.BUFFERED}),
    "policy": frozenset({Mode.BOUNDED_STALENESS}),
    "damping": frozenset({Mode.ASYNC, Mode.BOUNDED_STALENESS, Mode.BUFFERED}),
    "combine": frozenset(Mode) - {Mode.SINGLE},
}
_KINDS: Final[Mapping[str, type[enum.StrEnum]]] = {"policy": Policy, "damping": Damping, "combine": Combine}
_WHOLES: Final = frozenset({"workers", "k", "staleness_max"})

SINGLE: Final = Aggregation()


def parse(text: object) -> Aggregation:
    """The aggregation that a text means: a mode and its arguments, such as "sync(4)", or ``k_of_n(3, 4, lease_s=10)``.

    ``policy=scale`` is short for ``policy=reject, damping=inverse``.

    Raises:
      InvalidArgumentError: it means none, or one that cannot be.
    """
    found = _TEXT.fullmatch(text) if isinstance(text, str) else None
    mode = next((mode for mode in Mode if found and mode == found[1]), None)
    if found is None or mode is None:
        raise _unknown(text)
    values: dict[str, Any] = {}
    names = iter(_POSITIONAL[mode])
    for part in (found[2] or "").split(",") if (found[2] or "").strip() else ():
        name, equals, value = part.partition("=")
        name, value = (name.strip(), value.strip()) if equals else (next(names, ""), part.strip())
        if name in values or (equals and name not in _DEFAULTS) or (not equals and (not name or len(values) > 2)):
            raise _unknown(text)
        if name == "policy" and value == "scale":
            if "damping" in values:
                raise _unknown(text)
            values |= {"policy": Policy.REJECT, "damping": Damping.INVERSE}
            continue
        values[name] = _value(name, value, text)
    if any(name not in values for name in _POSITIONAL[mode]):
        raise _unknown(text)
    return Aggregation(mode, **values)


def _value(name: str, text: str, whole: object) -> Any:
    if name in _KINDS:
        return next((choice for choice in _KINDS[name] if choice == text), None) or _refuse(whole)
    if name in _WHOLES:
        return int(text) if _WHOLE.fullmatch(text) else _refuse(whole)
    return float(text) if _NUMBER.fullmatch(text) else _refuse(whole)


def _refuse(text: object) -> Any:
    raise _unknown(text)


def _unknown(text: object) -> errors.InvalidArgumentError:
    expected = (
        "'single', 'sync(N)', 'k_of_n(K, N)', 'quorum(MIN, MAX, deadline_s=S)', 'async', "
        "'bounded_staleness(S, policy=reject)' or 'buffered(K)'"
    )
    got = repr(text[:80] if isinstance(text, str) else text)[:82]
    return errors.InvalidArgumentError(
        f"aggregation {got}: expected {expected}", subject="aggregation", expected=expected, got=got
    )
