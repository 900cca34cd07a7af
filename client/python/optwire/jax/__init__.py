"""optwire for JAX: the seed's triple, an optax transformation, and sessions over any pytree.

    opt_init, opt_update, get_params = optwire.jax.optimizer(client, spec)    # the seed's triple
    tx = optwire.jax.transformation(session)                                  # optax, Flax, Equinox; under jit

``create_session``, ``params`` and ``step`` are a session's, for any pytree; ``export_update`` turns an update rule of
your own into a file that a server can run. The only room of the client that knows JAX.
"""

from optwire.jax._export import export_update
from optwire.jax._sessions import create_session, params, step
from optwire.jax._state import RemoteState
from optwire.jax._transformation import transformation
from optwire.jax._triple import Optimizer, optimizer

__all__ = [
    "Optimizer",
    "RemoteState",
    "create_session",
    "export_update",
    "optimizer",
    "params",
    "step",
    "transformation",
]
