"""Embeddings of images without some of their patches: what enters a block is computed once for all of them.

With it come its queries, keys and values there, of which every variant gathers the rows that it keeps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from clipkernels import block
from clipkernels.adapters import Tower
from clipkernels.backend import use_epilogue_kernels
from clipkernels.plan import Plan
from clipkernels.reference import Norm
from clipkernels.tower import Reads, TowerInput, refuse, run


class BlockInput(NamedTuple):
    """What enters a block: which one, x (b,N,C), its q, k, v (b,H,N,D) there, its rotary table or None."""

    block: int
    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    rope: Tensor | None


class PrecomputedQKV(NamedTuple):
    """A block's parts with queries, keys and values that are there already."""

    parts: Any
    q: Tensor
    k: Tensor
    v: Tensor

    norm1: Norm | None = None

    def qkv(
        self, x: Tensor, normed: Tensor | None, rows: int | None, rope: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.q[:, :, :rows], self.k, self.v

    def project(self, out: Tensor, fused: bool) -> block.Branch:
        return self.parts.project(out, fused)

    @property
    def norm2(self) -> Norm | None:
        return self.parts.norm2

    def mlp(self, x: Tensor, normed: Tensor | None, fused: bool) -> block.Branch:
        return self.parts.mlp(x, normed, fused)


def run_to_block(tower: Tower, images: Tensor, at: int) -> BlockInput:
    """What images (b,3,S,S) are when they enter a block."""
    x, rope = tower.embed(images)
    x = run(tower, TowerInput(x, rope), _dense_plan(tower, x.shape[1]), blocks=at).x
    host = tower.blocks[at]
    refuse(tower, host, at)
    q, k, v = tower.parts(host).qkv(x, None, None, rope)
    return BlockInput(at, x, q, k, v, rope)


def embed_subsets(tower: Tower, entering: BlockInput, image: Tensor, kept: Tensor) -> Tensor:
    """Embeddings (V,E) of the images at (V,) with the tokens (V,M) alone, ascending, the prefix among them."""
    at = image[:, None]
    x, rope = entering.x[at, kept], entering.rope
    q, k, v = (part[at, :, kept].transpose(1, 2) for part in (entering.q, entering.k, entering.v))
    if rope is not None:
        each = rope[image] if rope.ndim > 3 and rope.shape[0] > 1 else rope
        rope = block.gather_rope(each, kept[:, tower.prefix :] - tower.prefix)
    parts: Any = PrecomputedQKV(tower.parts(tower.blocks[entering.block]), q, k, v)
    rows = tower.prefix if tower.pools_cls else None
    after, last = entering.block + 1, entering.block == len(tower.blocks) - 1
    state = block.TokenState(x)
    x = block.forward(
        parts, state, None, tower.prefix, rows=rows if last else None, fused=use_epilogue_kernels(x)
    ).state.x
    plan = _dense_plan(tower, kept.shape[1])
    return tower.pool(run(tower, TowerInput(x, rope), plan, Reads(rows), first=after).x)


def _dense_plan(tower: Tower, tokens: int) -> Plan:
    return Plan((None,) * len(tower.blocks), tokens, tower.prefix)
