"""What the bad requests are aimed at: a session whose state must not move, and good requests to go wrong from."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
from tests.e2e import wire

from optwire_proto import convert, specs, trees
from optwire_proto.v1 import optimizer_pb2 as pb

PARAMS = {"b": np.zeros(3, np.float32), "w": np.ones((4, 3), np.float32)}
GRADS = {"b": np.full(3, 0.5, np.float32), "w": np.arange(12, dtype=np.float32).reshape(4, 3)}
PAYLOAD = wire.payload_of(GRADS)
ADAM = specs.Spec("adam", (("step_size", 0.01),))
STEPS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One bad request, and what must come of it. ``reason`` is empty where gRPC itself answers."""

    call: Callable[[Bench], object]
    code: str
    reason: str
    fragment: str


class Bench:
    """A session named "reference", ``STEPS`` steps old, and one named "other" that good requests go to."""

    def __init__(self, peer: wire.Peer, server: Any) -> None:
        self.peer = peer
        self.server = server
        self.session = peer.create(PARAMS, ADAM, "reference")
        self.other = peer.create(PARAMS, ADAM, "other")
        for step in range(STEPS):
            peer.step(wire.push(self.session, step + 1, step), PAYLOAD)
        self.state = peer.read("reference")
        self.good = 0  # pushes that "other" has taken

    def create_begin(self, **changes: Any) -> pb.CreateSessionBegin:
        begin = {
            "name": "never",
            "tree": convert.tree_to_proto(trees.flatten(PARAMS).spec),
            "spec": convert.spec_to_proto(ADAM),
            "create_key": secrets.token_hex(16),
        }
        return pb.CreateSessionBegin(**begin | changes)

    def create(self, **changes: Any) -> pb.Session:
        """A creation that would be right without the changes; it needs the tree of PARAMS to succeed."""
        return self.peer.create_from(self.create_begin(**changes), pb.PayloadEnd(digest=wire.digest(b"")))

    def begin(self, *, key: dict[str, Any] | None = None, **changes: Any) -> pb.PushBegin:
        """The next push of the reference session, with changes."""
        begin = wire.push(self.session, STEPS + 1, STEPS, **changes)
        for field, value in (key or {}).items():
            setattr(begin.key, field, value)
        return begin

    def check_nothing_happened(self) -> None:
        """No trace of a bad request is left, and the next good one is served."""
        assert self.peer.read("reference") == self.state
        listed = self.peer.stub.ListSessions(pb.ListSessionsRequest(), timeout=wire.TIMEOUT_S)
        assert [session.name for session in listed.sessions] == ["other", "reference"]
        self.good += 1
        response = self.peer.step(wire.push(self.other, self.good, self.good - 1), PAYLOAD)
        assert response.ack.step == self.good
        wire.until(wire.idle(self.server), "landing buffers and streams given back")
