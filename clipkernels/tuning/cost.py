"""The cost of plans on one device: measured milliseconds, and multiply-accumulates as executed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from clipkernels import block, ops
from clipkernels.adapters import Tower, outputs_only_cls
from clipkernels.adapters.blocks import read_blocks
from clipkernels.arguments import check_callable, check_int, check_model, describe, is_list
from clipkernels.backend import use_kernels
from clipkernels.block import Branch, Parts, TokenState
from clipkernels.classifier import eval_mode
from clipkernels.encode import tower_weight
from clipkernels.measure.timing import Clock, Times, gmacs_for, measure, plan_for, vary
from clipkernels.methods import Dense, EViT, Method, ToMe
from clipkernels.ops import unchecked
from clipkernels.patching import patched, tower_of
from clipkernels.plan import Condense, Merge, Plan, Prune, Step
from clipkernels.reference import Norm
from clipkernels.row_places import gather_rope
from clipkernels.tuning.cost_table import Conditions, CostTable, conditions_of

__all__ = ["CostTable", "gmacs_as_executed", "isotonic", "measure_cost"]

MEASURED_COUNTS = 10
MAX_SCALE = 2.0
Progress = Callable[[int, int], None]


def gmacs_as_executed(tower: Tower, plan: Plan) -> float:
    """The GMACs per image that a plan runs on a tower, whose last block runs for CLS alone if it outputs only CLS."""
    return gmacs_for(tower, plan, exact=outputs_only_cls(tower))


def measure_cost(
    model: nn.Module,
    batch: int,
    *,
    counts: Sequence[int] | None = None,
    rounds: int = 15,
    clock: Clock = "wall",
    seed: int = 0,
    progress: Progress | None = None,
) -> CostTable:
    """Measure the cost of the parts of a model's image tower by number of tokens.

    The parts are those of the tower's own blocks, with its weights, in turn; their input is the embedding of random
    images. All of them run interleaved, in a new random order every round, and a time is a median. The model is patched
    with `ck.Dense` meanwhile and then restored.

    Args:
        model: a model that `ck.patch` takes, patched or not.
        batch: images per batch.
        counts: the numbers of tokens, prefix included; the tower's own is added. None for ten at equal distances.
        rounds: timed runs of every part.
        clock: "wall", or "process": CPU time of one thread.
        seed: seed of the images and the orders.
        progress: called with the number of finished runs and the number of all runs.
    Raises:
        ValueError: counts that the tower does not have, a number out of range, the process clock with several threads,
            or a tower in another dtype than float32, float16 or bfloat16.
        UnsupportedTower: as `ck.patch`.
    """
    check_model(model)
    check_int("rounds", rounds, 1)
    check_callable(progress=progress)
    with torch.inference_mode(), eval_mode(model), patched(model, Dense()):
        tower = tower_of(model)
        conditions = conditions_of(tower, batch)
        tokens = _check_counts(counts, tower)
        generator, weight = torch.Generator().manual_seed(seed), tower_weight(model)
        images = torch.randn(batch, 3, *tower.image_size, generator=generator).to(weight)
        bench = _Bench(tower, images, generator)
        reduced = _reduced(tower)
        calls: dict[str, Callable[[], object]] = {"embed": partial(tower.embed, images)}
        for name, variant in vary(model, {"dense": Dense(), **reduced}).items():
            calls[name] = partial(variant.encode, images)
        for count in tokens:
            calls |= {f"{name} {count}": call for name, call in bench.calls(count).items()}
        done, total = 0, len(calls) * (rounds + 1)

        def advance() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        times = measure(calls, rounds, seed=seed, clock=clock, progress=advance)
    table = _tabulate(times, conditions, tokens, bench.repeats, clock)
    ratios = [_median(times, name) / table.milliseconds(plan_for(tower, method)) for name, method in reduced.items()]
    # In a forward a block finds other things in the caches than when timed alone, and the host runs ahead of a GPU.
    return msgspec.structs.replace(table, scale=min(max(statistics.median(ratios), 1 / MAX_SCALE), MAX_SCALE))


def isotonic(values: Iterable[float]) -> list[float]:
    """The non-decreasing values with the least sum of squared differences to these: pool adjacent violators.

    Source: Barlow et al., Statistical Inference under Order Restrictions, 1972, section 1.2.
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, size = float(value), 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        pools.append((mean, size))
    return [mean for mean, size in pools for _ in range(size)]


