"""Update rules in float64 NumPy, written from the papers one equation after the other.

Must not know anything of ours, nor of jax: what it gives is the reference the rules are held to, whatever the order
of operations there. A rule takes x0, the gradients and the learning rates of all steps, and gives the last x.
"""

from collections.abc import Iterable

import numpy as np

Array = np.ndarray


def sgd(x: Array, grads: Iterable[Array], rates: Array) -> Array:
    """Robbins and Monro (1951)."""
    for alpha, g in zip(rates, grads, strict=True):
        x = x - alpha * g
    return x


def momentum(x: Array, grads: Iterable[Array], rates: Array, mass: float) -> Array:
    """Polyak (1964): `v_{t+1} = μ v_t + g_t`, `x_{t+1} = x_t - α v_{t+1}`."""
    v = np.zeros_like(x)
    for alpha, g in zip(rates, grads, strict=True):
        v = mass * v + g
        x = x - alpha * v
    return x


def nesterov(x: Array, grads: Iterable[Array], rates: Array, mass: float) -> Array:
    """Nesterov (1983) at the point y where the gradient is taken: `x' = y - α g(y)`, then ahead along the velocity.

    The velocity is Sutskever et al.'s (2013) in units of α, so that a change of α takes effect at once.
    """
    y, v = x, np.zeros_like(x)
    for alpha, g in zip(rates, grads, strict=True):
        v = mass * v + g
        y = (y - alpha * g) - alpha * mass * v
    return y


def adagrad(x: Array, grads: Iterable[Array], rates: Array, momentum: float) -> Array:
    """Duchi et al. (2011), diagonal form: `G = Σ g gᵀ`, step `diag(G)^{-1/2} g`, here averaged over time."""
    seen: list[Array] = []
    average = np.zeros_like(x)
    for alpha, g in zip(rates, grads, strict=True):
        seen.append(g)
        norms = np.linalg.norm(np.stack(seen), axis=0)
        direction = np.divide(g, norms, out=np.zeros_like(x), where=norms > 0)
        average = momentum * average + (1 - momentum) * direction
        x = x - alpha * average
    return x


def rmsprop(x: Array, grads: Iterable[Array], rates: Array, gamma: float, eps: float) -> Array:
    """Hinton, lecture 6e, slide 29: divide the gradient by a running root mean square of its magnitude."""
    mean_square = np.zeros_like(x)
    for alpha, g in zip(rates, grads, strict=True):
        mean_square = gamma * mean_square + (1 - gamma) * g**2
        x = x - alpha * g / np.sqrt(mean_square + eps)
    return x


def rmsprop_momentum(
    x: Array, grads: Iterable[Array], rates: Array, gamma: float, eps: float, momentum: float
) -> Array:
    """Hinton's mean square with Graves (2013), eq. 38 to 41, less the subtraction of the squared mean."""
    mean_square, delta = np.zeros_like(x), np.zeros_like(x)
    for alpha, g in zip(rates, grads, strict=True):
        mean_square = gamma * mean_square + (1 - gamma) * g**2
        delta = momentum * delta - alpha * g / np.sqrt(mean_square + eps)
        x = x + delta
    return x


def adam(x: Array, grads: Iterable[Array], rates: Array, b1: float, b2: float, eps: float) -> Array:
    """Kingma and Ba (2015), algorithm 1."""
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, (alpha, g) in enumerate(zip(rates, grads, strict=True), 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        x = x - alpha * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return x


def adamax(x: Array, grads: Iterable[Array], rates: Array, b1: float, b2: float, eps: float) -> Array:
    """Kingma and Ba (2015), algorithm 2, with ε in the divisor."""
    m, u = np.zeros_like(x), np.zeros_like(x)
    for t, (alpha, g) in enumerate(zip(rates, grads, strict=True), 1):
        m = b1 * m + (1 - b1) * g
        u = np.maximum(b2 * u, np.abs(g))
        x = x - alpha / (1 - b1**t) * m / (u + eps)
    return x


def sm3(x: Array, grads: Iterable[Array], rates: Array, momentum: float) -> Array:
    """Anil et al. (2019), algorithm SM3-II, with the co-dimension-one slices of the tensor as the sets S_r."""
    shape = x.shape
    x = np.atleast_1d(x).astype(float)
    kept = {(axis, r): 0.0 for axis, length in enumerate(x.shape) for r in range(length)}
    average = np.zeros_like(x)
    for alpha, grad in zip(rates, grads, strict=True):
        g = np.atleast_1d(grad)
        following = dict.fromkeys(kept, 0.0)
        direction = np.zeros_like(x)
        for entry in np.ndindex(x.shape):
            nu = min(kept[slice_] for slice_ in enumerate(entry)) + g[entry] ** 2
            for slice_ in enumerate(entry):
                following[slice_] = max(following[slice_], nu)
            direction[entry] = g[entry] / np.sqrt(nu) if nu > 0 else 0.0
        kept = following
        average = momentum * average + (1 - momentum) * direction
        x = x - alpha * average
    return x.reshape(shape)


def exponential_decay(i: int, step_size: float, decay_steps: float, decay_rate: float) -> float:
    """Falls by `decay_rate` every `decay_steps`."""
    return step_size * float(np.exp(np.log(decay_rate) * i / decay_steps))


def inverse_time_decay(
    i: int, step_size: float, decay_steps: float, decay_rate: float, staircase: bool = False
) -> float:
    """Robbins and Monro's 1/t, with the time counted in `decay_steps`."""
    time = i // decay_steps if staircase else i / decay_steps
    return step_size / (1 + decay_rate * time)


def polynomial_decay(i: int, step_size: float, decay_steps: float, final_step_size: float, power: float = 1.0) -> float:
    """Falls from the first to the last value along `(remaining time)^power`, and stays there."""
    remaining = max(decay_steps - i, 0) / decay_steps
    return final_step_size + (step_size - final_step_size) * remaining**power


def piecewise_constant(i: int, boundaries: list[int], values: list[float]) -> float:
    """The value of the interval i lies in; a boundary belongs to the interval it ends."""
    return next((value for boundary, value in zip(boundaries, values, strict=False) if i <= boundary), values[-1])
