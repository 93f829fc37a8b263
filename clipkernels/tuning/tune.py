"""`ck.tune`: the cheapest plan of a tower that keeps a budget, on a user's own photographs.

1. dense embeddings; the photographs are halved
2. effects of single blocks, their additive model, and true forwards on the search half
3. the promise, on the held-out half
4. paired timing against the fastest dense tower, if cost is time
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipkernels import adapters
from clipkernels.adapters import Tower
from clipkernels.arguments import check_callable, check_choice, check_int, check_model, check_path, check_range
from clipkernels.classifier import eval_mode
from clipkernels.encode import check_images_list
from clipkernels.fingerprint import fingerprint, fingerprinted_module
from clipkernels.methods import Dense
from clipkernels.patching import patched
from clipkernels.tuning.arguments import check_annotations, check_cost, check_families, read_budget
from clipkernels.tuning.bounds import sample_warning
from clipkernels.tuning.budget import Constraint
from clipkernels.tuning.cost import CostTable
from clipkernels.tuning.costs import Costs, digest_of, load_table
from clipkernels.tuning.effects import FAMILIES
from clipkernels.tuning.evaluations import PartName, Stopped
from clipkernels.tuning.forwards import Part
from clipkernels.tuning.photographs import Halves, digest_of_values, halve
from clipkernels.tuning.reference import Reference, check_measurable
from clipkernels.tuning.results import Progress, Tuned
from clipkernels.tuning.run import Report, Run, conduct
from clipkernels.tuning.state import Settings, State

FORWARD_IMAGES = 128
"""Least images per forward of the search, whose results do not depend on the speed."""
EFFECT_IMAGES, MIN_EFFECT_IMAGES = 250, 32
"""Photographs on which the effects of single blocks are measured: half of the search half, within these limits."""


def tune(
    model: nn.Module,
    images: Tensor | Sequence[Tensor | None],
    budget: str | Sequence[Constraint],
    *,
    against: Literal["dense", "same"] = "dense",
    labels: Tensor | None = None,
    classes: Tensor | None = None,
    captions: Tensor | None = None,
    caption_ids: Tensor | None = None,
    cost: CostTable | str | os.PathLike[str] | None = None,
    families: Sequence[str] = tuple(FAMILIES),
    evaluations: int = 100,
    search_share: float = 0.5,
    batch_size: int = 8,
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], bool | None] | None = None,
) -> Tuned:
    """The cheapest plan of a tower that keeps a budget on photographs, as a `ck.Schedule`, with its evidence.

    The search sees one half of the photographs. A few plans near the budget are tested on the other half, and the
    cheapest that passes is returned. With 95 % confidence it keeps the budget on images from the same source. The model
    is left as it was, patched or not.

    Args:
        model: a model that `ck.patch` takes, on the device and in the precision of its use.
        images: (n,3,S,S) preprocessed, or a sequence of (3,S,S), of which a None is left out.
        budget: terms separated by commas, all fractions, or constraints of `parse_budget`: recall@K>=…,
            cosine_p1>=…, cosine_mean>=…, accuracy_drop<=…, text_recall@K>=…, speedup>=…, gmacs<=….
        against: the index that reduced queries search for recall@K: "dense", or "same", the reduced one.
        labels: the class (n,) int64 of each image, for accuracy_drop.
        classes: class embeddings (K,E), for accuracy_drop.
        captions: embeddings (n,E) of a caption of each image, for text_recall.
        caption_ids: ints (n,), equal for equal captions; None tells captions apart by their embeddings.
        cost: a measured table, its file, which is written if it is not there, or None to measure one; or "gmacs", where
            operations count and nothing is timed, for a tower that runs elsewhere.
        families: the kinds of steps to try, of "merge", "merge-plain", "prune", "prune-drop" and "condense".
        evaluations: most plans that are run on the search half.
        search_share: share of the photographs that the search sees, in (0, 1).
        batch_size: images per batch that cost is measured with.
        seed: seed of the halves and of the bootstrap.
        state: folder that keeps every forward, with which the same call goes on after it was stopped or killed; it
            stays when the run is done.
        progress: called after each batch with a `Progress`; a true result stops the run.
    Returns:
        Tuned. Its schedule is None if no plan keeps the budget and is faster than the dense tower.
    Raises:
        ValueError: a budget that cannot be read, or that needs labels, captions or more photographs; numbers out of
            range; images of another size; a cost table of another tower, device or batch; or a state of another run.
        UnsupportedTower, TypeError: as in `ck.patch`.
        OSError: the state or the table cannot be read or written.
        On any error the model is as it was.
    Warns:
        UserWarning: too few photographs to prove a term of the budget, whatever the plan.
    Guarantees: the same arguments and the same cost table give the same schedule, also if the run was killed and has
        gone on, on the same machine. No generator of the caller is moved.
    Source: the fallback procedure, Wiens, 2003; Learn then Test, arXiv 2110.01052.
    """
    check_model(model)
    constraints = read_budget(budget)
    check_choice("against", against, "dense", "same")
    check_images_list(images)
    check_annotations(len(images), labels, classes, captions, caption_ids)
    check_cost(cost)
    check_families(families)
    check_int("evaluations", evaluations, 8)
    check_range("search_share", search_share, 0, 1, "()")
    check_int("batch_size", batch_size, 1)
    check_int("seed", seed, 0, 2**63 - 1, "2⁶³ - 1")
    check_callable(progress=progress)
    if state is not None:
        check_path(state=state)
    if cost == "gmacs" and any(constraint.name == "speedup" for constraint in constraints):
        raise ValueError('expected a measured cost for speedup, got cost="gmacs": leave one of the two out')
    tower = adapters.find_tower(model)
    halves = halve(images, tower.image_size, search_share, seed)
    order = torch.cat([halves.search, halves.held_out])
    report = Report(progress, len(halves.skipped))
    for constraint in constraints:
        shortage = sample_warning(constraint, len(halves.held_out)) if constraint.is_quality else None
        if shortage is not None:
            warnings.warn(shortage, stacklevel=2)

    tensors = {"labels": labels, "captions": captions, "caption_ids": caption_ids}
    taken = {name: None if values is None else values.cpu()[order] for name, values in tensors.items()}
    classes = None if classes is None else classes.cpu()
    try:
        with (
            torch.inference_mode(),
            eval_mode(model),
            patched(model, Dense()),
            torch.autocast(tower.like.device.type, enabled=False),
        ):
            tower = adapters.find_tower(model)
            table = None if cost == "gmacs" else load_table(model, cost, batch_size, report)
            settings = Settings(
                tower=fingerprint(fingerprinted_module(tower)), images=len(order), pixels=halves.digest,
                labels=digest_of_values(taken["labels"], classes),
                captions=digest_of_values(taken["captions"], taken["caption_ids"]),
                budget=", ".join(constraint.text for constraint in constraints), against=against,
                cost=digest_of(table), families=list(families), evaluations=evaluations,
                search_share=float(search_share), batch_size=batch_size, device=tower.like.device.type,
                precision=str(tower.like.dtype).removeprefix("torch."), seed=seed,
            )  # fmt: skip
            with State(None if state is None else Path(os.path.abspath(state)), settings) as store:
                parts = parts_of(tower, images, halves, batch_size)
                costs = Costs(tower, [each for each in constraints if each.is_cost], table)
                report.begin("embedding", len(parts["search"].batches) + len(parts["held out"].batches))
                dense = [parts[name].embed(costs.dense, report.advance) for name in ("search", "held out")]
                reference = Reference(torch.cat(dense), against, classes=classes, **taken)
                for constraint in constraints:
                    if constraint.is_quality:
                        check_measurable(constraint, reference)
                run = Run(
                    model, constraints, costs, parts, reference, store, report, tuple(families), evaluations,
                    batch_size, seed, halves.skipped,
                )  # fmt: skip
                return conduct(run)
    except Stopped:
        sizes = len(halves.search), len(halves.held_out)
        return Tuned(None, None, (), (), None, None, 0.0, None, 0, sizes, halves.skipped, True)


def parts_of(tower: Tower, images: Any, halves: Halves, batch_size: int) -> dict[PartName, Part]:
    """The parts of the photographs; the effects are measured on the first ones of the search half."""
    size = max(FORWARD_IMAGES, batch_size)
    count = min(EFFECT_IMAGES, max(MIN_EFFECT_IMAGES, len(halves.search) // 2), len(halves.search))
    indices: dict[PartName, Tensor] = {
        "search": halves.search, "held out": halves.held_out, "effects": halves.search[:count],
    }  # fmt: skip
    return {name: Part(tower, images, index, size) for name, index in indices.items()}