class _WithoutProjections:
    """A block whose projections and MLP return ready tensors, so that its attention and its step remain."""

    def __init__(self, parts: Parts, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.parts, self.ready = parts, (q, k, v)

    @property
    def norm1(self) -> Norm | None:
        return self.parts.norm1

    @property
    def norm2(self) -> Norm | None:
        return self.parts.norm2

    def qkv(
        self, x: Tensor, normed: Tensor | None, rows: int | None, rope: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.ready

    def project(self, out: Tensor, fused: bool) -> Branch:
        return Branch(out.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor, normed: Tensor | None, fused: bool) -> Branch:
        return Branch(x)


class _Bench:
    """The timed parts of a tower, on tokens of the embedding of random images.

    Args:
        tower: the tower, patched.
        images: (B,3,S,S).
        generator: draws the patches that rotary tables keep.
    """

    def __init__(self, tower: Tower, images: Tensor, generator: torch.Generator) -> None:
        self.tower, self.generator, self.prefix = tower, generator, tower.prefix
        self.x, self.rope = tower.embed(images)
        self.fused = use_kernels(self.x)
        hosts = list(tower.blocks)
        self.parts: list[Any] = read_blocks(tower, hosts, width=self.x.shape[2] if self.fused else None).parts
        # A GPU works on one block while the host launches the next, as in a forward; one block alone would wait.
        self.repeats = len(hosts) if self.x.device.type == "cuda" else 1

    def calls(self, count: int) -> dict[str, Callable[[], object]]:
        """The calls at a number of tokens, by name; each runs `repeats` blocks, but `pool` once.

        A pool of CLS is the same at all numbers of tokens, so only the largest has it.
        """
        patches, alone = count - self.prefix, outputs_only_cls(self.tower)
        x, rope = self.x[:, :count].contiguous(), self.rope
        if rope is not None and count < self.x.shape[1]:
            rows = torch.rand(len(x), self.x.shape[1] - self.prefix, generator=self.generator).argsort(1)
            rope = gather_rope(rope, rows[:, :patches].sort(1).values.to(x.device))
        size = torch.ones(x.shape[:2], device=x.device)
        state = TokenState(x, x if self.fused else None, None, rope)
        sized = state._replace(size=size)
        bare = [_WithoutProjections(part, *part.qkv(x, None, None, rope)) for part in self.parts[:1]]
        signal: Any = "cls" if self.tower.pools_cls else "received"
        centers = min(2, max(1, patches // 3))
        steps: dict[str, Step] = {
            "merge": Merge(patches // 4),
            "prune": Prune(patches // 2, signal=signal),
            "condense": Condense(patches // 3, max(1, patches // 3), centers, signal=signal),
        }
        calls = {
            "block": self._repeat(self.parts, self._run(state)),
            "block sized": self._repeat(self.parts, self._run(sized, proportional=True)),
            "mlp": self._repeat(self.parts, partial(self._mlp, state)),
            "core": self._repeat(bare, self._run(state)),
            "core with sizes": self._repeat(bare, self._run(sized)),
        }
        for name, step in steps.items():
            track = name != "prune" and not alone
            calls[name] = self._repeat(bare, self._run(sized if name == "merge" else state, step, track=track))
        if alone:
            calls["last"] = self._repeat(self.parts, self._run(state, rows=self.prefix))
            calls["last sized"] = self._repeat(self.parts, self._run(sized, proportional=True, rows=self.prefix))
        if not alone or count == self.x.shape[1]:
            calls["pool"] = partial(self.tower.pool, x[:, : self.prefix] if alone else x)
        return calls

    def _run(self, state: TokenState, step: Step | None = None, **options: Any) -> Callable[[Any, Any], object]:
        """A function that runs a block on a state, and fused the first norm of the next."""

        def run(parts: Any, following: Any) -> object:
            norm = following.norm1 if self.fused and "rows" not in options else None
            return block.forward(parts, state, step, self.prefix, next_norm=norm, fused=self.fused, **options)

        return run

    def _mlp(self, state: TokenState, parts: Any, following: Any) -> object:
        """The MLP of a block and the sum and the norm that follow it."""
        add_norm = unchecked.add_norm if self.fused else partial(ops.add_norm, backend="reference")
        normed = state.x if self.fused and parts.norm2 is not None else None
        branch = parts.mlp(state.x, normed, self.fused)
        return add_norm(state.x, branch.y, branch.bias, branch.scale, following.norm1 if self.fused else None)

    def _repeat(self, parts: Sequence[Any], run: Callable[[Any, Any], object]) -> Callable[[], object]:
        """A function that runs `repeats` blocks, the next ones at every call, so that weights are not in cache."""
        turn, following = cycle(parts), cycle([*parts[1:], parts[0]])

        def call() -> object:
            for _ in range(self.repeats):
                run(next(turn), next(following))
            return None

        return call


def _reduced(tower: Tower) -> dict[str, Method]:
    """Methods whose forwards the sum of parts is scaled to: half of the patches go, at once or block by block."""
    patches = tower.num_tokens - tower.prefix
    return {
        "merge at once": ToMe([patches // 2]),
        "prune at once": EViT(0.5, blocks=(0,)),
        "merge gradually": ToMe(max(1, patches // (2 * len(tower.blocks)))),
    }


def _tabulate(times: Times, conditions: Conditions, counts: tuple[int, ...], repeats: int, clock: Clock) -> CostTable:
    """The table of measured times, as they are."""
    tower = conditions.tower

    def curve(name: str, minus: str | None = None) -> tuple[float, ...]:
        """A part by count, or its difference to another."""
        return tuple(isotonic(max(0.0, of(name, count) - (of(minus, count) if minus else 0)) for count in counts))

    def of(name: str, count: int) -> float:
        return _median(times, f"{name} {count}") / (1 if name == "pool" else repeats)

    def of_last(name: str) -> tuple[float, ...]:
        return curve(name) if tower.outputs_only_cls else (0.0,) * len(counts)

    return CostTable(
        conditions=conditions,
        clock=clock,
        rounds=len(times.seconds["dense"]),
        counts=counts,
        dense=_median(times, "dense"),
        scale=1.0,
        embed=_median(times, "embed"),
        attention=curve("block", minus="mlp"),
        attention_sized=curve("block sized", minus="mlp"),
        mlp=curve("mlp"),
        last=of_last("last"),
        last_sized=of_last("last sized"),
        pool=(_median(times, f"pool {counts[-1]}"),) * len(counts) if tower.outputs_only_cls else curve("pool"),
        merge=curve("merge", minus="core with sizes"),
        prune=curve("prune", minus="core"),
        condense=curve("condense", minus="core"),
    )


def _median(times: Times, name: str) -> float:
    """The median milliseconds of a call."""
    return 1e3 * statistics.median(times.seconds[name])


def _check_counts(counts: Any, tower: Tower) -> tuple[int, ...]:
    """The numbers of tokens to measure, ascending, with the tower's own; raises ValueError for others."""
    most, prefix = tower.num_tokens, tower.prefix
    if counts is None:
        patches = most - prefix
        steps = min(MEASURED_COUNTS, patches)
        counts = [prefix + patches * number // steps for number in range(1, steps + 1)]
    if not is_list(counts):
        raise ValueError(f"counts must be a list of numbers of tokens, got {describe(counts)}")
    for place, count in enumerate(counts):
        check_int(f"counts[{place}]", count, prefix + 1, most, "the tower's tokens")
    return tuple(sorted({*counts, most}))
