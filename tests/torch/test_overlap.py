"""``overlap=True``: the same bits as without, whatever the loop does, and nobody uses parameters that have not come."""

from __future__ import annotations

import copy
import gc
import io
import pickle  # noqa: TID251  what copies of an optimizer are made with, by others
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import optwire
from optwire_server import testing

torch = pytest.importorskip("torch", reason="torch is an optional test dependency; `make test` installs it")

from tests.e2e import proxy as proxies  # noqa: E402
from tests.e2e import wire  # noqa: E402
from tests.torch import training  # noqa: E402

from optwire.torch import RemoteOptimizer  # noqa: E402

F = torch.nn.functional
GLOBAL_HOOKS = torch.nn.modules.module._global_forward_pre_hooks
STEPS = 4


def network(dtype: Any = torch.float32) -> Any:
    """Always the same one; long enough for its gradients to travel in frames."""
    torch.manual_seed(7)
    layers = [torch.nn.Linear(16, 128), torch.nn.Tanh(), torch.nn.Linear(128, 160), torch.nn.Linear(160, 2)]
    return torch.nn.Sequential(*layers).to(dtype)


def batch(step: int, dtype: Any = torch.float32) -> Any:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).to(dtype)


def loss(model: Any, step: int) -> Any:
    return model(batch(step, next(model.parameters()).dtype)).square().mean()


def plain_step(model: Any, optimizer: Any, step: int) -> None:
    optimizer.zero_grad()
    loss(model, step).backward()
    optimizer.step()


Step = Callable[[Any, Any, int], None]


class Pair:
    """Two models that go through the same loop, one of them with ``overlap=True``."""

    def __init__(self, target: str, *, make: Callable[[], Any] = network, **arguments: Any) -> None:
        usual = {} if "optimizer" in arguments else {"optimizer": "adamw", "lr": 1e-2}
        options = {"transport": "stream", **usual, **arguments}
        groups = options.pop("groups", lambda model: model.named_parameters())
        self.models = make(), make()
        self.plain, self.overlapped = self.optimizers = [
            RemoteOptimizer(groups(model), target=target, overlap=overlap, **options)
            for model, overlap in zip(self.models, (False, True), strict=True)
        ]

    @property
    def is_under_way(self) -> bool:
        return self.overlapped._overlap._pushed is not None

    def train(self, step: Step = plain_step, steps: int = STEPS) -> None:
        under_way = set()
        for index in range(steps):
            for model, optimizer in zip(self.models, self.optimizers, strict=True):
                step(model, optimizer, index)
            under_way.add(self.is_under_way)
        assert True in under_way, "step returned before the parameters had come"
        self.check()

    def check(self) -> None:
        self.overlapped.synchronize()
        assert training.equal(*map(training.values, self.models))
        assert self.plain.last_reply.step == self.overlapped.last_reply.step

    def close(self) -> None:
        for optimizer in self.optimizers:
            if optimizer._remote.session is not None:
                optimizer.synchronize()
                optimizer._remote.client.delete_session(optimizer._remote.session.name)
            optimizer.close()


