"""Subclasses of a host's class, made of layers that one instance gains and loses in any order.

    host's class ← the loop of `ck.patch` ← the calls of `ck.graphed` ← the calls of `ck.compile`

A subclass has the name of the host's class. A copy or a pickle of an instance refers to the host's class and to the
layers, so it needs neither to be importable.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn


class Layer(NamedTuple):
    """One layer of a class.

    rank: layers of a lower rank are nearer to the host's class.
    make: a function of a module that returns the attributes of the layer, by name; its arguments are the class below
        and `arguments`.
    arguments: further arguments of `make`, which can be pickled.
    """

    rank: int
    make: Callable[..., dict[str, Any]]
    arguments: tuple[Hashable, ...] = ()


def has_layer(module: nn.Module, make: Callable[..., Any], *arguments: Hashable) -> bool:
    """Return true if the class of a module has a layer made by `make`, and was not changed by others since.

    With `arguments` only a layer with these counts.
    """
    return len(_layers_without(module, make, *arguments)) < len(_layers_of(module))


def host_of(module: nn.Module) -> Any:
    """The host's class of a module, without layers."""
    return vars(type(module)).get("_host", type(module))


def add_layer(module: nn.Module, layer: Layer) -> None:
    """Add a layer to the class of a module, in place of the one of the same rank."""
    others = [each for each in _layers_of(module) if each.rank != layer.rank]
    _set_layers(module, sorted([*others, layer], key=lambda each: each.rank))


def remove_layer(module: nn.Module, make: Callable[..., Any], *arguments: Hashable) -> None:
    """Remove the layer that `make` has made from the class of a module; with `arguments`, only one with these."""
    _set_layers(module, _layers_without(module, make, *arguments))


def add_server(module: nn.Module, rank: int, slot: str, server: Any) -> None:
    """Let an object serve the calls of a module, by a layer of a rank; `served_calls` describes both."""
    add_layer(module, Layer(rank, served_calls, (slot,)))
    vars(module)[slot] = server


def remove_server(module: nn.Module, slot: str) -> Any:
    """Remove the object of a slot that serves the calls of a module, with its layer; return it, None without one."""
    if has_layer(module, served_calls, slot):
        remove_layer(module, served_calls, slot)
    return vars(module).pop(slot, None)


@contextmanager
def unserved(model: nn.Module) -> Iterator[None]:
    """Run calls of a model and of its modules in the body as without the objects that serve them."""
    modules = [
        (vars(part), layer.arguments[0])
        for part in model.modules()
        for layer in _layers_of(part)
        if layer.make is served_calls
    ]
    served: list[Any] = [(attributes, slot, attributes.pop(slot)) for attributes, slot in modules if slot in attributes]
    try:
        yield
    finally:
        for attributes, slot, server in served:
            attributes[slot] = server


def served_calls(base: Any, slot: str) -> dict[str, Any]:
    """The attributes of a layer whose calls are served by the object in a slot of the instance's `__dict__`.

    The object has `call(root, base, args, kwargs)`, `drop()`, which forgets all that it knows of the weights, and a
    representation, which that of the instance shows. A compiler sees the class below.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return base.__call__(self, *args, **kwargs)
        server = vars(self).get(slot)
        return base.__call__(self, *args, **kwargs) if server is None else server.call(self, base, args, kwargs)

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        server = vars(self).get(slot)
        if server is not None:
            server.drop()  # before the weights move, so that both need not fit
        return base._apply(self, fn, recurse)

    def extra_repr(self: Any) -> str:
        server = vars(self).get(slot)
        label = [] if server is None else [f"clipkernels: {server}"]
        return ", ".join([*label, *filter(None, [base.extra_repr(self)])])

    return {"__call__": __call__, "_apply": _apply, "extra_repr": extra_repr}


def _layers_of(module: nn.Module) -> tuple[Layer, ...]:
    """The layers of a module's class, the host's side first; none for a class that others have derived."""
    layers: tuple[Layer, ...] = vars(type(module)).get("_layers", ())
    return layers


def _layers_without(module: nn.Module, make: Callable[..., Any], *arguments: Hashable) -> list[Layer]:
    """The layers of a module's class but those that `make` has made with these arguments, or with any."""
    return [
        layer for layer in _layers_of(module) if layer.make is not make or (arguments and layer.arguments != arguments)
    ]


def _set_layers(module: Any, layers: list[Layer]) -> None:
    """Make the class of a module that of its host with these layers."""
    host: Any = host_of(module)
    module.__class__ = _subclass(host, tuple(layers))


@cache
def _subclass(host: Any, layers: tuple[Layer, ...]) -> Any:
    """A host's class with layers, whose instances can be pickled and copied."""
    if not layers:
        return host
    *lower, layer = layers
    base = _subclass(host, tuple(lower))

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (host, layers), self.__dict__

    names = {"__module__": host.__module__, "__qualname__": host.__qualname__, "_host": host, "_layers": layers}
    namespace = {"__reduce_ex__": __reduce_ex__, **names, **layer.make(base, *layer.arguments)}
    return type(host.__name__, (base,), namespace)


def _rebuild(host: Any, layers: tuple[Layer, ...]) -> nn.Module:
    """An empty instance of a class with layers; unpickling then restores its state."""
    cls = _subclass(host, layers)
    instance: nn.Module = cls.__new__(cls)
    return instance
