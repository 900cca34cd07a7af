"""Random histories of workers, in every mode of aggregation: the machine does what a plain simulator of the mode does.

Pushes that fit, come twice, late, too early or from a process that was replaced; joins, heartbeats, departures, deaths,
time that passes, loads, updates that fail. And at the end of each history: nobody is stuck.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import time
from collections.abc import Callable, Iterable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.server import simulators
from tests.server.simulators import Happening, Push

from optwire_proto import aggregations, digests, errors, limits, sessions
from optwire_server.session import effects, events, machine, members

ID = "0" * 32
WORKERS = 4
LEASE_S = 10.0
MODES = [
    "single",
    "sync(3, lease_s=10)",
    "sync(3, lease_s=10, combine=sum)",
    "k_of_n(2, 4, lease_s=10)",
    "quorum(1, 3, lease_s=10)",
    "quorum(2, 4, deadline_s=4, lease_s=10)",
    "async(lease_s=10)",
    "async(damping=inverse, combine=sum, lease_s=10)",
    "bounded_staleness(1, lease_s=10)",
    "bounded_staleness(3, damping=sqrt, lease_s=10)",
    "bounded_staleness(0, policy=wait, lease_s=10)",
    "bounded_staleness(2, policy=wait, lease_s=10)",
    "bounded_staleness(3, policy=wait, damping=sqrt, lease_s=10)",
    "buffered(1, lease_s=10)",
    "buffered(3, damping=inverse, lease_s=10)",
    "buffered(2, staleness_max=2, combine=sum, lease_s=10)",
]
# What happens, as often as it is named. Of a push: how its base, seq or process is.
PUSHES = (
    ["fits"] * 12 + ["newest"] * 6 + ["again"] * 3 + ["older", "skips", "too early", "too late", "replaced", "other"]
)
KINDS = PUSHES + ["join"] * 5 + ["join again", "beat", "beat", "read", "read", "leave", "load", "tick", "tick", "tick"]
ENDINGS = ["updated"] * 40 + ["refused", "broken"] * 2 + ["refused", "broken", "lost"]
# (what, worker, a small number, seconds that have passed, how an update ends)
Move = tuple[str, int, int, int, str]
MOVE = st.tuples(
    st.sampled_from(KINDS),
    st.integers(0, WORKERS - 1),
    st.integers(0, 3),
    st.sampled_from([0, 0, 0, 0, 1, 3, 11]),
    st.sampled_from(ENDINGS),
)


@functools.cache
def digest(data: int) -> sessions.Digest:
    return digests.digest(bytes([data]))


@dataclasses.dataclass
class Process:
    """What the newest process of a worker knows."""

    epoch: int = 0
    key: int = -1
    base: int = 0
    last: Push | None = None


class World:
    """Machine, simulator, and the workers' side of it."""

    def __init__(self, aggregation: aggregations.Aggregation) -> None:
        self.endings: list[str] = []
        self.simulator = simulators.simulator(aggregation, self.endings)
        self.session = machine.Session(id=ID, name="s", aggregation=aggregation)
        self.processes = [Process() for _ in range(WORKERS)]
        self.now = 0.0
        self.pushes: dict[tuple[int, int], Push] = {}  # by worker and seq, the last that was made
        self.loads = 0
        self.kept: dict[int, Push] = {}  # payloads that wait, by worker
        self.calls: dict[int, int] = {}  # how many calls wait for what becomes of them
        self.steps: list[list[Push]] = []  # whose gradients the machine had applied
        self.sum: list[Push] = []
        self.given_up: list[Push] = []  # what was in sums whose updates were not made, as documented
        self.replied: list[Push] = []

    def move(self, what: str, name: int, number: int, passed: int, ending: str) -> None:
        """One event, to both; what comes of it must be the same."""
        self.now += passed
        self.endings[:] = [ending]
        if what in PUSHES:
            self.push(self.made(what, name, number))
        elif what in ("join", "join again"):
            self.join(name, is_new=what == "join")
        elif what in ("beat", "leave"):
            kind = events.Beat if what == "beat" else events.Left
            epoch = max(self.processes[name].epoch - (number == 3), 0)
            call = getattr(self.simulator, what)
            self.both(lambda: call(name, epoch, self.now), kind(sessions.worker_id(name), epoch, self.now))
        elif what == "read":
            epoch = max(self.processes[name].epoch - (number == 3), 0)
            event = events.Read(sessions.worker_id(name), epoch, self.now)
            self.both(lambda: self.simulator.read(name, epoch, self.now), event)
            self.processes[name].base = self.simulator.step
        elif what == "tick":
            self.both(lambda: self.simulator.tick(self.now), events.Ticked(self.now))
        elif what == "load" and number == 0:
            self.loads += 1
            event = events.Loaded(self.simulator.incarnation, f"{self.loads:032x}", step=self.simulator.step + passed)
            self.both(lambda: self.simulator.load(self.simulator.step + passed), event)

    def made(self, what: str, name: int, number: int) -> Push:
        process, step = self.processes[name], self.simulator.step
        if what == "again" and process.last is not None:
            return dataclasses.replace(process.last, epoch=process.epoch)
        counted = self.simulator.counted.get(name)
        last = counted.push.seq if counted else 0
        base, seq, epoch, data = process.base, last + 1, process.epoch, number
        match what:
            case "newest":
                base = step
            case "older":
                seq = max(last - 1, 1)
            case "skips":
                seq = last + 2
            case "too early":
                base = step + 1
            case "too late":
                base = max(step - number - 1, 0)
            case "replaced":
                epoch = max(epoch - 1, 0)
            case "other":
                seq, data = max(last, 1), number + 4
        return Push(name, seq, base, data, epoch, 1.0 if number < 3 else 2.5)

    def push(self, push: Push) -> None:
        key = sessions.PushKey(
            session_id=ID,
            incarnation=self.simulator.incarnation,
            worker=sessions.worker_id(push.worker),
            seq=push.seq,
            base_step=push.base,
            epoch=push.epoch,
        )
        self.pushes[push.worker, push.seq] = push
        self.processes[push.worker].last = push
        event = events.Pushed(key, digest(push.data), sessions.PushOptions(weight=push.weight), self.now)
        self.both(lambda: self.simulator.push(push, self.now, self.simulator.incarnation), event)

    def join(self, name: int, *, is_new: bool) -> None:
        process = self.processes[name]
        key = process.key + 1 if is_new or process.key < 0 else process.key
        event = events.Joined(sessions.worker_id(name), f"{name:016x}{key:016x}", self.now)
        if self.both(lambda: self.simulator.join(name, key, self.now), event):
            self.processes[name] = Process(self.simulator.workers[name].epoch, key, self.simulator.step)

    def both(self, simulated: Callable[[], list[Happening]], event: events.Event) -> bool:
        """Whether an event was taken, by both or by neither."""
        endings, before = list(self.endings), self.session
        expected, refusal = heard(simulated)
        if refusal is not None:
            assert refused(before, event) is refusal, f"{event}, expected {refusal.__name__}"
            return False
        happened = self.advanced(event, endings)
        assert matches(happened, expected), f"{event} in {before}:\n{happened}, expected\n{expected}"
        self.compare()
        for happening in happened:
            if happening[0] == "told" and len(happening) == 4:  # a reply
                self.processes[happening[1]].base = self.simulator.step  # type: ignore[call-overload]
        return True

    def advanced(self, event: events.Event, endings: list[str]) -> list[Happening]:
        """What the machine makes of an event, with the updates that follow from it."""
        before = self.session
        self.session, todo = machine.advance(before, event)
        happened: list[Happening] = []
        mine = plain(event) if isinstance(event, events.Pushed) else None
        worker = mine.worker if mine else -1
        while todo:
            effect, *rest = todo
            follows: Iterable[effects.Effect] = ()
            match effect:
                case effects.Apply():
                    happened.append(("step", shares(self.session, effect)))
                    ending = ended(endings.pop() if endings else "")
                    self.applied(effect, mine, is_made=isinstance(ending, events.Updated))
                    self.session, follows = machine.advance(self.session, ending)
                case effects.Add():
                    pushed = self.session.pending
                    assert pushed is not None
                    happened.append(("added", plain(pushed), effect.factor))
                    assert effect.is_first == (not self.session.buffered)
                    self.sum = [*([] if effect.is_first else self.sum), plain(pushed)]
                    self.session, follows = machine.advance(self.session, events.Added(0.5))
                case effects.Reply():
                    assert mine is not None
                    happened.append(("told", worker, effect.seq, effect.applied_step))
                    self.replied += [] if effect.duplicate else [mine]
                case effects.Fail():
                    happened.append(("told", worker, type(effect.error)))
                case effects.Answer(answered, outcome):
                    happened.append(self.answered(int(answered, 16), outcome))
                case effects.Hold():
                    assert mine is not None
                    assert self.kept.get(worker, mine).identity == mine.identity, "nobody heard of another push"
                    self.kept[worker] = mine
                    self.calls[worker] = self.calls.get(worker, 0) + 1
            todo = (*rest, *follows)
        if isinstance(event, events.Loaded) and self.session is not before:
            self.given_up, self.sum = [*self.given_up, *self.sum], []
        assert {sessions.worker_id(name) for name in self.calls} == set(self.session.gathered), "a call is forgotten"
        return happened

    def answered(self, worker: int, outcome: effects.Reply | effects.Fail) -> Happening:
        """All calls that wait for what becomes of a worker's push are told."""
        assert self.calls.pop(worker, 0) > 0, "nobody waits"
        push = self.kept.pop(worker)
        if isinstance(outcome, effects.Fail):
            return "told", worker, type(outcome.error)
        self.replied.append(push)
        return "told", worker, outcome.seq, outcome.applied_step

    def applied(self, apply: effects.Apply, mine: Push | None, *, is_made: bool) -> None:
        """An update, with the payloads that the engine would take: those kept, and that of the push just made."""
        pending = self.session.pending
        assert pending is None or plain(pending) == mine
        assert apply.workers or pending is not None, "an update of nobody's"
        taken = [mine] if mine and pending and not apply.workers else []
        for name in (int(worker, 16) for worker in apply.workers):
            is_mine = pending is not None and mine is not None and name == mine.worker
            taken.append(mine if mine and is_mine else self.kept[name])
            meant = pending if is_mine else self.session.gathered[sessions.worker_id(name)]
            assert meant is not None
            assert taken[-1] == plain(meant), "the payload of another push"
        summed, self.sum = (self.sum, []) if apply.completes_sum else ([], self.sum)
        if is_made:
            self.steps.append([*summed, *taken])
        else:
            self.given_up += summed

    def compare(self) -> None:
        """Both are in the same state, as far as anybody can see."""
        session, plain_one = self.session, self.simulator
        assert (session.step, session.incarnation) == (plain_one.step, plain_one.incarnation)
        assert [int(worker, 16) for worker in session.gathered] == list(plain_one.waiting)
        assert len(session.buffered) == len(plain_one.sum)
        assert {int(worker, 16): (last.seq, last.step) for worker, last in session.workers.items()} == {
            worker: (last.push.seq, last.step) for worker, last in plain_one.counted.items()
        }
        assert {
            int(worker, 16): (str(member.state), member.epoch, member.base_step, member.heard_s)
            for worker, member in session.members.items()
        } == {name: (one.state, one.epoch, one.base, one.heard) for name, one in plain_one.workers.items()}
        assert {int(worker, 16) for worker in members.awaited(session)} == plain_one.awaited()
        assert session.phase is not machine.Phase.APPLYING

    def check(self) -> None:
        """What must be so after any history: no push counts twice, and none was too late."""
        bound = self.simulator.rule.staleness_max
        if not self.simulator.rule.takes_stale:
            bound = 0
        assert bound is None or all(0 <= late <= bound for late in self.simulator.staleness)
        made = [identity(push) for step in self.steps for push in step]
        waiting = {identity(push) for push in (*self.sum, *self.given_up)}
        assert not {identity(push) for push in self.replied} - set(made) - waiting, "a push that counts is in no step"
        if not self.loads:  # a load takes steps back
            assert len(set(made)) == len(made), "a push was applied twice"

    def finish(self) -> None:
        """Nobody is stuck: those who are silent are lost, the others push, and whoever waited is told."""
        if self.simulator.ended:
            return
        if (due := machine.next_deadline(self.session)) is not None:
            self.now = max(self.now, due)
            self.move("tick", 0, 0, 0, "updated")
        stuck = list(self.simulator.waiting.values())
        for turn in range(4 * WORKERS):
            stuck = [push for push in stuck if self.simulator.waiting.get(push.worker) is push]
            if not stuck:
                return
            awaited = sorted(self.simulator.awaited()) or [turn % WORKERS]
            name = awaited[0]
            if name not in self.simulator.live() or self.simulator.workers[name].epoch != self.processes[name].epoch:
                self.move("join", name, 0, 0, "updated")
            self.move("newest", name, 0, 0, "updated")
        raise AssertionError(f"{stuck} are stuck: {self.session}")