@pytest.fixture
def pair(server: testing.Serving) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(target: str = server.target, **arguments: Any) -> Pair:
        made.append(Pair(target, **arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


# ------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize(
    "options", [{}, {"transport": "unary"}, {"transport": "shared_memory"}, {"grads_codec": "int8"}], ids=str
)
def test_the_bits_are_those_without_overlap(pair: Callable[..., Pair], options: dict[str, str]) -> None:
    both = pair(**options)
    both.train()
    assert both.overlapped.resent_bytes == 0
    assert both.plain.resent_bytes == 0


def test_gradients_go_up_before_the_step(pair: Callable[..., Pair]) -> None:
    both = pair()
    both.train(steps=2)
    model, optimizer = both.models[1], both.overlapped
    optimizer.zero_grad()
    loss(model, 2).backward()
    size = sum(4 * p.numel() for p in model.parameters())
    feed = optimizer._overlap._stage._feed
    wire.until(lambda: feed.sent_bytes == size, "all were sent")
    optimizer.step()
    plain_step(both.models[0], both.plain, 2)
    both.check()


def test_micro_batches_go_up_in_the_last_of_them(pair: Callable[..., Pair]) -> None:
    def step(model: Any, optimizer: Any, index: int) -> None:
        optimizer.zero_grad()
        for micro in range(4):
            (loss(model, 4 * index + micro) / 4).backward()
        optimizer.step()
        resent.append(optimizer.resent_bytes)

    resent: list[int] = []
    both = pair()
    both.train(step)
    assert resent[3] <= resent[5] == resent[7] == both.overlapped.resent_bytes, "learned in the first step"

    def fewer(model: Any, optimizer: Any, index: int) -> None:
        optimizer.zero_grad()
        for micro in range(4 - index):
            loss(model, 4 * index + micro).backward()
        optimizer.step()

    both.train(fewer)


@pytest.mark.parametrize("clipped", [True, False])
def test_clipped_gradients_are_sent_again_where_clipping_changed_them(pair: Callable[..., Pair], clipped: bool) -> None:
    def step(model: Any, optimizer: Any, index: int) -> None:
        optimizer.zero_grad()
        loss(model, index).backward()
        if optimizer is both.overlapped and index:
            feed = optimizer._overlap._stage._feed
            wire.until(lambda: feed.sent_bytes >= 4 * sum(p.numel() for p in model.parameters()), "all were sent")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3 if clipped else 1e3)
        optimizer.step()

    both = pair()
    both.train(step)
    size = 4 * sum(p.numel() for p in both.models[0].parameters())
    assert both.overlapped.resent_bytes == (size * (STEPS - 1) if clipped else 0)


def test_changes_that_no_counter_sees_are_sent_too(pair: Callable[..., Pair]) -> None:
    def step(model: Any, optimizer: Any, index: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        loss(model, index).backward()
        for p in model.parameters():
            p.grad.data.clamp_(-1e-3, 1e-3)
        model[0].weight.grad.numpy()[0] = -0.0
        if index == 2:
            model[3].bias.grad = model[3].bias.grad.t().clone() * 2
        optimizer.step()
        for p in model.parameters():
            p.grad.zero_()  # while the push is on its way

    pair().train(step)


@pytest.mark.parametrize("amp", ["client", "server"])
def test_a_grad_scaler_is_served_in_both_ways(pair: Callable[..., Pair], amp: str) -> None:
    def step(model: Any, optimizer: Any, index: int) -> None:
        scaler = scalers.setdefault(id(optimizer), torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, index)
        scaler.scale(value).backward()
        if index == 2:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()

    scalers: dict[int, Any] = {}
    both = pair(amp=amp)
    both.train(step, steps=6)
    assert both.overlapped.last_reply.step == 5
    assert amp == "client" or both.overlapped.resent_bytes <= 4 * sum(p.numel() for p in both.models[0].parameters())


def test_groups_and_schedulers_are_as_without(pair: Callable[..., Pair]) -> None:
    def groups(model: Any) -> list[dict[str, Any]]:
        named = [*model.named_parameters()]
        return [{"params": named[:2], "lr": 0.01}, {"params": named[2:], "lr": 0.02, "weight_decay": 0.1}]

    def step(model: Any, optimizer: Any, index: int) -> None:
        if id(optimizer) not in clocks:
            clocks[id(optimizer)] = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.02, 0.03], total_steps=20)
        plain_step(model, optimizer, index)
        clocks[id(optimizer)].step()
        if index == 2:
            optimizer.param_groups[1]["weight_decay"] = 0.2

    clocks: dict[int, Any] = {}
    both = pair(groups=groups)
    both.train(step, steps=5)
    numbers = [
        [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        for optimizer in both.optimizers
    ]
    assert numbers[0] == numbers[1]
    changes = [optimizer.session.info().changes for optimizer in both.optimizers]
    assert changes[0] == changes[1]
    assert len(changes[0]) == 4


def test_what_another_client_sets_shows_and_an_edit_since_the_step_wins(pair: Callable[..., Pair]) -> None:
    both = pair(optimizer="sgd", lr=0.1, momentum=0.5)
    both.train(steps=2)
    optimizer = both.overlapped
    path = "per_leaf.optimizer.torch_sgd."
    optimizer.session.set_hyperparams({path + "momentum": 0.7, path + "weight_decay": 0.5})
    plain_step(both.models[1], optimizer, 2)
    optimizer.param_groups[0]["weight_decay"] = 0.25
    optimizer.synchronize()
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.7, 0.25)
    plain_step(both.models[1], optimizer, 3)
    assert [dict(change.values) for change in optimizer.session.info().changes][-1] == {path + "weight_decay": 0.25}
    both.plain.session.set_hyperparams({path + "momentum": 0.7, path + "weight_decay": 0.5})
    plain_step(both.models[0], both.plain, 2)
    both.plain.param_groups[0]["weight_decay"] = 0.25
    plain_step(both.models[0], both.plain, 3)
    both.check()


