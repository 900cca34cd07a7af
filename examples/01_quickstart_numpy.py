"""Linear regression in NumPy; Adam and its state live on a server.

    python examples/01_quickstart_numpy.py                    # starts a server of its own
    python examples/01_quickstart_numpy.py localhost:50051    # uses the one that `optwire serve` runs

Needs grpcio, protobuf and NumPy; only the server needs JAX.
"""

import sys

import numpy as np

import optwire
from optwire import optimizers as opt


def main(target: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 3), np.float32)
    y = x @ np.array([2, -1, 0.5], np.float32) + np.float32(3)

    with optwire.connect(target) as client:
        params = {"w": np.zeros(3, np.float32), "b": np.zeros((), np.float32)}
        session = client.create_session(params, opt.adam(0.1))
        for step in range(201):
            error = x @ params["w"] + params["b"] - y
            if step % 40 == 0:
                print(f"step {step:3}   loss {np.mean(error**2):.6f}")
            grads = {"w": 2 * error @ x / len(x), "b": 2 * error.mean()}
            params = session.step(grads)  # gradients go, updated parameters come
        print(f"w = {params['w'].round(3)}, b = {params['b'].round(3)}")
        client.delete_session(session.name)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        from optwire_server import testing

        with testing.serve() as server:
            main(server.target)
