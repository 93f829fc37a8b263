"""`Schedule`: explicit steps for one tower, and their file.

FILE  JSON: tokens (entering each block and leaving the last), prefix, one step or null per block, and their SHA-256
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import msgspec

from clipkernels.arguments import check_path, describe
from clipkernels.formats import Format, to_struct
from clipkernels.messages import quantity
from clipkernels.methods.counts import check_sequence
from clipkernels.plan import Plan, Predict, Rank, Step
from clipkernels.plan_records import PlanRecord, read_plan, record_plan
from clipkernels.state_files import read_json, write_json

FORMAT = Format("clipkernels.schedule.1", "a schedule of ck.Schedule.save", PlanRecord, lambda header: {})
MAX_BYTES = 1 << 22
DIGEST_LENGTH = 6


@dataclass(frozen=True)
class Schedule:
    """Explicit steps, one or none per block, for one number of tokens, blocks and prefix tokens.

    A frozen plan as a method: `ck.tune` returns one, and `Schedule.from_plan(ck.EViT(0.7).plan(197, 12))` freezes a
    published one. `str` is its short name: the tokens that enter and leave, and the first digits of a hash, which tells
    two schedules of the same counts apart. A tower that pools something else than CLS ranks by the attention received,
    as for all methods.

    Args:
        steps: `ck.Prune`, `ck.Merge`, `ck.Condense` or None for each block.
        tokens: number of tokens entering the first block, the prefix included.
        prefix: number of leading tokens (CLS, registers) that no step touches.
    Raises:
        ValueError: a step that keeps or merges more patches than its block has; a `ck.Predict` step, which needs a
            trained predictor; a `ck.Rank` step, which changes no token; a number that is no int in range; or, from
            `plan`, another tower.
        TypeError: steps are no sequence of steps.
    """

    steps: Sequence[Step | None]
    tokens: int
    prefix: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.steps, (tuple, list)):
            raise TypeError(f"steps must be a tuple of one step or None per block, got {describe(self.steps)}")
        check_sequence(self.tokens, len(self.steps), self.prefix)
        object.__setattr__(self, "steps", tuple(self.steps))
        for block, step in enumerate(self.steps):
            if isinstance(step, Predict):
                raise ValueError(
                    f"steps[{block}] must need no predictor, got a Predict step: use ck.PatchRanking, which has one"
                )
            if isinstance(step, Rank):
                raise ValueError(f"steps[{block}] must change the tokens, got a Rank step: use ck.Select")
        self._plan()

    @classmethod
    def from_plan(cls, plan: Plan) -> Schedule:
        """The schedule of a plan, such as one that another method makes.

        Raises:
            ValueError: a plan with Predict steps or learnt tokens, which are weights.
            TypeError: no plan.
        """
        if not isinstance(plan, Plan):
            raise TypeError(f"plan must be a ck.Plan, got {describe(plan)}")
        if plan.learnt:
            raise ValueError(f"plan must have no learnt tokens, got {plan.learnt}: use ck.PatchRanking, which has them")
        return cls(plan.steps, plan.entry, plan.prefix)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schedule:
        """The schedule that `save` wrote.

        Raises:
            ValueError: another file, or one that is not as it was written.
            OSError: the file cannot be read.
            TypeError: no path.
        """
        check_path(path=path)
        record = read_json(path, FORMAT, MAX_BYTES)
        try:
            return cls.from_plan(read_plan(record))
        except ValueError as error:
            raise ValueError(f"expected {FORMAT.title} ({FORMAT.name}), got {path} with {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the schedule to a JSON file, atomically; equal schedules give equal files.

        Raises:
            ValueError: more tokens or blocks than a file can hold.
            OSError: the file cannot be written.
            TypeError: no path.
        """
        check_path(path=path)
        try:
            record = to_struct(FORMAT, msgspec.to_builtins(record_plan(self._plan())))
            write_json(path, FORMAT, record, MAX_BYTES)
        except ValueError as error:
            raise ValueError(f"expected {FORMAT.title} to write to {path}, got one with {error}") from error

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        """The plan, for the tower that the schedule is for.

        Raises:
            ValueError: another number of tokens, blocks or prefix tokens.
        """
        check_sequence(tokens, blocks, prefix)
        if (tokens, blocks, prefix) != (self.tokens, len(self.steps), self.prefix):
            raise ValueError(
                f"the schedule is for {quantity(self.tokens, 'token')}, {self.prefix} of them prefix, and "
                f"{quantity(len(self.steps), 'block')}, got {tokens}, {prefix} and {blocks}"
            )
        return self._plan()

    def __str__(self) -> str:
        digest = sha256(repr(self).encode()).hexdigest()[:DIGEST_LENGTH]
        return f"Schedule({self.tokens}→{self._plan().tokens[-1]}, {digest})"

    def _plan(self) -> Plan:
        return Plan(tuple(self.steps), self.tokens, self.prefix)
