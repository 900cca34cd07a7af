"""The images, built for real and run as a careful operator runs them: any user, nothing to write to, no capabilities.

The promise: "One image, one port, a health service, a clean stop on SIGTERM", and a new version of ours moves little.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import time
import tomllib
from typing import Any

import jax
import numpy as np
import pytest
from jax.example_libraries import optimizers as seed
from tests.container import containers

import optwire
import optwire.jax
from optwire import optimizers as opt

MB = 1e6
STOP_S_MAX = 2.0
MOVED_MB_MAX = 20.0
RNG = np.random.default_rng(3)
PARAMS = {"w": RNG.standard_normal((300, 100)).astype(np.float32), "b": np.zeros(100, np.float32)}  # 120 kB
GRADS = [{name: RNG.standard_normal(leaf.shape).astype(np.float32) for name, leaf in PARAMS.items()} for _ in range(4)]


def test_the_image_says_what_it_is_and_asks_for_no_root(engine: Any, image: str, client_image: str):
    version = tomllib.loads((containers.ROOT / "pyproject.toml").read_text())["project"]["version"]
    server, client = (engine.images.get(name).attrs["Config"] for name in (image, client_image))
    for config, title in ((server, "optwire"), (client, "optwire-client")):
        assert config["User"] == "10001:10001"
        assert config["Labels"]["org.opencontainers.image.title"] == title
        assert config["Labels"]["org.opencontainers.image.version"] == version
        assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert server["Entrypoint"] == ["optwire"]
    assert server["StopSignal"] == "SIGTERM"
    assert list(server["ExposedPorts"]) == [containers.PORT]
    assert server["Healthcheck"]["Test"][:3] == ["CMD", "optwire", "health"]


def test_the_images_are_small_and_hold_no_installer(
    engine: Any, image: str, client_image: str, measured: dict[str, str]
):
    for name, most_mb in ((image, 900), (client_image, 350)):
        size_mb = engine.images.get(name).attrs["Size"] / MB
        measured[f"size of {name}, MB"] = f"{size_mb:.0f}"
        assert size_mb < most_mb
        arguments = {
            "entrypoint": ["sh", "-c", "ls /opt /opt/venv/bin; find / -xdev -name .cache -o -xdev -path /src"],
            "user": "0:0",  # to whom no folder is closed
            "remove": True,
        }
        listing = engine.containers.run(name, stderr=False, **arguments).decode().split()
        assert "venv" in listing
        assert not {"pip", "pip3", "/src"} & set(listing)
        assert not [found for found in listing if found.endswith("/.cache")]


def test_the_entry_point_takes_commands(engine: Any, image: str):
    output = engine.containers.run(image, ["serve", "--help"], remove=True, **containers.HARDENED).decode()
    assert "usage: optwire serve" in output


def test_the_server_runs_without_any_privilege(server: containers.Running):
    code, status = server.container.exec_run(["cat", "/proc/1/status"])
    assert code == 0
    fields = dict(line.split(":\t", 1) for line in status.decode().splitlines())
    assert fields["Uid"].split() == ["12345"] * 4
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    code, output = server.container.exec_run(["touch", "/opt/venv/mine"])
    assert code != 0
    assert b"Read-only file system" in output


@pytest.mark.parametrize("transport", ["unary", "stream"])
def test_a_client_outside_trains_as_a_local_optimizer_does(server: containers.Running, transport: str):
    init, update, get_params = seed.adam(1e-2)
    state = init(PARAMS)
    with optwire.connect(server.target, transport=transport) as client:
        session = client.create_session(PARAMS, opt.adam(1e-2), name=f"outside-{transport}")
        for step, grads in enumerate(GRADS):
            state = jax.jit(update)(step, grads, state)
            remote = session.step(grads)
        client.delete_session(session.name)
    for name, leaf in get_params(state).items():
        np.testing.assert_allclose(remote[name], np.asarray(leaf), rtol=1e-6, atol=1e-7)


def test_a_client_container_trains_by_the_name_of_the_server(
    engine: Any, server: containers.Running, client_image: str, network: Any
):
    program = (containers.ROOT / "tests/thin/train_thin.py").read_text()
    command = ["python3", "-I", "-c", program, f"{server.container.name}:50051"]
    output = engine.containers.run(client_image, command, network=network.name, remove=True, **containers.HARDENED)
    assert "trained 20 steps" in output.decode()


SHARED = """
import sys, numpy as np, optwire
from optwire import optimizers as opt
with optwire.connect(sys.argv[1]) as client:
    session = client.create_session({"w": np.zeros(100_000, np.float32)}, opt.sgd(1.0))
    params = session.step({"w": np.ones(100_000, np.float32)})
    print(session.info().transport, params["w"].min(), params["w"].max(), session.info().transport_reason)
