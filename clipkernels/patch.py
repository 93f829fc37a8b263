"""patch, unpatch, patched: give a tower a method and take it back.

Patching swaps the class of the one module that runs the blocks for a subclass of its own type whose loop keeps all
token state in locals. The method sits in the instance's `__dict__`, outside `state_dict` and `parameters()`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from clipkernels import adapters
from clipkernels.adapters import Tower, UnsupportedTower
from clipkernels.adapters.packing import pack, unpack
from clipkernels.methods import Method
from clipkernels.plan import Plan, Predict
from clipkernels.tower import Ran, run, unmerge
from clipkernels.verify import refuse_replaced, verify

Model = TypeVar("Model", bound=nn.Module)
SLOT = "_clipkernels"


class _Weak:
    """A module held without owning it, so that no cycle keeps a dropped model alive; it follows copies and pickles."""

    def __init__(self, module: nn.Module | None) -> None:
        self.ref = (lambda: None) if module is None else weakref.ref(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Weak:
        module = self.ref()
        return self if module is None else _Weak(memo.get(id(module), module))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Weak, (self.ref(),)


class _Patch(NamedTuple):
    """What a patched owner carries: its method, the weights that come with it, the plan for its usual tokens with what
    was read of the result when it was made, and how to find the tower around it."""

    method: Method
    weights: Mapping[str, nn.Module]
    plan: Plan
    reads: tuple[bool, bool]
    tower: Any
    root: _Weak


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
    tower = adapters.find(model)
    plan = planned(method, tower, tower.tokens)
    check: Any = getattr(method, "check_tower", None)
    if check is not None:
        check(tower)
    weights = _beside(method, tower.owner)
    _suits(plan, weights)
    before = tower.owner.__dict__.get(SLOT)
    if before is None:
        verify(tower)
    try:
        _install(tower, _Patch(method, weights, plan, _reads(tower), tower.__class__, _Weak(tower.root)))
    except BaseException:  # no memory, most likely
        unpatch(model)
        if before is not None:
            _install(tower, before)
        raise
    return model


def _install(tower: Tower, slot: _Patch) -> None:
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
    tower = adapters.find(model)
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
    before = adapters.find(model).owner.__dict__.get(SLOT)
    patch(model, method)
    try:
        yield model
    finally:
        unpatch(model)
        if before is not None:
            tower = adapters.find(model)
            # The tower may have learnt or moved meanwhile.
            _install(tower, before._replace(weights=_beside(before.method, tower.owner)))


def method_of(model: nn.Module) -> Method | None:
    """The method a model is patched with, or None."""
    slot = adapters.find(model).owner.__dict__.get(SLOT)
    return None if slot is None else slot.method


def tower_of(model: nn.Module) -> Tower:
    """The image tower of a model, patched or not: its sizes, blocks and parts.

    Raises:
        UnsupportedTower: the tower is none that can be served; the message names what was found.
    """
    return adapters.find(model)


def for_pool(ran: Ran, plan: Plan, whole: bool) -> Tensor:
    """What is handed on: where more than CLS is read, merged tokens go back to the places they stand for."""
    return unmerge(ran.x, ran.sources, plan.prefix) if plan.merges and whole else ran.x


def _beside(method: Method, owner: nn.Module) -> dict[str, nn.Module]:
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


def _suits(plan: Plan, weights: Mapping[str, nn.Module]) -> None:
    """Raises ValueError unless a plan's weights are there."""
    ranks = any(isinstance(step, Predict) for step in plan.steps)
    for name, asked, what in (("predictor", ranks, "Predict steps"), ("learnt", plan.learnt > 0, "learnt tokens")):
        if asked and name not in weights:
            came = ", ".join(weights) or "none"
            raise ValueError(f"a plan with {what} needs a method whose weights() have {name!r}, got {came}")