def identity(push: Push) -> tuple[int, int, int]:
    """What no two pushes have in common; of a worker that was forgotten, the seq may come again, but not the step."""
    return push.worker, push.seq, push.base


def heard(simulated: Callable[[], list[Happening]]) -> tuple[list[Happening], type[errors.OptwireError] | None]:
    try:
        return simulated(), None
    except simulators.RefusedError as exc:
        return [], exc.kind


def refused(session: machine.Session, event: events.Event) -> type[errors.OptwireError] | None:
    """The error with which the machine refuses an event; None: it takes it."""
    try:
        machine.advance(session, event)
    except errors.OptwireError as exc:
        return type(exc)
    return None


def plain(pushed: events.Pushed) -> Push:
    """A push as the simulator has it; its data is known by its digest."""
    data = next(data for data in range(8) if digest(data) == pushed.digest)
    key = pushed.key
    return Push(int(key.worker, 16), key.seq, key.base_step, data, key.epoch, pushed.options.weight)


def shares(session: machine.Session, apply: effects.Apply) -> tuple[tuple[Push, float], ...]:
    """What each push of an update is multiplied by, as the engine will see it."""
    pending = session.pending
    if apply.completes_sum:
        assert pending is not None
        factors = [gathered_factor(session, pushed) for pushed in session.buffered] + [apply.factors[0]]
        pushes = [*session.buffered, pending]
        return tuple((plain(p), f / apply.divisor) for p, f in zip(pushes, factors, strict=True))
    if not apply.workers:
        assert pending is not None
        return ((plain(pending), 1.0 / apply.options.grad_scale),)
    at = {**session.gathered, **({pending.key.worker: pending} if pending else {})}
    taken = [at[worker] for worker in apply.workers]
    times = apply.factors or (1.0,) * len(taken)
    divisor = (apply.divisor or len(taken)) * apply.options.grad_scale
    return tuple((plain(p), f / divisor) for p, f in zip(taken, times, strict=True))


