"""What each mode of aggregation should do, said as plainly as possible: the reference that the machine must match.

Written from the description of the modes and not from the machine: state is a few dicts that are changed in place, what
may be applied is searched for by brute force, and nothing is kept that can be worked out. For a few workers only.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math

from optwire_proto import aggregations, errors, limits

Kind = type[errors.OptwireError]


class RefusedError(Exception):
    """An event that is refused, with the error that says so."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind.__name__)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Push:
    """A push as its worker makes it; ``data`` stands for its bytes."""

    worker: int
    seq: int
    base: int
    data: int
    epoch: int = 0
    weight: float = 1.0

    @property
    def identity(self) -> tuple[int, int, int, int, float]:
        """What is the same in a retry."""
        return self.worker, self.seq, self.base, self.data, self.weight


@dataclasses.dataclass
class Worker:
    """What the server knows of a worker."""

    state: str = "live"
    epoch: int = 0
    key: int = -1
    base: int = 0
    heard: float = 0.0


@dataclasses.dataclass
class Counted:
    """The last push of a worker that counts, and the step it is part of."""

    push: Push
    step: int


# What happened: ("step", shares) with (push, what it is multiplied by), in the order of summation; ("held", worker);
# ("told", worker, seq, step) or ("told", worker, error).
Happening = tuple[object, ...]


