"""The state of a tower that a captured or compiled forward repeats, and the check that the tower still has it.

Such a forward reads weights by their addresses, or keeps them, and runs no Python. The check costs a few tens of
microseconds.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import copy
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from clipkernels.adapters import Tower
from clipkernels.adapters.hooks import has_global_hooks
from clipkernels.backend import requested_backend, transform_obstacle
from clipkernels.custom_ops import can_skip_dispatcher
from clipkernels.slot import SLOT
from clipkernels.tower import pool_of

GRAPHS = "_clipkernels_graphs"
COMPILATION = "_clipkernels_compilation"
RANKS = {GRAPHS: 1, COMPILATION: 2}
"""The slots of the objects that serve a tower's calls, with the ranks of their layers in the class of its root."""

# Entries of a transformers configuration that change the output of a forward; the second has either name.
_OUTPUTS = ("output_hidden_states", "output_attentions", "_output_attentions", "return_dict")
# Attributes that all modules have, and those of patched and graphed ones. They are compared otherwise or not at all.
_COMPARED = frozenset({*vars(nn.Module()), "forward", SLOT, GRAPHS, COMPILATION})
# An object of another type may be a new one after every forward.
_CONSTANTS = frozenset({bool, int, float, str, type(None), tuple, list, dict, set})


def is_plain_call(images: Tensor) -> bool:
    """Return true if nothing around a call needs the forward itself: a tracer, a transform, autocast, a global hook."""
    return (
        can_skip_dispatcher(images)
        and transform_obstacle() is None
        and not torch.is_autocast_enabled(images.device.type)
        and not has_global_hooks()
    )


class Snapshot:
    """The state of a tower that its graphs or its compiled forwards repeat."""

    def __init__(self, tower: Tower) -> None:
        root, self.slot = tower.root, vars(tower.owner).get(SLOT)
        weights = () if self.slot is None else self.slot.weights.values()
        parts, modules = list(chain.from_iterable(module.modules() for module in weights)), list(root.modules())
        tables = ((module._parameters, module._buffers, module._modules) for module in (*modules, *parts))
        self.tables: list[dict[str, Any]] = [table for table in chain.from_iterable(tables) if table]
        self.values = list(chain.from_iterable(map(dict.values, self.tables)))
        self.tensors = [value for value in self.values if isinstance(value, Tensor)]
        # Tensors of other classes may have no address. Their `.to()` drops the graphs.
        self.plain = [tensor for tensor in self.tensors if type(tensor) in (Tensor, nn.Parameter)]
        self.addresses = list(map(Tensor.data_ptr, self.plain))
        # A graph that is out of date still reads them, and no other tensor can come to have their addresses.
        self.in_use = [tensor.detach() for tensor in self.plain]
        # Without the root's, which would make a cycle. A method's modules work the same in both modes.
        self.states = [vars(module) for module in modules if module is not root]
        self.hooks = [hooks for module in parts for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.adapter: Any = type(tower)
        self.settings = _settings(tower)
        self.children = modules[1:]
        self.classes = list(map(type, self.children))
        self.remember_constants(root)
        self.arguments = _arguments(root)
        self.shape, self.dtype, self.device = (3, *tower.image_size), tower.like.dtype, tower.like.device

    def is_current(self, root: nn.Module) -> bool:
        """Return true if the modules, the addresses of the weights and the settings are those of the snapshot."""
        tower = self.adapter(root)
        return (
            vars(tower.owner).get(SLOT) is self.slot
            and sum(map(len, self.tables)) == len(self.values)
            and all(map(is_, chain.from_iterable(map(dict.values, self.tables)), self.values))
            and list(map(Tensor.data_ptr, self.plain)) == self.addresses
            and list(map(type, self.children)) == self.classes
            and _settings(tower) == self.settings
            and self._has_constants(root)
        )

    def remember_constants(self, root: nn.Module) -> None:
        """Take the present numbers, texts and containers among the attributes of the modules for the snapshot's.

        Examples are `eps`, and the names of the adapters of PEFT that are in use. A forward may change some, as a
        counter of its calls, so this follows each capture.
        """
        self.sizes = list(map(len, self.states))
        places = [(state, name) for state in self.states for name in _constants_of(state)]
        self.places = [state for state, _ in places], [name for _, name in places]
        self.constants = [copy(state[name]) for state, name in places]
        self.root_constants = {name: copy(vars(root)[name]) for name in _constants_of(vars(root))}

    def _has_constants(self, root: nn.Module) -> bool:
        """Return true if the numbers, texts and containers among the attributes are those of the snapshot."""
        state = vars(root)
        try:
            same = list(map(dict.get, *self.places)) == self.constants
            same = same and all(state.get(name) == value for name, value in self.root_constants.items())
        except Exception:  # a container of tensors, or whatever else cannot be compared
            return False
        return same and list(map(len, self.states)) == self.sizes

    def is_idle(self, root: nn.Module) -> bool:
        """Return true if no module trains, has a hook or a replaced forward, and no gradient is needed."""
        ignored = self.adapter(root).ignores_hook
        for state in (vars(root), *self.states):
            if state["training"] or state["_forward_pre_hooks"] or "forward" in state:
                return False
            if state["_forward_hooks"] and not all(map(ignored, state["_forward_hooks"].values())):
                return False
        return not any(self.hooks) and not (
            torch.is_grad_enabled() and any(map(attrgetter("requires_grad"), self.tensors))
        )

    def serves(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return true if a graph of this state gives what the forward would give for a call now."""
        return self.takes(args, kwargs) and self.is_idle(root)

    def takes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return true for a call with images as they were captured and otherwise defaults."""
        name, defaults = self.arguments
        passed = [
            key for key, value in kwargs.items() if not any(value is default for default in defaults.get(key, ()))
        ]
        if [*passed, *args[1:]] != ([] if args else [name]):
            return False
        images = args[0] if args else kwargs[name]
        alike = (images.dtype, images.device) == (self.dtype, self.device)
        return alike and images.shape[1:] == self.shape


def _constants_of(state: Mapping[str, Any]) -> list[str]:
    """The names of a module's attributes that are numbers, texts or containers, without those of every module."""
    return [name for name, value in state.items() if type(value) in _CONSTANTS and name not in _COMPARED]


def _settings(tower: Tower) -> tuple[Any, ...]:
    """The settings that a forward reads besides weights and method: those of the pool and the host, and the backend."""
    config = vars(tower.root.config) if hasattr(tower.root, "config") else {}
    outputs = tuple(config.get(name) for name in _OUTPUTS)
    return (*pool_of(tower), tower.attention, requested_backend("auto"), *outputs)


def _arguments(root: nn.Module) -> tuple[str, dict[str, tuple[Any, ...]]]:
    """The name of the argument that takes the images, and the values of the others that ask for nothing.

    Those are the default of the argument, and for an entry of the host's configuration its value and None.
    """
    parameters = inspect.signature(root.forward).parameters
    config = getattr(root, "config", None)
    configured = {name: (None, getattr(config, name)) for name in _OUTPUTS if hasattr(config, name)}
    images, *others = parameters
    defaults = {name: (parameters[name].default, *configured.get(name, ())) for name in others}
    return images, {**configured, **defaults}
