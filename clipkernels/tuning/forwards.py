"""Embeddings of one part of the photographs under any plan, from tokens that are kept.

A plan whose first step is in block b starts there, with the dense tokens that enter block b, if those are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels.adapters import Tower
from clipkernels.adapters.blocks import BlockCache
from clipkernels.encode import check_images
from clipkernels.plan import Plan
from clipkernels.tower import TowerInput, decide_reads, run, unmerge_for_pool

TOKEN_BYTES = 1 << 30
"""Most bytes of the tokens that one part keeps."""


class Tokens(NamedTuple):
    """Tokens x (B,N,C) that enter a block, and the host's rotary table or None."""

    x: Tensor
    rope: Tensor | None


class Part:
    """A part of the photographs, of which plans are run in batches that are always the same.

    Args:
        tower: a patched tower.
        images: (n,3,S,S) preprocessed, or a sequence of (3,S,S).
        index: the indices (m,) of the part.
        batch_size: images per forward.
        limit: most bytes of tokens to keep; tokens entering the first block are kept before those entering later ones.
        remember: keep the embeddings of every plan, for several budgets in one process.
    """

    def __init__(
        self,
        tower: Tower,
        images: Any,
        index: Tensor,
        batch_size: int,
        *,
        limit: int = TOKEN_BYTES,
        remember: bool = False,
    ) -> None:
        self.tower, self.images, self.index = tower, images, index
        self.batches: Sequence[Tensor] = index.split(batch_size)
        self._cache = BlockCache()
        bytes_per_block = len(index) * tower.num_tokens * tower.width * tower.like.element_size()
        kept = min(len(tower.blocks), limit // max(1, bytes_per_block))
        self._kept = tuple(range(kept))
        self._embeddings: dict[Plan, Tensor] | None = {} if remember else None
        self._tokens: list[list[Tokens] | None] = [None] * len(self.batches)

    @torch.inference_mode()
    def embed(self, plan: Plan, after_batch: Callable[[], None] = lambda: None) -> Tensor:
        """Normalised embeddings (m,E) fp32 on the CPU.

        Args:
            plan: the plan to run.
            after_batch: called after each batch.
        """
        if self._embeddings is not None and plan in self._embeddings:
            return self._embeddings[plan]
        first = next((block for block, step in enumerate(plan.steps) if step is not None), len(plan.steps) - 1)
        rows = []
        for number in range(len(self.batches)):
            tokens, start = self._entering(number, max(first, 0))
            rows.append(normalize(self._run(tokens, plan, start).float(), dim=1).cpu())
            after_batch()
        embeddings = torch.cat(rows)
        if self._embeddings is not None:
            self._embeddings[plan] = embeddings
        return embeddings

    def _run(self, tokens: Tokens, plan: Plan, first: int) -> Tensor:
        reads = decide_reads(plan, patches=not self.tower.pools_cls)
        output = run(self.tower, TowerInput(*tokens), plan, reads, first=first, cache=self._cache)
        return self.tower.pool(unmerge_for_pool(output, plan, reads))

    def _entering(self, number: int, block: int) -> tuple[Tokens, int]:
        """The dense tokens of a batch that enter a block or an earlier one, and the index of that block."""
        kept = self._tokens[number]
        if kept is None:
            kept = [Tokens(*self.tower.embed(self.read(self.batches[number])))]
            plan = Plan((None,) * len(self.tower.blocks), kept[0].x.shape[1], self.tower.prefix)
            for last in self._kept[1:]:
                x = run(self.tower, TowerInput(*kept[-1]), plan, first=last - 1, blocks=last, cache=self._cache).x
                kept.append(Tokens(x, kept[-1].rope))
            self._tokens[number] = kept if self._kept else None
        start = min(block, len(kept) - 1)
        return kept[start], start

    def read(self, index: Tensor) -> Tensor:
        """The images (b,3,S,S) at indices, on the device and in the dtype of the tower."""
        like = self.tower.like
        if isinstance(self.images, Tensor):
            batch = self.images[index.to(self.images.device)]
        else:
            batch = torch.stack([self.images[at] for at in index.tolist()])
        check_images(batch, self.tower.image_size)
        return batch.to(like.device, like.dtype)