def test_a_rate_that_the_spec_decides_shows_at_the_next_door(pair: Callable[..., Pair]) -> None:
    both = pair(optimizer="adam(exponential_decay(0.1, 1, 0.5))")
    both.train()
    rates = [optimizer.param_groups[0]["lr"] for optimizer in both.optimizers]
    assert rates == [pytest.approx(0.1 / 2 ** (STEPS - 1))] * 2


def test_frozen_and_missing_gradients_alternate(pair: Callable[..., Pair]) -> None:
    def step(model: Any, optimizer: Any, index: int) -> None:
        model[2].weight.requires_grad_(index not in (1, 2))
        optimizer.zero_grad()
        loss(model, index).backward()
        if index % 2:
            model[0].bias.grad = None
        optimizer.step()

    pair().train(step, steps=6)


def test_parameters_of_16_bits(pair: Callable[..., Pair]) -> None:
    both = pair(make=lambda: network(torch.bfloat16))
    both.train()
    assert both.models[1][0].weight.dtype is torch.bfloat16


def test_a_group_that_joins_and_parameters_that_are_written_to(pair: Callable[..., Pair]) -> None:
    both = pair(groups=lambda model: [*model.named_parameters()][:4])

    def step(model: Any, optimizer: Any, index: int) -> None:
        if index == 2:
            optimizer.add_param_group({"params": [*model.named_parameters()][4:], "lr": 0.1})
        if index == 3:
            optimizer.synchronize()
            with torch.no_grad():
                model[0].weight.clamp_(-0.05, 0.05)
        plain_step(model, optimizer, index)

    both.train(step, steps=5)


def test_a_closure(pair: Callable[..., Pair]) -> None:
    def step(model: Any, optimizer: Any, index: int) -> None:
        def closure() -> Any:
            optimizer.zero_grad()
            value = loss(model, index)
            value.backward()
            return value

        assert optimizer.step(closure) > 0

    pair().train(step)


# ------------------------------------------------------------------------------------------------------- models


class Unusual(torch.nn.Module):
    """Submodules whose parameters are used without calling them, a parameter of its own, a tied one, a list."""

    def __init__(self, *, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = torch.nn.Linear(16, 64)
        self.offset = torch.nn.Parameter(torch.randn(64))
        self.attention = torch.nn.MultiheadAttention(64, 4, batch_first=True)
        self.layer = torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.extra = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(64)) for _ in range(2)])
        self.normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(64, 64))
        self.out = torch.nn.Linear(64, 16)
        self.out.weight = torch.nn.Parameter(self.embed.weight.detach().t().clone())
        self.reentrant = reentrant

    def forward(self, inputs: Any) -> Any:
        hidden = self.embed(inputs)[None] + self.offset
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        if self.reentrant is None or not self.training:
            hidden = self.layer(hidden)
        else:
            hidden = torch.utils.checkpoint.checkpoint(self.layer, hidden, use_reentrant=self.reentrant)
        return self.out(self.normed(hidden) * self.extra[0] + self.extra[1])


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_modules_that_use_what_others_own_wait_for_it(pair: Callable[..., Pair], reentrant: bool | None) -> None:
    def step(model: Any, optimizer: Any, index: int) -> None:
        plain_step(model, optimizer, index)
        if index % 2:  # by the short ways that torch takes where nothing is trained
            model.eval()
            with torch.no_grad():
                seen[id(model)] = model(batch(index)).clone()
            model.train()
            if len(seen) == 2:
                assert torch.equal(*seen.values())
                seen.clear()

    seen: dict[int, Any] = {}
    pair(make=lambda: Unusual(reentrant=reentrant)).train(step)


