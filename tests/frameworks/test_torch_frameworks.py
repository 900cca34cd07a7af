"""What frameworks around torch do to an optimizer, beyond what the examples show."""

from __future__ import annotations

import pathlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import optwire
from optwire_proto import errors

torch = pytest.importorskip("torch")

from optwire.torch import RemoteOptimizer  # noqa: E402  it needs torch

nn = torch.nn
STEPS = 8

# What frameworks warn of in each other, and in data this small, is not ours to mend.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:::optwire")]


class Counter:
    """Passes connections on to a server and counts the bytes that go there."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.sent = 0
        self._there = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            there = socket.create_connection(self._there)
            for source, sink, counts in ((here, there, True), (there, here, False)):
                threading.Thread(target=self._pass_on, args=(source, sink, counts), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        while data := source.recv(1 << 16):
            self.sent += len(data) if counts else 0
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def counter(target: str) -> Iterator[Counter]:
    found = Counter(target)
    yield found
    found.close()


def data(number: int) -> Any:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(number))


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def train(model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(data(step)).square().mean().backward()
        optimizer.step()


def assert_close(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


# ----------------------------------------------------------------------------------------------------- Accelerate


def accelerator(**options: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=True, **options)


@pytest.mark.parametrize("form", ["handle", "full"])
def test_prepare_moves_nothing_before_the_first_step(form: str, counter: Counter) -> None:
    model = nn.Linear(1000, 500)
    optimizer = RemoteOptimizer(model.named_parameters(), "adamw", target=counter.target, state=form)
    accelerator().prepare(model, optimizer)
    assert counter.sent == 0


def test_prepare_moves_less_than_10_kb_where_there_is_a_session(counter: Counter) -> None:
    model = nn.Linear(1000, 500)
    optimizer = RemoteOptimizer(model.named_parameters(), "adamw", target=counter.target)
    assert optimizer.session.step_count == 0
    before = counter.sent
    assert before > 2_000_000  # the parameters
    accelerator().prepare(model, optimizer)
    assert counter.sent - before < 10_000


@pytest.mark.parametrize("form", ["handle", "full"])
def test_prepare_leaves_a_session_alone_that_another_process_trained(form: str, target: str) -> None:
    straight, model = network(), network()
    train(straight, torch.optim.AdamW(straight.parameters(), lr=0.01), range(2 * STEPS))
    first = RemoteOptimizer(model.named_parameters(), "adamw", lr=0.01, target=target)
    train(model, first, range(STEPS))
    second = RemoteOptimizer(
        model.named_parameters(), "adamw", lr=0.01, target=target, session=first.session.name, state=form
    )
    model, second = accelerator().prepare(model, second)
    train(model, second, range(STEPS, 2 * STEPS))
    assert second.optimizer.session.step_count == 2 * STEPS
    assert_close(model, straight)


def test_accelerate_learns_whether_a_step_was_skipped(target: str) -> None:
    accelerator()
    from accelerate.optimizer import AcceleratedOptimizer

    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=4.0)
    remote = RemoteOptimizer(model.named_parameters(), "sgd", lr=0.01, target=target)
    optimizer = AcceleratedOptimizer(remote, scaler=scaler)
    skipped = []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(data(0)).mean() * factor).backward()
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
    assert skipped == [False, True, False]
    assert remote.session.step_count == 2


# ------------------------------------------------------------------------------------------------------ Lightning


def lightning_module(make: Any) -> Any:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone = nn.Linear(8, 16)
            self.head = nn.Linear(16, 1)

        def training_step(self, batch: Any, number: int) -> Any:
            return self.head(self.backbone(batch[0]).tanh()).square().mean()

        def configure_optimizers(self) -> Any:
            return make(self)

    return Module()


def fit(module: Any, folder: pathlib.Path, **options: Any) -> Any:
    trainer = trainer_of(folder, **options)
    trainer.fit(module, batches())
    return trainer


def batches() -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data(0)), batch_size=4)


def trainer_of(folder: pathlib.Path, **options: Any) -> Any:
    lightning = pytest.importorskip("lightning")
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_finetuning_thaws_layers_into_a_session_under_way(target: str, tmp_path: pathlib.Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Thaw(lightning.pytorch.callbacks.BaseFinetuning):
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.backbone)

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.backbone, optimizer, lr=0.01)

    def trained(make: Any) -> Any:
        module = lightning_module(lambda module: make([p for p in module.parameters() if p.requires_grad]))
        return fit(module, tmp_path, max_epochs=3, callbacks=[Thaw()])

    ours = trained(lambda parameters: RemoteOptimizer(parameters, "adamw", lr=0.05, target=target))
    theirs = trained(lambda parameters: torch.optim.AdamW(parameters, lr=0.05))
    assert_close(ours.model, theirs.model)
    assert ours.optimizers[0].session.step_count == 12


def test_lightning_clips_unless_the_server_unscales(target: str, tmp_path: pathlib.Path) -> None:
    def trained(make: Any, **options: Any) -> Any:
        module = lightning_module(lambda module: make(module.named_parameters()))
        return fit(module, tmp_path, max_epochs=1, gradient_clip_val=0.1, **options).model

    def remote(amp: str) -> Any:
        return lambda parameters: RemoteOptimizer(parameters, "sgd", lr=0.1, target=target, amp=amp)

    ours, theirs = trained(remote("client")), trained(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    assert_close(ours, theirs)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trained(remote("server"), precision="bf16-mixed")

    def clipping(parameters: Any) -> Any:
        spec = "chain(clip_by_global_norm(0.1), sgd(0.1))"
        return RemoteOptimizer(parameters, spec, target=target, amp="server")

    module = lightning_module(lambda module: clipping(module.named_parameters()))
    assert_close(fit(module, tmp_path, max_epochs=1).model, theirs)


@pytest.mark.parametrize("form", ["full", "handle"])
def test_the_finder_of_learning_rates_goes_back_with_a_full_state_only(
    form: str, target: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lightning = pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)

    def found(make: Any) -> Any:
        module = lightning_module(lambda module: make(module))
        module.lr = 1e-3
        trainer = trainer_of(tmp_path, max_epochs=1)
        finder = lightning.pytorch.tuner.Tuner(trainer).lr_find(module, batches(), num_training=16)
        trainer.fit(module, batches())
        return finder.results, module

    def remote(module: Any) -> Any:
        return RemoteOptimizer(module.named_parameters(), "adamw", lr=module.lr, target=target, state=form)

    if form == "handle":
        with pytest.raises(errors.OutOfStepError, match="state='full'"):
            found(remote)
        return
    ours, theirs = found(remote), found(lambda module: torch.optim.AdamW(module.parameters(), lr=module.lr))
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-5)
    assert_close(ours[1], theirs[1])


# ---------------------------------------------------------------------------------------------------------- torch


def test_a_compiled_model_trains_and_its_names_are_not_the_sessions(target: str) -> None:
    ours, theirs = network(), network()
    compiled = torch.compile(ours, backend="eager")
    assert next(iter(compiled.state_dict())).startswith("_orig_mod.")
    optimizer = RemoteOptimizer(ours.named_parameters(), "adamw", lr=0.01, target=target)
    train(compiled, optimizer, range(STEPS))
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01), range(STEPS))
    assert_close(ours, theirs)
    assert sorted(optimizer.session.params()) == sorted(name for name, _ in ours.named_parameters())


def test_fully_sharded_parameters_are_refused_by_name(target: str, tmp_path: pathlib.Path) -> None:
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed import fsdp

        model = network()
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        fsdp.fully_shard(model, mesh=mesh)
        with pytest.raises(errors.UnsupportedError, match="parameter '0.weight': a DTensor"):
            RemoteOptimizer(model.named_parameters(), "adamw", target=target)
    finally:
        distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def tidy(target: str) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    with optwire.connect(target) as client:
        for info in client.list_sessions():
            client.delete_session(info.name)
