"""A worker that may be killed at any moment, and leaves a log of what it did. ``mortal_worker.py JSON``.

Every line is written before the next thing is done, so that the log of a killed process is complete but for what was
under way. It ends when the file ``stop`` names a step that has come.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time

import numpy as np

import optwire

SHAPE = (40_000,)  # 160 kB: in frames on a stream


def gradient(process: int, count: int) -> np.ndarray:
    """What a process pushes for the ``count``-th time."""
    return np.random.default_rng([process, count]).standard_normal(SHAPE, np.float32)


def main(target: str, name: str, rank: int, process: int, folder: str, pause_s: float) -> None:
    stop = pathlib.Path(folder, "stop")
    with open(pathlib.Path(folder, f"{process}.log"), "a", buffering=1) as log:

        def say(what: str, **values: object) -> None:
            log.write(json.dumps({"what": what, "process": process, "rank": rank, **values}) + "\n")

        with optwire.connect(target, transport="stream", timeout=60.0) as client:
            session = client.attach(name, worker=rank)
            session.params()
            say("joined", seq=session._seq, step=session.step_count)
            count = 0
            while not (stop.exists() and session.step_count >= int(stop.read_text())):
                time.sleep(pause_s)
                count += 1
                late = session.late_count
                say("push", seq=session._seq + 1, base=session.step_count, count=count)
                session.step(gradient(process, count), late="params")
                if session.late_count > late:
                    say("late", seq=session._seq, step=session.step_count)
                    continue
                ack = session.last_ack
                assert ack is not None
                say("ack", seq=ack.seq, applied=ack.applied_step, step=ack.step, duplicate=ack.duplicate)
        say("left")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
