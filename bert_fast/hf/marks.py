"""How a model of transformers is accelerated in place: a mark on the instance.

The class' method looks for the mark and without one does what it did. So the model keeps its class
and parameters, and copies, pickles and the replicas of DataParallel keep the mark.
"""

import functools
import importlib
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

MARK = "_bert_fast"  # attribute of an instance
_lock = threading.Lock()


class Mark:
    """What makes an instance run its replacement.

    Attributes:
        owner: the class whose method looks for it.
        strict: raise rather than run the original code.
        scored: whether a masked-LM head that is accelerated stands beside the instance.
        reasons: why the original code had to run, as far as it had.
    """

    def __init__(self, owner: type, strict: bool, scored: bool = False):
        """Make a mark, and have the class look for such."""
        self.owner, self.strict, self.scored = owner, strict, scored
        self.reasons: set[str] = set()
        with _lock:
            _replacements[owner].live.add(self)
            _replacements[owner].install()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mark":
        return Mark(self.owner, self.strict, self.scored)

    def __reduce__(self) -> tuple[Any, ...]:
        name = self.owner.__module__, self.owner.__qualname__
        return _mark, (*name, self.strict, self.scored)

    def refuse(self, module: nn.Module, reason: str) -> None:
        """Say, once, why the original code runs; or raise, if strict.

        Raises:
            NotImplementedError: strict.
        """
        if self.strict:
            raise NotImplementedError(f"{type(module).__name__}: {reason}")
        if reason not in self.reasons and not torch.compiler.is_compiling():
            self.reasons.add(reason)
            text = f"bert_fast: {type(module).__name__} runs its original code, since {reason}"
            warnings.warn(text, stacklevel=4)


class Replacement:
    """A method of a class that marked instances run something else for.

    Attributes:
        original: the method.
        names: of its arguments but self.
        live: the marks there are.
    """

    def __init__(self, owner: type, method: str, run: Callable[..., Any]):
        """Prepare it: run(self, mark, replacement, args, kwargs) goes in the method's place."""
        self._owner, self._method, self._run = owner, method, run
        self.original: Callable[..., Any] = owner.__dict__[method]
        self.names = [*inspect.signature(self.original).parameters][1:]
        self.live: weakref.WeakSet[Mark] = weakref.WeakSet()
        self._installed: Callable[..., Any] | None = None

    def install(self) -> None:
        """Put it into the class, unless it is there."""
        if self._installed is not None:
            return
        original, run = self.original, self._run

        @functools.wraps(original)
        def method(self_: Any, *args: Any, **kwargs: Any) -> Any:
            mark = self_.__dict__.get(MARK)
            if mark is None:
                return original(self_, *args, **kwargs)
            return run(self_, mark, self, args, kwargs)

        setattr(self._owner, self._method, method)
        self._installed = method

    def remove(self) -> None:
        """Give the class its method back if no instance has a mark."""
        if not self.live and self._owner.__dict__.get(self._method) is self._installed:
            setattr(self._owner, self._method, self.original)
            self._installed = None

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


_replacements: dict[type, Replacement] = {}


def replaceable(owner: type, method: str, run: Callable[..., Any]) -> None:
    """Let instances of a class be marked, to run something in place of a method."""
    if owner not in _replacements:
        _replacements[owner] = Replacement(owner, method, run)


def remove_marks(module: nn.Module) -> None:
    """Take the marks off a module and all that is in it."""
    owners = {found.owner for m in module.modules() if (found := m.__dict__.pop(MARK, None))}
    with _lock:
        for owner in owners:
            _replacements[owner].remove()


def _mark(module: str, name: str, strict: bool, scored: bool) -> Mark:
    """Return a mark from a pickle, in a process that may not have accelerated anything yet."""
    from bert_fast.hf.accelerate import prepare

    owner = getattr(importlib.import_module(module), name)
    prepare(owner)
    return Mark(owner, strict, scored)