"""


@pytest.mark.parametrize("shares", ["the folder", "nothing"])
def test_two_containers_that_share_a_folder_share_memory(
    engine: Any, start: containers.Start, client_image: str, network: Any, shares: str
):
    options = {"type": "tmpfs", "device": "tmpfs", "o": "uid=12345,mode=0700"}
    volume = engine.volumes.create(f"{network.name}-handover", driver="local", driver_opts=options)
    try:
        folder = {volume.name: {"bind": "/handover", "mode": "rw"}}
        with start("sharing", "--handover-dir", "/handover", volumes=folder) as server:
            with containers.answering(server):
                pass
            command = ["python3", "-I", "-c", SHARED, f"{server.container.name}:50051"]
            mine = {"volumes": folder} if shares == "the folder" else {}
            output = engine.containers.run(
                client_image, command, network=network.name, remove=True, **containers.HARDENED, **mine
            ).decode()
    finally:
        volume.remove()
    expected = "shared_memory -1.0 -1.0" if shares == "the folder" else "stream -1.0 -1.0 no socket of the server at"
    assert output.startswith(expected)


def test_the_clients_image_has_what_a_thin_client_needs_and_nothing_else(engine: Any, client_image: str):
    program = "import importlib.metadata as m; print(*sorted(found.name for found in m.distributions()))"
    names = engine.containers.run(client_image, ["python3", "-c", program], remove=True).decode().split()
    assert names == ["grpcio", "numpy", "optwire", "protobuf", "typing_extensions"]


def test_a_client_may_bring_a_program(start: containers.Start):
    def sgd(step: Any, rate: Any, grad: Any, param: Any) -> Any:
        return param - rate * grad

    spec = opt.exported(optwire.jax.export_update(sgd, slots=0), 0.5)
    with start("programs", "--allow-programs") as server, containers.answering(server) as client:
        params = client.create_session(PARAMS, spec).step(GRADS[0])
    for name, leaf in PARAMS.items():
        np.testing.assert_allclose(params[name], leaf - np.float32(0.5) * GRADS[0][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("connected", ["alone", "with an idle stream open"])
def test_the_server_stops_at_once_when_told(start: containers.Start, connected: str, measured: dict[str, str]):
    began = time.monotonic()
    with start("stopping") as server, containers.answering(server) as client:
        measured["start to the first answer, s"] = f"{time.monotonic() - began:.1f}"
        if connected != "alone":
            client.create_session(PARAMS, opt.adam(1e-3), name="idle").step(GRADS[0])
        began = time.monotonic()
        server.container.stop(timeout=30)
        took_s = time.monotonic() - began
        measured[f"stop, {connected}, s"] = f"{took_s:.2f}"
        assert took_s < STOP_S_MAX, server.logs()
        assert server.container.wait()["StatusCode"] == 0
        assert server.logs().rstrip().endswith("stopped")


def test_a_new_version_of_ours_moves_little(engine: Any, image: str, tmp_path: pathlib.Path, measured: dict[str, str]):
    for name in ("Dockerfile", ".dockerignore", "Makefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(containers.ROOT / name, tmp_path)
    for name in ("proto", "client", "server", "deploy"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(containers.ROOT / name, tmp_path / name, ignore=ignored)
    with (tmp_path / "server/optwire_server/server.py").open("a") as source:
        source.write(f"\n# {time.time()}: a line that no version before had.\n")
    project = (tmp_path / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(project.replace('\nversion = "', '\nversion = "9.'))

    measured["build after a change of ours, s"] = f"{containers.build(tmp_path, 'optwire:changed'):.1f}"
    before, after = (engine.images.get(name) for name in (image, "optwire:changed"))
    # From the base up: each entry of the history that is not empty is a layer.
    sizes = [entry["Size"] for entry in reversed(after.history()) if entry["Size"]]
    layers = after.attrs["RootFS"]["Layers"]
    assert len(sizes) == len(layers)
    there = before.attrs["RootFS"]["Layers"]
    moved = [size / MB for size, layer in zip(sizes, layers, strict=True) if layer not in there]
    measured["moved by a new version of ours, MB"] = f"{sum(moved):.2f} of {sum(sizes) / MB:.0f}"
    assert len(moved) == 1
    assert sum(moved) < MOVED_MB_MAX
    assert after.labels["org.opencontainers.image.version"].startswith("9.")


def test_a_build_elsewhere_makes_the_same_large_layer(engine: Any, client_image: str):
    base = os.environ.get("BASE_IMAGE")
    arguments = ["--build-arg", f"BASE_IMAGE={base}"] if base else []
    command = ["docker", "build", "--no-cache", "--target", "client", "--tag", "optwire-client:again", *arguments, "."]
    done = containers.run(*command, timeout_s=280)
    assert done.returncode == 0, done.stdout + done.stderr
    here, elsewhere = (
        engine.images.get(name).attrs["RootFS"]["Layers"] for name in (client_image, "optwire-client:again")
    )
    assert here[:-1] == elsewhere[:-1]


def test_compose_runs_a_server_and_workers(image: str, client_image: str, network: Any, measured: dict[str, str]):
    names = [["docker-compose"], ["docker", "compose"]]
    program = next((name for name in names if containers.run(*name, "version").returncode == 0), None)
    if program is None:
        pytest.skip("neither docker-compose nor docker compose is here")
    compose = [*program, "--ansi", "never", "-f", "deploy/compose.yaml", "-p", network.name]
    settings = {"OPTWIRE_IMAGE": image, "OPTWIRE_CLIENT_IMAGE": client_image, "OPTWIRE_PORT": "0"}
    began = time.monotonic()
    try:
        done = containers.run(*compose, "up", "--no-build", "--exit-code-from", "worker", **settings)
        measured["compose: a server, three workers, s"] = f"{time.monotonic() - began:.1f}"
        assert done.returncode == 0, done.stdout + done.stderr
        ends = [line for line in done.stdout.splitlines() if "step 200, w = [ 1. -2.  3. -4.]" in line]
        late = [int(match[1]) for line in ends if (match := re.search(r"(\d+) of them too late", line))]
        assert late
        assert max(late) < 10  # of 200: they wait for each other once they have joined
    finally:
        containers.run(*compose, "down", **settings)