class Method(torch.nn.Module):
    """Is not called itself, but by a method, which uses a parameter before anything is called."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.nn.Parameter(torch.ones(16))
        self.body = network()

    def loss(self, inputs: Any) -> Any:
        return self.body(inputs + self.offset).square().mean()


def test_where_it_is_not_known_who_uses_a_parameter_step_waits(pair: Callable[..., Pair]) -> None:
    both = pair(make=Method)
    for index in range(3):
        for model, optimizer in zip(both.models, both.optimizers, strict=True):
            optimizer.zero_grad()
            model.loss(batch(index)).backward()
            optimizer.step()
        assert not both.is_under_way
        assert training.equal(*map(training.values, both.models))


def test_a_compiled_model_waits_before_it_runs(pair: Callable[..., Pair]) -> None:
    compiled: dict[int, Any] = {}

    def step(model: Any, optimizer: Any, index: int) -> None:
        runs = compiled.setdefault(id(model), torch.compile(model, backend="eager"))
        optimizer.zero_grad()
        runs(batch(index)).square().mean().backward()
        optimizer.step()

    with pytest.warns(UserWarning, match="global hooks"):
        pair().train(step)
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize("others", [False, True])
def test_a_module_waits_only_for_what_it_uses(server: testing.Serving, client: optwire.Client, others: bool) -> None:
    """The reply stops in the middle: what has come is used, what has not is waited for, even if others push then."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(16, 20_000), torch.nn.Linear(20_000, 20))
    twin = copy.deepcopy(model)
    ran = [threading.Event(), threading.Event()]
    failures: list[BaseException] = []

    def forward() -> None:
        try:
            loss(model, 3)
        except optwire.OptwireError as exc:
            failures.append(exc)

    with proxies.before(server.target) as proxy:
        optimizer = RemoteOptimizer(
            model.named_parameters(), "sgd", lr=0.1, target=proxy.target, overlap=True, transport="stream"
        )
        for index in range(2):
            plain_step(model, optimizer, index)
            optimizer.synchronize()
        optimizer.zero_grad()
        loss(model, 2).backward()
        hooks = [layer.register_forward_hook(lambda *_, at=at: ran[at].set()) for at, layer in enumerate(model)]
        fault = proxy.fail(proxies.DOWN, messages=3, act="hold")  # the ack and 2 MiB: all of the first layer
        optimizer.step()
        thread = threading.Thread(target=forward)
        thread.start()
        assert ran[0].wait(20)
        assert fault.done.wait(20)
        assert not ran[1].is_set()
        if others:
            with client.attach(optimizer._remote.name) as other:
                newest = other.step({name: p.grad.numpy() for name, p in model.named_parameters()})
        proxy.heal()
        thread.join(20)
        for hook in hooks:
            hook.remove()
        if others:
            assert not ran[1].is_set(), "parameters of two steps are not used together"
            assert [type(exc) for exc in failures] == [optwire.StaleStepError]
            assert all(torch.equal(p, torch.from_numpy(newest[name])) for name, p in model.named_parameters())
        else:
            assert ran[1].is_set()
            local = torch.optim.SGD(twin.parameters(), lr=0.1)
            for index in range(3):
                plain_step(twin, local, index)
            assert training.drift(twin, model) < training.RELATIVE
        client.delete_session(optimizer.session.name)
        optimizer.close()


# -------------------------------------------------------------------------------------------------------- doors


