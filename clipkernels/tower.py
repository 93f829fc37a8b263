"""Runs a tower's blocks under a plan, for the host's own forward and for `encode_image`.

All state of a forward is local to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipkernels import adapters, block
from clipkernels.adapters import Tower, UnsupportedTower
from clipkernels.backend import use_epilogue_kernels
from clipkernels.block import TokenState
from clipkernels.methods import Method
from clipkernels.plan import Condense, Plan, Predict

SLOT = "_clipkernels"


class WeakModule:
    """A module held without owning it, so that no cycle keeps a dropped model alive; it follows copies and pickles."""

    def __init__(self, module: nn.Module | None) -> None:
        self.ref = (lambda: None) if module is None else weakref.ref(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakModule:
        module = self.ref()
        return self if module is None else WeakModule(memo.get(id(module), module))

    def __reduce__(self) -> tuple[Any, ...]:
        return WeakModule, (self.ref(),)


class Slot(NamedTuple):
    """The configuration that a patched owner carries.

    method: what it runs.
    weights: the modules that come with the method, by the names that `run` takes.
    plan: for the tower's usual number of tokens.
    reads: `pool_of` the tower when the plan was made.
    tower: the class of the adapter.
    root: the module around the owner.
    """

    method: Method
    weights: Mapping[str, nn.Module]
    plan: Plan
    reads: tuple[bool, bool]
    tower: Any
    root: WeakModule


class TowerInput(NamedTuple):
    """The tensors that enter the blocks of a tower.

    x (B,N,C): embedded tokens.
    rope (…,P,2·D): the host's rotary table of the patches, or None.
    visible (B,N): 1 for tokens that may be attended to and 0 for padding, or None for all 1; without steps only.
    anchors (A,L,C): CLS tokens as they leave each block, from which blocks that condense choose; None for none.
    """

    x: Tensor
    rope: Tensor | None = None
    visible: Tensor | None = None
    anchors: Tensor | None = None


class Reads(NamedTuple):
    """The parts of a forward's result that are read.

    rows: leading rows of the last block that are enough, or None for all.
    whole: merged tokens go back to the places that they stand for, because more than CLS is read.
    track: return, after each step, the row that holds each patch, or -1.
    path: return the CLS row that leaves every block.
    take: return the tokens that leave these blocks, with each patch at its place (needs `track`).
    """

    rows: int | None = None
    whole: bool = False
    track: bool = False
    path: bool = False
    take: Collection[int] = ()


class ForwardOutput(NamedTuple):
    """x (B,N',C) after the last block, sources one (B,P) int64 per step, path (B,C) per block, taken (B,N,C) each."""

    x: Tensor
    sources: list[Tensor]
    path: list[Tensor]
    taken: list[Tensor]


ALL_ROWS = Reads()
"""Every row of the last block and nothing else."""


def decide_reads(
    plan: Plan,
    *,
    whole: bool,
    every_row: bool = False,
    source: bool = False,
    path: bool = False,
    take: Collection[int] = (),
) -> Reads:
    """The rows to compute and the places to track.

    Args:
        plan: of the forward.
        whole: the pool or the caller reads more than the CLS row.
        every_row: the caller reads any row for another reason.
        source: the caller reads the places of the patches.
        path: the caller reads the CLS row of every block.
        take: the blocks whose tokens the caller reads.
    """
    rows = None if whole or every_row or source or take else plan.prefix
    return Reads(rows, whole, source or bool(take) or (plan.merges and whole), path, take)


def run(
    tower: Tower,
    inputs: TowerInput,
    plan: Plan,
    reads: Reads = ALL_ROWS,
    *,
    first: int = 0,
    blocks: int | None = None,
    predictor: block.Predictor | None = None,
    learnt: Callable[[], Tensor] | None = None,
) -> ForwardOutput:
    """The blocks of a tower on embedded tokens.

    Args:
        tower: whose blocks run.
        inputs: the tensors that enter the first block that runs.
        plan: one step or None per block, for N tokens.
        reads: the parts of the result that are read.
        first: the block to begin with.
        blocks: stop before this one.
        predictor: ranks the patches for steps that ask for it.
        learnt: gives (D,T,C), tokens for each of the first D blocks to begin with, behind the prefix; the other blocks
            go on with what the last of these makes of them. None for none.
    """
    x, rope, visible, anchors = inputs
    prefix, last = plan.prefix + plan.learnt, len(plan.steps) - 1
    own = () if learnt is None else learnt().unbind()
    # A key that stands for no patch has the weight of none.
    state, proportional = TokenState(x, size=visible, rope=rope), plan.proportional or visible is not None
    sources: list[Tensor] = []
    path: list[Tensor] = []
    taken: list[Tensor] = []
    source = None
    if reads.track:
        source = torch.arange(x.shape[1] + plan.learnt, device=x.device).expand(x.shape[0], -1)
    hosts = list(tower.blocks)[:blocks]
    parts = [tower.parts(host) for host in hosts]
    fused = use_epilogue_kernels(x)
    for index in range(first, len(hosts)):
        host, step, follows = hosts[index], plan.steps[index], index + 1
        refuse(tower, host, index)
        if index < len(own):
            state = state._replace(x=_with_learnt(state.x, own[index], plan, bool(index)))
        # The next block begins with what this one leaves, unless tokens come or go in between.
        same = len(own) <= follows < len(hosts) and not isinstance(plan.steps[follows], Predict)
        # The first block has no CLS token before it that an anchor could be compared with.
        table = anchors[:, index - 1] if anchors is not None and index and isinstance(step, Condense) else None
        options: dict[str, Any] = {
            "proportional": proportional,
            "rows": reads.rows if index == last else None,
            "track": reads.track,
            "after": parts[follows].norm1 if fused and same else None,
            "fused": fused,
            "anchors": table,
            "predictor": predictor,
        }
        if tower.checkpointing and torch.is_grad_enabled():
            output = checkpoint(block.forward, parts[index], state, step, prefix, use_reentrant=False, **options)
        else:
            output = block.forward(parts[index], state, step, prefix, **options)
        state = output.state
        if source is not None and output.to is not None:
            source = torch.where(source < 0, source, output.to.gather(1, source.clamp_min(0)))
            sources.append(source[:, prefix:])
        if reads.path:
            path.append(state.x[:, 0])
        if index in reads.take:
            taken.append(_without_learnt(unmerge(state.x, sources, prefix), plan))
    sources = [source - plan.learnt * (source >= 0) for source in sources] if plan.learnt else sources
    return ForwardOutput(_without_learnt(state.x, plan), sources, path, taken)


def run_patched(
    owner: nn.Module,
    x: Tensor,
    rope: Tensor | None = None,
    visible: Tensor | None = None,
    take: Collection[int] = (),
    blocks: int | None = None,
    whole: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The loop of a patched owner: the tokens that its host goes on with, and those that leave the blocks in `take`.

    Args:
        owner: the module that runs.
        x: (B,N,C) entering the first block.
        rope: the rotary table of its patches, or None.
        visible: (B,N) 0 for padding, or None.
        take: blocks whose result is returned too, every patch at its place.
        blocks: stop after so many.
        whole: every row is read, whatever the pool reads.
    """
    slot = owner.__dict__[SLOT]
    tower, plan = slot.tower(slot.root.ref(), owner), slot.plan
    if (x.shape[1], len(tower.blocks), pool_of(tower)) != (plan.entry, len(plan.steps), slot.reads):
        # A loop that outlived its tower goes on with the prefix it had.
        plan = make_plan(slot.method, tower, x.shape[1], plan.prefix if tower.root is None else None)
    if visible is not None and (any(plan.steps) or plan.learnt):
        _refuse_padding(visible, plan)
        visible = None
    # Whoever hooks the owner may read any row.
    whole, hooked = whole or not adapters.outputs_only_cls(tower), bool(owner._forward_hooks)
    reads = decide_reads(plan, whole=whole, every_row=hooked, take=take)
    output = run(tower, TowerInput(x, rope, visible), plan, reads, blocks=blocks, **slot.weights)
    return unmerge_for_pool(output, plan, reads), output.taken


def make_plan(method: Method, tower: Tower, tokens: int, prefix: int | None = None) -> Plan:
    """The method's plan for a tower that `tokens` tokens enter.

    Raises:
        ValueError: a plan for other tokens or blocks, or one that the tower's pool cannot read.
    """
    depth, prefix = len(tower.blocks), tower.prefix if prefix is None else prefix
    plan = method.plan(tokens=tokens, blocks=depth, prefix=prefix)
    if not isinstance(plan, Plan):
        raise ValueError(f"the plan of {method!r} must be a ck.Plan, got {type(plan).__name__}")
    if (plan.entry, len(plan.steps), plan.prefix) != (tokens, depth, prefix):
        raise ValueError(
            f"the plan of {method!r} must start at {tokens} tokens, {prefix} of them prefix, and have {depth} "
            f"steps, got {plan.entry}, {plan.prefix} and {len(plan.steps)}"
        )
    if plan.merges and plan.drops and not adapters.outputs_only_cls(tower):
        raise ValueError("a plan that merges tokens and drops others needs a tower that pools CLS, got another pool")
    return plan if tower.pools_cls else plan.ranked_by("received")


def pool_of(tower: Tower) -> tuple[bool, bool]:
    """The parts of its result that a tower reads, on which plans depend: CLS alone is pooled, tokens are returned."""
    return tower.pools_cls, tower.returns_tokens


def unmerge_for_pool(output: ForwardOutput, plan: Plan, reads: Reads) -> Tensor:
    """The tokens that are handed on: merged ones go back to their places where more than CLS is read."""
    return unmerge(output.x, output.sources, plan.prefix) if plan.merges and reads.whole else output.x


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
    why = tower.unsupported_reason(host)
    if why is not None:
        raise UnsupportedTower(f"block {index}: {why}")


def _with_learnt(x: Tensor, own: Tensor, plan: Plan, there: bool) -> Tensor:
    """Tokens with learnt ones (T,C) behind the prefix, in place of those that are `there` already."""
    patches = x[:, plan.prefix + plan.learnt if there else plan.prefix :]
    return torch.cat([x[:, : plan.prefix], own.to(x.dtype).expand(x.shape[0], -1, -1), patches], 1)


def _without_learnt(x: Tensor, plan: Plan) -> Tensor:
    """Tokens without the learnt ones, if they are there: where CLS alone is computed they are not."""
    start = plan.prefix + plan.learnt
    return torch.cat([x[:, : plan.prefix], x[:, start:]], 1) if plan.learnt and x.shape[1] >= start else x


def _refuse_padding(visible: Tensor, plan: Plan) -> None:
    """Raises ValueError where a mask (B,N) hides tokens, which no step may keep, or the pool will be given it again."""
    if torch.compiler.is_compiling() or not visible.all():
        raise ValueError(
            "a tower that prunes or merges takes images without padding, got a mask that may hide patches: give images "
            "that fill it, or patch with ck.Dense()"
        )
    if plan.prunes:
        raise ValueError(
            "a pool that is given the mask of all patches cannot read the few that pruning leaves: merge with ck.ToMe, "
            "ask ck.encode_image, or use transformers 5, which leaves out a mask that hides nothing"
        )
