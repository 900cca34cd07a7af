"""The demo's data: real images that came with a package. Nothing is downloaded."""

from __future__ import annotations

import dataclasses
import gzip
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt

FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")
PIXELS = 28 * 28  # of a Fashion-MNIST image
CLASSES = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Dataset:
    """Images in ten classes.

    Attributes:
      name: what it is called.
      source: the package it came with.
      train_images: grey values 0 to 255, uint8 (images, pixels). So are ``test_images``.
      train_labels: classes, uint8 (images,). So are ``test_labels``.
    """

    name: str
    source: str
    train_images: npt.NDArray[np.uint8]
    train_labels: npt.NDArray[np.uint8]
    test_images: npt.NDArray[np.uint8]
    test_labels: npt.NDArray[np.uint8]


def load(folder: pathlib.Path = FASHION_MNIST) -> Dataset:
    """Fashion-MNIST where its Debian package put it, otherwise the digits that scikit-learn brings along."""
    if (folder / "train-images-idx3-ubyte.gz").exists():
        return _fashion_mnist(folder)
    return _digits()


def _fashion_mnist(folder: pathlib.Path) -> Dataset:
    return Dataset(
        "Fashion-MNIST",
        "Debian's dataset-fashion-mnist",
        _idx(folder / "train-images-idx3-ubyte.gz", header_bytes=16).reshape(-1, PIXELS),
        _idx(folder / "train-labels-idx1-ubyte.gz", header_bytes=8),
        _idx(folder / "t10k-images-idx3-ubyte.gz", header_bytes=16).reshape(-1, PIXELS),
        _idx(folder / "t10k-labels-idx1-ubyte.gz", header_bytes=8),
    )


def _idx(path: pathlib.Path, header_bytes: int) -> npt.NDArray[np.uint8]:
    """The values of a file in MNIST's IDX format."""
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header_bytes)


def _digits() -> Dataset:
    from sklearn import datasets  # type: ignore[import-untyped]  # slow to import, and not needed for the other

    digits: Any = datasets.load_digits()
    images = np.round(digits.data * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.uint8)
    shuffled = np.random.default_rng(0).permutation(len(images))
    test, train = np.split(shuffled, [len(images) // 5])
    return Dataset("digits", "scikit-learn", images[train], labels[train], images[test], labels[test])
