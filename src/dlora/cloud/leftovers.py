"""What a forward leaves on the model's modules: of one pass, seen by no other, and gone with it.

Some modules keep a recurrent state, or frequencies for the length that they have seen, in their
attributes. All streams share the modules: without this one would compute with what another left.
Which they are is found by comparing modules before and after a few passes. No module's name is in
here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn

from dlora.errors import INSTEAD, ModelError

__all__ = ["Attributes", "attributes_of", "keep_apart", "own_attributes"]

_thread = threading.local()

Attributes = Mapping[str, Mapping[str, tuple[Any, int]]]
"""Module name -> {attribute: (value, how often it was changed in place)}."""

_MISSING: Final = object()
_LEFT: Final = "dlora_left"
"""The attribute of a module that has the values before any pass of what passes leave on it."""


def attributes_of(model: nn.Module) -> Attributes:
    """Attributes of all modules that a forward could leave something in; weights are none."""
    return {path: _attributes(module) for path, module in model.named_modules()}


def _attributes(module: nn.Module) -> dict[str, tuple[Any, int]]:
    return {
        name: (value, value._version if isinstance(value, Tensor) else 0)
        for name, value in (*vars(module).items(), *module._buffers.items())
        if not name.startswith(("_", "dlora_")) and name not in ("forward", "training")
    }


def keep_apart(model: nn.Module, before: Attributes) -> bool:
    """Give each pass its own of what has changed since; whether anything has.

    Plain attributes become those of the pass that computes. Buffers are put back after each call
    of their module, which one thread at a time may make. Raises ModelError where a module that
    waits for edges has such buffers.
    """
    found = False
    for path, module in model.named_modules():
        old, new = before.get(path, {}), _attributes(module)
        changed = [name for name in {**old, **new} if _differ(old.get(name), new.get(name))]
        found |= bool(changed)
        buffers = {name: old[name][0] for name in changed if name in module._buffers}
        if buffers and any(isinstance(inner, nn.Linear) for inner in module.modules()):
            raise ModelError(
                f"{type(model).__name__} cannot be split: {path} keeps {next(iter(buffers))} of "
                f"one pass for the next, and passes share it. {INSTEAD}"
            )
        if buffers:
            _put_back(module, buffers)
        if plain := [name for name in changed if name not in buffers]:
            _of_each_pass(module, {name: old.get(name, (_MISSING, 0))[0] for name in plain})
    return found


@contextmanager
def own_attributes() -> Iterator[None]:
    """A pass of this thread: what it leaves is nobody else's, and gone afterwards."""
    _thread.left = {}
    try:
        yield
    finally:
        _thread.left = None


def _differ(old: tuple[Any, int] | None, new: tuple[Any, int] | None) -> bool:
    """Whether a forward left another value, or changed it in place."""
    if old is None or new is None:
        return old is not new
    (one, version), (other, newer) = old, new
    if isinstance(one, int | float | str) and type(one) is type(other):
        return bool(one != other)
    return one is not other or version != newer


def _put_back(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Wrap the module's forward: buffers are afterwards what they were before."""
    lock = threading.Lock()
    kept = {name: (buffer, buffer.clone()) for name, buffer in buffers.items()}
    own = vars(module).get("forward")  # somebody else's, on the module; None: the class's

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = partial(type(module).forward, module) if own is None else own
        with lock:
            try:
                return run(*args, **kwargs)
            finally:
                with torch.no_grad():
                    for name, (buffer, value) in kept.items():
                        module._buffers[name] = buffer.copy_(value)

    module.forward = MethodType(forward, module)


def _of_each_pass(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Let these attributes be of the pass that computes, with `values` at its beginning."""
    left = vars(module).setdefault(_LEFT, {})
    left.update(values)
    vars(module).update(values)
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {name: _attribute(name) for name in values})


def _attribute(name: str) -> property:
    """An attribute of the pass of this thread or, outside of passes, of the module."""

    def get(module: nn.Module) -> Any:
        left = getattr(_thread, "left", None)
        if left is None:
            value = vars(module).get(name, _MISSING)
        else:
            value = left.get((id(module), name), vars(module)[_LEFT][name])
        if value is _MISSING:
            raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")
        return value

    def put(module: nn.Module, value: Any) -> None:
        left = getattr(_thread, "left", None)
        if left is None:
            vars(module)[name] = value
        else:
            left[id(module), name] = value

    return property(get, put)
