"""``docs/jax.md`` runs as it stands."""

import re
import runpy
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "jax.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def run(blocks, client, path):
    path.write_text("\n".join(blocks), encoding="utf-8")
    try:
        runpy.run_path(str(path), init_globals={"client": client})
    finally:
        client.delete_session("run-7")


def test_the_blocks_that_need_optax_alone(client, tmp_path):
    blocks = [block for block in BLOCKS if not re.search("flax|equinox|orbax", block)]
    assert 4 <= len(blocks) < len(BLOCKS)
    run(blocks, client, tmp_path / "blocks.py")


def test_all_blocks(client, tmp_path):
    for name in ("flax", "equinox", "orbax.checkpoint"):
        pytest.importorskip(name)
    run(BLOCKS, client, tmp_path / "blocks.py")
