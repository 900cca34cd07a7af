"""Turns on a device: order within a session, fairness between sessions, errors, the end."""

from __future__ import annotations

import concurrent.futures
import threading
import time

import pytest

import optwire
from optwire_server.engine import device


class Scene:
    """Work whose blocks tell when they are run; the first waits until all are asked for."""

    def __init__(self) -> None:
        self.device = device.Device()
        self.log: list[str] = []
        self.gate = threading.Event()
        self.pool = concurrent.futures.ThreadPoolExecutor(16)
        self.asked = 0

    def work(self, name: str, blocks: int) -> device.Work[str]:
        for block in range(blocks):
            if block:
                yield
            self.log.append(name)
        return name

    def hold(self) -> device.Work[None]:
        self.gate.wait(30)
        yield

    def ask(self, lane: device.Lane, work: device.Work[str]) -> concurrent.futures.Future[str]:
        """Asks for work from a thread of its own, and waits until it stands in line."""
        before = len(lane.tasks)
        future = self.pool.submit(self.device.run, lane, work)
        while len(lane.tasks) == before and not future.done():
            time.sleep(0.001)
        return future

    def run(self, *asked: tuple[device.Lane, str, int]) -> list[str]:
        """The blocks in the order in which they were run, all of them asked for before the first."""
        first = self.ask(device.Lane(), self.hold())  # type: ignore[arg-type]
        futures = [self.ask(lane, self.work(name, blocks)) for lane, name, blocks in asked]
        self.gate.set()
        first.result(30)
        assert [future.result(30) for future in futures] == [name for _, name, _ in asked]
        return self.log


def test_sessions_take_turns_block_by_block() -> None:
    assert Scene().run((device.Lane(), "a", 3), (device.Lane(), "b", 1), (device.Lane(), "c", 2)) == list("abcaca")


def test_calls_of_one_session_are_worked_off_in_order() -> None:
    one, other = device.Lane(), device.Lane()
    assert Scene().run((one, "a", 2), (one, "b", 2), (other, "c", 5)) == list("acacbcbcc")


def test_a_session_with_more_turns_gets_more() -> None:
    assert Scene().run((device.Lane(3), "a", 6), (device.Lane(), "b", 3)) == list("aaabaaabb")


def test_a_tiny_call_waits_for_one_block_of_a_long_one() -> None:
    scene = Scene()
    assert scene.run((device.Lane(), "a", 100), (device.Lane(), "b", 1)).index("b") == 1


def test_an_error_is_the_callers_and_the_next_one_runs() -> None:
    scene, lane = Scene(), device.Lane()

    def failing() -> device.Work[str]:
        yield
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        scene.device.run(lane, failing())
    assert scene.device.run(lane, scene.work("a", 1)) == "a"


def test_a_wait_that_is_interrupted_takes_nobody_elses_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, lane = Scene(), device.Lane()
    first = scene.ask(device.Lane(), scene.hold())  # type: ignore[arg-type]
    second = scene.ask(lane, scene.work("a", 2))

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

    task = device._Task(scene.work("b", 1), Interrupted())
    with monkeypatch.context() as patched:
        patched.setattr(device, "_Task", lambda work: task)
        for own in (lane, device.Lane()):
            with pytest.raises(KeyboardInterrupt):
                scene.device.run(own, task.work)
    scene.gate.set()
    first.result(30)
    assert second.result(30) == "a"
    assert scene.device.run(lane, scene.work("c", 1)) == "c"
    assert scene.log == list("aac")


def test_many_threads_lose_nothing() -> None:
    turns, count, most = device.Device(), [0], [0]
    lanes = [device.Lane(1 + k % 3) for k in range(5)]

    def work() -> device.Work[None]:
        for _ in range(3):
            count[0] += 1
            most[0] = max(most[0], count[0])
            time.sleep(0)
            count[0] -= 1
            yield

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(turns.run, lanes[k % 5], work()) for k in range(500)]
        for future in futures:
            future.result(60)
    assert most == [1]  # one at a time
    turns.close()


def test_close_waits_for_what_was_asked_for_and_takes_nothing_more() -> None:
    scene = Scene()
    first = scene.ask(device.Lane(), scene.hold())  # type: ignore[arg-type]
    second = scene.ask(device.Lane(), scene.work("a", 2))
    closing = threading.Thread(target=scene.device.close)
    closing.start()
    time.sleep(0.05)
    assert closing.is_alive()
    scene.gate.set()
    closing.join(30)
    assert first.done()
    assert second.result(30) == "a"
    with pytest.raises(optwire.UnavailableError):
        scene.device.run(device.Lane(), scene.work("b", 1))
