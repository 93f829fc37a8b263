"""Patch a tower with a method, and undo it: patch, unpatch, patched.

Patching swaps the class of the one module that runs the blocks for a subclass of its type, whose loop keeps all token
state in local variables. The method is stored in the instance's `__dict__`, outside `state_dict` and `parameters()`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from clipkernels import adapters
from clipkernels.adapters import Tower, UnsupportedTower
from clipkernels.adapters.blocks import BlockCache
from clipkernels.adapters.packing import pack, unpack
from clipkernels.arguments import check_flags, describe
from clipkernels.layered_class import Layer, add_layer, has_layer, remove_layer
from clipkernels.methods import Method
from clipkernels.plan import Plan, Predict
from clipkernels.slot import SLOT, Slot, WeakContainer, WeakModule
from clipkernels.tower import make_plan, pool_of, run_patched
from clipkernels.verify import refuse_replaced, verify
from clipkernels.vlm.counts import tower_of as tower_in
from clipkernels.vlm.families import find_container
from clipkernels.vlm.hand_over import install, prepare, remove

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model, method: Method, *, hand_over: bool = False) -> Model:
    """Patch a model in place so that its image tower runs `method`, and return it. Patching again replaces the method.

    If the pool reads only CLS and the tower returns no other token, the last block computes only the CLS row;
    `encode_image(tokens=True)` computes all rows. If only CLS is pooled, its attention ranks the patches; otherwise the
    attention that they receive from all tokens does. Registers and CLS are never dropped. Rotary embeddings follow
    their patches: a merged token has the position of its target, a fused token has none.

    A patched model deep-copies and pickles with its method. `torch.save(model)` therefore writes a file that loads only
    where clipkernels is installed; `ck.unpatch` the model first, or save `model.state_dict()`, which a patch does not
    change.

    Args:
        model: a model from open_clip, transformers, timm or OpenAI's clip, its image tower, or a module that contains
            exactly one such tower.
        method: `Dense`, `EViT`, `ToMe` or any object with a `plan` like theirs. The method's weights (`PatchRanking`)
            are used directly if they match the tower's device and dtype; otherwise copies are, and are renewed when the
            tower moves.
        hand_over: of a vision-language model of transformers, shorten the prompt of the language model too: only the
            tokens that the method leaves go into it, each once. `ck.vlm` and docs/vlm.md say more.
    Raises:
        UnsupportedTower: the tower is not supported, or a block's output differs from that of its parts.
        ValueError: the method does not fit the tower, or its weights were made for another tower; or it drops patches
            and the model has one image token in its text for each of them, as LLaVA has, and does not hand over; or its
            tokens cannot be handed over.
        TypeError: the model is not a torch module, or the method has no `plan`.
        On any error the model is left unchanged.
    Warns if the tower cannot do what the method asks for, such as to merge more tokens than it has.
    """
    check_method(method)
    check_flags(hand_over=hand_over)
    container = find_container(model) if hand_over else None
    if container is not None:
        tower_in(container)  # its error names more than that of the model's tower
    tower = adapters.find_tower(model)
    plan = make_plan(method, tower, tower.num_tokens)
    handing = None if container is None else prepare(container, method, plan)
    if handing is None:
        _refuse_dropped_patches(model, tower, method, plan)
    check: Any = getattr(method, "check_tower", None)
    if check is not None:
        check(tower)
    weights = _weights_on_device_of(method, tower.owner)
    _check_weights(plan, weights)
    previous = tower.owner.__dict__.get(SLOT)
    if previous is None:
        verify(tower)
    shortfall = method.shortfall(plan) if hasattr(method, "shortfall") else None
    if shortfall is not None:
        warnings.warn(shortfall, stacklevel=2)
    root = WeakModule(tower.root)
    try:
        pool, kind = pool_of(tower), tower.__class__
        slot = Slot(method, weights, plan, pool, tower.attention, kind, root, BlockCache())
        if handing is not None:
            slot = slot._replace(marks=handing.marks, container=WeakContainer(handing.container))
        _install(tower, slot)
    except BaseException:  # most likely out of memory
        unpatch(model)
        if previous is not None:
            _install(tower, previous)
        raise
    return model


def check_method(method: Any) -> None:
    """Raise TypeError for a value without a `plan`, or for the class of a method."""
    if isinstance(method, type) or not callable(getattr(method, "plan", None)):
        actual = method.__name__ if isinstance(method, type) else describe(method)
        raise TypeError(f"method must be a method such as ck.EViT(keep=0.7), got {actual}")


def _install(tower: Tower, slot: Slot) -> None:
    """Make a tower run the method of a slot, and pack its separate projections."""
    owner: Any = tower.owner
    remove(tower)
    if SLOT not in owner.__dict__:
        # A hook may have left the class's own forward in the instance, where it would hide the new class's.
        owner.__dict__.pop("forward", None)
        add_layer(owner, Layer(0, _patched_loop, (tower.__class__,)))
    owner.__dict__[SLOT] = slot
    install(owner)
    for host in tower.blocks:
        pack(tower.projections(host))


def unpatch(model: Model) -> Model:
    """Undo `patch`, bit for bit, and return the model. An unpatched model is left unchanged.

    Raises:
        UnsupportedTower: the model has no supported tower, or the tower's class or forward was replaced after patching.
    """
    tower = adapters.find_tower(model)
    owner: Any = tower.owner
    if SLOT in owner.__dict__:
        if not has_layer(owner, _patched_loop):
            raise UnsupportedTower(f"the class of the tower was changed after patching, to {type(owner).__name__}")
        refuse_replaced(tower)
        remove(tower)
        owner.__dict__.pop("forward", None)
        remove_layer(owner, _patched_loop)
        del owner.__dict__[SLOT]
        for host in tower.blocks:
            unpack(tower.projections(host))
    return model


@contextmanager
def patched(model: Model, method: Method, *, hand_over: bool = False) -> Iterator[Model]:
    """Patch the model for the length of a `with` block, then restore its previous state or method.

    The patch is the model's, not the thread's: other threads that use the model meanwhile run the method too, and two
    threads that enter and leave such blocks of one model may restore each other's method. Give each thread a
    `copy.deepcopy`, or patch once before the threads start; running a patched model is safe in any number of threads.
    """
    previous = adapters.find_tower(model).owner.__dict__.get(SLOT)
    patch(model, method, hand_over=hand_over)
    try:
        yield model
    finally:
        unpatch(model)
        if previous is not None:
            tower = adapters.find_tower(model)
            # The tower may have been trained or moved meanwhile.
            _install(tower, previous._replace(weights=_weights_on_device_of(previous.method, tower.owner)))


def method_of(model: nn.Module) -> Method | None:
    """The method that a model is patched with, or None."""
    slot = adapters.find_tower(model).owner.__dict__.get(SLOT)
    return None if slot is None else slot.method


def tower_of(model: nn.Module) -> Tower:
    """The image tower of a model, patched or not: its sizes, blocks and parts.

    Raises:
        UnsupportedTower: the tower is not supported; the message names its type.
    """
    return adapters.find_tower(model)


def _refuse_dropped_patches(model: nn.Module, tower: Tower, method: Method, plan: Plan) -> None:
    """Raise ValueError unless the model around a tower can use a plan.

    A plan that only ranks patches is for a prompt. A vision-language model that configures an image token has one in
    its text for each patch, or pools a whole grid.
    """
    if plan.ranks:
        raise ValueError(
            f"{method!r} chooses tokens of a prompt: patch a vision-language model of transformers with hand_over=True"
        )
    for holder in model.modules() if plan.prunes else ():
        config = getattr(holder, "config", None)
        tokens = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
        if any(token is not None for token in tokens) and any(part is tower.owner for part in holder.modules()):
            raise ValueError(
                f"{type(holder).__name__} needs every patch, because its text has a fixed number of image tokens: use "
                "ck.Dense(), ck.ToMe or ck.TCA, which leave a row for each patch, or hand_over=True for a shorter "
                f"prompt, got {method!r}"
            )


def _weights_on_device_of(method: Method, owner: nn.Module) -> dict[str, nn.Module]:
    """The modules of a method on the device and in the dtype of an owner's blocks: themselves, or copies if needed."""
    if not hasattr(method, "weights"):
        return {}
    # Norms may be wider than projections. Where projections are quantized, norms are all the parameters.
    like = next((parameter for parameter in owner.parameters() if parameter.ndim > 1), next(owner.parameters()))
    modules: dict[str, nn.Module] = {}
    for name, module in method.weights().items():
        matches = all(p.device == like.device and p.dtype == like.dtype for p in module.parameters())
        modules[name] = module if matches else copy.deepcopy(module).to(like)
    return modules


