"""Runs the PyTorch program of the README as printed: ``python -I readme_torch.py README.md TARGET``.

In an environment that has torch and the thin client, and nothing else; ``.ci/run thin`` makes it.
"""

import pathlib
import re
import runpy
import sys
import tempfile

FORBIDDEN = ("jax", "jaxlib", "optax", "optwire_server")


def program(readme: str, target: str) -> str:
    """The lines of the first diff that are there afterwards."""
    found = re.search(r"```diff\n(.*?)```", readme, re.DOTALL)
    if found is None:
        raise SystemExit("readme_torch: the README has no diff")
    lines = [line[1:] for line in found[1].splitlines() if not line.startswith("-")]
    return "\n".join(lines).replace("localhost:50051", target)


def main(readme: str, target: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "program.py")
        path.write_text(program(pathlib.Path(readme).read_text(), target))
        loss = runpy.run_path(str(path))["loss"].item()
    loaded = [name for name in FORBIDDEN if name in sys.modules]
    if loaded:
        raise SystemExit(f"readme_torch: imported {', '.join(loaded)}")
    if not loss < 0.8:  # it begins at 1.1
        raise SystemExit(f"readme_torch: the loss is {loss}")


if __name__ == "__main__":
    main(*sys.argv[1:])
