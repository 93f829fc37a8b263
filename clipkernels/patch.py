"""patch, unpatch, patched: give a tower a method and take it back, and read everything a forward can hand back.

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
from clipkernels.methods import Dense, Method
from clipkernels.plan import Plan
from clipkernels.tower import Ran, run, unmerge
from clipkernels.verify import refuse_replaced, verify

Model = TypeVar("Model", bound=nn.Module)
_SLOT = "_clipkernels"


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


class Encoded(NamedTuple):
    """What one forward of an image tower hands back.

    embedding (B,E): what the host's own encode_image returns, not normalised (CoCa's normalises unless told not to).
    tokens (B,N',E): all tokens after the final norm and projection, prefix first; CoCa's queries where those pool.
    cls_path (B,L,C): the CLS token after every block.
    source (B,S,P) int32: after each of the S steps the row that holds each patch, -1 where it is gone.
    prefix: the leading rows of tokens that are no patches.
    """

    embedding: Tensor
    tokens: Tensor | None = None
    cls_path: Tensor | None = None
    source: Tensor | None = None
    prefix: int = 1


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
    plan = _plan(method, tower, tower.tokens)
    check: Any = getattr(method, "check_tower", None)
    if check is not None:
        check(tower)
    weights = _beside(method, tower.owner)
    before = tower.owner.__dict__.get(_SLOT)
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
    if _SLOT not in owner.__dict__:
        owner.__dict__.pop("forward", None)  # its class's own, left behind by a hook, would outlive the class
        owner.__class__ = _subclass(owner.__class__, tower.__class__)
    owner.__dict__[_SLOT] = slot
    for host in tower.blocks:
        pack(tower.projections(host))


def unpatch(model: Model) -> Model:
    """The model as it was before `patch`, bit for bit; nothing happens to an unpatched one.

    Raises:
        UnsupportedTower: the model has no tower that could have been patched, or its class was swapped since.
    """
    tower = adapters.find(model)
    owner: Any = tower.owner
    if _SLOT in owner.__dict__:
        if "_unpatched" not in type(owner).__dict__:
            raise UnsupportedTower(f"the class of the tower was changed after patching, to {type(owner).__name__}")
        refuse_replaced(tower)
        owner.__dict__.pop("forward", None)
        owner.__class__ = type(owner)._unpatched
        del owner.__dict__[_SLOT]
        for host in tower.blocks:
            unpack(tower.projections(host))
    return model


@contextmanager
def patched(model: Model, method: Method) -> Iterator[Model]:
    """The model patched for the length of a `with` block; then whatever was there before, another method included."""
    before = adapters.find(model).owner.__dict__.get(_SLOT)
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
    slot = adapters.find(model).owner.__dict__.get(_SLOT)
    return None if slot is None else slot.method


def tower_of(model: nn.Module) -> Tower:
    """The image tower of a model, patched or not: its sizes, blocks and parts.

    Raises:
        UnsupportedTower: the tower is none that can be served; the message names what was found.
    """
    return adapters.find(model)


def encode_image(
    model: nn.Module,
    images: Tensor,
    tokens: bool = False,
    cls_path: bool = False,
    source: bool = False,
    anchors: Tensor | None = None,
) -> Encoded:
    """The embedding of images and, where asked for, what led to it; on patched and unpatched towers.

    On open_clip's ResNets, which have no CLS path and no steps, every position of the last feature map asks the
    attention pool, and the mean position, row 0 of the tokens, gives the embedding.

    Composed of the host's own parts: hooks on its norms and MLPs fire, hooks on the whole tower do not.

    Args:
        model: what `patch` takes, or an open_clip ResNet.
        images: (B,3,S,S) preprocessed, in the tower's dtype and on its device.
        tokens: also return all tokens after final norm and projection.
        cls_path: also return the CLS token after every block.
        source: also return where each patch went.
        anchors: (A,L,C) CLS tokens after every block, such as `ck.Reservoir` has: where a method condenses, attention
            sees, as one more token, the anchor most like the image so far. Rows of zeros are no anchors; one at least
            must be more. Where patches are ranked by what they receive, they receive from the anchor too.
    Returns:
        Encoded.
    Raises:
        ValueError: images of another size than the tower's, or anchors of another depth or width.
        UnsupportedTower: as in `patch`; or a ResNet asked for `cls_path` or `source`, or given anchors.
    """
    resnet = adapters.find_resnet(model)
    if resnet is not None:
        if cls_path or source or anchors is not None:
            raise UnsupportedTower("expected a ViT for cls_path, source and anchors, got a ResNet")
        check_images(images, resnet.image_size)
        asked = resnet.tokens(images)
        return Encoded(asked[:, 0], asked if tokens else None)
    tower = adapters.find(model)
    check_images(images, tower.image_size)
    if (cls_path or anchors is not None) and not tower.has_cls:
        wanted = "expected a tower with a CLS token for cls_path and anchors"
        raise UnsupportedTower(f"{wanted}, got {type(tower.root).__name__}")
    depth = len(tower.blocks)
    if anchors is not None and (anchors.ndim != 3 or anchors.shape[1:] != (depth, tower.width) or not len(anchors)):
        raise ValueError(f"anchors must be (A,{depth},{tower.width}) with A ≥ 1, got {tuple(anchors.shape)}")
    refuse_replaced(tower)
    x, rope = tower.embed(images)
    slot = tower.owner.__dict__.get(_SLOT)
    plan = _plan(Dense() if slot is None else slot.method, tower, x.shape[1])
    rows = tower.prefix if tower.pools_cls and not (tokens or source) else None
    whole = not tower.pools_cls
    track = source or (plan.merges and whole)
    anchors = None if anchors is None else anchors.to(x.device)
    weights = {} if slot is None else slot.weights
    ran = run(tower, x, plan, rope=rope, rows=rows, track=track, path=cls_path, anchors=anchors, **weights)
    pooled = _for_pool(ran, plan, whole)
    return Encoded(
        embedding=tower.pool(pooled),
        tokens=tower.project(pooled if tower.pools_by_query else ran.x) if tokens else None,
        cls_path=torch.stack(ran.path, 1) if cls_path else None,
        source=_stacked(ran.sources, x, plan) if source else None,
        prefix=plan.prefix,
    )


def check_images(images: Tensor, size: tuple[int, int]) -> None:
    """Raises ValueError unless images are (B,3,*size)."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, *size):
        came = ",".join(str(n) for n in images.shape)
        raise ValueError(f"images must be (B,3,{size[0]},{size[1]}), got ({came})")


def _stacked(sources: list[Tensor], x: Tensor, plan: Plan) -> Tensor:
    empty = torch.empty(x.shape[0], 0, plan.entry - plan.prefix, dtype=torch.int32, device=x.device)
    return torch.stack(sources, 1).int() if sources else empty


def _for_pool(ran: Ran, plan: Plan, whole: bool) -> Tensor:
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


def _reads(tower: Tower) -> tuple[bool, bool]:
    """What of its result a tower reads, on which plans depend."""
    return tower.pools_cls, tower.hands_out


def _plan(method: Method, tower: Tower, tokens: int, prefix: int | None = None) -> Plan:
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
    slot = owner.__dict__[_SLOT]
    tower, plan = slot.tower(slot.root.ref(), owner), slot.plan
    if (x.shape[1], len(tower.blocks), _reads(tower)) != (plan.entry, len(plan.steps), slot.reads):
        # A loop that outlived its tower goes on with the prefix it had.
        plan = _plan(slot.method, tower, x.shape[1], plan.prefix if tower.root is None else None)
    # Whoever takes states or hooks the owner may read any row.
    whole = whole or not adapters.reads_cls_alone(tower)
    rows = plan.prefix if not (whole or take or owner._forward_hooks) else None
    if visible is not None and (any(plan.steps) or plan.learnt):
        _refuse_padding(visible, plan)
        visible = None
    asked: dict[str, Any] = {"rows": rows, "track": bool(take) or (plan.merges and whole), "take": take}
    ran = run(tower, x, plan, rope=rope, visible=visible, blocks=blocks, **asked, **slot.weights)
    return _for_pool(ran, plan, whole), ran.taken


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
        slot = self.__dict__.get(_SLOT)
        if slot is not None:  # what moved or changed its dtype lies apart again
            found = tower(slot.root.ref(), self)
            for host in found.blocks:
                pack(found.projections(host))
            self.__dict__[_SLOT] = slot._replace(weights=_beside(slot.method, self))
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
