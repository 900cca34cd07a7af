"""What a client was told at ``connect``, and the numbers it decides with. Value objects; no gRPC."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import re
from typing import Any

import numpy as np

from optwire_proto import errors, limits, sessions

# Up to this a push and its reply travel in one message each: no frames. Beyond, "auto" asks for shared memory first.
WHOLE_BYTES_MAX = 64 * limits.KIB
# Every deadline grows by a second for this many payload bytes, so that `timeout` need not know the model: a link of
# 32 Mbit/s keeps up.
BYTES_PER_SECOND_MIN = 4 * limits.MIB
# And by a second for this many leaves where a session is created: the server may have to compile the update.
LEAVES_PER_SECOND_MIN = 10
# How long the thread that watches deadlines outlives the last of them, in seconds.
WATCHDOG_IDLE_S = 1.0
# So many small pushes in one call each, before a handle opens a stream for them: on each end that is a thread. Pushes
# on an open stream take less time.
UNARY_FIRST = 3
# And so many after the server ended a stream, as it does with idle ones where others want its place.
UNARY_AFTER_LOSS = 64
# Pauses between tries: the first is at most this, each next one twice that, up to the longest.
PAUSE_FIRST_S = 0.05
PAUSE_MAX_S = 2.0
# Longest timeout, in seconds (115 days): beyond, the clocks of threads and gRPC overflow.
TIMEOUT_MAX_S = 1e7
# How long `Session.close` waits for the server: to end its side of the stream, and to let a worker leave.
CLOSE_S = 1.0
# Pushes that may wait for their turn after `Session.step_async`: each holds its gradients. Whoever asks for more waits.
WAITING_MAX = 64

_SCHEME = re.compile("(unix|unix-abstract|dns|ipv4|ipv6):.+")
_HOST_AND_PORT = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:.]+(%[\w.-]+)?\]):([0-9]{1,5})")


class Transport(enum.StrEnum):
    """How pushes travel."""

    AUTO = "auto"
    STREAM = "stream"
    UNARY = "unary"
    SHARED_MEMORY = "shared_memory"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of ``connect``, checked.

    Attributes:
      target: a gRPC target: "host:port" or "unix:/path".
      timeout_s: deadline of each call, retries included, in seconds; payloads add to it (``BYTES_PER_SECOND_MIN``).
      transport: how pushes travel.

    Raises:
      InvalidArgumentError: a target of another form, or a timeout that is not positive or too long.
    """

    target: str
    timeout_s: float
    transport: Transport

    def __post_init__(self) -> None:
        if not _is_target(self.target):
            raise wrong("target", "host:port with a port from 1 to 65535, or unix:/path", self.target)
        if not _is_number(self.timeout_s) or not 0 < self.timeout_s <= TIMEOUT_MAX_S:
            raise wrong("timeout", f"a positive number of seconds, at most {TIMEOUT_MAX_S:.0e}", self.timeout_s)


def transport(name: str) -> Transport:
    """The transport called ``name``; raises InvalidArgumentError where there is none."""
    if name not in list(Transport):
        raise wrong("transport", f"one of {', '.join(Transport)}", name)
    return Transport(name)


def reply(name: str) -> sessions.ReplyContent:
    """The content of a reply called ``name``; raises InvalidArgumentError where there is none."""
    if name not in list(sessions.ReplyContent):
        raise wrong("reply", f"one of {', '.join(sessions.ReplyContent)}", name)
    return sessions.ReplyContent(name)


def late(name: str, content: sessions.ReplyContent) -> bool:
    """Whether gradients that come too late are dropped; raises InvalidArgumentError."""
    if name not in ("raise", "params"):
        raise wrong("late", "'raise' or 'params'", name)
    if name == "params" and content in (sessions.ReplyContent.UPDATES, sessions.ReplyContent.PRESENT):
        raise wrong("late", f"'raise' with reply='{content}', which says nothing where gradients are dropped", name)
    return name == "params"


def _is_target(value: object) -> bool:
    """Whether gRPC could ever connect to it; what it does not know it would take for a host name, and try for long."""
    if not isinstance(value, str) or not value.isprintable():
        return False
    found = _HOST_AND_PORT.fullmatch(value)
    return 0 < int(found[3]) < 2**16 if found else bool(_SCHEME.fullmatch(value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite(name: str, value: object) -> float:
    """A number that is finite; raises InvalidArgumentError."""
    number = math.nan
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # a whole number beyond all real ones
            number = float(value)
    if not math.isfinite(number):
        raise wrong(name, "a finite number", value)
    return number


def whole(name: str, value: object) -> int:
    """A whole number from 0 up to 2**64; raises InvalidArgumentError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= int(value) < 2**64:
        raise wrong(name, "a whole number from 0 to 2**64 - 1", value)
    return int(value)


def plain(value: Any) -> Any:
    """A whole number of NumPy's as one of Python's; anything else as it is."""
    return int(value) if isinstance(value, np.integer) else value


def positive(name: str, value: object) -> float:
    """A number that is finite and greater than 0; raises InvalidArgumentError."""
    number = finite(name, value)
    if number <= 0:
        raise wrong(name, "a positive number", value)
    return number


def weight(value: object) -> float:
    """What a push may count; raises InvalidArgumentError."""
    number = finite("weight", value)
    if not limits.WEIGHT_MIN <= number <= limits.WEIGHT_MAX:
        raise wrong("weight", f"a number from {limits.WEIGHT_MIN:g} to {limits.WEIGHT_MAX:g}", value)
    return number


def wrong(name: str, expected: str, value: object) -> errors.InvalidArgumentError:
    """The error for an argument that has a value it cannot take."""
    try:
        got = repr(value)[:80]
    except ValueError:  # a whole number with more digits than Python writes down
        got = type(value).__name__
    return errors.InvalidArgumentError(f"{name}: {got}, expected {expected}", subject=name, expected=expected, got=got)
