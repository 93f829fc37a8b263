"""Run a tower's blocks under a plan, for the host's own forward and for `encode_image`.

All state of a forward is local to it, so that threads can share a model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipkernels import adapters, block
from clipkernels.adapters import Tower
from clipkernels.adapters.blocks import BlockCache, read_blocks
from clipkernels.adapters.hooks import forward_with_hooks
from clipkernels.backend import use_kernels
from clipkernels.block import Ranking, TokenState
from clipkernels.marks import choose, place_rows, unmerge
from clipkernels.messages import quantity
from clipkernels.methods import Method
from clipkernels.plan import Condense, Plan, Predict
from clipkernels.slot import SLOT


class TowerInput(NamedTuple):
    """The tensors that enter the blocks of a tower.

    x (B,N,C): embedded tokens.
    rope (…,P,2·D): the host's rotary table of the patches, or None.
    visible (B,N): 1 for a token and 0 for padding, or None for all 1; allowed only without steps.
    anchors (A,L,C): CLS tokens after each block, for blocks that condense to choose from; None for no anchors.
    """

    x: Tensor
    rope: Tensor | None = None
    visible: Tensor | None = None
    anchors: Tensor | None = None


class Reads(NamedTuple):
    """The parts of a forward's result that are read.

    rows: number of leading rows that the last block computes, or None for all.
    patches: patch rows are read, so that merged tokens must be copied back to the positions of their patches.
    track: return the row that holds each patch after each step, or -1.
    path: return the CLS row after every block.
    take_indices: return the tokens after these blocks, each patch at its position (needs `track` or `place`).
    place: return every token once, at the position of its patch, and NaN at the other positions.
    """

    rows: int | None = None
    patches: bool = False
    track: bool = False
    path: bool = False
    take_indices: Collection[int] = ()
    place: bool = False


class ForwardOutput(NamedTuple):
    """The result of the blocks.

    x (B,N',C): the tokens after the last block.
    sources: the row (B,P) int64 that holds each patch after each step.
    path: the CLS row (B,C) after each block.
    intermediates: the tokens (B,N,C) after each block of `take_indices`.
    ranking: the scores and keys of the plan's `Rank` step, or None.
    """

    x: Tensor
    sources: list[Tensor]
    path: list[Tensor]
    intermediates: list[Tensor]
    ranking: Ranking | None


ALL_ROWS = Reads()
"""Read every row of the last block and nothing else."""


def decide_reads(
    plan: Plan,
    *,
    patches: bool,
    every_row: bool = False,
    source: bool = False,
    path: bool = False,
    take_indices: Collection[int] = (),
) -> Reads:
    """The rows to compute and the patches to track.

    Args:
        plan: the plan of the forward.
        patches: the pool or the caller reads the patches, each at its position.
        every_row: the caller reads the rows of the last block as they are.
        source: the caller reads the row that holds each patch.
        path: the caller reads the CLS row after every block.
        take_indices: the blocks whose tokens the caller reads.
    """
    rows = None if patches or every_row or source or take_indices else plan.prefix
    return Reads(rows, patches, source or bool(take_indices) or (plan.merges and patches), path, take_indices)


def run(
    tower: Tower,
    inputs: TowerInput,
    plan: Plan,
    reads: Reads = ALL_ROWS,
    *,
    first: int = 0,
    blocks: int | None = None,
    cache: BlockCache | None = None,
    predictor: block.Predictor | None = None,
    learnt: Callable[[], Tensor] | None = None,
) -> ForwardOutput:
    """Run the blocks of a tower on embedded tokens.

    Args:
        tower: the tower.
        inputs: the tensors that enter the first block that runs.
        plan: one step or None per block, for N tokens.
        reads: the parts of the result that are read.
        first: index of the first block that runs.
        blocks: index of the block to stop before, or None to run all.
        cache: what the last forward of a patched tower read, or None to read its blocks.
        predictor: ranks the patches for `Predict` steps.
        learnt: returns learnt tokens (D,T,C), which follow the prefix. Each of the first D blocks starts with its own;
            the later blocks continue with the output of block D-1. None for no learnt tokens.
    """
    x, rope, visible, anchors = inputs
    prefix, last = plan.prefix + plan.learnt, len(plan.steps) - 1
    learnt_tokens = () if learnt is None else learnt().unbind()
    # Padding is a token of size 0, which proportional attention gives no weight.
    state, proportional = TokenState(x, size=visible, rope=rope), plan.proportional or visible is not None
    sources: list[Tensor] = []
    path: list[Tensor] = []
    intermediates: list[Tensor] = []
    source = position = ranking = None
    if reads.place:
        position = torch.arange(x.shape[1] - plan.prefix, device=x.device).expand(x.shape[0], -1)
    if reads.track:
        source = torch.arange(x.shape[1] + plan.learnt, device=x.device).expand(x.shape[0], -1)
    hosts = list(tower.blocks)[:blocks]
    fused = use_kernels(x)
    width = x.shape[2] if fused else None
    _, parts, hooked = read_blocks(tower, hosts, first, width) if cache is None else cache.read(tower, hosts, width)
    for index in range(first, len(hosts)):
        step, follows = plan.steps[index], index + 1
        forward = partial(forward_with_hooks, tower, index) if hooked[index] else block.forward
        if index < len(learnt_tokens):
            state = state._replace(x=_with_learnt(state.x, learnt_tokens[index], plan, bool(index)))
        # The next block starts with this one's output unless tokens join or leave in between.
        same = len(learnt_tokens) <= follows < len(hosts) and not isinstance(plan.steps[follows], Predict)
        same = same and not hooked[index] and not hooked[follows]  # a hook may replace the tokens
        # No block precedes the first one, so it has no CLS token to compare an anchor with.
        table = anchors[:, index - 1] if anchors is not None and index and isinstance(step, Condense) else None
        options: dict[str, Any] = {
            "proportional": proportional,
            "rows": reads.rows if index == last and not hooked[index] else None,
            "track": reads.track,
            "place": reads.place,
            "next_norm": parts[follows].norm1 if fused and same else None,
            "fused": fused,
            "anchors": table,
            "predictor": predictor,
        }
        if tower.checkpointing and torch.is_grad_enabled():
            output = checkpoint(forward, parts[index], state, step, prefix, use_reentrant=False, **options)
        else:
            output = forward(parts[index], state, step, prefix, **options)
        state = output.state
        if source is not None and output.destination is not None:
            source = torch.where(source < 0, source, output.destination.gather(1, source.clamp_min(0)))
            sources.append(source[:, prefix:])
        if position is not None and output.origin is not None:
            position = position.gather(1, output.origin)
        ranking = ranking if output.ranking is None else output.ranking
        if reads.path:
            path.append(state.x[:, 0])
        if index in reads.take_indices:
            restored = unmerge(state.x, sources, prefix) if position is None else state.x
            intermediates.append(_placed(_without_learnt(restored, plan), position, plan))
    sources = [source - plan.learnt * (source >= 0) for source in sources] if plan.learnt else sources
    x = _placed(_without_learnt(state.x, plan), position, plan)
    return ForwardOutput(x, sources, path, intermediates, ranking)


def run_patched(
    owner: nn.Module,
    x: Tensor,
    rope: Tensor | None = None,
    visible: Tensor | None = None,
    take_indices: Collection[int] = (),
    blocks: int | None = None,
    patches: bool = False,
    rankings: list[Ranking] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run the blocks of a patched owner.

    Args:
        owner: the module that runs.
        x: tokens (B,N,C) entering the first block.
        rope: the rotary table of the patches, or None.
        visible: (B,N) 0 for padding, or None.
        take_indices: the blocks whose output is returned too.
        blocks: number of blocks to run, or None for all.
        patches: the caller reads the patches, even if the pool reads only CLS.
        rankings: a list that gets the ranking of a hand-over that chooses after the tower, or None.
    Returns:
        The tokens that the host continues with, and those after each block of `take_indices`, each patch at its
        position. With marks, rows of patches that are not passed on are NaN.
    """
    slot = owner.__dict__[SLOT]
    tower, plan = slot.tower(slot.root.ref(), owner), slot.plan
    tokens = int(x.shape[1])  # a tensor under torch.jit.trace
    if tower.attention != slot.attention and not torch.compiler.is_compiling():
        warnings.warn(
            f"a patched tower computes attention itself, so the implementation {tower.attention!r} that was set after "
            "patching is not used: set it after ck.unpatch",
            stacklevel=3,
        )
    if (tokens, len(tower.blocks), pool_of(tower)) != (plan.entry, len(plan.steps), slot.pool):
        # An owner that outlived its tower keeps its prefix.
        plan = make_plan(slot.method, tower, tokens, plan.prefix if tower.root is None else None)
    if visible is not None and (any(plan.steps) or plan.learnt):
        _refuse_padding(visible, plan)
        visible = None
    patches = patches or not adapters.outputs_only_cls(tower)
    if slot.marks is not None:
        reads = Reads(take_indices=take_indices, place=any(plan.steps) and not plan.ranks)
    else:
        hooked = bool(owner._forward_hooks)  # a hook may read any row
        reads = decide_reads(plan, patches=patches, every_row=hooked, take_indices=take_indices)
    output = run(tower, TowerInput(x, rope, visible), plan, reads, blocks=blocks, cache=slot.cache, **slot.modules())
    if output.ranking is not None and slot.marks is not None:
        if slot.marks.after and rankings is not None:
            rankings.append(output.ranking)
        if not slot.marks.after:
            return choose(slot.marks, output.ranking, plan.prefix, [output.x, *output.intermediates])
    return unmerge_for_pool(output, plan, reads), output.intermediates


def make_plan(method: Method, tower: Tower, tokens: int, prefix: int | None = None) -> Plan:
    """The method's plan for a tower that `tokens` tokens enter.

    Raises:
        ValueError: the plan is for another number of tokens or blocks, or the tower's pool cannot read its result.
    """
    depth, prefix = len(tower.blocks), tower.prefix if prefix is None else prefix
    plan = method.plan(tokens=tokens, blocks=depth, prefix=prefix)
    if not isinstance(plan, Plan):
        raise ValueError(f"the plan of {method!r} must be a ck.Plan, got {type(plan).__name__}")
    if (plan.entry, len(plan.steps), plan.prefix) != (tokens, depth, prefix):
        raise ValueError(
            f"the plan of {method!r} must start at {quantity(tokens, 'token')}, {prefix} of them prefix, and have "
            f"{quantity(depth, 'step')}, got {plan.entry}, {plan.prefix} and {len(plan.steps)}"
        )
    if plan.merges and plan.drops and not adapters.outputs_only_cls(tower):
        raise ValueError("a plan that merges tokens and drops others needs a tower that pools CLS, got another pool")
    return plan if tower.pools_cls else plan.ranked_by("received")


def pool_of(tower: Tower) -> tuple[bool, bool]:
    """The properties of a tower's pool that plans depend on: it pools only CLS, and the tower returns tokens."""
    return tower.pools_cls, tower.returns_tokens


def unmerge_for_pool(output: ForwardOutput, plan: Plan, reads: Reads) -> Tensor:
    """The tokens for the pool. Merged tokens are copied back to the positions of their patches if those are read."""
    return unmerge(output.x, output.sources, plan.prefix) if plan.merges and reads.patches else output.x


def _with_learnt(x: Tensor, learnt: Tensor, plan: Plan, replace: bool) -> Tensor:
    """Tokens with learnt ones (T,C) after the prefix; with `replace`, in place of those already there."""
    patches = x[:, plan.prefix + plan.learnt if replace else plan.prefix :]
    return torch.cat([x[:, : plan.prefix], learnt.to(x.dtype).expand(x.shape[0], -1, -1), patches], 1)


def _placed(x: Tensor, position: Tensor | None, plan: Plan) -> Tensor:
    """Tokens, each at the position of its patch, or as they are without positions."""
    return x if position is None else place_rows(x, position, plan.prefix, plan.entry)


def _without_learnt(x: Tensor, plan: Plan) -> Tensor:
    """Tokens without the learnt ones."""
    # A last block that computes only CLS has no learnt tokens.
    start = plan.prefix + plan.learnt
    return torch.cat([x[:, : plan.prefix], x[:, start:]], 1) if plan.learnt and x.shape[1] >= start else x


def _refuse_padding(visible: Tensor, plan: Plan) -> None:
    """Raise ValueError if a mask (B,N) hides tokens, or if the plan prunes and the pool will read the mask again."""
    if torch.compiler.is_compiling() or not visible.all():
        raise ValueError(
            "a tower that prunes or merges takes images without padding, got a mask that may hide patches: use images "
            "that fill the mask, or patch with ck.Dense()"
        )
    if plan.prunes:
        raise ValueError(
            "a pool with a mask for all patches cannot read the patches left by pruning: merge with ck.ToMe, call "
            "ck.encode_image, or use transformers 5, which omits a mask that hides nothing"
        )