class Simulator(abc.ABC):
    """One session. Each method is an event; it gives what happened, or raises RefusedError and changes nothing."""

    def __init__(self, aggregation: aggregations.Aggregation, endings: list[str]) -> None:
        self.rule = aggregation
        self.endings = endings  # how the updates to come end, the next one last; none left: they are applied
        self.most = limits.WORKERS_MAX  # workers, and last pushes of workers, that are known at a time
        self.forgotten_step = self.forgotten_epoch = 0  # the highest of those that were forgotten
        self.step = 0
        self.incarnation = 1
        self.ended = ""
        self.workers: dict[int, Worker] = {}
        self.counted: dict[int, Counted] = {}
        self.waiting: dict[int, Push] = {}  # in the order of arrival
        self.first_at = 0.0  # when the first one that waits came
        self.sum: list[tuple[Push, float]] = []
        self.log: list[list[Push]] = []  # whose pushes each step is of
        self.staleness: list[int] = []  # of all that was applied

    # ---------------------------------------------------------------------------------------------- the modes' rules

    def may_come(self, worker: int) -> bool:
        """Whether there may be such a worker."""
        return True

    def places(self) -> float:
        """How many workers may be there at a time."""
        return math.inf

    @abc.abstractmethod
    def check_base(self, push: Push) -> None:
        """Refuses gradients that are too old."""

    @abc.abstractmethod
    def ready(self, now: float) -> list[int]:
        """Whose waiting pushes are to be one step now; none: nothing is."""

    def awaited(self) -> set[int]:
        """Whom those who wait wait for."""
        return set()

    def shares(self, pushes: list[Push]) -> list[tuple[Push, float]]:
        """What each push of a step is multiplied by."""
        whole = sum(push.weight for push in pushes) if self.rule.combine == "mean" else 1.0
        return [(push, push.weight * self.damped(push) / whole) for push in pushes]

    # ----------------------------------------------------------------------------------------------------- what helps

    def damped(self, push: Push) -> float:
        late = self.step - push.base
        return {"none": 1.0, "inverse": 1 / (1 + late), "sqrt": (1 + late) ** -0.5}[self.rule.damping]

    def live(self) -> set[int]:
        return {name for name, worker in self.workers.items() if worker.state == "live"}

    def alive(self) -> None:
        if self.ended:
            raise RefusedError(
                {"failed": errors.SessionFailedError, "deleted": errors.SessionNotFoundError}[self.ended]
            )

    def known(self, worker: int, epoch: int) -> None:
        """Refuses a process that another one has replaced, that has left, or that never joined as it says."""
        found = self.workers.get(worker)
        if epoch != (found.epoch if found else 0) or (found and found.state == "left" and epoch > 0):
            raise RefusedError(errors.ReplacedError)

    def has_room(self, worker: int) -> bool:
        there = self.live() | set(self.waiting)
        return worker in there or len(there) < self.places()

    def admitted(self, worker: int) -> None:
        if not self.has_room(worker):
            raise RefusedError(errors.LimitError)

    def put(self, name: int, worker: Worker) -> None:
        """Notes a worker as the last one heard of; where there are too many, one is forgotten that is missed least."""
        self.workers.pop(name, None)
        self.workers[name] = worker
        if len(self.workers) > self.most:
            ranks = {"left": 0, "lost": 2, "live": 4}
            least = min(ranks[one.state] + (one.epoch > 0) for one in self.workers.values())
            gone = next(n for n, one in self.workers.items() if ranks[one.state] + (one.epoch > 0) == least)
            self.forgotten_epoch = max(self.forgotten_epoch, self.workers.pop(gone).epoch)

    # ------------------------------------------------------------------------------------------------------- events

    def push(self, push: Push, now: float, incarnation: int) -> list[Happening]:
        self.alive()
        if incarnation != self.incarnation:
            raise RefusedError(errors.IncarnationError)
        if not self.may_come(push.worker):
            raise RefusedError(errors.InvalidArgumentError)
        self.known(push.worker, push.epoch)
        last = self.counted.get(push.worker)
        if last and push.seq < last.push.seq:
            raise RefusedError(errors.StalePushError)
        if last and push.seq > last.push.seq + 1:
            raise RefusedError(errors.FuturePushError)
        if last and push.seq == last.push.seq:
            return self.again(last, push)
        self.admitted(push.worker)
        if push.base > self.step:
            raise RefusedError(errors.FutureStepError)
        if self.rule.takes_stale and last is None and push.base < self.forgotten_step:
            raise RefusedError(errors.StaleStepError)
        self.check_base(push)
        return self.take(push, now)

    def again(self, last: Counted, push: Push) -> list[Happening]:
        if (last.push.data, last.push.weight) == (push.data, push.weight):
            return [("told", push.worker, push.seq, last.step)]
        if push.epoch > last.push.epoch:
            raise RefusedError(errors.StepClosedError if self.rule.gathers else errors.StaleStepError)
        raise RefusedError(errors.DivergentRetryError)

    def take(self, push: Push, now: float) -> list[Happening]:
        """A push that fits waits, until it is its turn: perhaps at once."""
        happened: list[Happening] = []
        if not self.waiting:
            self.first_at = now
        before = self.waiting.get(push.worker)
        if before and before.identity != push.identity:
            del self.waiting[push.worker]
            happened.append(("told", push.worker, errors.StalePushError))
        self.waiting[push.worker] = push
        self.heard(push.worker, now, push)
        return happened + self.go_on(now)

    def heard(self, name: int, now: float, push: Push | None = None) -> None:
        worker = self.workers.get(name, Worker())
        if push is not None:
            worker.base = max(worker.base, push.base)
        worker.state, worker.heard = "live", max(worker.heard, now)
        self.put(name, worker)

    def join(self, name: int, key: int, now: float) -> list[Happening]:
        self.alive()
        if not self.may_come(name):
            raise RefusedError(errors.InvalidArgumentError)
        found = self.workers.get(name)
        if found and found.key == key:
            return self.beat(name, found.epoch, now)
        self.admitted(name)
        if len([other for other in self.live() - {name} if self.workers[other].epoch]) >= self.most:
            raise RefusedError(errors.LimitError)
        epoch = max(found.epoch if found else 0, self.forgotten_epoch) + 1
        self.put(name, Worker("live", epoch, key, self.step, now))
        return self.replaced(name) + self.go_on(now)

    def replaced(self, name: int) -> list[Happening]:
        """What becomes of a push that waits, of a process whose place another one takes."""
        return []

    def beat(self, name: int, epoch: int, now: float) -> list[Happening]:
        self.alive()
        if not self.may_come(name):
            raise RefusedError(errors.InvalidArgumentError)
        self.known(name, epoch)
        if name not in self.workers:
            raise RefusedError(errors.ReplacedError)
        self.admitted(name)
        self.returned(name)
        self.heard(name, now)
        return self.go_on(now)

    def returned(self, name: int) -> None:  # noqa: B027  only modes with a bound look
        """A worker that may have been lost is heard of."""

    def leave(self, name: int, epoch: int, now: float) -> list[Happening]:
        self.alive()
        if not self.may_come(name):
            raise RefusedError(errors.InvalidArgumentError)
        found = self.workers.get(name)
        if not (found and found.state == "left" and found.epoch == epoch):
            self.known(name, epoch)
        if found or self.rule.is_ranked:
            worker = found or Worker()
            worker.state, worker.heard = "left", max(worker.heard, now)
            self.put(name, worker)
        return self.go_on(now)

    def read(self, name: int, epoch: int, now: float) -> list[Happening]:
        self.alive()
        found = self.workers.get(name)
        if found and found.epoch == epoch and found.state != "left" and self.has_room(name):
            self.returned(name)
            self.heard(name, now)
            self.workers[name].base = self.step
        return self.go_on(now)

    def tick(self, now: float) -> list[Happening]:
        for name in self.live():
            worker = self.workers[name]
            if worker.epoch and worker.heard + self.rule.lease_s <= now:
                worker.state = "lost"
        return [] if self.ended else self.go_on(now)

    def load(self, step: int) -> list[Happening]:
        self.alive()
        gone, self.waiting = self.waiting, {}
        self.step, self.sum, self.counted, self.forgotten_step = step, [], {}, 0
        self.incarnation += 1
        for worker in self.workers.values():
            worker.base = step
        return [("told", name, errors.IncarnationError) for name in gone]

    def delete(self) -> list[Happening]:
        if self.ended == "deleted":
            raise RefusedError(errors.SessionNotFoundError)
        gone, self.waiting, self.ended = self.waiting, {}, "deleted"
        self.sum = []
        return [("told", name, errors.SessionNotFoundError) for name in gone]

    # ------------------------------------------------------------------------------------------------------- updates

    def go_on(self, now: float) -> list[Happening]:
        """Makes steps as long as any can be made; says who waits still."""
        happened: list[Happening] = []
        while not self.ended and (names := self.ready(now)):
            happened += self.make(self.shares([self.waiting[name] for name in sorted(names)]))
        return happened

    def make(self, shares: list[tuple[Push, float]]) -> list[Happening]:
        """One update."""
        mine = [push for push, _ in shares if self.waiting.get(push.worker) is push]
        ending = self.endings.pop() if self.endings else "updated"
        happened: list[Happening] = [("step", tuple(shares))]
        for push in mine:
            del self.waiting[push.worker]
        self.sum = []
        if ending == "lost":
            self.ended = "failed"
            mine, self.waiting = [*mine, *self.waiting.values()], {}
        if ending != "updated":
            kind = {"refused": errors.NonFiniteError, "broken": errors.InternalError, "lost": errors.SessionFailedError}
            return happened + [("told", push.worker, kind[ending]) for push in mine]
        self.staleness += [self.step - push.base for push, _ in shares]
        self.log.append([push for push, _ in shares])
        self.step += 1
        return happened + [self.count(push, self.step) for push in mine]

    def count(self, push: Push, step: int) -> Happening:
        self.counted.pop(push.worker, None)
        if len(self.counted) >= self.most:
            self.forgotten_step = max(self.forgotten_step, self.counted.pop(next(iter(self.counted))).step)
        self.counted[push.worker] = Counted(push, step)
        if push.worker in self.live():
            self.workers[push.worker].base = self.step
        return "told", push.worker, push.seq, step


