"""`CostTable`: milliseconds of the parts of a tower by number of tokens, and of a plan as their sum.

    plan   scale · (embed + Σ over blocks + pool(tokens that leave))
    dense  measured as a whole
    block  attention(tokens that enter) + the step's extra(tokens that enter) + mlp(tokens that leave the step)
    last   last(tokens that enter), if the tower outputs only CLS

Between two measured numbers of tokens a part is linear, below the least one constant. After a merge with
`proportional`, attention and the last block are those with sizes.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta
from torch import nn

from clipkernels.adapters import Tower, outputs_only_cls
from clipkernels.arguments import check_int
from clipkernels.backend import use_kernels
from clipkernels.formats import Count, Format, Line, Precision, Size
from clipkernels.measure.environment import cpu_name, versions
from clipkernels.messages import list_items
from clipkernels.patching import tower_of
from clipkernels.plan import Condense, Merge, Plan, Predict, Prune, Step
from clipkernels.state_files import read_json, write_json

MAX_BYTES = 1 << 20
TIMED_PACKAGES = ("clipkernels", "torch", "triton")
Milliseconds = Annotated[float, Meta(ge=0, le=1e9)]
Curve = Annotated[tuple[Milliseconds, ...], Meta(min_length=1, max_length=1 << 12)]


class TowerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The properties of a tower that its speed depends on; its weights are none.

    library: the class of the adapter.
    block: the first digits of a SHA-256 of the printed first block, which tells activations and heads apart.
    """

    library: Line
    block: Line
    tokens: Size
    blocks: Size
    prefix: Count
    width: Size
    mlp_ratio: Annotated[float, Meta(gt=0, le=1e4)]
    patch: Size
    out: Size
    outputs_only_cls: bool


class Conditions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The conditions of a measurement: where times are the same, up to noise.

    kernels: the tower launches Triton kernels.
    threads: CPU threads; 0 on another device, which they do not slow down.
    """

    tower: TowerRecord
    device: Line
    dtype: Precision
    batch: Size
    threads: Count
    kernels: bool
    versions: dict[Line, Line | None]


class CostTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Milliseconds per batch, on one tower, device, dtype and batch size.

    conditions: of the measurement.
    clock, rounds: as in `measure_cost`.
    counts: the measured numbers of tokens, ascending; the last is the number that enters the tower.
    dense: the whole dense forward, as `ck.Dense` runs it.
    scale: of the parts to those of a forward, from forwards that were measured too.
    embed: the embedding of the patches, the same for all plans.
    attention, attention_sized, mlp: by the tokens of a block's attention, without and with sizes, and of its MLP.
    last, last_sized: the last block by the tokens that enter it, if the tower outputs only CLS.
    pool: by the tokens that leave the last block; the same for all of them if the tower outputs only CLS.
    merge, prune, condense: what a step adds, by the tokens that enter its block; the matching or scoring included.

    All of them are non-decreasing.
    """

    conditions: Conditions
    clock: Literal["wall", "process"]
    rounds: Size
    counts: Annotated[tuple[Size, ...], Meta(min_length=1, max_length=1 << 12)]
    dense: Milliseconds
    scale: Annotated[float, Meta(gt=0, le=1e3)]
    embed: Milliseconds
    attention: Curve
    attention_sized: Curve
    mlp: Curve
    last: Curve
    last_sized: Curve
    pool: Curve
    merge: Curve
    prune: Curve
    condense: Curve

    def __post_init__(self) -> None:
        if list(self.counts) != sorted(set(self.counts)) or self.counts[-1] != self.conditions.tower.tokens:
            raise ValueError("counts that do not rise to the tower's number of tokens")
        for name in CURVES:
            curve = getattr(self, name)
            if len(curve) != len(self.counts) or list(curve) != sorted(curve):
                raise ValueError(f"milliseconds of {name} that are not one per count, or fall")

    def milliseconds(self, plan: Plan) -> float:
        """The predicted milliseconds of a batch under a plan.

        Raises:
            ValueError: a plan for another number of tokens, blocks or prefix tokens, with Predict steps, or with learnt
                tokens.
        """
        tower = self.conditions.tower
        expected, actual = (tower.tokens, tower.blocks, tower.prefix), (plan.entry, len(plan.steps), plan.prefix)
        if expected != actual:
            raise ValueError(
                "expected a plan for {} tokens, {} blocks and a prefix of {} as in the cost table, got {}, {} and "
                "{}".format(*expected, *actual)
            )
        if plan.learnt:
            raise ValueError(
                f"expected a plan without learnt tokens, whose cost is not in the table, got {plan.learnt}"
            )
        if not any(plan.steps):
            return self.dense
        total, sized = self.scale * self.embed, False
        for index, (step, (keys, rows)) in enumerate(zip(plan.steps, plan.passes, strict=True)):
            total += self.block_milliseconds(keys, rows, step, sized=sized, last=index == tower.blocks - 1)
            sized = sized or (plan.proportional and isinstance(step, Merge))
        # Merged tokens are copied back to their patches before a pool that reads these.
        return total + self.scale * self._at(self.pool, plan.entry if plan.merges else plan.tokens[-1])

    def block_milliseconds(
        self, keys: int, rows: int, step: Step | None = None, *, sized: bool = False, last: bool = False
    ) -> float:
        """The predicted milliseconds of one block; a forward also has the embedding and the pool.

        Args:
            keys: tokens that enter it.
            rows: tokens that leave it.
            step: its step, or None.
            sized: attention weights keys by the sizes of their tokens.
            last: it is the tower's last block.
        Raises:
            ValueError: a Predict step, or more tokens than enter the tower.
        """
        if last and self.conditions.tower.outputs_only_cls:
            return self.scale * self._at(self.last_sized if sized else self.last, keys)
        if isinstance(step, Predict):
            raise ValueError("expected steps without a predictor, whose cost is not in the table, got a Predict step")
        extra = 0.0
        for kind, curve in ((Merge, self.merge), (Prune, self.prune), (Condense, self.condense)):
            extra += self._at(curve, keys) if isinstance(step, kind) else 0.0
        attention = self._at(self.attention_sized if sized else self.attention, keys)
        return self.scale * (attention + extra + self._at(self.mlp, rows))

    def check(self, model: nn.Module, batch: int, source: object = "a cost table") -> None:
        """Raise ValueError unless the table is of this model's tower on its device, in its dtype, at this batch size.

        Args:
            model: the model, patched or not.
            batch: images per batch.
            source: the file of the table, for messages.
        """
        now = conditions_of(tower_of(model), batch)
        pairs = [(name, getattr(now, name), getattr(self.conditions, name)) for name in now.__struct_fields__]
        for place in ("tower", "versions"):
            pairs += _fields_of(place, getattr(now, place), getattr(self.conditions, place))
        differences = [
            f"{name} {expected!r} (it has {actual!r})"
            for name, expected, actual in pairs
            if name not in ("tower", "versions") and expected != actual
        ]
        if differences:
            raise ValueError(f"expected a cost table of {list_items(differences)}, got {source}: measure a new one")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as signed JSON, atomically.

        Raises:
            OSError: the file cannot be written.
        """
        write_json(path, FORMAT, self, MAX_BYTES)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostTable:
        """Read a table.

        Raises:
            ValueError: another kind of file, an older format, or a table that is not as it was written.
            OSError: the file cannot be read.
        """
        table: CostTable = read_json(path, FORMAT, MAX_BYTES)
        return table

    def _at(self, curve: Sequence[float], tokens: int) -> float:
        """A part's milliseconds at a number of tokens."""
        if tokens > self.counts[-1]:
            raise ValueError(f"expected at most {self.counts[-1]} tokens, which enter the tower, got {tokens}")
        above = bisect_left(self.counts, tokens)
        if above == 0:
            return curve[0]
        low, high = self.counts[above - 1], self.counts[above]
        share = (tokens - low) / (high - low)
        return curve[above - 1] + share * (curve[above] - curve[above - 1])