DOORS: dict[str, Callable[[Any, Any], Any]] = {
    "forward": lambda model, optimizer: model(batch(0)),
    "evaluation": lambda model, optimizer: torch.no_grad()(model.eval())(batch(0)),
    "inference": lambda model, optimizer: torch.inference_mode()(model)(batch(0)),
    "module.state_dict": lambda model, optimizer: model.state_dict(),
    "module.load_state_dict": lambda model, optimizer: model.load_state_dict({}, strict=False),
    "synchronize": lambda model, optimizer: optimizer.synchronize(),
    "step": lambda model, optimizer: optimizer.step(),
    "last_reply": lambda model, optimizer: optimizer.last_reply,
    "session": lambda model, optimizer: optimizer.session,
    "pull": lambda model, optimizer: optimizer.pull(),
    "state_dict": lambda model, optimizer: optimizer.state_dict(),
    "full_state_dict": lambda model, optimizer: optimizer.full_state_dict(),
    "load_state_dict": lambda model, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "add_param_group": lambda model, optimizer: optimizer.add_param_group({"params": [("new", _new())]}),
    "deepcopy": lambda model, optimizer: copy.deepcopy(optimizer),
    "pickle": lambda model, optimizer: pickle.dumps(optimizer),
    "close": lambda model, optimizer: optimizer.close(),
    "backward": lambda model, optimizer: model[0].weight.sum().backward(),
}


def _new() -> Any:
    return torch.nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize("door", DOORS)
def test_behind_every_door_are_the_new_parameters(server: testing.Serving, client: optwire.Client, door: str) -> None:
    model, twin = network(), network()
    optimizer = RemoteOptimizer(
        model.named_parameters(), "sgd", lr=0.1, target=server.target, transport="stream", overlap=True
    )
    local = torch.optim.SGD(twin.parameters(), lr=0.1)
    for index in range(2):
        plain_step(model, optimizer, index)
        plain_step(twin, local, index)
    name = optimizer._remote.name
    optimizer.zero_grad()
    before = training.values(model)
    assert training.drift(model, twin) > 1e-4, "read directly, they are the old ones until somebody has waited"
    DOORS[door](model, optimizer)
    assert training.drift(model, twin) < training.RELATIVE
    assert not training.equal(before, training.values(model))
    assert training.values(copy.deepcopy(model)), "and modules may be copied again"
    optimizer.close()
    client.delete_session(name)


