"""Where a program comes to parameters whose new values are on their way: forwards, and dictionaries of modules.

Which modules use a parameter is learned by watching: one whose forward was called uses its own, and those of submodules
that are never called by themselves. Knows nothing of sessions.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from optwire_proto import errors

# Takes the ids of parameters that are needed now; None: all.
Open = Callable[[frozenset[int] | None], None]


class Doors:
    """Watches the forwards of all modules of this process, and has somebody wait before parameters are used.

    Args:
      opened: called, while ``close`` is ahead, before somebody uses parameters; may raise. Not kept alive.
    """

    def __init__(self, opened: Open) -> None:
        self._opened = weakref.WeakMethod(opened)
        self._called = _Modules()  # since the last step
        self._known = _Modules()  # in the step before
        self._is_shut = False
        self._is_passed = False  # whether a hook of a dictionary is running
        self._handles: list[Any] = []
        self._watching = torch.nn.modules.module.register_module_forward_pre_hook(_Forward(self))

    def shut(self, ids: frozenset[int]) -> bool:
        """From now on somebody waits before these parameters are used; False where it is not known who uses them.

        Args:
          ids: of the parameters whose new values are on their way.
        """
        self._known, self._called = self._called, _Modules()
        users = [(module, frozenset(map(id, _uses(module, self._known)))) for module in self._known]
        if not ids <= frozenset().union(*(used for _, used in users)):
            return False
        self._is_shut = True
        for user, used in users:
            for module in _owners(user, self._known) if used & ids else ():
                door = _Dictionary(self)
                self._handles.append(module.register_state_dict_pre_hook(door))
                self._handles.append(module.register_load_state_dict_pre_hook(door))
        return True

    def open(self) -> None:
        """Nothing is on its way any more."""
        self._is_shut = False
        handles, self._handles = self._handles, []
        for handle in handles:
            if self._is_passed and not _is_last(handle):
                self._handles.append(handle)  # a hook that has others behind it is not taken away while it runs
            else:
                handle.remove()

    def remove(self) -> None:
        """Ends the watching; nothing is left behind in modules."""
        self.open()
        self._watching.remove()

    def before_forward(self, module: torch.nn.Module) -> None:
        """A module is about to run."""
        if torch.is_grad_enabled():
            self._called.add(module)
        if self._is_shut:
            # One that does not train may take shorter ways, which use the parameters of submodules directly.
            used = _uses(module, self._known) if module.training else module.parameters()
            self._pass(frozenset(map(id, used)))

    def before_dictionary(self) -> None:
        """The parameters of a module are about to be read, or replaced, by name."""
        if self._is_shut:
            self._is_passed = True
            try:
                self._pass(None)
            finally:
                self._is_passed = False

    @property
    def is_shut(self) -> bool:
        """Whether somebody waits before parameters are used."""
        return self._is_shut

    def _pass(self, ids: frozenset[int] | None) -> None:
        opened = self._opened()
        if opened is not None:
            opened(ids)


class _Modules:
    """Modules that are not kept alive, by identity: what they call equal does not matter."""

    def __init__(self) -> None:
        self._found: dict[int, weakref.ref[torch.nn.Module]] = {}

    def add(self, module: torch.nn.Module) -> None:
        if module not in self:
            self._found[id(module)] = weakref.ref(module)

    def __contains__(self, module: torch.nn.Module) -> bool:
        found = self._found.get(id(module))
        return found is not None and found() is module

    def __iter__(self) -> Iterator[torch.nn.Module]:
        return iter([module for found in self._found.values() if (module := found()) is not None])


class _Hook:
    """A hook that does not keep its doors alive."""

    def __init__(self, doors: Doors) -> None:
        self._doors = weakref.ref(doors)


class _Forward(_Hook):
    def __call__(self, module: torch.nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return  # who waits is the module around what is compiled
        doors = self._doors()
        if doors is not None:
            doors.before_forward(module)


class _Dictionary(_Hook):
    def __call__(self, *args: Any) -> None:
        doors = self._doors()
        if doors is not None:
            doors.before_dictionary()

    def __reduce__(self) -> tuple[type[_Spent], tuple[()]]:
        """A module that has this hook has parameters whose new values have not come: a copy would have old ones."""
        doors = self._doors()
        if doors is None or not doors.is_shut:
            return _Spent, ()
        raise errors.UnsupportedError(
            "copying or pickling a module while its new parameters are on their way: call optimizer.synchronize() "
            "first",
            subject="overlap",
        )


class _Spent:
    """What a copy of a module has in the place of a hook that had not been taken away yet."""

    def __call__(self, *args: Any) -> None:
        return


def _is_last(handle: Any) -> bool:
    """Whether a hook is the last one of its kind in its module."""
    hooks = handle.hooks_dict_ref()
    return hooks is None or handle.id not in hooks or next(reversed(hooks)) == handle.id


def _owners(module: torch.nn.Module, called: _Modules) -> Iterator[torch.nn.Module]:
    """A module, and the submodules whose parameters it uses itself, as they are not called."""
    yield module
    for child in module.children():
        if child not in called:
            yield from _owners(child, called)


def _uses(module: torch.nn.Module, called: _Modules) -> Iterable[torch.Tensor]:
    for owner in _owners(module, called):
        yield from owner.parameters(recurse=False)
