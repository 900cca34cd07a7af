"""Three workers in one session: one computes its gradients in PyTorch, one in JAX, one in NumPy.

The session knows names, shapes and element types, and no framework. Each worker trains a classifier on data of its own;
a step is the mean of their gradients. Where PyTorch is not installed there are two.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable

import numpy as np

import optwire
from optwire import optimizers as opt
from optwire_server import testing

STEPS = 80
FEATURES, CLASSES = 16, 5
Params = dict[str, np.ndarray]  # w: (FEATURES, CLASSES), b: (CLASSES,)
Gradients = Callable[[Params, np.ndarray, np.ndarray], tuple[float, Params]]


def samples(seed: int, count: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (count, FEATURES), and labels by a rule that is the same for all workers."""
    rule = np.random.default_rng(0).standard_normal((FEATURES, CLASSES), np.float32)
    x = np.random.default_rng([1, seed]).standard_normal((count, FEATURES), np.float32)
    return x, (x @ rule).argmax(axis=1).astype(np.int32)


def in_numpy() -> Gradients:
    def loss_and_grads(params: Params, x: np.ndarray, labels: np.ndarray) -> tuple[float, Params]:
        scores = x @ params["w"] + params["b"]
        scores -= scores.max(axis=1, keepdims=True)
        log_probabilities = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        rows = np.arange(len(labels))
        d_scores = np.exp(log_probabilities)
        d_scores[rows, labels] -= 1
        d_scores /= np.float32(len(labels))
        return -float(log_probabilities[rows, labels].mean()), {"w": x.T @ d_scores, "b": d_scores.sum(axis=0)}

    return loss_and_grads


def in_jax() -> Gradients:
    import jax

    def loss(params: Params, x: np.ndarray, labels: np.ndarray) -> jax.Array:
        log_probabilities = jax.nn.log_softmax(x @ params["w"] + params["b"])
        return -jax.numpy.take_along_axis(log_probabilities, labels[:, None], axis=1).mean()

    return jax.jit(jax.value_and_grad(loss))  # its arrays are pushed as they are


def in_torch() -> Gradients:
    import torch

    def loss_and_grads(params: Params, x: np.ndarray, labels: np.ndarray) -> tuple[float, Params]:
        leaves = {name: torch.from_numpy(leaf).requires_grad_() for name, leaf in params.items()}
        scores = torch.from_numpy(x) @ leaves["w"] + leaves["b"]
        loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels).long())
        loss.backward()
        return loss.item(), {name: leaf.grad.numpy() for name, leaf in leaves.items()}

    return loss_and_grads


FRAMEWORKS = {"numpy": in_numpy, "jax": in_jax, "torch": in_torch}


def work(target: str, rank: int, framework: str) -> None:
    """What each of the processes does."""
    loss_and_grads, (x, labels) = FRAMEWORKS[framework](), samples(rank)
    losses = []
    with optwire.connect(target) as client:
        session = client.attach("mixed", worker=rank)
        params = session.params()
        for _ in range(STEPS):
            loss, grads = loss_and_grads(params, x, labels)
            losses.append(float(loss))
            params = session.step(grads)
    print(f"worker {rank}, {framework:5}: loss {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True)


def main() -> None:
    present = [name for name in FRAMEWORKS if importlib.util.find_spec(name)]
    for name in FRAMEWORKS.keys() - present:
        print(f"{name}: not installed here")
    params = {"w": np.zeros((FEATURES, CLASSES), np.float32), "b": np.zeros(CLASSES, np.float32)}
    with testing.serve() as server, optwire.connect(server.target) as client:
        session = client.create_session(params, opt.adam(0.1), name="mixed", aggregation=f"sync({len(present)})")
        command = [sys.executable, __file__, server.target]
        workers = [subprocess.Popen([*command, str(rank), name]) for rank, name in enumerate(present)]
        assert [worker.wait(60) for worker in workers] == [0] * len(present)
        params = session.params()
    x, labels = samples(seed=100)
    right = float(((x @ params["w"] + params["b"]).argmax(axis=1) == labels).mean())
    print(f"step {session.step_count}: {right:.1%} of new samples right")
    assert session.step_count == STEPS
    assert right > 0.9


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else:
        main()