def test_a_copy_of_a_module_is_refused_while_it_would_have_old_parameters(pair: Callable[..., Pair]) -> None:
    both = pair()
    both.train(steps=2)
    plain_step(both.models[1], both.overlapped, 2)
    for copied in (copy.deepcopy, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(optwire.UnsupportedError, match="synchronize"):
            copied(both.models[1])
    plain_step(both.models[0], both.plain, 2)
    both.check()
    torch.save(both.models[1], io.BytesIO())


def test_a_dictionary_may_have_hooks_of_others(pair: Callable[..., Pair]) -> None:
    both = pair()
    both.train(steps=2)
    for model, optimizer in zip(both.models, both.optimizers, strict=True):
        plain_step(model, optimizer, 2)
    called = []
    for layer in both.models[1]:
        layer.register_state_dict_pre_hook(lambda *_: called.append("pre"))
    training_state = both.models[1].state_dict()
    assert len(called) == len(both.models[1])
    assert all(torch.equal(training_state[name], value) for name, value in both.models[0].state_dict().items())
    copy.deepcopy(both.models[1])
    both.train()
    assert [len(layer._state_dict_pre_hooks) for layer in both.models[1]] == [1] * 4


def test_a_parameter_written_to_while_its_values_are_coming_is_an_error(pair: Callable[..., Pair]) -> None:
    both = pair()
    both.train(steps=2)
    for model, optimizer in zip(both.models, both.optimizers, strict=True):
        plain_step(model, optimizer, 2)
    with torch.no_grad():
        both.models[1][2].weight.clamp_(-0.01, 0.01)
    with pytest.raises(optwire.UnsupportedError, match=r"params/2\.weight: written to while"):
        both.models[1](batch(0))
    both.train()


# ------------------------------------------------------------------------------------------------------- failures


def test_an_answer_that_is_lost_is_asked_for_again_at_the_next_door(
    server: testing.Serving, client: optwire.Client
) -> None:
    model, twin = network(), network()
    usual = {"lr": 0.1, "momentum": 0.9, "session": "lost-late"}
    patient = RemoteOptimizer(model.named_parameters(), "sgd", client=client, **usual)
    assert patient.session.step_count == 0, "compiled, so that nothing below takes long"
    with proxies.before(server.target) as proxy:
        optimizer = RemoteOptimizer(
            model.named_parameters(), "sgd", target=proxy.target, transport="stream", timeout=1.5, overlap=True, **usual
        )
        local = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
        for index in range(3):
            plain_step(twin, local, index)
        for index in range(2):
            plain_step(model, optimizer, index)
        optimizer.synchronize()
        optimizer.zero_grad()
        loss(model, 2).backward()
        proxy.fail(proxies.DOWN, bytes=0, act="hold")
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the push has copies of its own
        before = training.values(model)
        with pytest.raises(optwire.DeadlineError, match="may or may not"):
            model(batch(3))
        assert training.equal(before, training.values(model))
        with pytest.raises(optwire.DeadlineError):
            optimizer.state_dict()
        proxy.heal()
        model(batch(3))
        assert training.drift(twin, model) <= training.RELATIVE
        assert client.attach("lost-late").info().step == 3
        proxy.fail(proxies.DOWN, bytes=0, act="hold")
        loss(model, 3).backward()
        optimizer.step()
        with pytest.raises(optwire.DeadlineError):
            optimizer.synchronize()
        proxy.heal()
        optimizer.pull()  # goes on from wherever the session is
        assert optimizer.last_reply.step == client.attach("lost-late").info().step
        optimizer.close()
    client.delete_session("lost-late")


def test_a_connection_that_is_cut_during_backward_costs_nothing_but_time(server: testing.Serving) -> None:
    with proxies.before(server.target) as proxy:
        both = Pair(proxy.target)

        def step(model: Any, optimizer: Any, index: int) -> None:
            if optimizer is both.overlapped and index:
                hook = model[2].register_full_backward_hook(lambda *_: cut())
            plain_step(model, optimizer, index)
            if optimizer is both.overlapped and index:
                hook.remove()

        def cut() -> None:
            feed = both.overlapped._overlap._stage._feed
            wire.until(lambda: feed is None or feed.sent_bytes > 0, "some was sent")
            proxy.cut()

        both.train(step, steps=5)
        assert both.overlapped.resent_bytes > 0
        both.close()


def test_a_push_that_is_refused_is_told_at_the_next_door_and_is_over(pair: Callable[..., Pair]) -> None:
    both = pair(optimizer="on_nonfinite(adam(0.1))")
    both.train(steps=2)
    model, optimizer = both.models[1], both.overlapped
    before = training.values(model)
    optimizer.zero_grad()
    loss(model, 2).backward()
    model[0].bias.grad[0] = float("nan")
    optimizer.step()
    with pytest.raises(optwire.NonFiniteError, match=r"0\.bias"):
        model(batch(2))
    assert training.equal(before, training.values(model))
    both.train()


def test_parameters_of_another_step_are_not_mixed(pair: Callable[..., Pair], client: optwire.Client) -> None:
    """Another client pushes: the step after is told so, and ``pull`` goes on from there."""
    both = pair()
    both.train(steps=2)
    model, optimizer = both.models[1], both.overlapped
    with client.attach(optimizer.session.name) as other:
        other.step({name: p.detach().numpy() for name, p in model.named_parameters()})
    plain_step(model, optimizer, 2)
    with pytest.raises(optwire.StaleStepError):
        optimizer.synchronize()
    optimizer.pull()
    plain_step(model, optimizer, 3)
    assert optimizer.last_reply.step == 4


def test_averages_of_other_processes_come_too_late_for_it() -> None:
    with pytest.raises(optwire.UnsupportedError, match="replicated"):
        RemoteOptimizer(network().parameters(), "sgd", target="localhost:1", overlap=True, distributed="replicated")


# -------------------------------------------------------------------------------------------------------- endings


def hooks_of(model: Any) -> int:
    own = sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())
    modules = sum(len(m._state_dict_pre_hooks) + len(m._load_state_dict_pre_hooks) for m in model.modules())
    return own + modules + len(GLOBAL_HOOKS)


