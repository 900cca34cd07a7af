"""Membership: a handle as one of its session's workers, from joining to leaving. No gRPC, no protobuf."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from typing import Final

from optwire import _deadlines, _options, _rpc
from optwire_proto import aggregations, errors, sessions

# A lease is renewed so often that two calls in a row may be lost.
_BEATS_PER_LEASE: Final = 3
# A call takes longer than a very short lease where the machine is busy; it renews the lease nevertheless.
_BEAT_S: Final = 1.0

_log = logging.getLogger("optwire")


class Membership:
    """What one handle has to do with the workers of its session. Used under the handle's lock, but for ``leave``.

    Args:
      channel: to the server.
      info: of the session.
      worker: the handle's.

    Attributes:
      beats: what keeps the lease alive, once it has joined; to be ended with the handle.
      epoch: for the keys of pushes; 0: it has not joined.
    """

    def __init__(self, channel: _rpc.Channel, info: sessions.SessionInfo, worker: str) -> None:
        self._channel = channel
        self._session_id = info.id
        self._worker = worker
        self._may_join = info.aggregation.mode is not aggregations.Mode.SINGLE and info.aggregation.includes(worker)
        self._join_key = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._is_over = False
        self._pid = os.getpid()  # of the process that the worker is
        self.beats = Beats(channel, info.id, worker)
        self.epoch = 0

    def join(self, deadline: _deadlines.Deadline) -> int | None:
        """Joins, where the session has workers and it has not joined before; the seq of the worker's last push.

        None: nothing was to be done. From now on the handle's process is heard of, and other handles of the same worker
        are replaced.
        """
        if not self._may_join or self.epoch:
            return None
        seq, epoch, lease_s = _deadlines.retried(
            lambda _: self._channel.join_session(
                deadline, id=self._session_id, worker=self._worker, join_key=self._join_key
            ),
            deadline,
            "joining the session's workers",
        )
        self.epoch = epoch
        self.beats.start(epoch, lease_s)
        return seq

    def leave(self, deadline: _deadlines.Deadline) -> None:
        """Has nobody wait for the worker any more; one try, as the end of its lease does the same. Idempotent."""
        with self._lock:
            was_over, self._is_over = self._is_over, True
        self.beats.end()
        if was_over or not self.epoch or os.getpid() != self._pid:
            return
        try:
            self._channel.leave_session(deadline, id=self._session_id, worker=self._worker, epoch=self.epoch)
        except errors.OptwireError as exc:
            _log.debug("leaving the session's workers: %s", exc)


class Beats:
    """A thread that keeps a worker's lease alive; it must not keep the handle alive, and so knows nothing of it.

    Args:
      channel: to the server.
      session_id: of the session.
      worker: whose lease it is.
    """

    def __init__(self, channel: _rpc.Channel, session_id: str, worker: str) -> None:
        self._channel = channel
        self._session_id = session_id
        self._worker = worker
        self._ended = threading.Event()

    def start(self, epoch: int, lease_s: float) -> None:
        """Begins with a lease that was just given, unless it lasts for ever."""
        if lease_s < _options.TIMEOUT_MAX_S:
            threading.Thread(
                target=self._run, args=(epoch, lease_s / _BEATS_PER_LEASE), name="optwire-heartbeat", daemon=True
            ).start()

    def end(self) -> None:
        """Ends the thread, soon."""
        self._ended.set()

    def _run(self, epoch: int, every_s: float) -> None:
        while not self._ended.wait(every_s):
            deadline = _deadlines.Deadline(max(every_s, _BEAT_S))
            try:
                self._channel.heartbeat(deadline, id=self._session_id, worker=self._worker, epoch=epoch)
            except errors.DetachedError:
                return
            except _deadlines.OUTCOME_UNKNOWN as exc:  # a server that is away may come back
                _log.debug("heartbeat: %s", exc)
            except errors.OptwireError as exc:  # the handle's next call says the same
                _log.info("no further heartbeat: %s", exc)
                return