class Single(Simulator):
    """Every push on the newest step is one."""

    def check_base(self, push: Push) -> None:
        if push.base < self.step:
            raise RefusedError(errors.StaleStepError)

    def ready(self, now: float) -> list[int]:
        return list(self.waiting)[:1]

    def heard(self, name: int, now: float, push: Push | None = None) -> None:
        if name in self.workers:
            super().heard(name, now, push)

    def tick(self, now: float) -> list[Happening]:
        return []  # there are no leases

    def shares(self, pushes: list[Push]) -> list[tuple[Push, float]]:
        return [(push, 1.0) for push in pushes]


class Gathering(Simulator):
    """Pushes on the newest step wait for each other."""

    def check_base(self, push: Push) -> None:
        if push.base < self.step:
            raise RefusedError(errors.StepClosedError)


class Ranked(Gathering):
    """Of ranks, each of which is awaited unless it is lost or has left: the first k of them, or all."""

    def may_come(self, worker: int) -> bool:
        return worker < self.rule.workers

    def awaited(self) -> set[int]:
        gone = {name for name, worker in self.workers.items() if worker.state != "live"}
        return set(range(self.rule.workers)) - gone - set(self.waiting)

    def ready(self, now: float) -> list[int]:
        enough = len(self.waiting) >= (self.rule.k or self.rule.workers)
        return list(self.waiting) if self.waiting and (enough or not self.awaited()) else []


