"""DiLoCo: four workers train a transformer by themselves and meet at every 25th step, two in torch and two in JAX.

    make examples                     # or: python examples/09_diloco.py

Each has an AdamW of its own and a quarter of the text. What it pushes is how far it went, and the session's optimizer,
Nesterov's momentum, makes a step of the mean. A push at every step would move 25 times as many bytes. Without torch all
four are in JAX. ``diloco_worker.py`` is one worker.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import diloco_worker
import numpy as np

import optwire
from optwire import optimizers as opt
from optwire_server import testing

WORKER = pathlib.Path(__file__).with_name("diloco_worker.py")
FRAMEWORKS = ("torch", "torch", "jax", "jax") if importlib.util.find_spec("torch") else ("jax",) * 4
STEPS, EVERY = 75, 25
OUTER = opt.nesterov(0.7, 0.9)


def fresh(characters: int) -> diloco_worker.Params:
    """Initial parameters, by the names that torch gives them in ``demo_torch.Transformer``."""
    rng = np.random.default_rng(0)
    width, context, layers = 64, diloco_worker.CONTEXT, 2
    shapes = {"embed.weight": (characters, width), "place": (context, width)}
    for layer in (f"layers.layers.{index}" for index in range(layers)):
        shapes |= {
            f"{layer}.self_attn.in_proj_weight": (3 * width, width),
            f"{layer}.self_attn.in_proj_bias": (3 * width,),
            f"{layer}.self_attn.out_proj.weight": (width, width),
            f"{layer}.self_attn.out_proj.bias": (width,),
            f"{layer}.linear1.weight": (4 * width, width),
            f"{layer}.linear1.bias": (4 * width,),
            f"{layer}.linear2.weight": (width, 4 * width),
            f"{layer}.linear2.bias": (width,),
        }
        shapes |= {f"{layer}.norm{part}.{kind}": (width,) for part in (1, 2) for kind in ("weight", "bias")}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    made = {}
    for name, shape in shapes.items():
        if "norm" in name and name.endswith("weight"):
            made[name] = np.ones(shape, np.float32)
        elif len(shape) == 1:
            made[name] = np.zeros(shape, np.float32)
        else:
            made[name] = (0.125 * rng.standard_normal(shape)).astype(np.float32)
    return made


def main() -> None:
    _, alphabet = diloco_worker.text()
    arguments = ["--steps", str(STEPS), "--every", str(EVERY)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    with testing.serve() as server, optwire.connect(server.target) as client:
        session = client.create_session(fresh(len(alphabet)), OUTER, name="diloco", aggregation="sync(4)")
        workers = [
            subprocess.Popen(
                [sys.executable, str(WORKER), server.target, "diloco", str(rank), framework, *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, framework in enumerate(FRAMEWORKS)
        ]
        for worker in workers:
            said, _ = worker.communicate()
            assert worker.returncode == 0, "a worker failed"
            found = json.loads(said)
            print(f"rank {found['rank']}, {found['framework']:<5}  loss {found['loss']:.2f} over the last 20 steps")
        session.params()
        pushed = 2 * session.step_count * session.info().payload_bytes
    print(f"{STEPS} local steps, {session.step_count} of the session: {pushed / 1e6:.1f} MB for each worker", end=", ")
    print(f"{STEPS // session.step_count} times fewer than with a push at every step")


if __name__ == "__main__":
    main()
