"""One worker in a process of its own: ``python worker_process.py TARGET SESSION RANK``.

Reads one command in JSON a line, and answers each with one. Gradients are the rank's alone.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np

import optwire


def main(target: str, name: str, rank: int) -> None:
    with optwire.connect(target, timeout=30) as client:
        session = client.attach(name, worker=rank)
        params = session.params()
        print(json.dumps({"step": session.step_count, "value": float(params["w"][0]), "pid": os.getpid()}), flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(session, params, rank, json.loads(line))), flush=True)


def answer(session: optwire.Session, params: Any, rank: int, options: dict[str, Any]) -> dict[str, Any]:
    grads = {"w": np.full_like(params["w"], rank + 1)}
    try:
        new = session.step(grads, **options)
    except optwire.OptwireError as exc:
        return {"error": type(exc).__name__, "said": str(exc), "step": exc.step}
    return {"step": session.step_count, "value": float(new["w"][0]), "late": session.late_count}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
