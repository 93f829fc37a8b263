"""The selection and the order of scores in the kernels, compared with a stable sort on rows of random scores.

    TRITON_INTERPRET=1 python tests/ops/selection.py --rows 10000

Rows have 1 to 1024 scores: distinct ones, ties, equal ones, NaN, infinities, zeros of both signs and subnormal numbers.
Of each row 0 to all scores are chosen, and every fourth launch also sorts its rows, which takes the interpreter most of
the time. Exit status 1 if a row is wrong.
"""

import argparse
import sys
from collections.abc import Iterator

import numpy as np
import torch
import triton
import triton.language as tl

from clipkernels.kernels import ranking
from clipkernels.kernels.ranking import choose_strongest, keys_of, load_scores, sort_strongest_first

ROWS_PER_LAUNCH = 20
# Of each launch these first rows are ranked, because the ranks are the order turned round.
RANKED_ROWS = 2
SPECIAL = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, -1e-42, 3.4e38, -3.4e38)


@triton.jit
def _selection_kernel(
    scores_ptr,
    counts_ptr,
    chosen_ptr,
    before_ptr,
    order_ptr,
    P,
    SORT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LOG_P: tl.constexpr,
):
    row, offs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_P)
    keys = keys_of(load_scores(scores_ptr + row * P, offs, P), offs, P)
    chosen, before = choose_strongest(keys, tl.load(counts_ptr + row))
    tl.store(chosen_ptr + row * BLOCK_P + offs, chosen.to(tl.int32))
    tl.store(before_ptr + row * P + offs, before, mask=offs < P)
    if SORT:
        tl.store(order_ptr + row * P + offs, sort_strongest_first(keys, offs, BLOCK_P, LOG_P), mask=offs < P)


def random_rows(generator: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Rows of random scores (rows,size) fp32, each of one of six kinds."""
    scores = generator.standard_normal((rows, size)).astype(np.float32)
    for row, kind in zip(scores, generator.integers(6, size=rows), strict=True):
        if kind == 1:  # few levels
            row[:] = np.round(row * generator.integers(1, 9)) / 4
        elif kind == 2:
            row[:] = row[0] if generator.random() < 0.5 else generator.choice(SPECIAL)
        elif kind == 3:  # special values among distinct ones
            special = generator.random(size) < generator.random()
            row[special] = generator.choice(SPECIAL, int(special.sum()))
        elif kind == 4:
            row[:] = generator.choice(SPECIAL, size)
        elif kind == 5:  # a softmax, where many scores underflow to 0
            row[:] = np.exp((row - row.max()) * generator.integers(1, 100))
    return scores


def wrong_rows(scores: np.ndarray, counts: np.ndarray, device: torch.device, sort: bool = True) -> Iterator[str]:
    """A description of every row whose selection, counts, order or ranks differ from those of a stable sort."""
    rows, size = scores.shape
    blocks = ranking.config(size)
    block = blocks["BLOCK_P"]
    chosen = torch.full((rows, block), -1, dtype=torch.int32, device=device)
    before = torch.full((rows, size), -1, dtype=torch.int32, device=device)
    order = torch.full_like(before, -1)
    on_device = torch.from_numpy(scores).to(device)
    _selection_kernel[(rows,)](
        on_device, torch.from_numpy(counts).to(device), chosen, before, order, size, SORT=sort, **blocks
    )
    ranks = ranking.rank_scores(on_device[None, : RANKED_ROWS if sort else 0])[0]
    bits = scores.view(np.int32).astype(np.int64)  # because a process may flush subnormal numbers to 0
    strength = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    strength[np.isnan(scores)] = -0x7F800000  # as -inf
    expected_order = np.argsort(-strength, axis=1, kind="stable")
    for row, count in enumerate(counts):
        place = np.empty(size, np.int64)
        place[expected_order[row]] = np.arange(size)
        mask = place < count
        actual = {"chosen": chosen[row, :size], "before": before[row]}
        actual["padding"] = chosen[row, size:]
        expected = {"chosen": mask, "before": np.cumsum(mask) - mask}
        expected["padding"] = np.zeros(block - size)
        if sort:
            actual["order"], expected["order"] = order[row], expected_order[row]
        if row < len(ranks):
            actual["ranks"], expected["ranks"] = ranks[row], size - 1 - place
        faults = [name for name in actual if not np.array_equal(actual[name].cpu().numpy(), expected[name])]
        if faults:
            yield f"{' '.join(faults)} of {count} among {scores[row].tolist()}"


def check(rows: int, seed: int, device: torch.device) -> list[str]:
    """The faults of `rows` random rows."""
    generator, faults = np.random.default_rng(seed), []
    for launch in range(rows // ROWS_PER_LAUNCH):
        size = int(generator.integers(1, 1025))
        counts = generator.integers(0, size + 1, ROWS_PER_LAUNCH).astype(np.int32)
        counts[:2] = 0, size
        faults += wrong_rows(random_rows(generator, ROWS_PER_LAUNCH, size), counts, device, launch % 4 == 0)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    faults = check(arguments.rows, arguments.seed, device)
    print(f"{arguments.rows} rows, {len(faults)} wrong")
    if faults:
        sys.exit("\n".join(fault[:200] for fault in faults[:20]))


if __name__ == "__main__":
    main()
