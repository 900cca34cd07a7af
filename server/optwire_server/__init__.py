"""The server of optwire: holds optimizer state, applies pushes. ``optimizers`` alone is the seed's module, usable anywhere."""

from importlib import metadata

__version__ = metadata.version("optwire")
__all__ = ["__version__"]