def gathered_factor(session: machine.Session, pushed: events.Pushed) -> float:
    damping = session.aggregation.damping.factor(session.step - pushed.key.base_step)
    return damping * pushed.options.weight


def ended(ending: str) -> events.Event:
    return {
        "refused": events.UpdateRefused(errors.NonFiniteError("not finite")),
        "broken": events.UpdateFailed("broken", state_lost=False),
        "lost": events.UpdateFailed("broken", state_lost=True),
    }.get(ending, events.Updated(0.25))


def matches(happened: Sequence[Happening], expected: Sequence[Happening]) -> bool:
    """Whether the same happened: steps in their order with their shares, and between them everybody told the same."""
    return normal(happened) == normal(expected)


def normal(happened: Sequence[Happening]) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    told: list[str] = []
    for happening in happened:
        if happening[0] == "told":
            told.append(str(happening))
            continue
        found += [tuple(sorted(told)), happening[:1], *map(rounded, happening[1:])]
        told = []
    return [*found, tuple(sorted(told))]


def rounded(value: object) -> tuple[object, ...]:
    if isinstance(value, float):
        return (round(value, 12),)
    return tuple((push, round(share, 12)) for push, share in value) if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("mode", MODES)
def test_a_history_is_what_the_simulator_of_the_mode_says(mode: str) -> None:
    aggregation = aggregations.parse(mode)

    @settings(max_examples=100, deadline=None)
    @given(history=st.lists(MOVE, max_size=40))
    def run(history: list[Move]) -> None:
        played(aggregation, history)

    run()


