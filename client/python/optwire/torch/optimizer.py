"""RemoteOptimizer: torch's face of a session. Hooks, groups, closures, checkpoints, pickles are as torch has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch

from optwire import _client, _options, _session
from optwire.torch import amp as amps
from optwire.torch import checkpoints, copies, gradients, leaves, ranks, recipes, remote, translation, ways
from optwire_proto import errors, sessions, specs

_FORMS: Final = ("handle", "full")


class RemoteOptimizer(copies.Detachable):
    """A ``torch.optim.Optimizer`` whose state and arithmetic are on a server.

    Schedulers, hooks, clipping, accumulation, mixed precision and checkpoints work as with any other optimizer; the
    session is made at the first ``step``, from the parameters as they are then. docs/pytorch.md says what holds.

    Example:
      >>> optimizer = RemoteOptimizer(  # doctest: +SKIP
      ...     model.named_parameters(), "adamw", lr=3e-4, betas=(0.9, 0.95), target="localhost:50051"
      ... )

    Args:
      params: parameters, (name, parameter) pairs, or groups, as torch takes them. Names become those of the session's
        leaves; without them they are called "g0.p0" and so on.
      optimizer: a name of torch's, "adamw", or its class; or a spec, or its text, whose arguments are its own.
      target: of the server, "host:port" or "unix:/path"; or
      client: one of ``optwire.connect``, which stays yours to close.
      session: name of the session. If it exists with the same leaves and optimizer, training goes on there and the
        model gets its parameters. None: the server makes a name.
      distributed: where several processes train together: "replicated" (gradients are averaged; rank 0 pushes) or
        "workers" (each rank pushes its own, the server averages).
      worker: the rank of this process in a session of several workers that do not train by ``torch.distributed``, as in
        ``optwire.Client.attach``; None: a worker of its own.
      late: what becomes of gradients that come too late, as their step was made without them, or the session is beyond
        it: "raise" ``StaleStepError``, or "params": they are dropped, counted in ``late_count``, and the model gets the
        newest parameters.
      overlap: whether gradients go up while backward runs, and parameters come down until they are needed.
      amp: who divides by the scale of a ``GradScaler``: the "client", as torch does, or the "server".
      missing_grad: what None in the place of a gradient means: "skip" leaves parameter and slots alone; "error".
      state: what ``state_dict`` holds: a "handle" on the session, or the "full" state in torch's layout.
      transport: as in ``optwire.connect``; with ``target`` only.
      timeout: of each call, in seconds; with ``target`` only.
      grads_codec: how gradients travel, as in ``optwire.Client.create_session``; a session that is joined must have the
        same. None: as they are, or as the session that is joined has it.
      allow_zero: whether a step may be pushed whose learning rates and gradients are all zero.
      telemetry: whether ``last_reply.metrics`` reports norms and the like, at the price of computing them.
      **arguments: torch's own, with its defaults, where ``optimizer`` is torch's.

    Raises:
      TypeError: an argument that the optimizer does not have, or as torch raises it.
      ValueError: a value that torch refuses; as InvalidArgumentError where the refusal is ours.
      UnsupportedError: what is not served: some optimizers of torch, ``distributed="shards"``.
      SpecError, TreeError: a text that is no spec; a parameter that cannot be served.
    """

    state: dict[torch.Tensor, dict[str, Any]]

    def __init__(
        self,
        params: Iterable[Any],
        optimizer: str | type | specs.Spec = "adamw",
        *,
        target: str | None = None,
        client: _client.Client | None = None,
        session: str | None = None,
        distributed: str | None = None,
        worker: int | None = None,
        late: str = "raise",
        overlap: bool = False,
        amp: str = "client",
        missing_grad: str = "skip",
        state: str = "handle",
        transport: str = ways.TRANSPORT,
        timeout: float = ways.TIMEOUT_S,
        grads_codec: str | None = None,
        allow_zero: bool = False,
        telemetry: bool = False,
        **arguments: Any,
    ) -> None:
        self._distributed = ranks.check(distributed)
        if not isinstance(overlap, bool):
            raise _options.wrong("overlap", "True or False", overlap)
        if overlap and self._distributed == "replicated":
            raise errors.UnsupportedError(
                "overlap=True with distributed='replicated': gradients are averaged after they were accumulated, when "
                "they would have gone up already; leave overlap out, or use distributed='workers'",
                subject="overlap",
            )
        if worker is not None and self._distributed is not None:
            raise _options.wrong("worker", "None with distributed=, by which processes have ranks", worker)
        if late == "params" and (overlap or self._distributed is not None):
            raise errors.UnsupportedError(
                "late='params' with overlap=True or distributed=: others go on with gradients that this process drops, "
                "or with parameters that it does not have yet; leave one of them out",
                subject="late",
            )
        self._rank = worker
        self._late = _one_of("late", late, ("raise", "params"))
        self._late_count = 0
        self._overlap = None
        self._form = _one_of("state", state, _FORMS)
        self._amp = _one_of("amp", amp, amps.CHOICES)
        self._missing_grad = _one_of("missing_grad", missing_grad, gradients.MISSING)
        self._allow_zero = allow_zero
        self._telemetry = bool(telemetry)
        self._given = frozenset(arguments)
        self._is_detached = False
        self._pending = None  # a group of which it is unknown whether the session has it
        self._rejoined = None  # that group, once the session was found to have it
        self._last: ranks.Outcome = ranks.Outcome()
        self._recipe = recipes.recipe(optimizer, arguments)
        self._remote = remote.Remote(
            self._recipe,
            ways.way(target, client, transport=transport, timeout_s=timeout, grads_codec=grads_codec),
            client=client,
            name=session,
            workers=self._distributed == "workers",
            rank=worker,
        )
        amps.mark(self, self._amp, self._distributed)
        super().__init__(params, dict(self._recipe.defaults))
        if overlap:
            self._set_up_overlap()
        if session is not None:
            self._find()

    # ---------------------------------------------------------------------------------------------------- stepping

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None, *, weight: float = 1.0) -> Any:
        """Pushes the gradients and writes the new parameters in place; one step of the session.

        Nothing is pushed where no parameter has a gradient, or a ``GradScaler`` found one that is not finite.

        Args:
          closure: evaluates the model again and returns the loss; called once.
          weight: what the gradients count among those of other workers, such as the number of samples behind them.

        Returns:
          What the closure returned.

        Raises:
          DetachedError: a copy that was not attached.
          HyperparameterOwnedError: ``lr`` was edited that a schedule of the spec decides.
          UnsupportedError: a sparse gradient.
          StaleStepError: another client pushed since; call ``pull``, and compute gradients again.
        """
        self._check_attached()
        self._distributed = ranks.check(self._distributed)
        self.synchronize()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with amps.cleared(self):
            scale = amps.scale(self, self._amp, self._distributed, self._parameters())
            if scale is None:
                if self._overlap is not None:
                    self._overlap.stepped(is_made=False)
                return loss
            told = gradients.loss(loss, is_wanted=self._recipe.wants_loss)
            if self._distributed == "replicated":
                outcome = ranks.from_rank_0(lambda: self._push(scale, told, weight), self._parameters())
                self._remote.name = self._remote.name or outcome.session or None
            else:
                outcome = self._push(scale, told, weight)
        if outcome.ack is not None:
            self._last = outcome
        return loss

    def pull(self) -> None:
        """Reads the newest parameters into the model, for example after a ``StaleStepError``.

        Raises:
          DetachedError: a copy that was not attached.
        """
        self._check_attached()
        if self._overlap is not None:
            self._overlap.abandon()
        if self._distributed == "replicated":
            ranks.from_rank_0(lambda: ranks.Outcome(written=self._pull()), self._parameters())
        else:
            self._pull()

    @property
    def session(self) -> _session.Session:
        """The session on the server, made now where there is none; its ``info`` and ``describe`` say more.

        Raises:
          DetachedError: a copy that was not attached, or a rank that has no session of its own.
        """
        self._check_attached()
        if self._follows:
            raise errors.DetachedError("distributed='replicated': rank 0 has the session, the others have none")
        self.synchronize()
        return self._open()

    @property
    def last_reply(self) -> sessions.Ack | None:
        """What the server said to the last push: ``step``, ``durable_step``, ``learning_rate``, ``metrics``."""
        self.synchronize()
        return self._last.ack

    @property
    def late_count(self) -> int:
        """Steps whose gradients came too late, and were dropped for the newest parameters: ``late="params"``."""
        return self._late_count

    @property
    def resent_bytes(self) -> int:
        """Bytes of gradients that ``overlap=True`` sent in vain so far, as they were changed before ``step``."""
        return self._overlap.resent_bytes if self._overlap is not None else 0

    @property
    def _follows(self) -> bool:
        """Whether another process has the session, and this one gets parameters from it."""
        return self._distributed == "replicated" and ranks.rank() > 0

    def _push(self, scale: tuple[float, float], loss: float | None, weight: float) -> ranks.Outcome:
        self._settle()
        factor, grad_scale = scale
        if [id(parameter) for group in self.param_groups for parameter in group["params"]] != self._ids:
            self._name_leaves()  # some frameworks put others in their places
        grads = gradients.gathered(self._remote.leaves, self._missing_grad, factor)
        if not grads and self._distributed != "workers":
            return ranks.Outcome()
        if not self._allow_zero:
            gradients.refuse_phantom(self.param_groups, grads)
        is_new = self._remote.session is None
        if self._overlap is not None and not is_new:
            self._outlive_client()
            self._overlap.push(
                self.param_groups, grads, grad_scale=grad_scale, loss=loss, weight=weight, telemetry=self._telemetry
            )
            return ranks.Outcome()
        try:
            written = self._remote.push(
                self.param_groups, grads, grad_scale=grad_scale, loss=loss, weight=weight, telemetry=self._telemetry
            )
        except errors.StaleStepError:
            if self._late == "raise":
                raise
            written = self._remote.pull()
            self._late_count += 1
        session = self._open()
        if self._overlap is not None:
            self._overlap.stepped(is_made=True)
        if is_new:  # and may have given parameters that have no gradient now
            self._show_handles()
            written = tuple(range(len(self._remote.leaves)))
        return ranks.Outcome(session.name, session.last_ack, written)

    def _find(self) -> None:
        """Goes on with the session of the name that was given, if it exists: before gradients are computed."""
        if self._distributed == "replicated":
            ranks.from_rank_0(lambda: ranks.Outcome(written=self._remote.find(self.param_groups)), self._parameters())
        else:
            self._remote.find(self.param_groups)
        self._show_handles()

    def _pull(self) -> tuple[int, ...]:
        self._open()
        return self._remote.pull()

    def _open(self) -> _session.Session:
        self._settle()
        is_new = self._remote.session is None
        session = self._remote.open(self.param_groups)
        if is_new:
            self._show_handles()
        return session

    # ------------------------------------------------------------------------------------------------------ groups

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; once there is a session, it gets more leaves and keeps what it has.

        After a ``DeadlineError``, ``UnavailableError`` or Ctrl-C it is unknown whether the session has them; the next
        use finds out, and the group is there if it has. Calling again with the same group is safe.

        Raises:
          InvalidArgumentError: a value that cannot be meant, or with a spec, any value at all.
          TreeError: a name that there is already, or a parameter that cannot be served.
        """
        self.synchronize()
        self._settle()
        if self._rejoined is not None and _ids(param_group) == _ids(self._rejoined):
            self._rejoined = None  # the call before this one did it
            return
        if isinstance(param_group, dict):
            where = f"param_groups[{len(self.param_groups)}]"
            self._recipe.check_group({**param_group}, where)
        given = self._given | set(param_group)  # before torch fills in the defaults
        super().add_param_group(param_group)
        try:
            self._name_leaves()
            self._remote.hyperparams.default(self.param_groups, len(self.param_groups) - 1, given)
            if self._remote.session is not None:
                self._remote.extend(self.param_groups)
        except BaseException:
            group = self.param_groups.pop()
            self._name_leaves()
            self._pending = group if self._remote.is_unsure else None
            raise
        self._show_handles()

    def _settle(self) -> None:
        """After a lost answer finds out what the session is, and has the group that it was extended by."""
        if self._remote.is_unsure:
            self._remote.settle(self.param_groups, self._rejoin)
            self._pending = None
            self._show_handles()

    def _rejoin(self) -> None:
        if self._pending is not None:
            self.param_groups.append(self._pending)
            self._pending, self._rejoined = None, self._pending
            self._name_leaves()

    def _name_leaves(self) -> None:
        known = {id(leaf.parameter): leaf.name for leaf in self._remote.leaves}
        self._remote.leaves = leaves.named(self.param_groups, known)
        self._ids = [id(parameter) for group in self.param_groups for parameter in group["params"]]

    def _parameters(self) -> list[torch.Tensor]:
        return [leaf.parameter for leaf in self._remote.leaves]

    # ------------------------------------------------------------------------------------------------- checkpoints

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """A handle on the session as it is, small and of plain types; ``full_state_dict`` with ``state="full"``."""
        if self._form == "full":
            return self.full_state_dict()
        self.synchronize()
        self._show_handles()
        return super().state_dict()

    @torch._disable_dynamo
    def full_state_dict(self) -> dict[str, Any]:
        """The slots, read from the server, in the layout of torch's own optimizer, which can load it.

        Slots have the server's element types: 32 bits for parameters of 16, whose copy in 32 comes along as "params".
        """
        if self._follows:
            raise errors.DetachedError("full_state_dict: distributed='replicated', and rank 0 has the session")
        self.synchronize()
        self._settle()
        handles, slots = self.state, self._remote.slots()
        try:
            self.state = {leaf.parameter: slots[leaf.name] for leaf in self._remote.leaves if slots.get(leaf.name)}
            return super().state_dict()
        finally:
            self.state = handles

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a handle of the session as it is, or slots in torch's layout, of this optimizer or of torch's own.

        Values of groups become commands of the next step. Slots go to the parameters of the same names where both sides
        have names, otherwise by position; shapes are checked; no element type is lost.

        Raises:
          ValueError: groups, names, slots or shapes that do not fit.
          OutOfStepError: a handle of another step than the session's.
          InvalidArgumentError: a handle of another session.
        """
        self.synchronize()
        self._settle()
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        own_names = [group.get("param_names") for group in self.param_groups]
        names = leaves.by_group(self._remote.leaves, self.param_groups)
        entries = checkpoints.by_name(state_dict, names, own_names)
        owned = {translation.RATE} if self._recipe.is_scheduled else set()
        merged = checkpoints.merged(self.param_groups, state_dict["param_groups"], leaving_out=owned)
        changed = [{**ours, **new} for ours, new in zip(self.param_groups, merged, strict=True)]
        self._remote.check_fixed(changed)
        handle = checkpoints.handle(state_dict["state"])
        if self._follows:
            pass
        elif handle is not None:
            self._remote.load_handle(handle, self.param_groups)
        else:
            self._remote.load(entries, changed)
        for group, values in zip(self.param_groups, merged, strict=True):
            group.update(values)
        self._show_handles()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _show_handles(self) -> None:
        """Fills ``state``: where it is empty, torch's own tools step to have it filled."""
        handle = None
        if self._remote.session is not None:
            handle = checkpoints.Handle(self._remote.session.name, self._remote.session.step_count)
        elif self._last.ack is not None:  # another rank has the session
            handle = checkpoints.Handle(self._last.session, self._last.ack.step)
        for leaf in self._remote.leaves:
            if handle is not None or not self.state.get(leaf.parameter):
                self.state[leaf.parameter] = (handle or checkpoints.NONE).entry(leaf.name)

    def __repr__(self) -> str:
        step = self._remote.session.step_count if self._remote.session else 0
        where = f"target {self._remote.way.target!r}, session {self._remote.name!r}, step {step}"
        return f"{super().__repr__()}\n{self._recipe.name} at {where}{', detached' * self._is_detached}"


def _ids(group: Any) -> list[int]:
    """Identities of a group's parameters, with names or without."""
    params = group.get("params", ()) if isinstance(group, dict) else ()
    listed = [params] if isinstance(params, torch.Tensor) else params if isinstance(params, list | tuple) else ()
    return [id(param[1] if isinstance(param, tuple) else param) for param in listed]


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise _options.wrong(name, " or ".join(map(repr, choices)), value)
    return str(value)
