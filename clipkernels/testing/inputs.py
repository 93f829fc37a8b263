"""Random inputs of the operations at the shapes of CLIP towers.

They resemble the inputs inside a tower: queries and keys are views of one packed projection, and no input is zeros. An
operation that selects tokens compares numbers that are exact in every precision and every order of summation, so that
its selection can be compared exactly, ties included.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


class Shape(NamedTuple):
    """A tower's tokens, width, heads and prefix tokens, and a ToMe r that merges most of the tokens over its depth."""

    tokens: int
    width: int
    heads: int
    prefix: int
    r: int


SHAPES = {
    "B-32": Shape(50, 768, 12, 1, 4),
    "B-16": Shape(197, 768, 12, 1, 13),
    "L-14": Shape(257, 1024, 16, 1, 7),
    "L-14-336": Shape(577, 1024, 16, 1, 16),
    "SO400M-14-384": Shape(729, 1152, 16, 0, 20),
}


class InputFactory:
    """Random inputs of one dtype at one shape and batch.

    Args:
        shape: shape of the tower.
        batch: images per batch.
        dtype: dtype of tokens, queries, keys and weights.
        device: device of the inputs.
        seed: seed of the generator.
    """

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.shape, self.batch, self.dtype, self.device = shape, batch, dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.patches = shape.tokens - shape.prefix
        self.keep = math.ceil(0.7 * self.patches)
        self.classes, self.support = (1000, 16_000) if shape.width >= 512 else (20, 150)

    @property
    def embedding(self) -> int:
        """The width of the tower's embeddings; of a small tower, its width."""
        return {768: 512, 1024: 768}.get(self.shape.width, self.shape.width)

    def normal(self, *size: int) -> Tensor:
        """Return normal random numbers of a size."""
        return torch.randn(size, generator=self.generator, device=self.device).to(self.dtype)

    def tokens(self, times: int = 1) -> Tensor:
        """Return tokens (B,N,times·C)."""
        return self.normal(self.batch, self.shape.tokens, times * self.shape.width)

    def vector(self, times: int = 1) -> Tensor:
        """Return a vector (times·C,)."""
        return self.normal(times * self.shape.width)

    def sizes(self) -> Tensor:
        """Return token sizes (B,N) from 1 to 4, fp32."""
        size = (self.batch, self.shape.tokens)
        return torch.randint(1, 5, size, generator=self.generator, device=self.device).float()

    def scores(self, *heads: int) -> Tensor:
        """Return softmax rows (B,P) or (B,H,P) in steps of 2⁻²⁰, whose sums over heads are exact in fp32."""
        size = (self.batch, *heads, self.patches)
        return (torch.randn(size, generator=self.generator, device=self.device).softmax(-1) * 2**20).round() / 2**20

    def signs(self, *heads: int) -> Tensor:
        """Return keys of ±1, equal in all heads: means and, at D = 64, similarities are exact, and many are tied."""
        size = (self.batch, *(1 for _ in heads), self.shape.tokens, self.shape.width // self.shape.heads)
        signs = torch.randint(0, 2, size, generator=self.generator, device=self.device) * 2 - 1
        return signs.to(self.dtype).repeat(1, *heads, 1, 1) if heads else signs.to(self.dtype)

    def points(self) -> Tensor:
        """Return tokens (B,N,C) of small integers: every squared distance is exact, and many are tied."""
        size = (self.batch, self.shape.tokens, self.shape.width)
        return torch.randint(-2, 3, size, generator=self.generator, device=self.device).to(self.dtype)

    def units(self, *size: int) -> Tensor:
        """Return embeddings (*size,E) of length one."""
        return normalize(self.normal(*size, self.embedding).float(), dim=-1).to(self.dtype)

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views q, k, v (B,H,N,D) of a packed projection (B,N,3·C)."""
        q, k, v = packed.unflatten(-1, (3, self.shape.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v