FEW = [mode for mode in MODES if mode.startswith(("async", "buffered", "bounded", "single")) and "wait" not in mode]


@pytest.mark.parametrize("mode", FEW)
def test_a_history_where_workers_are_forgotten_is_what_the_simulator_says(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    aggregation = aggregations.parse(mode)
    monkeypatch.setattr(limits, "WORKERS_MAX", WORKERS - 1)
    monkeypatch.setattr(machine, "WORKERS_MAX", WORKERS - 1)

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(history=st.lists(MOVE, max_size=40))
    def run(history: list[Move]) -> None:
        played(aggregation, history)

    run()


def played(aggregation: aggregations.Aggregation, history: Sequence[Move]) -> World:
    world = World(aggregation)
    for move in history:
        world.move(*move)
    world.check()
    world.finish()
    return world


HISTORIES = 100_000
_EACH = 500


@pytest.mark.slow
def test_a_hundred_thousand_histories_are_what_the_simulators_say(capsys: pytest.CaptureFixture[str]) -> None:
    """As above, many more and shorter: random moves of a seed that hypothesis chooses."""
    rules = [aggregations.parse(mode) for mode in MODES]
    counts = {"histories": 0, "events": 0, "steps": 0}
    began_s = time.monotonic()

    @settings(max_examples=HISTORIES // _EACH, deadline=None, database=None)
    @given(seed=st.integers(0, 2**64 - 1))
    def run(seed: int) -> None:
        source = random.Random(seed)
        for _ in range(_EACH):
            history = [drawn(source) for _ in range(source.randrange(1, 14))]
            aggregation = source.choice(rules)
            try:
                world = played(aggregation, history)
            except AssertionError as exc:
                raise AssertionError(f"{aggregation}: {history}") from exc
            counts["histories"] += 1
            counts["events"] += len(history)
            counts["steps"] += len(world.simulator.log)

    run()
    with capsys.disabled():
        print(f"\n{counts} in {time.monotonic() - began_s:.0f} s")
    assert counts["histories"] >= HISTORIES
    assert counts["steps"] > HISTORIES, "histories get somewhere"


def drawn(source: random.Random) -> Move:
    passed = source.choice((0, 0, 0, 0, 0, 0, 1, 1, 3, 11))
    return source.choice(KINDS), source.randrange(WORKERS), source.randrange(4), passed, source.choice(ENDINGS)
