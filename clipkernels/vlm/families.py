"""The vision-language models of transformers whose prompt can be shortened, and what differs between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from clipkernels.adapters import UnsupportedTower
from clipkernels.arguments import check_model
from clipkernels.layered_class import host_of

NEEDED = (5, 23)
"""The oldest version of transformers whose models take the outputs of their towers as `mm_encoder_outputs`."""


def _one(container: Any) -> int:
    return 1


def _pooled(container: Any) -> int:
    return int(container.multi_modal_projector.kernel_size)


def _shuffled(container: Any) -> int:
    return int(container.config.scale_factor)


class Family(NamedTuple):
    """The properties of a family.

    title: its name for people.
    projector: attribute of the module that maps the tower's rows to image tokens.
    cell: the side in patches of the square that becomes one image token, of a container.
    takes_steps: the tower's rows are image tokens one by one, so that steps in the tower can shorten the prompt.
    passes_options: the host's forward passes arguments that it does not name to the tower as well.
    packs: tiles of an image are packed with newlines after the projector, so that the choice comes after.
    first_position: position of the first token of a prompt.
    """

    title: str
    projector: str = "multi_modal_projector"
    cell: Callable[[Any], int] = _one
    takes_steps: bool = False
    passes_options: bool = False
    packs: bool = False
    first_position: int = 0


FAMILIES = {
    "LlavaModel": Family("LLaVA", takes_steps=True, passes_options=True),
    "PaliGemmaModel": Family("PaliGemma and ColPali", takes_steps=True, first_position=1),
    "LlavaNextModel": Family("LLaVA-NeXT", packs=True),
    "Idefics3Model": Family("Idefics 3", "connector", _shuffled),
    "SmolVLMModel": Family("SmolVLM", "connector", _shuffled),
    "Gemma3Model": Family("Gemma 3", cell=_pooled),
    "LlavaOnevisionModel": Family("LLaVA-OneVision", packs=True),
}


def find_container(model: nn.Module) -> Any:
    """The module of a vision-language model that owns tower, projector and language model.

    Raises:
        UnsupportedTower: the model is of no family, or transformers is too old; the message names what came.
        TypeError: the model is not a torch module.
    """
    check_model(model)
    holders = [module for module in model.modules() if hasattr(type(module), "get_image_features")]
    containers = [module for module in holders if host_of(module).__name__ in FAMILIES]
    if len(containers) == 1:
        _check_version()
        return containers[0]
    names = ", ".join(family.title for family in FAMILIES.values())
    actual = host_of(holders[-1] if holders else model).__name__
    found = f"{len(containers)} in {type(model).__name__}" if containers else actual
    raise UnsupportedTower(f"hand_over=True takes one vision-language model of {names}, got {found}")


def family_of(container: Any) -> Family:
    """The family of a container."""
    return FAMILIES[host_of(container).__name__]


def _check_version() -> None:
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < NEEDED:
        raise UnsupportedTower(
            f"hand_over=True takes transformers {NEEDED[0]}.{NEEDED[1]} or later, got {transformers.__version__}: "
            "update it, or patch without hand_over"
        )
