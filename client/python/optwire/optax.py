"""Optax's optimizers, transformations and schedules by their own names and arguments; each builds a spec.

    from optwire import optax

    spec = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-4, 200, 10_000), weight_decay=0.1, mask="**/kernel")

Neither optax nor JAX is imported here: the functions are made from ``optwire_proto.optax_entries``, the signatures of
the optax named there. Where optax takes a mask, give a name pattern, a list of patterns (``!`` excludes) or a flag;
where it takes an element type, its name. ``help(optwire.optax.adamw)`` shows the signature. Names that cannot be served
raise the reason. What the names compute is documented by optax.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Final

from optwire.optimizers import chain, described
from optwire_proto import catalogue, entries, errors, specs
from optwire_proto.optax_entries import ENTRIES, OPTAX_VERSION

__all__ = [
    "OPTAX_VERSION",
    "chain",
    *sorted(entry.name.removeprefix("optax.") for entry in ENTRIES if not entry.refusal),
]

Spec = specs.Spec
_ENTRIES: Final = {entry.name.removeprefix("optax."): entry for entry in ENTRIES}


def __getattr__(name: str) -> Callable[..., Spec]:
    entry = _ENTRIES.get(name)
    if entry is None:
        raise AttributeError(f"optax {OPTAX_VERSION} has no {name!r}{catalogue.suggestion(name, __all__)}")
    if entry.refusal:
        raise errors.UnsupportedError(f"optax.{name} is not served: {entry.refusal}", subject=name, got=name)
    made = globals()[name] = _constructor(name, entry)
    return made


def __dir__() -> Iterable[str]:
    return __all__


def _constructor(name: str, entry: entries.Entry) -> Callable[..., Spec]:
    """A function with the entry's signature."""
    signature = inspect.Signature([_parameter(parameter) for parameter in entry.parameters], return_annotation=Spec)

    def constructor(*args: Any, **kwargs: Any) -> Spec:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as exc:
            wrong = next((key for key in kwargs if key not in signature.parameters), "")
            hint = catalogue.suggestion(wrong, signature.parameters) if wrong else ""
            parameters = signature.replace(return_annotation=inspect.Signature.empty)
            raise errors.SpecError(
                f"{entry.name}: {exc}{hint}; expected {entry.name}{parameters}",
                subject=f"{entry.name}.{wrong}" if wrong else entry.name,
                expected=", ".join(signature.parameters),
                got=wrong,
            ) from exc
        return described(entry, given)

    constructor.__name__ = constructor.__qualname__ = name
    constructor.__module__ = __name__
    constructor.__doc__ = f"{entry.summary}\n\nAs {entry.origin}.{name}; raises SpecError for what it cannot take."
    vars(constructor)["__signature__"] = signature
    return constructor


def _parameter(parameter: entries.Parameter) -> inspect.Parameter:
    kind = (
        inspect.Parameter.VAR_POSITIONAL
        if parameter.variadic
        else inspect.Parameter.KEYWORD_ONLY
        if parameter.keyword_only
        else inspect.Parameter.POSITIONAL_OR_KEYWORD
    )
    has_default = parameter.default is not entries.REQUIRED and not parameter.variadic
    return inspect.Parameter(
        parameter.name, kind, default=parameter.default if has_default else inspect.Parameter.empty
    )
