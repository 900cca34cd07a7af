"""Whether updates give the same bits with one XLA thread and with two: half of the processes may use one CPU only.

    .venv/bin/python benchmarks/threads.py --processes 20

Prints a line of each digest that there was and how often, and exits with 1 unless all processes gave the same one.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import subprocess
import sys

# Of the leaves, 3 Mi elements together: blocks whose borders are in the middle of leaves, and a tail.
SIZES = (1_000_003, 1 << 20, 3 * (1 << 20) - (1 << 20) - 1_000_003 - 17, 17)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=20, help="how many, half of them on one CPU")
    parser.add_argument("--steps", type=int, default=3, help="updates of each optimizer")
    parser.add_argument("--cpus", type=int, help="be one of the processes, on so many CPUs")
    asked = parser.parse_args()
    if asked.cpus:
        print(digest(asked.cpus, asked.steps))
        return 0
    if len(os.sched_getaffinity(0)) < 2:
        print("there is but one CPU: nothing to compare")
        return 2
    found: dict[int, collections.Counter[str]] = {1: collections.Counter(), 2: collections.Counter()}
    for number in range(asked.processes):
        cpus = 1 + number % 2
        command = [sys.executable, __file__, "--cpus", str(cpus), "--steps", str(asked.steps)]
        found[cpus][subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()] += 1
    for cpus, digests in found.items():
        for text, times in digests.items():
            print(f"{cpus} thread{'s' if cpus > 1 else ''}: {text[:16]} in {times} processes")
    same = len(found[1] | found[2]) == 1
    print(f"elementwise and clipped updates in {asked.processes} processes: {'the same bits' if same else 'DIFFERENT'}")
    return 0 if same else 1


def digest(cpus: int, steps: int) -> str:
    """Of the parameters that some optimizers arrive at. XLA makes as many threads as it has CPUs when it is loaded."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])

    import numpy as np

    from optwire import optax as remote
    from optwire import optimizers as opt
    from optwire_proto import trees
    from optwire_server.engine import engine, landing, program, rates

    optimizers = (
        remote.adamw(1e-3),
        opt.chain(opt.clip_grads(1.0), opt.adam(1e-3)),
        opt.chain(remote.clip_by_global_norm(1.0), remote.lion(1e-3)),
        opt.on_nonfinite(opt.chain(remote.normalize_by_update_norm(), opt.momentum(1e-3, 0.9)), "skip"),
    )
    rng = np.random.default_rng(3)
    params, grads = ([rng.standard_normal(size, np.float32) for size in SIZES] for _ in range(2))
    tree = trees.flatten(params).spec
    engine.own_process()
    running = engine.Engine()
    landings = landing.Landings(bytes_max=1 << 30, keep_bytes=1 << 30)
    taken = hashlib.sha256()
    for spec in map(running.check, optimizers):
        compiled = running.compile(spec, tree)
        given = tuple(rates.rates(spec).values())
        lent = landings.land(tree, compiled.layout)

        def fill(leaves: list[np.ndarray], lent: landing.Landing = lent) -> landing.Landing:
            for array, leaf in zip(lent.arrays(), leaves, strict=True):
                array[...] = leaf
            return lent

        held = running.hold(compiled, fill(params), given)
        fill(grads)
        for step in range(steps):
            running.work(running.update(held, program.Variant(), program.Operands(given, step), lent), held)
        for segment in running.work(running.params(held), held):
            taken.update(segment)
    running.close()
    return taken.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