class Quorum(Gathering):
    """Of whoever is there, all; after a while, those that have come, if they are enough."""

    def places(self) -> float:
        return self.rule.workers

    def awaited(self) -> set[int]:
        return self.live() - set(self.waiting)

    def ready(self, now: float) -> list[int]:
        if len(self.waiting) < self.rule.k:
            return []
        is_over = self.rule.deadline_s > 0 and now >= self.first_at + self.rule.deadline_s
        return list(self.waiting) if is_over or not self.awaited() else []


class Asynchronous(Simulator):
    """Every push is a step, up to a bound of staleness if there is one."""

    def check_base(self, push: Push) -> None:
        if self.rule.staleness_max is not None and self.step - push.base > self.rule.staleness_max:
            raise RefusedError(errors.StaleStepError)

    def ready(self, now: float) -> list[int]:
        return list(self.waiting)[:1]

    def shares(self, pushes: list[Push]) -> list[tuple[Push, float]]:
        (push,) = pushes
        return [(push, self.damped(push) * (push.weight if self.rule.combine == "sum" else 1.0))]


class Pacing(Asynchronous):
    """Fast workers wait for slow ones, so that the bound can be kept by everybody."""

    def places(self) -> float:
        return self.bound + 1

    @property
    def bound(self) -> int:
        assert self.rule.staleness_max is not None
        return self.rule.staleness_max

    def bases(self) -> dict[int, int]:
        bases = {name: self.workers[name].base for name in self.live()}
        return {**bases, **{name: push.base for name, push in self.waiting.items()}}

    def can_all(self, bases: list[int], step: int) -> bool:
        """Whether there is an order in which pushes can be applied one after another, none of them too late."""
        return any(
            all(step + turn - base <= self.bound for turn, base in enumerate(order))
            for order in itertools.permutations(bases)
        )

    def check_base(self, push: Push) -> None:
        super().check_base(push)
        if not self.can_all(list({**self.bases(), push.worker: push.base}.values()), self.step):
            raise RefusedError(errors.StaleStepError)

    def ready(self, now: float) -> list[int]:
        for name in self.waiting:
            others = [base for other, base in self.bases().items() if other != name]
            if self.can_all(others, self.step + 1):
                return [name]
        return []

    def awaited(self) -> set[int]:
        bases = {name: base for name, base in self.bases().items() if name not in self.waiting}
        return {name for name, base in bases.items() if base == min(bases.values())} if self.waiting else set()

    def replaced(self, name: int) -> list[Happening]:
        push = self.waiting.get(name)
        if push is None or push.epoch == self.workers[name].epoch:
            return []
        del self.waiting[name]
        return [("told", name, errors.StalePushError)]

    def returned(self, name: int) -> None:
        worker = self.workers[name]
        if worker.state != "live" and not self.can_all(list({**self.bases(), name: worker.base}.values()), self.step):
            worker.base = self.step


class Buffered(Simulator):
    """Pushes are added to a sum as they come; every k of them are a step."""

    def check_base(self, push: Push) -> None:
        if self.rule.staleness_max is not None and self.step - push.base > self.rule.staleness_max:
            raise RefusedError(errors.StaleStepError)

    def ready(self, now: float) -> list[int]:
        return list(self.waiting)[:1]

    def go_on(self, now: float) -> list[Happening]:
        if not self.waiting:
            return []
        (push,) = self.waiting.values()
        if len(self.sum) + 1 == self.rule.k:
            return self.make(self.weighted([*self.sum, (push, self.damped(push) * push.weight)]))
        del self.waiting[push.worker]
        self.sum.append((push, self.damped(push) * push.weight))
        return [("added", push, self.sum[-1][1]), self.count(push, self.step + 1)]

    def weighted(self, factors: list[tuple[Push, float]]) -> list[tuple[Push, float]]:
        whole = sum(push.weight for push, _ in factors) if self.rule.combine == "mean" else 1.0
        return [(push, factor / whole) for push, factor in factors]


MODES: dict[aggregations.Mode, type[Simulator]] = {
    aggregations.Mode.SINGLE: Single,
    aggregations.Mode.SYNC: Ranked,
    aggregations.Mode.K_OF_N: Ranked,
    aggregations.Mode.QUORUM: Quorum,
    aggregations.Mode.ASYNC: Asynchronous,
    aggregations.Mode.BOUNDED_STALENESS: Asynchronous,
    aggregations.Mode.BUFFERED: Buffered,
}


def simulator(aggregation: aggregations.Aggregation, endings: list[str]) -> Simulator:
    """The reference of a mode."""
    kind = Pacing if aggregation.policy is aggregations.Policy.WAIT else MODES[aggregation.mode]
    return kind(aggregation, endings)
