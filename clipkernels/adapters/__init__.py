"""Where the parts of each library's image tower are: one module per library, imported when its models are met."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class UnsupportedTower(ValueError):
    """The tower cannot be served; the message names what was found. Nothing was changed."""


class Tower(Protocol):
    """What an adapter says of a host's image tower. Every property and method reads the host as it is now."""

    @property
    def root(self) -> nn.Module:
        """The whole image tower, which embeds and pools."""

    @property
    def owner(self) -> nn.Module:
        """The module that holds and runs the blocks: its class is swapped."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The host's blocks, in order."""

    @property
    def prefix(self) -> int:
        """Leading tokens that are no patches: CLS, registers."""

    @property
    def num_tokens(self) -> int:
        """Tokens entering the first block, the prefix included."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""

    @property
    def width(self) -> int:
        """C."""

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""

    @property
    def out(self) -> int:
        """E, the width of the embedding."""

    @property
    def mlp_ratio(self) -> float:
        """Multiply-accumulates of the MLP per token over 2·C²: of two layers, the hidden width over C."""

    @property
    def like(self) -> Tensor:
        """Any tensor with the dtype and device of the tokens."""

    @property
    def has_cls(self) -> bool:
        """Whether the first token is CLS."""

    @property
    def pools_cls(self) -> bool:
        """Whether the pool reads the CLS row alone; then its attention ranks, otherwise what patches receive."""

    @property
    def returns_tokens(self) -> bool:
        """Whether the host's own forward returns tokens beside the embedding."""

    @property
    def pools_with_queries(self) -> bool:
        """Whether the pool asks with several learned queries, whose answers then stand for the tokens."""

    @property
    def checkpointing(self) -> bool:
        """Whether the host was asked to recompute activations."""

    def parts(self, host: nn.Module) -> Any:
        """A block's parts, a `block.Parts`."""

    def projections(self, host: nn.Module) -> Sequence[nn.Module]:
        """A block's separate query, key and value projections, to be packed; none where they are one already."""

    def run_block(self, host: nn.Module, x: Tensor, rope: Tensor | None) -> Tensor:
        """The host's own forward of one block, (B,N,C) to (B,N,C)."""

    def rope_like(self, host: nn.Module, patches: int) -> Tensor | None:
        """Some rotary table (patches,2·D) such as this block takes, or None."""

    def unsupported_reason(self, host: nn.Module) -> str | None:
        """Why running the parts of a block would not be what its own forward does, or None."""

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens (B,N,C) entering the first block, and the rotary table (…,P,2·D) of their patches or None."""

    def pool(self, x: Tensor) -> Tensor:
        """The embedding (B,E) the host makes of what leaves the last block (B,N,C)."""

    def project(self, x: Tensor) -> Tensor:
        """Every token, or every query's answer, after the host's final norm and projection, (B,N',E)."""

    def encode(self, images: Tensor) -> Tensor:
        """The embedding (B,E) by the host's own forward."""

    @staticmethod
    def overrides(run: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """The owner's methods while patched; `run` is `tower.run_patched`."""


def outputs_only_cls(tower: Tower) -> bool:
    """Whether whoever calls a tower's own forward sees nothing of its last tokens but CLS."""
    return tower.pools_cls and not tower.returns_tokens


def find_tower(model: nn.Module) -> Tower:
    """The image tower of a model: the model itself, its image half, or the one tower somewhere inside it.

    Raises:
        UnsupportedTower: there is none that can be served, or more than one; the message names what was found.
        TypeError: the model is no torch module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module with an image tower, got {type(model).__name__}")
    tower = _find_in_library(model)
    if tower is not None:
        return tower
    inside: dict[int, tuple[str, Tower]] = {}
    for name, module in model.named_modules():
        tower = _find_in_library(module)
        if tower is not None:
            inside.setdefault(id(tower.owner), (name, tower))
    if len(inside) == 1:
        return next(iter(inside.values()))[1]
    if inside:
        names = ", ".join(name for name, _ in inside.values())
        raise UnsupportedTower(f"expected one image tower, got {len(inside)} in {type(model).__name__}: {names}")
    raise UnsupportedTower(f"expected {SUPPORTED}, got {describe(model)}")


SUPPORTED = "an image ViT of open_clip, transformers, timm or OpenAI's clip"


def describe(model: nn.Module) -> str:
    """The name of a model's image tower, as far as it has one."""
    visual = getattr(model, "visual", None) or getattr(model, "vision_model", None) or model
    trunk = getattr(visual, "trunk", None)
    return (
        f"{type(visual).__name__} around timm's {type(trunk).__name__}" if trunk is not None else type(visual).__name__
    )


def _find_in_library(model: Any) -> Tower | None:
    """The tower of a module that a served library would call a model or an image tower, or None."""
    # Whoever has a library's model has imported the library.
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


class ResNet(Protocol):
    """A tower without tokens whose attention pool can be asked at every position."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""

    def tokens(self, images: Tensor) -> Tensor:
        """What the pool gives for the mean position, the embedding, and every other: (B,1+P,E)."""


def find_resnet(model: nn.Module) -> ResNet | None:
    """The image tower of a model if it is one of open_clip's ResNets, else None."""
    visual: Any = getattr(model, "visual", model)
    if not hasattr(visual, "layer4") or not hasattr(getattr(visual, "attnpool", None), "c_proj"):
        return None
    from clipkernels.adapters.open_clip import OpenCLIPResNet

    return OpenCLIPResNet(visual)
