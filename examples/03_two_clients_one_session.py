"""Two clients race to train one session. Who comes too late fetches the newest parameters and computes again.

A push carries the step of the parameters its gradients were computed on. The server applies it only while that is the
session's step, so no update is ever built on parameters that have moved on.
"""

import concurrent.futures
import threading

import numpy as np

import optwire
from optwire import optimizers as opt
from optwire_server import testing

UPDATES_EACH = 25
GOAL = np.array([1, -2, 3, -4], np.float32)


def work(target: str, start: threading.Barrier) -> tuple[int, int]:
    """Trains until 25 updates of its own were applied; returns how many were, and how many came too late."""
    applied = late = 0
    with optwire.connect(target) as client:
        session = client.attach("shared")
        params = session.params()
        start.wait()  # both know step 0 now, so one of the first two pushes is late for certain
        while applied < UPDATES_EACH:
            grads = {"w": params["w"] - GOAL}
            try:
                params = session.step(grads)
                applied += 1
            except optwire.StaleStepError:
                params = session.params()
                late += 1
    return applied, late


def main() -> None:
    start = threading.Barrier(2)
    with testing.serve() as server, optwire.connect(server.target) as client:
        session = client.create_session({"w": np.zeros(4, np.float32)}, opt.momentum(0.05, mass=0.8), name="shared")
        with concurrent.futures.ThreadPoolExecutor() as threads:
            clients = [threads.submit(work, server.target, start) for _ in range(2)]
        counts = [client.result() for client in clients]
        for number, (applied, late) in enumerate(counts, 1):
            print(f"client {number}: {applied} updates applied, {late} came too late and were computed again")

        first, second = session.params(), client.attach("shared").params()
        assert session.step_count == sum(applied for applied, _ in counts) == 2 * UPDATES_EACH
        assert sum(late for _, late in counts) >= 1
        assert first["w"].tobytes() == second["w"].tobytes()
        print(f"the session is at step {session.step_count}, w = {first['w'].round(3)} for everyone who asks")


if __name__ == "__main__":
    main()
