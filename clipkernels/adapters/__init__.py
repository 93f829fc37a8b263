"""Adapters to the image towers of each library: one module per library, imported when one of its models is passed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from clipkernels.adapters.advice import describe


class UnsupportedTower(ValueError):
    """The tower is not supported. The message names its type; the model is unchanged."""


class Tower(Protocol):
    """An adapter's view of a host's image tower. Every property and method reads the host's current state."""

    @property
    def root(self) -> nn.Module:
        """The whole image tower, which embeds and pools."""

    @property
    def owner(self) -> nn.Module:
        """The module that holds and runs the blocks. Patching swaps its class."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The host's blocks, in order."""

    @property
    def prefix(self) -> int:
        """Number of leading tokens that are not patches: CLS, registers."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens entering the first block, the prefix included."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""

    @property
    def width(self) -> int:
        """Width C of the tokens."""

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""

    @property
    def out(self) -> int:
        """Width E of the embedding."""

    @property
    def mlp_ratio(self) -> float:
        """Multiply-accumulates of the MLP per token over 2·C². For two layers this is the hidden width over C."""

    @property
    def like(self) -> Tensor:
        """A tensor with the dtype and device of the tokens."""

    @property
    def has_cls(self) -> bool:
        """True if the first token is CLS."""

    @property
    def pools_cls(self) -> bool:
        """True if the pool reads only the CLS row.

        Then the attention of CLS ranks the patches; otherwise the attention that they receive does.
        """

    @property
    def returns_tokens(self) -> bool:
        """True if the host's own forward returns tokens and the embedding."""

    @property
    def pools_with_queries(self) -> bool:
        """True if the pool has several learned queries, whose outputs `project` returns instead of the tokens."""

    @property
    def attention(self) -> str | None:
        """The host's choice of an attention implementation, or None if it has no choice."""

    @property
    def checkpointing(self) -> bool:
        """True if the host recomputes activations in the backward pass."""

    def parts(self, host: nn.Module) -> Any:
        """The parts of a block, a `block.Parts`."""

    def projections(self, host: nn.Module) -> Sequence[nn.Module]:
        """A block's separate query, key and value projections, to be packed; empty if it has one projection."""

    def run_block(self, host: nn.Module, x: Tensor, rope: Tensor | None) -> Tensor:
        """The host's own forward of one block, (B,N,C) to (B,N,C)."""

    def layout(self, x: Tensor) -> Tensor:
        """Tokens (B,N,C) in the layout that the host's blocks take; the same call turns them back."""

    def returns_tuple(self, host: nn.Module) -> bool:
        """True if the host's own forward of a block returns its tokens in a tuple."""

    def ignores_hook(self, hook: Any) -> bool:
        """True for a forward hook on a block that the adapter itself calls."""

    def rope_like(self, host: nn.Module, patches: int) -> Tensor | None:
        """A rotary table (patches,2·D) for testing this block, or None if it takes none."""

    def unsupported_reason(self, host: nn.Module) -> str | None:
        """The reason why a block's parts would not compute what its own forward does, or None."""

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens (B,N,C) entering the first block, and the rotary table (…,P,2·D) of the patches, or None."""

    def pool(self, x: Tensor) -> Tensor:
        """The embedding (B,E) of the tokens (B,N,C) after the last block: the host's norm, pool and projection."""

    def project(self, x: Tensor) -> Tensor:
        """Every token after the host's final norm and projection, (B,N',E); every query's answer if the pool has
        several queries."""

    def encode(self, images: Tensor) -> Tensor:
        """The embedding (B,E), computed by the host's own forward."""

    @staticmethod
    def overrides(run: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """The methods, by name, that replace the owner's own while patched; `run` is `tower.run_patched`."""


def outputs_only_cls(tower: Tower) -> bool:
    """Return true if the output of a tower's own forward depends only on the CLS row of its last block."""
    return tower.pools_cls and not tower.returns_tokens


def find_tower(model: nn.Module) -> Tower:
    """The image tower of a model: the model itself, its image half, or the one tower among its submodules.

    Raises:
        UnsupportedTower: the model has no supported tower, or more than one; the message names them.
        TypeError: the model is not a torch module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module with an image tower, got {type(model).__name__}")
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


class ResNet(Protocol):
    """A tower without tokens, whose attention pool can be queried at every position."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""

    def tokens(self, images: Tensor) -> Tensor:
        """The pool's output (B,1+P,E) for the mean position, which is the embedding, and for every other position."""


def find_resnet(model: nn.Module) -> ResNet | None:
    """The image tower of a model if it is one of open_clip's ResNets, else None."""
    visual: Any = getattr(model, "visual", model)
    if not hasattr(visual, "layer4") or not hasattr(getattr(visual, "attnpool", None), "c_proj"):
        return None
    from clipkernels.adapters.open_clip import OpenCLIPResNet

    return OpenCLIPResNet(visual)
