"""The protocols that adapters fulfil, and the error for a tower that none of them supports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


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


class ResNet(Protocol):
    """A tower without tokens, whose attention pool can be queried at every position."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""

    def tokens(self, images: Tensor) -> Tensor:
        """The pool's output (B,1+P,E) for the mean position, which is the embedding, and for every other position."""


class Exported(NamedTuple):
    """The image tower of a model that another runtime computes, with the method that it was exported with.

    image_size: height and width of an image in pixels.
    runtime: its runtime and precision, for people: "openvino, int8".
    method: the method in text, None for the host's own forward.
    tokens: tokens that enter each block and leave the last; empty if the host's own forward runs.
    tower, text_tower: fingerprints of the towers in PyTorch; no text tower is None.
    """

    image_size: tuple[int, int]
    runtime: str
    method: str | None
    tokens: tuple[int, ...]
    tower: Mapping[str, str]
    text_tower: Mapping[str, str] | None
