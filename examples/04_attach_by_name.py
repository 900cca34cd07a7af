"""Training goes on in another process: it needs the server's address and the session's name, and no checkpoint.

Parameters, Adam's moments and the step count stay on the server when a client ends.
"""

import subprocess
import sys

import numpy as np

import optwire
from optwire import optimizers as opt
from optwire_server import testing

GOAL = np.array([0.5, -1.5], np.float32)


def train(session: optwire.Session, steps: int) -> None:
    params = session.params()
    for _ in range(steps):
        params = session.step({"w": 2 * (params["w"] - GOAL)})
    loss = np.sum((params["w"] - GOAL) ** 2)
    print(f"step {session.step_count:3}   loss {loss:.6f}   w = {params['w'].round(3)}", flush=True)


def second_process(target: str) -> None:
    with optwire.connect(target) as client:
        session = client.attach("long-run")
        print(f"a new process finds {session.name!r} at step {session.step_count}", flush=True)
        train(session, 80)


def main() -> None:
    with testing.serve() as server:
        with optwire.connect(server.target) as client:
            train(client.create_session({"w": np.zeros(2, np.float32)}, opt.adam(0.05), name="long-run"), 20)
        print("the first client is gone", flush=True)
        subprocess.run([sys.executable, __file__, server.target], check=True, timeout=60)
        with optwire.connect(server.target) as client:
            assert client.attach("long-run").step_count == 100


if __name__ == "__main__":
    if len(sys.argv) > 1:
        second_process(sys.argv[1])
    else:
        main()