@pytest.mark.parametrize("ending", ["close", "del", "del under way"])
def test_nothing_is_left_behind(server: testing.Serving, client: optwire.Client, ending: str) -> None:
    gc.collect()  # what other tests left
    model, twin = network(), network()
    threads, before = proxies.threads(), hooks_of(model)
    optimizer = RemoteOptimizer(
        model.parameters(), "sgd", lr=0.1, target=server.target, overlap=True, transport="stream"
    )
    assert hooks_of(model) == before + 1 + len([*model.parameters()])
    local = torch.optim.SGD(twin.parameters(), lr=0.1)
    for index in range(3):
        plain_step(model, optimizer, index)
        plain_step(twin, local, index)
    name, inside = optimizer._remote.name, weakref.ref(optimizer._overlap)
    if ending == "del":
        optimizer.synchronize()
    if ending == "close":
        optimizer.close()
        optimizer.close()
    else:
        del optimizer
        gc.collect()
        assert inside() is None
    assert training.drift(model, twin) < training.RELATIVE, "the last step is not lost"
    assert hooks_of(model) == before
    client.delete_session(name)
    wire.until(lambda: proxies.threads() <= threads, "threads ended")


def test_a_collector_on_any_thread_may_end_an_optimizer(server: testing.Serving, client: optwire.Client) -> None:
    """Even on one that the push needs: it does not wait there, and the last step is not lost."""
    model, twin = network(), network()
    with proxies.before(server.target) as proxy:
        optimizer = RemoteOptimizer(
            model.parameters(),
            "sgd",
            lr=0.1,
            target=proxy.target,
            session="collected",
            overlap=True,
            transport="stream",
        )
        local = torch.optim.SGD(twin.parameters(), lr=0.1)
        for index in range(3):
            plain_step(twin, local, index)
            optimizer.synchronize()
            if index == 2:
                fault = proxy.fail(proxies.DOWN, bytes=0, act="hold")
            plain_step(model, optimizer, index)
        held, optimizer = [optimizer], None
        collector = threading.Thread(target=held.clear, daemon=True)
        collector.start()
        collector.join(10)
        assert not collector.is_alive()
        assert fault.done.wait(10)
        proxy.heal()
        wire.until(lambda: training.drift(model, twin) < training.RELATIVE, "the parameters are written")
    client.delete_session("collected")


SCRIPT = """
import sys, torch
from optwire.torch import RemoteOptimizer
model = torch.nn.Linear(200, 200)
optimizer = RemoteOptimizer(model.parameters(), "sgd", lr=0.1, target=sys.argv[1], session="script", overlap=True,
                            transport="stream")
for _ in range(3):
    optimizer.zero_grad()
    model(torch.ones(1, 200)).sum().backward()
    optimizer.step()
"""


def test_a_script_that_ends_with_a_step_has_made_it(server: testing.Serving, client: optwire.Client) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, server.target], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert client.attach("script").info().step == 3
    client.delete_session("script")


def test_a_copy_has_an_overlap_of_its_own(pair: Callable[..., Pair], client: optwire.Client) -> None:
    both = pair()
    both.train(steps=2)
    model, optimizer = copy.deepcopy((both.models[1], both.overlapped))
    assert optimizer._overlap is not both.overlapped._overlap
    with pytest.raises(optwire.DetachedError):
        plain_step(model, optimizer, 2)
    optimizer.attach("overlap-copy")
    for index in (2, 3):
        for each, its in ((model, optimizer), (both.models[0], both.plain), (both.models[1], both.overlapped)):
            plain_step(each, its, index)
    both.check()
    optimizer.synchronize()
    assert training.equal(training.values(model), training.values(both.models[1]))
    optimizer.close()
    client.delete_session("overlap-copy")