CURVES = ("attention", "attention_sized", "mlp", "last", "last_sized", "pool", "merge", "prune", "condense")
FORMAT = Format("clipkernels.cost.1", "a cost table", CostTable, lambda header: {})


def conditions_of(tower: Tower, batch: int) -> Conditions:
    """The conditions of a measurement that runs now.

    Raises:
        ValueError: a batch below 1, or a tower in another dtype than float32, float16 or bfloat16.
    """
    check_int("batch", batch, 1)
    like = tower.like
    device, dtype = like.device, str(like.dtype).removeprefix("torch.")
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"expected a tower in float32, float16 or bfloat16, got {dtype}: cast the model")
    block = hashlib.sha256(repr(tower.blocks[0]).encode()).hexdigest()[:8]
    record = TowerRecord(
        library=type(tower).__name__,
        block=block,
        tokens=tower.num_tokens,
        blocks=len(tower.blocks),
        prefix=tower.prefix,
        width=tower.width,
        mlp_ratio=float(tower.mlp_ratio),
        patch=tower.patch,
        out=tower.out,
        outputs_only_cls=outputs_only_cls(tower),
    )
    sample = torch.empty(1, tower.num_tokens, tower.width, dtype=like.dtype, device=device)
    installed = versions()
    return Conditions(
        tower=record,
        device=_device_name(device),
        dtype=dtype,
        batch=batch,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        kernels=use_kernels(sample),
        versions={name: installed[name] and str(installed[name]) for name in TIMED_PACKAGES},
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else device.type


def _fields_of(place: str, expected: Any, actual: Any) -> list[tuple[str, Any, Any]]:
    """The fields of a record or a dict of two tables, as (name, expected, actual)."""
    first, second = msgspec.to_builtins(expected), msgspec.to_builtins(actual)
    return [(f"{place} {name}", first.get(name), second.get(name)) for name in {**first, **second}]
