"""Embeddings of images without some of their patches, from a block input that is computed once per image.

The block's queries, keys and values are also computed once; each subset gathers the rows that it keeps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from clipkernels import block
from clipkernels.adapters import Tower, UnsupportedTower
from clipkernels.adapters.blocks import refuse
from clipkernels.adapters.hooks import fires_hooks
from clipkernels.backend import use_kernels
from clipkernels.plan import Plan
from clipkernels.reference import Norm
from clipkernels.row_places import gather_rope
from clipkernels.tower import Reads, TowerInput, run


class BlockInput(NamedTuple):
    """The input of block number `block`: tokens x (b,N,C), q, k, v (b,H,N,D), and the rotary table or None."""

    block: int
    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    rope: Tensor | None


class PrecomputedQKV(NamedTuple):
    """The parts of a block with queries, keys and values that are already computed."""

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
    """The input of block `at` (zero-based) for images (b,3,S,S).

    Raises:
        UnsupportedTower: the block is not supported, or carries a hook.
    """
    x, rope = tower.embed(images)
    x = run(tower, TowerInput(x, rope), _dense_plan(tower, x.shape[1]), blocks=at).x
    host = tower.blocks[at]
    refuse(tower, host, at)
    if fires_hooks(tower, host):
        raise UnsupportedTower(f"block {at} carries a hook, which a ranking of its patches would skip: remove it first")
    q, k, v = tower.parts(host).qkv(x, None, None, rope)
    return BlockInput(at, x, q, k, v, rope)


def embed_subsets(tower: Tower, block_input: BlockInput, image: Tensor, tokens: Tensor) -> Tensor:
    """Embeddings (V,E) of the images at index `image` (V,) from their tokens (V,M) only, ascending, prefix included."""
    index = image[:, None]
    x, rope = block_input.x[index, tokens], block_input.rope
    q, k, v = (part[index, :, tokens].transpose(1, 2) for part in (block_input.q, block_input.k, block_input.v))
    if rope is not None:
        table = rope[image] if rope.ndim > 3 and rope.shape[0] > 1 else rope
        rope = gather_rope(table, tokens[:, tower.prefix :] - tower.prefix)
    parts: Any = PrecomputedQKV(tower.parts(tower.blocks[block_input.block]), q, k, v)
    rows = tower.prefix if tower.pools_cls else None
    after, last = block_input.block + 1, block_input.block == len(tower.blocks) - 1
    state = block.TokenState(x)
    x = block.forward(parts, state, None, tower.prefix, rows=rows if last else None, fused=use_kernels(x)).state.x
    plan = _dense_plan(tower, tokens.shape[1])
    return tower.pool(run(tower, TowerInput(x, rope), plan, Reads(rows), first=after).x)


def _dense_plan(tower: Tower, tokens: int) -> Plan:
    return Plan((None,) * len(tower.blocks), tokens, tower.prefix)
