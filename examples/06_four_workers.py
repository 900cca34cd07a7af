"""Four processes train one model, each on its quarter of every batch; the mean of their gradients is one step.

Each needs NumPy and the server's address. The order in which they come makes no difference: the mean is taken in the
order of ranks, so what they get are the bits that one process computes which has the whole batch.
"""

import subprocess
import sys

import jax
import numpy as np

import optwire
from optwire import optimizers as opt
from optwire_server import optimizers, testing

WORKERS, STEPS, BATCH = 4, 60, 256
LEARNING_RATE = 0.3
FEATURES = 8
Params = dict[str, np.ndarray]


def initial_params() -> Params:
    return {"w": np.zeros(FEATURES, np.float32), "b": np.zeros((), np.float32)}


def quarter(step: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (BATCH / WORKERS, FEATURES) and targets of one worker's part of a batch."""
    rng = np.random.default_rng([step, rank])
    x = rng.standard_normal((BATCH // WORKERS, FEATURES), np.float32)
    noise = np.float32(0.1) * rng.standard_normal(len(x), np.float32)
    return x, x @ np.arange(FEATURES, dtype=np.float32) - 2 + noise


def loss_and_grads(params: Params, x: np.ndarray, y: np.ndarray) -> tuple[float, Params]:
    """The mean squared error, and its gradients by hand."""
    error = x @ params["w"] + params["b"] - y
    return float(np.mean(error**2)), {"w": 2 * error @ x / np.float32(len(x)), "b": 2 * error.mean()}


def work(target: str, rank: int) -> None:
    """What each of the four processes does."""
    with optwire.connect(target) as client:
        session = client.attach("four", worker=rank)
        params = session.params()
        for step in range(STEPS):
            loss, grads = loss_and_grads(params, *quarter(step, rank))
            params = session.step(grads)  # waits for the others; all of them get the same parameters
        print(f"worker {rank}: loss of its quarter {loss:.4f}, step {session.step_count}", flush=True)


def alone() -> Params:
    """The same in one process: all four quarters, the mean in the order of ranks, Adam."""
    init_fun, update_fun, get_params = optimizers.adam(LEARNING_RATE)
    update_fun = jax.jit(update_fun)
    opt_state = init_fun(initial_params())
    for step in range(STEPS):
        params = {name: np.asarray(leaf) for name, leaf in get_params(opt_state).items()}
        parts = [loss_and_grads(params, *quarter(step, rank))[1] for rank in range(WORKERS)]
        mean = {name: mean_in_order([part[name] for part in parts]) for name in params}
        opt_state = update_fun(step, mean, opt_state)
    return {name: np.asarray(leaf) for name, leaf in get_params(opt_state).items()}


def mean_in_order(arrays: list[np.ndarray]) -> np.ndarray:
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total / np.float32(len(arrays))


def main() -> None:
    with testing.serve() as server, optwire.connect(server.target) as client:
        # Whoever creates it is no worker yet: nobody waits for this process.
        client.create_session(initial_params(), opt.adam(LEARNING_RATE), name="four", aggregation=f"sync({WORKERS})")
        command = [sys.executable, __file__, server.target]
        workers = [subprocess.Popen([*command, str(rank)]) for rank in range(WORKERS)]
        assert [worker.wait(60) for worker in workers] == [0] * WORKERS
        params, local = client.attach("four").params(), alone()
    print(f"w = {params['w'].round(2)}, b = {float(params['b']):.2f}")
    for name in local:
        assert params[name].tobytes() == local[name].tobytes(), name
    print(f"after {STEPS} steps: the bits of one process with the whole batch")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(sys.argv[1], int(sys.argv[2]))
    else:
        main()
