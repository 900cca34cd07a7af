"""A torch optimizer whose state lives on a server: three changed lines in a loop that worked before.

Example:
  >>> from optwire.torch import RemoteOptimizer
  >>> optimizer = RemoteOptimizer(  # doctest: +SKIP
  ...     model.named_parameters(), "adamw", lr=3e-4, target="localhost:50051"
  ... )

docs/pytorch.md has the arguments, and what holds for checkpoints, mixed precision and several processes. Knows torch,
and neither JAX nor the server.
"""

from optwire.torch.local_steps import LocalSteps, tree_of
from optwire.torch.optimizer import RemoteOptimizer
from optwire.torch.ranks import no_allreduce_hook

__all__ = ["LocalSteps", "RemoteOptimizer", "no_allreduce_hook", "tree_of"]
