"""One of several workers that train one session: whoever comes first creates it, the others attach.

``worker.py TARGET`` runs in the client's image (deploy/compose.yaml) and wherever ``pip install optwire`` has run.
"""

import contextlib
import socket
import sys
import time

import numpy as np

import optwire
from optwire import optimizers as opt

NAME = "shared"
LAST_STEP = 200
GOAL = np.array([1, -2, 3, -4], np.float32)


def join(client: optwire.Client) -> optwire.Session:
    """Whoever creates the session asks for no aggregation of its own: it gets the one of the server."""
    with contextlib.suppress(optwire.SessionExistsError):
        return client.create_session({"w": np.zeros(4, np.float32)}, opt.momentum(0.02, mass=0.8), name=NAME)
    return client.attach(NAME)


def gradients(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    time.sleep(0.02)  # where a model would be
    return {"w": params["w"] - GOAL}


def train(session: optwire.Session) -> int:
    """Trains until the session, not this worker alone, has come to its last step; returns how often it pushed."""
    pushes = 0
    params = session.params()
    while session.step_count < LAST_STEP:
        params = session.step(gradients(params), late="params")
        pushes += 1
    return pushes


def main(target: str) -> None:
    with optwire.connect(target) as client:
        session = join(client)
        pushes = train(session)
        w = session.params()["w"]
        counts = f"{pushes} pushes, {session.late_count} of them too late"
        print(f"{socket.gethostname()}: {counts}; step {session.step_count}, w = {w.round(3)}")
        assert np.allclose(w, GOAL, atol=1e-2), w


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # told to stop: the session stays on the server
        main(sys.argv[1])
