"""How a server is reached: a target with options, or a client of the user's."""

from __future__ import annotations

import dataclasses
from typing import Final

import optwire
from optwire import _client, _options
from optwire_proto import codecs

# As in `optwire.connect`.
TRANSPORT: Final = "auto"
TIMEOUT_S: Final = 30.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How the server is reached: what is left of a connection when it is pickled.

    Attributes:
      target: a gRPC target.
      transport: as in ``optwire.connect``.
      timeout_s: of each call.
      grads_codec: how gradients travel, as in ``optwire.Client.create_session``; None: as in a session that is joined.

    Raises:
      InvalidArgumentError: there is no such codec.
    """

    target: str
    transport: str = TRANSPORT
    timeout_s: float = TIMEOUT_S
    grads_codec: str | None = None

    def __post_init__(self) -> None:
        if self.grads_codec is not None:
            codecs.parse(self.grads_codec, "grads_codec")

    def connect(self) -> _client.Client:
        """A new client."""
        return optwire.connect(self.target, timeout=self.timeout_s, transport=self.transport)


def way(
    target: str | None,
    client: _client.Client | None,
    *,
    transport: str,
    timeout_s: float,
    grads_codec: str | None = None,
) -> Way:
    """How the server is reached, by the one of two arguments that was given.

    Raises:
      TypeError: both or none of them, or arguments of a connection for a client that has one.
      InvalidArgumentError: a value that ``optwire.connect`` cannot take.
    """
    if (target is None) == (client is None):
        raise TypeError("RemoteOptimizer: exactly one of target= and client= says where the server is")
    if client is None:
        options = _options.Options(target=str(target), timeout_s=timeout_s, transport=_options.transport(transport))
    elif (transport, timeout_s) != (TRANSPORT, TIMEOUT_S):
        raise TypeError("RemoteOptimizer: transport= and timeout= belong to the client that was given")
    else:
        options = client._options
    return Way(
        target=options.target,
        transport=str(options.transport),
        timeout_s=options.timeout_s,
        grads_codec=grads_codec,
    )
