"""Adapters to the image towers of each library: one module per library, imported when one of its models is passed."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from clipkernels.adapters.advice import describe
from clipkernels.adapters.protocols import Exported, ResNet, Tower, UnsupportedTower
from clipkernels.arguments import check_model

__all__ = [
    "Exported",
    "ResNet",
    "Tower",
    "UnsupportedTower",
    "find_exported",
    "find_resnet",
    "find_tower",
    "outputs_only_cls",
]


def outputs_only_cls(tower: Tower) -> bool:
    """Return true if the output of a tower's own forward depends only on the CLS row of its last block."""
    return tower.pools_cls and not tower.returns_tokens


def find_tower(model: nn.Module) -> Tower:
    """The image tower of a model: the model itself, its image half, or the one tower among its submodules.

    Raises:
        UnsupportedTower: the model has no supported tower, or more than one; the message names them.
        TypeError: the model is not a torch module.
    """
    check_model(model)
    if find_exported(model) is not None:
        raise UnsupportedTower(
            "expected a model in PyTorch, got an exported one, whose method is fixed: export another"
        )
    tower = _find_in_library(model)
    if tower is not None:
        return tower
    towers: dict[int, tuple[str, Tower]] = {}
    for name, module in model.named_modules():
        tower = _find_in_library(module)
        if tower is not None:
            towers.setdefault(id(tower.owner), (name, tower))
    if len(towers) == 1:
        return next(iter(towers.values()))[1]
    if towers:
        names = ", ".join(name for name, _ in towers.values())
        raise UnsupportedTower(f"expected one image tower, got {len(towers)} in {type(model).__name__}: {names}")
    raise UnsupportedTower(f"expected {SUPPORTED}, got {describe(model)}")


SUPPORTED = "an image ViT of open_clip, timm or OpenAI's clip, or a CLIP or SigLIP of transformers"


def _find_in_library(model: Any) -> Tower | None:
    """The tower of a module that is a model or an image tower of a supported library, or None."""
    # A library that has not been imported cannot have made the model.
    if "transformers" in sys.modules and (hasattr(model, "vision_model") or hasattr(model, "encoder")):
        from clipkernels.adapters import transformers

        return transformers.find(model)
    visual = getattr(model, "visual", model)
    if "timm" in sys.modules and (hasattr(visual, "trunk") or hasattr(visual, "patch_embed")):
        from clipkernels.adapters import timm

        return timm.find(visual)
    if not hasattr(visual, "conv1") or not hasattr(visual, "transformer"):
        return None
    if hasattr(visual, "_embeds"):
        from clipkernels.adapters import open_clip

        return open_clip.find(visual)
    from clipkernels.adapters import openai

    return openai.find(visual)


def find_resnet(model: nn.Module) -> ResNet | None:
    """The image tower of a model if it is one of open_clip's ResNets, else None."""
    visual: Any = getattr(model, "visual", model)
    if not hasattr(visual, "layer4") or not hasattr(getattr(visual, "attnpool", None), "c_proj"):
        return None
    from clipkernels.adapters.open_clip import OpenCLIPResNet

    return OpenCLIPResNet(visual)


def find_exported(model: nn.Module) -> Exported | None:
    """The image tower of a model if another runtime computes it, else None."""
    exported: Exported | None = getattr(model, "exported", None)
    return exported if isinstance(exported, Exported) else None
