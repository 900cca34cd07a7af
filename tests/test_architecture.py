"""The architecture, held by tests: who imports what, and what may not be there at all.

import-linter's contracts (pyproject.toml) cover most import rules; this file runs them and adds what they cannot say.
"""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "optwire_proto": ROOT / "proto" / "optwire_proto",
    "optwire": ROOT / "client" / "python" / "optwire",
    "optwire_server": ROOT / "server" / "optwire_server",
    "optwire_bench": ROOT / "server" / "optwire_bench",
}

# What the session machine may import besides our own data types (import-linter sees to those): nothing with a clock,
# a lock, a file or a source of randomness.
PURE = {"__future__", "collections", "dataclasses", "enum", "functools", "itertools", "math", "typing"}

# Modules longer than 400 lines, each with its reason. A length is an alarm, not a rule.
LONG_MODULES: dict[str, str] = {
    "optwire._rpc": "the client's only room for gRPC",
    "optwire._session": "what a user may ask of a handle, half of it docstrings; how pushes travel is in _route",
    "optwire.optimizers": "one constructor with its docstring for each entry that is not optax's",
    "optwire.torch.optimizer": "what torch asks of an optimizer, half of it docstrings; the session is in remote",
    "optwire_server.engine.build": "one method for each constructor that is not optax's",
    "optwire_server.engine.held": "what is done with one session's arrays, all of it block by block",
    "optwire_server.engine.kernel": "one rule traced for one block, and the four things that are compiled of the trace",
    "optwire_server.engine.program": "how a tree is cut, and the names of what comes of it, follow from one another",
    "optwire_server.registry": "every way in to a session, and in which order each is decided, applied, answered",
    "optwire_server.optimizers.torch_rules": "eleven update rules of one form",
    "optwire_proto.catalogue": "one entry for each constructor that is not optax's",
    "optwire_proto.checks": "one method for each kind of value that a parameter takes",
    "optwire_proto.optax_entries": "generated: optax's signatures",
    "optwire_proto.sessions": "plain data: one class for each thing both ends say",
    "optwire_proto.spec_text": "one grammar, read by one parser",
}


def modules(*packages: str) -> Iterator[tuple[str, Path]]:
    """Hand-written modules of our packages, as (dotted name, path)."""
    for package in packages or PACKAGES:
        for path in sorted(PACKAGES[package].rglob("*.py")):
            parts = (package, *path.relative_to(PACKAGES[package]).with_suffix("").parts)
            if parts[:2] != ("optwire_proto", "v1"):
                yield ".".join(parts).removesuffix(".__init__"), path


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(tree: ast.AST) -> set[str]:
    """Every dotted name that a module may import: `from a import b` gives both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def is_within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def dotted(node: ast.expr) -> str:
    """`a.b.c` for an attribute chain on a name, otherwise the empty string."""
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return node.id if isinstance(node, ast.Name) else ""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_import_contracts_are_kept():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_thin_client_loads_no_framework_and_no_server():
    result = run_python("import sys, optwire; print(*sorted(sys.modules), sep='\\n')")
    assert result.returncode == 0, result.stderr
    loaded = result.stdout.split()
    assert "optwire" in loaded
    assert [name for name in loaded if is_within(name, "jax", "jaxlib", "torch", "optwire_server")] == []


def test_generated_code_has_exactly_three_importers():
    importers = {
        name for name, path in modules() if any(is_within(i, "optwire_proto.v1") for i in imported(parse(path)))
    }
    rooms = {"optwire_proto.convert" if is_within(name, "optwire_proto.convert") else name for name in importers}
    assert rooms == {"optwire_proto.convert", "optwire._rpc", "optwire_server.transport.servicer"}


def test_generated_code_lies_alone():
    strangers = {
        path.name
        for path in (PACKAGES["optwire_proto"] / "v1").iterdir()
        if not path.name.endswith((".proto", "_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi"))
    }
    assert strangers <= {"__init__.py", "__pycache__"}


def test_the_session_machine_imports_only_pure_modules():
    foreign = {
        (name, i)
        for name, path in modules("optwire_server")
        if is_within(name, "optwire_server.session")
        for i in imported(parse(path))
        if not is_within(i, *PURE, "optwire_server.session", "optwire_proto") and i != "optwire_server"
    }
    assert foreign == set()


def test_jax_example_libraries_are_imported_by_tests_only():
    paths = [path for _, path in modules()]
    paths += [path for room in ("examples", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    guilty = [p for p in paths if any(is_within(i, "jax.example_libraries") for i in imported(parse(p)))]
    assert guilty == []


def test_no_module_is_a_place_for_leftovers():
    banned = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert [name for name, _ in modules() if banned & {part.lstrip("_") for part in name.split(".")}] == []


def test_no_code_crosses_the_wire():
    """Quotes the README: no pickle, no eval, no client-supplied Python; optimizers are described as data."""
    banned_modules = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
    banned_calls = {"eval", "exec", "compile", "builtins.eval", "builtins.exec", "torch.load", "yaml.load"}
    loads = {"np.load", "numpy.load", "jnp.load", "jax.numpy.load"}
    found = []
    for name, path in modules():
        tree = parse(path)
        found += [f"{name} imports {i}" for i in imported(tree) if is_within(i, *banned_modules)]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            function = dotted(call.func)
            keywords = {keyword.arg for keyword in call.keywords}
            if function in banned_calls or (function in loads and "allow_pickle" in keywords):
                found.append(f"{name}:{call.lineno} calls {function}")
    assert found == []


def test_modules_are_short_or_say_why():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules()}
    too_long = {name: count for name, count in lines.items() if count > 400 and name not in LONG_MODULES}
    assert too_long == {}, "split it along a noun, or list it in LONG_MODULES with the reason"
    stale = [name for name in LONG_MODULES if lines.get(name, 0) <= 400]
    assert stale == [], "no longer long: take it off LONG_MODULES"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str):
    assert (PACKAGES[package] / "py.typed").exists()


def test_changelog_names_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{version}]" in changelog
