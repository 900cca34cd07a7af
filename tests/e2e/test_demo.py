"""The parts of `make demo` that are worth a test of their own; `.ci/run demo` runs the whole."""

import gzip
import pathlib
import sys

import numpy as np
import pytest
from examples import demo_data, demo_train

from optwire import optimizers as opt

RECIPE = demo_train.Recipe(hidden=16, epochs=1, batch=64, learning_rate=2e-3, accuracy_min=0.0)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> demo_data.Dataset:
    return demo_data.load(tmp_path_factory.mktemp("empty"))


def write_idx(path: pathlib.Path, array: np.ndarray) -> None:
    """MNIST's format: two zeros, the type (8: uint8), the rank, the big-endian shape, the values."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_without_fashion_mnist_the_demo_trains_on_digits(digits):
    assert (digits.name, digits.source) == ("digits", "scikit-learn")
    assert digits.train_images.shape == (1438, 64)
    assert digits.test_images.shape == (359, 64)
    assert (digits.train_images.dtype, digits.train_labels.dtype) == (np.uint8, np.uint8)
    assert digits.train_images.max() == 255
    assert set(digits.test_labels) == set(range(demo_data.CLASSES))


def test_fashion_mnist_is_read_where_it_is_installed(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    labels = np.array([9, 0, 4], np.uint8)
    for part, count in (("train", 3), ("t10k", 2)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images[:count])
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels[:count])
    data = demo_data.load(tmp_path)
    assert data.name == "Fashion-MNIST"
    assert np.array_equal(data.train_images, images.reshape(3, 784))
    assert np.array_equal(data.test_images, images[:2].reshape(2, 784))
    assert np.array_equal(data.train_labels, labels)
    assert np.array_equal(data.test_labels, labels[:2])


@pytest.mark.parametrize("name", demo_train.PARAMS)
def test_the_gradients_are_those_of_the_loss(digits, name):
    params = {key: leaf.astype(np.float64) for key, leaf in demo_train.initial_params(64, 16, 10).items()}
    images, labels = digits.train_images[:32], digits.train_labels[:32]
    direction = np.random.default_rng(2).standard_normal(params[name].shape)

    def loss(distance: float) -> float:
        return demo_train.loss_and_grads(params | {name: params[name] + distance * direction}, images, labels)[0]

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    grads = demo_train.loss_and_grads(params, images, labels)[1]
    assert np.sum(grads[name] * direction) == pytest.approx(slope, rel=1e-4)


def test_training_through_the_server_and_locally_gives_the_same_bits(client, digits):
    params = demo_train.initial_params(64, RECIPE.hidden, demo_data.CLASSES)
    session = client.create_session(params, opt.adam(RECIPE.learning_rate))
    steps = []
    results = []
    for step in (session.step, demo_train.local_step(params, RECIPE.learning_rate)):
        results.append(
            demo_train.train(
                params, digits.train_images, digits.train_labels, RECIPE, step, lambda number, _: steps.append(number)
            )
        )
    (remote, remote_losses), (local, local_losses) = results
    count = RECIPE.steps(len(digits.train_images))
    assert count == 22
    assert steps == 2 * list(range(1, count + 1))
    assert remote_losses == local_losses
    assert remote_losses[-1] < remote_losses[0]
    assert all(remote[name].tobytes() == local[name].tobytes() for name in demo_train.PARAMS)
    assert session.step_count == count


def test_a_client_that_imported_jax_says_so():
    assert "jax" in sys.modules  # by the server, which runs in the same process here
    with pytest.raises(RuntimeError, match="jax"):
        demo_train.check_thin()
