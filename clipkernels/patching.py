"""patch, unpatch, patched: give a tower a method and take it back.

Patching swaps the class of the one module that runs the blocks for a subclass of its own type whose loop keeps all
token state in locals. The method sits in the instance's `__dict__`, outside `state_dict` and `parameters()`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from torch import nn

from clipkernels import adapters
from clipkernels.adapters import Tower, UnsupportedTower
from clipkernels.adapters.packing import pack, unpack
from clipkernels.methods import Method
from clipkernels.plan import Plan, Predict
from clipkernels.tower import SLOT, Slot, WeakModule, make_plan, pool_of, run_patched
from clipkernels.verify import refuse_replaced, verify

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model, method: Method) -> Model:
    """The model, its image tower now running `method`, in place; patching again replaces the method.

    While patched, a tower whose pool reads the CLS row alone, and that hands out nothing else, computes no other row in
    its last block: read all of them with `encode_image(tokens=True)`. Where CLS alone is pooled its attention ranks the
    patches, elsewhere what they receive of all tokens' attention. Registers and CLS are never dropped. Rotary
    embeddings go where their patches go: a merged token has its target's place, a fused one none.

    Args:
        model: a model of open_clip, transformers, timm or OpenAI's clip, its image tower, or one that holds such.
        method: `Dense`, `EViT`, `ToMe` or anything with their `plan`. One with weights of its own, such as
            `PatchRanking`, runs with them if they have the tower's device and dtype, else with copies, which are made
            anew when the tower moves.
    Raises:
        UnsupportedTower: the tower cannot be served, or its block computes something else than expected.
        ValueError: the method does not fit the tower, or its weights were made for another.
        TypeError: the model is no torch module, or the method has no `plan`.
        Whatever is raised, the model is as it was.
    """
    if isinstance(method, type) or not callable(getattr(method, "plan", None)):
        raise TypeError(f"method must be a method such as ck.EViT(keep=0.7), got {method!r}")
    tower = adapters.find_tower(model)
    plan = make_plan(method, tower, tower.num_tokens)
    check: Any = getattr(method, "check_tower", None)
    if check is not None:
        check(tower)
    weights = _weights_on_device_of(method, tower.owner)
    _check_weights(plan, weights)
    before = tower.owner.__dict__.get(SLOT)
    if before is None:
        verify(tower)
    try:
        _install(tower, Slot(method, weights, plan, pool_of(tower), tower.__class__, WeakModule(tower.root)))
    except BaseException:  # no memory, most likely
        unpatch(model)
        if before is not None:
            _install(tower, before)
        raise
    return model


def _install(tower: Tower, slot: Slot) -> None:
    """Has a tower run what a slot says, its separate projections side by side."""
    owner: Any = tower.owner
    if SLOT not in owner.__dict__:
        owner.__dict__.pop("forward", None)  # its class's own, left behind by a hook, would outlive the class
        owner.__class__ = _subclass(owner.__class__, tower.__class__)
    owner.__dict__[SLOT] = slot
    for host in tower.blocks:
        pack(tower.projections(host))


def unpatch(model: Model) -> Model:
    """The model as it was before `patch`, bit for bit; nothing happens to an unpatched one.

    Raises:
        UnsupportedTower: the model has no tower that could have been patched, or its class was swapped since.
    """
    tower = adapters.find_tower(model)
    owner: Any = tower.owner
    if SLOT in owner.__dict__:
        if "_unpatched" not in type(owner).__dict__:
            raise UnsupportedTower(f"the class of the tower was changed after patching, to {type(owner).__name__}")
        refuse_replaced(tower)
        owner.__dict__.pop("forward", None)
        owner.__class__ = type(owner)._unpatched
        del owner.__dict__[SLOT]
        for host in tower.blocks:
            unpack(tower.projections(host))
    return model


@contextmanager
def patched(model: Model, method: Method) -> Iterator[Model]:
    """The model patched for the length of a `with` block; then whatever was there before, another method included."""
    before = adapters.find_tower(model).owner.__dict__.get(SLOT)
    patch(model, method)
    try:
        yield model
    finally:
        unpatch(model)
        if before is not None:
            tower = adapters.find_tower(model)
            # The tower may have learnt or moved meanwhile.
            _install(tower, before._replace(weights=_weights_on_device_of(before.method, tower.owner)))


def method_of(model: nn.Module) -> Method | None:
    """The method a model is patched with, or None."""
    slot = adapters.find_tower(model).owner.__dict__.get(SLOT)
    return None if slot is None else slot.method


def tower_of(model: nn.Module) -> Tower:
    """The image tower of a model, patched or not: its sizes, blocks and parts.

    Raises:
        UnsupportedTower: the tower is none that can be served; the message names what was found.
    """
    return adapters.find_tower(model)


def _weights_on_device_of(method: Method, owner: nn.Module) -> dict[str, nn.Module]:
    """The weights that come with a method, on the device and in the dtype of the blocks that an owner holds: the
    modules themselves where they are that, else copies."""
    if not hasattr(method, "weights"):
        return {}
    like = next(parameter for parameter in owner.parameters() if parameter.ndim > 1)  # norms may be wider
    made: dict[str, nn.Module] = {}
    for name, module in method.weights().items():
        there = all(p.device == like.device and p.dtype == like.dtype for p in module.parameters())
        made[name] = module if there else copy.deepcopy(module).to(like)
    return made


def _check_weights(plan: Plan, weights: Mapping[str, nn.Module]) -> None:
    """Raises ValueError unless a plan's weights are there."""
    ranks = any(isinstance(step, Predict) for step in plan.steps)
    for name, asked, what in (("predictor", ranks, "Predict steps"), ("learnt", plan.learnt > 0, "learnt tokens")):
        if asked and name not in weights:
            came = ", ".join(weights) or "none"
            raise ValueError(f"a plan with {what} needs a method whose weights() have {name!r}, got {came}")


@cache
def _subclass(base: Any, tower: Any) -> Any:
    """A subclass of a host's class that runs the patched loop, and pickles and copies as one."""

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (base, tower), self.__dict__

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        base._apply(self, fn, recurse)
        slot = self.__dict__.get(SLOT)
        if slot is not None:  # what moved or changed its dtype lies apart again
            found = tower(slot.root.ref(), self)
            for host in found.blocks:
                pack(found.projections(host))
            self.__dict__[SLOT] = slot._replace(weights=_weights_on_device_of(slot.method, self))
        return self

    def extra_repr(self: nn.Module) -> str:
        slot = self.__dict__.get(SLOT)
        mark = [] if slot is None else [f"clipkernels: {slot.method}"]
        return ", ".join([*mark, *filter(None, [base.extra_repr(self)])])

    namespace = {
        "_apply": _apply,
        "extra_repr": extra_repr,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    return type(base.__name__, (base,), {**namespace, "_unpatched": base, **tower.overrides(run_patched)})


def _rebuild(base: Any, tower: Any) -> nn.Module:
    """An empty instance of a patched class, whose state the pickle restores."""
    cls = _subclass(base, tower)
    instance: nn.Module = cls.__new__(cls)
    return instance
