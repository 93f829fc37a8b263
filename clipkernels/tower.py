"""Runs a tower's blocks under a plan, and what one forward can hand back. All state is local to the forward."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipkernels import block
from clipkernels.adapters import Tower, UnsupportedTower
from clipkernels.backend import epilogues
from clipkernels.plan import Condense, Plan, Predict


class Ran(NamedTuple):
    """x (B,N',C) after the last block, sources one (B,P) int64 per step, path (B,C) per block, taken (B,N,C) each."""

    x: Tensor
    sources: list[Tensor]
    path: list[Tensor]
    taken: list[Tensor]


def run(
    tower: Tower,
    x: Tensor,
    plan: Plan,
    *,
    rope: Tensor | None = None,
    visible: Tensor | None = None,
    rows: int | None = None,
    track: bool = False,
    path: bool = False,
    take: Collection[int] = (),
    first: int = 0,
    blocks: int | None = None,
    anchors: Tensor | None = None,
    predictor: block.Predictor | None = None,
    learnt: Callable[[], Tensor] | None = None,
) -> Ran:
    """The blocks of a tower on embedded tokens.

    Args:
        tower: whose blocks run.
        x: (B,N,C) entering the first block that runs.
        plan: one step or None per block, for N tokens.
        rope: the host's rotary table (…,P,2·D) of the patches, or None.
        visible: (B,N) 1 for tokens that may be attended to and 0 for padding, or None for all 1; without steps only.
        rows: where only these leading rows of the result are read, compute no others in the last block.
        track: also return, after each step, the row that holds each patch, or -1.
        path: also return the CLS row that leaves every block.
        take: also return what leaves these blocks, with each patch at its place (needs `track`).
        first: the block to begin with.
        blocks: stop before this one.
        anchors: (A,L,C) CLS tokens as they leave each block, which blocks that condense choose from; None for none.
        predictor: what ranks for steps that ask for it.
        learnt: gives (D,T,C), tokens for each of the first D blocks to begin with, behind the prefix; the other blocks
            go on with what the last of these makes of them. None for none.
    """
    prefix, last = plan.prefix + plan.learnt, len(plan.steps) - 1
    own = () if learnt is None else learnt().unbind()
    # A key that stands for no patch has the weight of none.
    size, proportional = visible, plan.proportional or visible is not None
    sources: list[Tensor] = []
    seen: list[Tensor] = []
    taken: list[Tensor] = []
    source = torch.arange(x.shape[1] + plan.learnt, device=x.device).expand(x.shape[0], -1) if track else None
    hosts = list(tower.blocks)[:blocks]
    parts = [tower.parts(host) for host in hosts]
    fused, normed = epilogues(x), None
    for index in range(first, len(hosts)):
        host, step, follows = hosts[index], plan.steps[index], index + 1
        refuse(tower, host, index)
        if index < len(own):
            patches = x[:, prefix if index else plan.prefix :]
            x = torch.cat([x[:, : plan.prefix], own[index].to(x.dtype).expand(x.shape[0], -1, -1), patches], 1)
        # The next block begins with what this one leaves, unless tokens come or go in between.
        same = len(own) <= follows < len(hosts) and not isinstance(plan.steps[follows], Predict)
        after = parts[follows].norm1 if fused and same else None
        arguments = (parts[index], x, step, size, prefix, proportional, rows if index == last else None, track)
        # The first block has no CLS token before it that an anchor could be compared with.
        table = anchors[:, index - 1] if anchors is not None and index and isinstance(step, Condense) else None
        if tower.checkpointing and torch.is_grad_enabled():
            more = (normed, rope, after, fused, table, predictor)
            moved = checkpoint(block.forward, *arguments, *more, use_reentrant=False)
        else:
            moved = block.forward(*arguments, normed, rope, after, fused, table, predictor)
        x, normed, size, rope, to = moved
        if source is not None and to is not None:
            source = torch.where(source < 0, source, to.gather(1, source.clamp_min(0)))
            sources.append(source[:, prefix:])
        if path:
            seen.append(x[:, 0])
        if index in take:
            taken.append(_without(unmerge(x, sources, prefix), plan))
    sources = [source - plan.learnt * (source >= 0) for source in sources] if plan.learnt else sources
    return Ran(_without(x, plan), sources, seen, taken)


def _without(x: Tensor, plan: Plan) -> Tensor:
    """Tokens without those that a plan added, if they are there: where CLS alone is wanted they are not."""
    start = plan.prefix + plan.learnt
    return torch.cat([x[:, : plan.prefix], x[:, start:]], 1) if plan.learnt and x.shape[1] >= start else x


def unmerge(x: Tensor, sources: list[Tensor], prefix: int) -> Tensor:
    """Tokens (B,N,C) with every patch back at its place: the row that holds it now, zeros where it is gone."""
    if not sources:
        return x
    source = sources[-1]
    patches = x[torch.arange(x.shape[0], device=x.device)[:, None], source.clamp_min(0)]
    patches = patches.masked_fill((source < 0)[..., None], 0)
    return torch.cat([x[:, :prefix], patches], 1)


def refuse(tower: Tower, host: nn.Module, index: int) -> None:
    """Raises UnsupportedTower where running a block's parts would skip something its own forward does."""
    why = tower.refusal(host)
    if why is not None:
        raise UnsupportedTower(f"block {index}: {why}")
