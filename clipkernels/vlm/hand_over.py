"""Hand image tokens over to the language model: the patch of a vision-language model beside that of its tower."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from clipkernels.adapters import Tower, UnsupportedTower
from clipkernels.adapters.modules import is_forward_replaced
from clipkernels.layered_class import Layer, add_layer, has_layer, remove_layer
from clipkernels.marks import Marks, marked_rows
from clipkernels.messages import quantity
from clipkernels.methods import Method, Select
from clipkernels.plan import Condense, Plan, Prune
from clipkernels.slot import SLOT
from clipkernels.vlm.counts import prefix_of, tower_of
from clipkernels.vlm.families import Family, family_of
from clipkernels.vlm.forward import handed_over


class HandOver(NamedTuple):
    """A hand-over that fits: the container, and the marks that its tower sets."""

    container: Any
    marks: Marks


def install(owner: nn.Module) -> None:
    """Add the layers of the container of a patched owner, if it has one, and of the modules after the blocks."""
    container, marks = _container_of(owner)
    if container is not None:
        add_layer(container, Layer(0, handed_over))
        for module in _modules_after_blocks(container):
            cell = marks.cell if module is _projector_of(container) else 1
            add_layer(module, Layer(0, marked_rows, (cell,)))


def remove(tower: Tower) -> None:
    """Undo `install`, also in a copy of the tower alone, and in modules that were wrapped after it.

    Raises:
        UnsupportedTower: a forward was replaced after patching.
    """
    container, _ = _container_of(tower.owner)
    if container is not None:
        _refuse_replaced(container)
    for module in list((tower.root if container is None else container).modules()):
        for make in (handed_over, marked_rows):
            if has_layer(module, make):
                remove_layer(module, make)


def _container_of(owner: nn.Module) -> tuple[Any, Any]:
    """The container that a patched owner refers to, None if it does not hold this owner, and the marks."""
    slot: Any = owner.__dict__.get(SLOT)
    container: Any = None if slot is None else slot.container.ref()
    # A copy of the tower alone refers to the container of the original.
    if slot is None or container is None or tower_of(container).owner is not owner:
        return None, None
    return container, slot.marks


def prepare(container: Any, method: Method, plan: Plan) -> HandOver:
    """The hand-over of a method's tokens in a container.

    Raises:
        UnsupportedTower: a forward was replaced.
        ValueError: the method's tokens cannot be handed over.
    """
    _refuse_replaced(container)
    prefix_of(container, {})
    family = family_of(container)
    cell, side = family.cell(container), round((plan.entry - plan.prefix) ** 0.5)
    if side % cell:
        raise ValueError(f"expected a grid that squares of {cell} patches fill, got {side} × {side} patches")
    if isinstance(method, Select):
        return HandOver(container, Marks(method, cell, family.packs))
    _check_steps(method, plan, family)
    return HandOver(container, Marks(cell=cell))


def is_installed(container: Any) -> bool:
    """Return true if a container hands tokens over."""
    return has_layer(container, handed_over)


def _check_steps(method: Method, plan: Plan, family: Family) -> None:
    """Raise ValueError unless every token that a plan leaves has a position of its own in the prompt."""
    if any(plan.steps) and not family.takes_steps:
        reason = "crops padding when it packs its tiles" if family.packs else "pools the grid of a whole tower"
        raise ValueError(
            f"{family.title} {reason}, so that steps in the tower cannot shorten its prompt: use ck.Select, or ck.ToMe "
            f"without hand_over, got {method!r}"
        )
    tokens = plan.entry
    for block, step in enumerate(plan.steps):
        patches = tokens - plan.prefix
        if isinstance(step, Prune) and step.fuse:
            raise ValueError(
                f"a fused token has no position in a prompt: use fuse=False, got {method!r}, whose block {block} fuses"
            )
        if isinstance(step, Condense) and step.keep + step.merge == patches:
            raise ValueError(
                f"a fused token without patches has no position in a prompt: block {block} keeps and merges all of "
                f"{quantity(patches, 'patch')}, got {method!r}"
            )
        tokens = step.leaves(tokens, plan.prefix) if step else tokens


def _refuse_replaced(container: Any) -> None:
    """Raise UnsupportedTower if the forward of a module with a layer is not its class's, which would hide the layer."""
    for module in (container, *_modules_after_blocks(container)):
        if is_forward_replaced(module):
            raise UnsupportedTower(f"the forward of {type(module).__name__} was replaced: patch the model first")


def _projector_of(container: Any) -> nn.Module:
    projector: nn.Module = getattr(container, family_of(container).projector)
    return projector


def _modules_after_blocks(container: Any) -> list[nn.Module]:
    """The modules that rows go through between the tower's blocks and the prompt."""
    vision: Any = tower_of(container).root
    return [vision.post_layernorm, _projector_of(container)]
