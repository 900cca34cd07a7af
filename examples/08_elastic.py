"""Workers come and go: one is killed, one joins late, and the training goes on with those that are there.

In a session of "quorum(2, 4)" a step is the mean of the pushes of all workers that are there, two at least. A worker is
there from joining on, as long as it is heard of: its handle sees to that. One that dies is waited for until its lease
is over, and `session.workers()` says so.
"""

import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

import optwire
from optwire import optimizers as opt
from optwire_server import testing

GOAL = np.array([1, -2, 3, -4], np.float32)
LEASE_S = 1.0
KILLED_AT, JOINED_AT, LAST = 20, 50, 200  # steps


def work(target: str, rank: int) -> None:
    """What each process does."""
    with optwire.connect(target) as client:
        session = client.attach("elastic", worker=rank)  # joins; from now on the others wait for it
        params = session.params()  # the newest, whenever it comes
        print(f"worker {rank} begins at step {session.step_count}", flush=True)
        while session.step_count < LAST:
            time.sleep(0.02)  # where a model would be
            params = session.step({"w": params["w"] - GOAL})
    print(f"worker {rank} ends at step {session.step_count}", flush=True)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def told(session: optwire.Session) -> str:
    """Who is there, and who is waited for."""
    workers = {int(worker.worker, 16): worker for worker in session.workers()}
    states = ", ".join(f"{rank} {worker.state}" for rank, worker in workers.items())
    awaited = ", ".join(str(rank) for rank, worker in workers.items() if worker.is_awaited)
    return f"step {session.info().step}: workers {states}; waiting for {awaited or 'nobody'}"


def main() -> None:
    with testing.serve() as server, optwire.connect(server.target) as client:
        params = {"w": np.zeros(4, np.float32)}
        aggregation = f"quorum(2, 4, lease_s={LEASE_S})"
        session = client.create_session(params, opt.momentum(0.02, mass=0.8), name="elastic", aggregation=aggregation)

        def begin(rank: int) -> subprocess.Popen[bytes]:
            return subprocess.Popen([sys.executable, __file__, server.target, str(rank)])

        def only_awaited(rank: int) -> bool:
            return [int(worker.worker, 16) for worker in session.workers() if worker.is_awaited] == [rank]

        workers = [begin(rank) for rank in range(3)]
        until(lambda: session.info().step >= KILLED_AT and len(session.workers()) == 3)
        workers[1].kill()
        workers[1].wait()
        print("worker 1 is killed", flush=True)
        until(lambda: only_awaited(1))
        print(told(session), flush=True)
        until(lambda: session.workers()[1].state == "lost")
        print(told(session), flush=True)

        until(lambda: session.info().step >= JOINED_AT)
        workers.append(begin(3))
        until(lambda: len(session.workers()) == 4)
        print(told(session), flush=True)
        assert [workers[rank].wait(60) for rank in (0, 2, 3)] == [0] * 3
        print(told(session))
        w = session.params()["w"]
    print(f"w = {w.round(2)}")
    assert session.step_count == LAST
    assert np.allclose(w, GOAL, atol=0.05), w


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(sys.argv[1], int(sys.argv[2]))
    else:
        main()