def _check_weights(plan: Plan, weights: Mapping[str, nn.Module]) -> None:
    """Raise ValueError unless the modules that a plan needs are among the weights."""
    predicts = any(isinstance(step, Predict) for step in plan.steps)
    needs = (("predictor", predicts, "Predict steps"), ("learnt", plan.learnt > 0, "learnt tokens"))
    for name, needed, feature in needs:
        if needed and name not in weights:
            actual = ", ".join(weights) or "none"
            raise ValueError(f"a plan with {feature} needs a method whose weights() have {name!r}, got {actual}")


def _release_parameters(owner: nn.Module) -> None:
    """Forget the parameters of an owner, because they may be about to be replaced.

    Its projections are unpacked if torch is about to swap parameters, which must have no weak references.
    """
    slot = owner.__dict__.get(SLOT)
    if slot is not None:
        slot.cache.clear()
    if slot is not None and torch.__future__.get_swap_module_params_on_conversion():
        tower = slot.tower(slot.root.ref(), owner)
        for host in tower.blocks:
            unpack(tower.projections(host))


def _patched_loop(base: Any, tower: Any) -> dict[str, Any]:
    """The layer of a patched owner's class: the loop that runs the blocks, of the adapter class `tower`."""

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        _release_parameters(self)
        base._apply(self, fn, recurse)
        slot = self.__dict__.get(SLOT)
        if slot is not None:  # parameters that moved or changed dtype are no longer packed
            adapter = tower(slot.root.ref(), self)
            for host in adapter.blocks:
                pack(adapter.projections(host))
            self.__dict__[SLOT] = slot._replace(weights=_weights_on_device_of(slot.method, self))
        return self

    def _load_from_state_dict(self: Any, *args: Any, **options: Any) -> None:
        _release_parameters(self)
        base._load_from_state_dict(self, *args, **options)

    def extra_repr(self: nn.Module) -> str:
        slot = self.__dict__.get(SLOT)
        label = [] if slot is None else [f"clipkernels: {slot.method}"]
        return ", ".join([*label, *filter(None, [base.extra_repr(self)])])

    methods = {"_apply": _apply, "_load_from_state_dict": _load_from_state_dict, "extra_repr": extra_repr}
    return {**methods, **tower.overrides(run_patched)}
