"""The server of optwire: holds optimizer state, applies pushes. ``optimizers`` is the seed's module, usable alone."""

from importlib import metadata

__version__ = metadata.version("optwire")
__all__ = ["__version__"]
