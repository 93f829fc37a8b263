"""Where the parts of each library's image tower are: one module per library, imported when its models are met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class UnsupportedTower(ValueError):
    """The tower cannot be served; the message names what was found. Nothing was changed."""


class Tower(Protocol):
    """What an adapter says of a host's image tower. Every property and method reads the host as it is now."""

    prefix: int
    """Leading tokens that are no patches."""

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
    def tokens(self) -> int:
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
        """Hidden width of the MLPs over C."""

    @property
    def like(self) -> Tensor:
        """Any tensor with the dtype and device of the tokens."""

    @property
    def cls_only(self) -> bool:
        """Whether the pool reads the CLS row alone."""

    @property
    def pools_by_query(self) -> bool:
        """Whether the pool asks with learned queries, whose answers then stand for the tokens."""

    @property
    def checkpointing(self) -> bool:
        """Whether the host was asked to recompute activations."""

    def parts(self, host: nn.Module) -> Any:
        """A block's parts, a `block.Parts`."""

    def run_block(self, host: nn.Module, x: Tensor) -> Tensor:
        """The host's own forward of one block, (B,N,C) to (B,N,C)."""

    def refusal(self, host: nn.Module) -> str | None:
        """Why running the parts of a block would not be what its own forward does, or None."""

    def embed(self, images: Tensor) -> Tensor:
        """The tokens (B,N,C) entering the first block."""

    def pool(self, x: Tensor) -> Tensor:
        """The embedding (B,E) the host makes of what leaves the last block (B,N,C)."""

    def project(self, x: Tensor) -> Tensor:
        """Every token, or every query's answer, after the host's final norm and projection, (B,N',E)."""

    @staticmethod
    def overrides(run: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """The owner's methods while patched; `run(owner, x, take=(), blocks=None)` is the patched loop."""


def find(model: nn.Module) -> Tower:
    """The image tower of a model.

    Raises:
        UnsupportedTower: the tower is none that can be served; the message names what was found.
        TypeError: the model is no torch module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module with an image tower, got {type(model).__name__}")
    from clipkernels.adapters import open_clip

    return open_clip.find(model)


class ResNet(Protocol):
    """A tower without tokens whose attention pool can be asked at every position."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""

    def tokens(self, images: Tensor) -> Tensor:
        """What the pool gives for the mean position, the embedding, and every other: (B,1+P,E)."""


def find_resnet(model: nn.Module) -> ResNet | None:
    """The image tower of a model if it is one of open_clip's ResNets, else None."""
    from clipkernels.adapters import open_clip

    return open_clip.find_resnet(model)
