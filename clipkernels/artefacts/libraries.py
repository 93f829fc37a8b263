"""The library of a model, and the module of this package that writes and reads its checkpoints."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from clipkernels.adapters import UnsupportedTower
from clipkernels.artefacts.header import Library

PACKAGES: dict[str, Library] = {
    "open_clip": "open_clip",
    "transformers": "transformers",
    "timm": "timm",
    "clip": "openai",
}


def library_of(model: nn.Module) -> Library:
    """The library that a model's class is from.

    Raises:
        UnsupportedTower: a model of another package, or only a part of a model of such a library.
    """
    package = type(model).__module__.partition(".")[0]
    whole = {
        "open_clip": hasattr(model, "visual") and hasattr(model, "encode_image"),
        "clip": hasattr(model, "visual") and hasattr(model, "encode_image"),
        "transformers": hasattr(model, "save_pretrained"),
        "timm": hasattr(model, "pretrained_cfg"),
    }
    if not whole.get(package):
        raise UnsupportedTower(
            "expected a whole model of open_clip, transformers, timm or OpenAI's clip, got "
            f"{type(model).__module__}.{type(model).__name__}: pass the model that its library made"
        )
    return PACKAGES[package]


def checkpoints_of(library: Library) -> Any:
    """The module that writes and reads the checkpoints of a library."""
    return import_module(f"clipkernels.artefacts.{library}")
