"""Study `ck.tune` on the bundled CLIP: budgets on fresh photographs, against the published schedules.

    python -m bench.studies.tune --images cifar10-train.tar.gz --out tune.csv
    python -m bench.studies.tune --images cifar10-val.tar.gz --seeds 0 1 --given 500 --fresh 500

Every seed has photographs that no other has: those that a tuning gets, and as many fresh ones, on which every figure
here is reported. Recall depends on the size of the gallery, so the two have the same. Cost is GMACs as executed. A row
is one budget of one seed:

held        the budget is kept on the fresh photographs
gmacs       of the plan, beside those of the cheapest published schedule that keeps the same budget on the same fresh
            photographs (chosen in hindsight, without a margin)
difference  in cosine_p1 to the costliest published schedule that is not above the plan's GMACs, with the 95 % interval
            of a paired bootstrap over the fresh photographs

The budgets of a seed share their forwards.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import print
from rich.table import Table
from torch import Tensor

import clipkernels as ck
from bench.result_files import header_of, resume, write
from bench.studies.ranking import Photos, preprocess_photos
from bench.studies.tiny_clip import read
from clipkernels.classifier import class_embeddings, prompts_of
from clipkernels.plan import Plan
from clipkernels.tuning.bounds import figure, holds
from clipkernels.tuning.budget import Constraint, parse_budget
from clipkernels.tuning.candidates import Geometry, published
from clipkernels.tuning.costs import Costs
from clipkernels.tuning.effects import FAMILIES
from clipkernels.tuning.forwards import Part
from clipkernels.tuning.quality import per_image
from clipkernels.tuning.reference import Reference
from clipkernels.tuning.run import Report, Run, conduct
from clipkernels.tuning.state import State

BUDGETS = (
    "cosine_p1>=0.99",
    "cosine_p1>=0.98",
    "cosine_p1>=0.96",
    "cosine_mean>=0.995",
    "cosine_mean>=0.99",
    "recall@1>=0.9",
    "recall@10>=0.99",
    "accuracy_drop<=0.01",
)
BATCH = 125
RESAMPLES = 2000
COSINE_P1 = parse_budget("cosine_p1>=0.5")[0]
COSINE_MEAN = parse_budget("cosine_mean>=0.5")[0]
TEMPLATE = "a photo of a {}."


class Photographs(NamedTuple):
    """One split: the photographs that a tuning gets, in two halves, and fresh ones, each with its reference."""

    parts: dict[str, Part]
    given: Reference
    fresh: Reference


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    header = header_of(arguments, "given", "search", "fresh", "evaluations", "threads")
    rows = resume(arguments.out, {**header, "budgets": list(BUDGETS), "cost": "gmacs"})
    photos, classes = read(arguments.images)
    needed = (max(arguments.seeds) + 1) * (arguments.given + arguments.fresh)
    if needed > len(photos.labels):
        raise SystemExit(f"error: expected {needed} photographs for these seeds, got {len(photos.labels)}")
    drawn = preprocess_photos(photos, needed)
    for row in cases(drawn, classes, arguments, {(row["seed"], row["budget"]) for row in rows}):
        rows.append(row)
        print(row)
        if arguments.out:  # an interrupted run keeps its rows
            write(rows, {**header, "budgets": list(BUDGETS), "cost": "gmacs"}, arguments.out)
    print(draw(rows))
    print(summary(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR|FILE.tar.gz", help="a sub-folder per class")
    parser.add_argument("--given", type=int, default=5000, help="photographs of a tuning; default %(default)s")
    parser.add_argument("--search", type=float, default=0.25, help="share that the search sees; default %(default)s")
    parser.add_argument("--fresh", type=int, default=5000, help="fresh photographs; default %(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="draws; default %(default)s")
    parser.add_argument("--budgets", type=int, default=len(BUDGETS), help="the first of them; default %(default)s")
    parser.add_argument("--evaluations", type=int, default=100, help="plans of a search; default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="the rows; FILE.json adds the environment")
    return parser.parse_args()


def cases(
    photos: Photos, classes: Sequence[str], arguments: argparse.Namespace, done: set[tuple[int, str]]
) -> Iterator[dict[str, Any]]:
    """Yield the row of every seed and budget that is not done."""
    model, _, tokenizer = ck.bundled()
    text = class_embeddings(model, tokenizer, prompts_of(classes, (TEMPLATE,)))
    budgets = BUDGETS[: arguments.budgets]
    with ck.patched(model, ck.Dense()):
        for seed in arguments.seeds:
            if all((seed, budget) in done for budget in budgets):
                continue
            split = divide(ck.tower_of(model), photos, text, arguments, seed)
            for budget in budgets:
                if (seed, budget) not in done:
                    yield case(model, split, budget, arguments, seed)


def divide(tower: Any, photos: Photos, text: Tensor, arguments: argparse.Namespace, seed: int) -> Photographs:
    """Return the split of a seed, embedded densely."""
    first = seed * (arguments.given + arguments.fresh)
    given = torch.arange(first, first + arguments.given)
    searched = round(arguments.search * len(given))
    indices = {
        "search": given[:searched],
        "held out": given[searched:],
        "effects": given[: min(250, searched // 2)],
        "fresh": torch.arange(len(given), len(given) + arguments.fresh) + first,
    }
    parts = {
        name: Part(tower, photos.images, index, BATCH, limit=1 << 28, remember=True) for name, index in indices.items()
    }
    dense = Costs(tower, (), None).dense

    def reference(*names: str) -> Reference:
        embeddings = torch.cat([parts[name].embed(dense) for name in names])
        labels = torch.cat([photos.labels[indices[name]] for name in names])
        return Reference(embeddings, labels=labels, classes=text)

    return Photographs(parts, reference("search", "held out"), reference("fresh"))


def case(model: Any, split: Photographs, budget: str, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return the row of one budget on one split."""
    began = time.process_time()
    constraints = parse_budget(budget)
    tower = ck.tower_of(model)
    costs = Costs(tower, [each for each in constraints if each.is_cost], None)
    parts: Any = {name: part for name, part in split.parts.items() if name != "fresh"}
    run = Run(
        model, constraints, costs, parts, split.given, State(None, None), Report(None, 0), tuple(FAMILIES),  # type: ignore[arg-type]
        arguments.evaluations, BATCH, seed,
    )  # fmt: skip
    tuned = conduct(run)
    quality = [constraint for constraint in constraints if constraint.is_quality]
    schedules = {plan: name for plan, name in published(Geometry.of(tower)).items() if any(plan.steps)}
    keeping = [plan for plan in schedules if is_kept(split, plan, quality)]
    cheapest = min(keeping, key=costs.gmacs, default=None)
    row: dict[str, Any] = {
        "seed": seed,
        "budget": budget,
        "found": tuned.schedule is not None,
        "cheapest_published": "" if cheapest is None else schedules[cheapest],
        "published_gmacs": None if cheapest is None else round(costs.gmacs(cheapest), 6),
        "dense_gmacs": round(costs.gmacs(costs.dense), 6),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    if tuned.schedule is not None:
        plan = Plan(tuple(tuned.schedule.steps), tuned.schedule.tokens, tuned.schedule.prefix)
        row |= compare(split, plan, schedules, quality, costs, seed)
        row["no_dearer"] = cheapest is None or row["gmacs"] <= row["published_gmacs"]
    return row


def is_kept(split: Photographs, plan: Plan, constraints: Sequence[Constraint]) -> bool:
    """Return true if a plan keeps the constraints on the fresh photographs."""
    reduced = split.parts["fresh"].embed(plan)
    return all(holds(each, figure(each, per_image(each, reduced, split.fresh))) for each in constraints)


def compare(
    split: Photographs,
    plan: Plan,
    schedules: Mapping[Plan, str],
    constraints: Sequence[Constraint],
    costs: Costs,
    seed: int,
) -> dict[str, Any]:
    """Return the figures of a plan on the fresh photographs, beside those of the costliest schedule not above it."""
    reduced = split.parts["fresh"].embed(plan)
    values = [figure(each, per_image(each, reduced, split.fresh)) for each in constraints]
    cosines = per_image(COSINE_MEAN, reduced, split.fresh)
    row: dict[str, Any] = {
        "gmacs": round(costs.gmacs(plan), 6),
        "tokens": " ".join(map(str, plan.tokens)),
        "steps": " ".join("-" if step is None else type(step).__name__ for step in plan.steps),
        "proportional": plan.proportional,
        "figure": round(values[0], 6) if values else None,
        "cosine_p1": round(figure(COSINE_P1, cosines), 6),
        "held": is_kept(split, plan, constraints),
    }
    below = [other for other in schedules if costs.gmacs(other) <= costs.gmacs(plan)]
    if below:
        rival = max(below, key=costs.gmacs)
        others = per_image(COSINE_MEAN, split.parts["fresh"].embed(rival), split.fresh)
        low, high = paired_interval(cosines, others, seed)
        row |= {
            "rival": schedules[rival],
            "rival_gmacs": round(costs.gmacs(rival), 6),
            "difference": round(figure(COSINE_P1, cosines) - figure(COSINE_P1, others), 6),
            "difference_low": round(low, 6),
            "difference_high": round(high, 6),
        }
    return row


def paired_interval(cosines: Tensor, others: Tensor, seed: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference in first percentiles, by a paired bootstrap over images (n,)."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(cosines), (RESAMPLES, len(cosines)), generator=generator)
    differences = torch.quantile(cosines[index], 0.01, dim=1) - torch.quantile(others[index], 0.01, dim=1)
    low, high = torch.quantile(differences, torch.tensor([0.025, 0.975], dtype=differences.dtype)).tolist()
    return low, high


def draw(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows as a table."""
    columns = ("seed", "budget", "gmacs", "figure", "held", "cheapest_published", "published_gmacs", "rival")
    table = Table(*columns, "difference")
    for row in rows:
        interval = ""
        if "difference" in row:
            interval = f"{row['difference']:.4f} [{row['difference_low']:.4f}, {row['difference_high']:.4f}]"
        table.add_row(*(str(row.get(name, "")) for name in columns), interval)
    return table


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the shares that the study is about, in one line."""
    plans = [row for row in rows if row["found"]]
    compared = [row for row in plans if "difference" in row]
    return (
        f"{len(rows)} cases, {len(plans)} with a plan; held {sum(row['held'] for row in plans)}; no dearer than the "
        f"cheapest published schedule {sum(row['no_dearer'] for row in plans)}; interval of the difference not below "
        f"-0.001 {sum(row['difference_low'] >= -0.001 for row in compared)}, above 0 "
        f"{sum(row['difference_low'] > 0 for row in compared)} of {len(compared)}"
    )


if __name__ == "__main__":
    main()
