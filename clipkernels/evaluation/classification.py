"""The scores of a labelled data set by one method: every head and number of shots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from clipkernels.adapters import find_resnet
from clipkernels.classifier import eval_mode, prompts_of
from clipkernels.encode import encode_image, tower_weight
from clipkernels.evaluation.datasets import Dataset, Items
from clipkernels.evaluation.features import Features, Pictures, key_of, split_key
from clipkernels.evaluation.heads import HEADS, Data, HeadKind, Report, weights_of
from clipkernels.evaluation.plan import Combinations, Model
from clipkernels.evaluation.results import Skip, read_rows, write_scores
from clipkernels.evaluation.run import Run
from clipkernels.evaluation.scores import score
from clipkernels.images.batches import collate, image_shape
from clipkernels.messages import list_items
from clipkernels.methods import Method
from clipkernels.patching import tower_of
from clipkernels.plan import Condense
from clipkernels.tower import make_plan

ACCURACY = "accuracy"
_HEADS_OF_VIEWS = [name for name, kind in HEADS.items() if kind.of_views]


def score_data(run: Run, data: Dataset, name: str, method: Method | None) -> None:
    """Add the rows of a data set by one method to the results of a run; scores that are on disk are read."""
    pairs = list(_pairs(run, data, name))
    files = {pair: _file_of(run, data, method, *pair) for pair in pairs}
    missing = [pair for pair in pairs if not files[pair].exists()]
    if missing:
        with run.as_method(method):
            _score(run, data, name, method, missing, [files[pair] for pair in missing])
    for (head, shots), file in files.items():
        run.results.rows.extend(read_rows(file, data.name, name, head, shots))


def _pairs(run: Run, data: Dataset, name: str) -> Iterator[tuple[str, int]]:
    """The heads and shots that a data set has a score for; others are added to the skips."""
    resnet = find_resnet(run.model.model) is not None
    has_cls = not resnet and tower_of(run.model.model).has_cls
    for head in run.combinations.heads:
        kind = HEADS[head]
        supported = kind.supported and data.name in run.combinations.supports
        counts = [shots for shots in run.combinations.shots if shots or supported] if kind.few_shot else [0]
        if not counts:
            reason = "no labelled images are chosen (shots of 1 or more), and no support set"
            run.results.skips.append(Skip(data.name, name, head, 0, reason))
        for shots in counts:
            reason = ""
            if data.views > 1 and not kind.of_views:
                reason = f"the head reads no views of point clouds, {list_items(_HEADS_OF_VIEWS)} do"
            elif "cls_path" in kind.kinds and not has_cls:
                reason = "the tower has no CLS token"
            elif shots and "train" not in data.splits:
                reason = "the data set has no train split"
            if reason:
                run.results.skips.append(Skip(data.name, name, head, shots, reason))
            else:
                yield head, shots


def _file_of(run: Run, data: Dataset, method: Method | None, head: str, shots: int) -> Path:
    """The file of a score, whose name stands for all that it depends on besides the settings of the folder."""
    kind = HEADS[head]
    splits = _splits_of(kind, shots, data.views)
    images = {split: split_key(items) for split, items in data.splits.items() if split in splits}
    runs = kind.runs(shots, run.combinations.seeds)
    support = run.combinations.supports.get(data.name) if kind.few_shot and not shots else None
    digests = []
    if support is not None:
        digests = list(zip((image.sha256 for image in support.images), support.labels.tolist(), strict=True))
    key = key_of(data.name, data.classes, data.templates, images, repr(method), head, shots, runs, digests)
    return run.folder / f"row-{key}.json"


def _score(
    run: Run,
    data: Dataset,
    name: str,
    method: Method | None,
    pairs: Sequence[tuple[str, int]],
    files: Sequence[Path],
) -> None:
    """Write the scores of heads and shots, of the model as it runs the method."""
    model = run.model
    anchored = _reads_anchors(model.model, method)

    def features(split: str, kinds: Iterable[HeadKind]) -> Features | None:
        kinds = list(kinds)
        if not kinds or split not in data.splits:
            return None
        # With anchors a reservoir encodes its images itself.
        read = {extra for kind in kinds for extra in kind.kinds if not (anchored and extra == "cls_path")}
        return run.features(data.name, split, data.splits[split], read, name, method)

    kinds = [HEADS[head] for head, _ in pairs]
    test = features("test", kinds)
    train = features("train", (HEADS[head] for head, shots in pairs if shots))
    val = features("val", (kind for kind in kinds if kind.tuned or data.views > 1))
    assert test is not None
    stream = partial(_stream, model, data.splits["test"], test) if anchored else None
    support = support_of(run.combinations, data)
    read = Data(data.name, _text_of(run, data, method), test, train, val, support, stream)
    splits = {"test": test, "train": train, "val": val}
    unread = {split: each.unread for split, each in splits.items() if each is not None and each.unread is not None}
    for (head, shots), file in zip(pairs, files, strict=True):
        kind = HEADS[head]
        runs = kind.runs(shots, run.combinations.seeds)
        hits = []
        for seed in range(runs):
            phase = f"{data.name}, {name}, {head}" + (f" of {shots} shots" if shots else "")
            phase += f", run {seed + 1} of {runs}" if runs > 1 else ""
            reported = read._replace(report=partial(run.report, phase))
            hits.append(kind.predict(reported, shots, seed, model.batch_size) == test.labels)
        used = {split: each for split, each in unread.items() if split in _splits_of(kind, shots, data.views)}
        write_scores(file, {ACCURACY: score(torch.stack(hits))}, used, weights_of(kind, read))


def _splits_of(kind: HeadKind, shots: int, views: int) -> list[str]:
    """The splits that a head reads; the weights of several views are searched on the validation split, too."""
    return ["test", *(["train"] if shots else []), *(["val"] if kind.tuned or views > 1 else [])]


def _text_of(run: Run, data: Dataset, method: Method | None) -> Tensor:
    """The class embeddings (K,E) of a data set, by the learnt tokens of a method that has them for texts."""
    names, model = list(dict.fromkeys(data.classes)), run.model  # two classes may have one name
    prompts = prompts_of(names, data.templates)
    embed = getattr(getattr(method, "tokens", None), "class_embeddings", None)
    if embed is None:
        text = run.encode_texts(data.name, f"{data.name}, classes", "class", prompts)
    else:
        text = embed(model.model, model.tokenizer, prompts).float().cpu()
    return text[[names.index(each) for each in data.classes]]


def support_of(combinations: Combinations, data: Dataset) -> tuple[Tensor, Tensor] | None:
    """The features and labels of the support set of a data set, or None without one.

    Raises:
        ValueError: a set of other classes.
    """
    support = combinations.supports.get(data.name)
    if support is None:
        return None
    if set(support.classes) != set(data.classes):
        other = min(set(support.classes) ^ set(data.classes))
        raise ValueError(
            f"expected a support set of the classes of {data.name}, got one that differs in {other!r}: build it from "
            "these class names"
        )
    places = torch.tensor([data.classes.index(name) for name in support.classes])
    return support.features.cpu(), places[support.labels.cpu()]


def _reads_anchors(model: nn.Module, method: Method | None) -> bool:
    """Return true if the tokens of a method depend on anchors: it condenses in some block."""
    if method is None:
        return False
    tower = tower_of(model)
    steps = make_plan(method, tower, tower.num_tokens).steps
    return any(isinstance(step, Condense) for step in steps)


@torch.inference_mode()
def _stream(model: Model, items: Items, test: Features, head: Any, order: Tensor, report: Report) -> Tensor:
    """The predicted classes (n,) of a test split, which a head with anchors reads in an order (n,)."""
    pictures = Pictures(items, model.preprocess, image_shape(model.model, model.preprocess))
    subset = Subset(pictures, test.places[order].tolist())
    loader: DataLoader[Any] = DataLoader(subset, model.batch_size, collate_fn=collate, num_workers=model.workers)
    weight, predicted, start = tower_weight(model.model), torch.empty(len(test), dtype=torch.int64), 0
    with eval_mode(model.model):
        for batch in loader:
            report(start, len(test))
            if batch.failed:
                place, reason = batch.failed[0]
                raise ValueError(
                    f"expected {items.names[place]} to be read as before, got an error: {reason}: start again"
                )
            encoded = encode_image(model.model, batch.images.to(weight), cls_path=True, anchors=head.anchors)
            rows = order[start : start + len(batch.indices)]
            predicted[rows] = head(encoded).argmax(1).cpu()
            start += len(rows)
    return predicted