def _reads(tower: Tower) -> tuple[bool, bool]:
    """What of its result a tower reads, on which plans depend."""
    return tower.pools_cls, tower.hands_out


def planned(method: Method, tower: Tower, tokens: int, prefix: int | None = None) -> Plan:
    depth, prefix = len(tower.blocks), tower.prefix if prefix is None else prefix
    plan = method.plan(tokens=tokens, blocks=depth, prefix=prefix)
    if not isinstance(plan, Plan):
        raise ValueError(f"the plan of {method!r} must be a ck.Plan, got {type(plan).__name__}")
    if (plan.entry, len(plan.steps), plan.prefix) != (tokens, depth, prefix):
        raise ValueError(
            f"the plan of {method!r} must start at {tokens} tokens, {prefix} of them prefix, and have {depth} "
            f"steps, got {plan.entry}, {plan.prefix} and {len(plan.steps)}"
        )
    if plan.merges and plan.drops and not adapters.reads_cls_alone(tower):
        raise ValueError("a plan that merges tokens and drops others needs a tower that pools CLS, got another pool")
    return plan if tower.pools_cls else plan.ranked_by("received")


def _run_patched(
    owner: nn.Module,
    x: Tensor,
    rope: Tensor | None = None,
    visible: Tensor | None = None,
    take: Collection[int] = (),
    blocks: int | None = None,
    whole: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The loop of a patched owner: what its host goes on with, and what leaves the blocks in `take`.

    Args:
        owner: that runs.
        x: (B,N,C) entering the first block.
        rope: the rotary table of its patches, or None.
        visible: (B,N) 0 for padding, or None.
        take: blocks whose result is returned too, every patch at its place.
        blocks: stop after so many.
        whole: every row is read, whatever the pool reads.
    """
    slot = owner.__dict__[SLOT]
    tower, plan = slot.tower(slot.root.ref(), owner), slot.plan
    if (x.shape[1], len(tower.blocks), _reads(tower)) != (plan.entry, len(plan.steps), slot.reads):
        # A loop that outlived its tower goes on with the prefix it had.
        plan = planned(slot.method, tower, x.shape[1], plan.prefix if tower.root is None else None)
    # Whoever takes states or hooks the owner may read any row.
    whole = whole or not adapters.reads_cls_alone(tower)
    rows = plan.prefix if not (whole or take or owner._forward_hooks) else None
    if visible is not None and (any(plan.steps) or plan.learnt):
        _refuse_padding(visible, plan)
        visible = None
    track = bool(take) or (plan.merges and whole)
    state: dict[str, Any] = {"rope": rope, "visible": visible, **slot.weights}
    ran = run(tower, x, plan, rows=rows, track=track, take=take, blocks=blocks, **state)
    return for_pool(ran, plan, whole), ran.taken


def _refuse_padding(visible: Tensor, plan: Plan) -> None:
    """Raises ValueError where a mask (B,N) hides tokens, which no step may keep, or the pool will be given it again."""
    if torch.compiler.is_compiling() or not visible.all():
        raise ValueError(
            "a tower that prunes or merges takes images without padding, got a mask that may hide patches: give images "
            "that fill it, or patch with ck.Dense()"
        )
    if plan.prunes:
        raise ValueError(
            "a pool that is given the mask of all patches cannot read the few that pruning leaves: merge with ck.ToMe, "
            "ask ck.encode_image, or use transformers 5, which leaves out a mask that hides nothing"
        )


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
            self.__dict__[SLOT] = slot._replace(weights=_beside(slot.method, self))
        return self

    namespace = {
        "_apply": _apply,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    return type(base.__name__, (base,), {**namespace, "_unpatched": base, **tower.overrides(_run_patched)})


def _rebuild(base: Any, tower: Any) -> nn.Module:
    """An empty instance of a patched class, whose state the pickle restores."""
    cls = _subclass(base, tower)
    instance: nn.Module = cls.__new__(cls)
    return instance
