"""An evaluation on point clouds: every view is an image, and the views are weighed on the validation split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipkernels as ck
from clipkernels.encode import Encoded
from clipkernels.evaluation.datasets import Dataset, read_dataset
from clipkernels.evaluation.evaluate import evaluate
from clipkernels.evaluation.plan import Combinations, Model
from clipkernels.evaluation.results import Progress, Results, Row, Unread
from clipkernels.evaluation.shots import draw_shots
from tests.evaluation.cloud_layouts import modelnet40, shape, write_clouds

pytest.importorskip("h5py", reason="h5py is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
DENSE, EVIT = "dense (host)", "EViT(keep=0.7)"
BATCH = 64


def bundled_model() -> Model:
    model, preprocess, tokenizer = ck.bundled()
    return Model(model, tokenizer, preprocess, BATCH, 0, "fp32")


def combinations(data: Dataset, **changes: Any) -> Combinations:
    plan = Combinations([data], {}, {}, {DENSE: None}, ["zero-shot", "calip", "tip"], (2,), 2)
    return plan._replace(**changes)


def never(progress: Progress) -> bool:
    return False


def row_of(results: Results, head: str, method: str = DENSE) -> Row:
    (row,) = [row for row in results.rows if (row.head, row.method) == (head, method)]
    return row


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return modelnet40(tmp_path_factory.mktemp("clouds"), train=10, test=5)


@pytest.fixture(scope="module")
def results(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    plan = combinations(read_dataset("modelnet40", home), methods={DENSE: None, EVIT: ck.EViT(0.7)})
    return evaluate(plan, bundled_model(), tmp_path_factory.mktemp("evaluation") / "state", never)


class Split:
    """The pictures of a split as the model takes them, their features by a method, and the labels of the clouds."""

    def __init__(self, data: Dataset, split: str, method: Any = None) -> None:
        self.model, preprocess, tokenizer = ck.bundled()
        if method is not None:
            ck.patch(self.model, method)
        items = data.splits[split]
        images = torch.stack([preprocess(items.read(name)) for name in items.names])
        self.labels = torch.tensor(items.labels[:: data.views])
        with torch.inference_mode():
            parts = [ck.encode_image(self.model, part, tokens=True) for part in images.split(BATCH)]
        tokens = [part.tokens for part in parts if part.tokens is not None]
        prefix = parts[0].prefix
        self.encoded = Encoded(torch.cat([part.embedding for part in parts]), torch.cat(tokens), prefix=prefix)
        self.text = ck.Classifier(self.model, tokenizer, data.classes, data.templates).head.text  # type: ignore[attr-defined]


def accuracy(head: Any, split: Split) -> float:
    with torch.inference_mode():
        return (head(split.encoded).argmax(1) == split.labels).double().mean().item()


@pytest.mark.parametrize("method", [DENSE, EVIT])
@pytest.mark.parametrize("name", ["zero-shot", "calip"])
def test_the_score_is_that_of_the_weighed_views(results: Results, home: Path, name: str, method: str) -> None:
    data = read_dataset("modelnet40", home)
    val, test = (Split(data, split, None if method == DENSE else ck.EViT(0.7)) for split in ("val", "test"))
    head: Any = ck.ZeroShot(test.text)
    if name == "calip":
        head = ck.CALIP(test.text)
        head.fit(val.encoded, val.labels.repeat_interleave(6))
    multi_view = ck.MultiView(head)
    multi_view.fit(val.encoded, val.labels)
    row = row_of(results, name, method)
    assert row.score.mean == pytest.approx(accuracy(multi_view, test), abs=1e-12)
    assert (row.score.images, row.weights, row.unread) == (15, "validation split, 6 clouds", {})


def test_tip_adapter_reads_the_views_of_labelled_clouds(results: Results, home: Path) -> None:
    data = read_dataset("modelnet40", home)
    train, val, test = (Split(data, split) for split in ("train", "val", "test"))
    shares = []
    for seed in range(2):
        rows = draw_shots(train.labels, 3, 2, seed)
        support = train.encoded.embedding.unflatten(0, (24, 6))[rows].flatten(0, 1)
        head = ck.TipAdapter(test.text, support, train.labels[rows].repeat_interleave(6))
        head.fit(val.encoded.embedding, val.labels.repeat_interleave(6), (50.0, 50.0))
        multi_view = ck.MultiView(head)
        multi_view.fit(val.encoded, val.labels)
        shares.append(accuracy(multi_view, test))
    row = row_of(results, "tip")
    assert row.score.mean == pytest.approx(sum(shares) / 2, abs=1e-12)
    assert (row.shots, row.score.runs, row.score.images) == (2, 2, 15)


def test_without_a_training_split_views_are_equal(home: Path, tmp_path: Path) -> None:
    data = read_dataset("modelnet40", home, splits=["test"])
    rows = evaluate(combinations(data, heads=["zero-shot", "calip"]), bundled_model(), tmp_path, never)
    test = Split(data, "test")
    zero_shot, calip = (row_of(rows, name) for name in ("zero-shot", "calip"))
    assert (zero_shot.weights, calip.weights) == ("equal views", "published for imagenet, equal views")
    assert zero_shot.score.mean == pytest.approx(accuracy(ck.MultiView(ck.ZeroShot(test.text)), test), abs=1e-12)


def test_other_heads_are_refused_by_name(home: Path, tmp_path: Path) -> None:
    heads = ["zero-shot", "tda", "reservoir", "tipx", "tip-f", "calip-fs"]
    results = evaluate(
        combinations(read_dataset("modelnet40", home), heads=heads), bundled_model(), tmp_path, never
    )  # fmt: skip
    assert [row.head for row in results.rows] == ["zero-shot"]
    assert [skip.head for skip in results.skips] == heads[1:]
    assert {skip.reason for skip in results.skips} == {
        "the head reads no views of point clouds, zero-shot, calip, tip do"
    }


def test_ten_views_are_other_images(home: Path, tmp_path: Path) -> None:
    data = read_dataset("modelnet40", home, views=10)
    results = evaluate(combinations(data, heads=["zero-shot"]), bundled_model(), tmp_path, never)
    val, test = (Split(data, split) for split in ("val", "test"))
    multi_view = ck.MultiView(ck.ZeroShot(test.text), views=10)
    multi_view.fit(val.encoded, val.labels)
    assert results.rows[0].score.mean == pytest.approx(accuracy(multi_view, test), abs=1e-12)
    six = combinations(read_dataset("modelnet40", home), heads=["zero-shot"])
    evaluate(six, bundled_model(), tmp_path, never)
    assert len(list(tmp_path.glob("row-*"))) == 2


def test_clouds_that_cannot_be_read_are_counted_as_one(tmp_path: Path) -> None:
    home = modelnet40(tmp_path)
    data = np.stack([shape(label, label) for label in (0, 1, 2, 1)])
    data[1, 0, 0] = np.inf
    write_clouds(home / "ply_data_test0.h5", [0, 1, 2, 1], data=data)
    plan = combinations(read_dataset("modelnet40", home), heads=["zero-shot", "calip"])
    reason = "points must be finite, got NaN or infinity: leave such points out"
    expected = {"test": Unread(1, "ply_data_test0.h5#1:1", reason)}
    results = evaluate(plan, bundled_model(), tmp_path / "state", never)
    assert [(row.score.images, row.unread) for row in results.rows] == [(3, expected)] * 2


def test_a_cloud_without_one_of_its_views_is_left_out(home: Path, tmp_path: Path) -> None:
    data, broken = read_dataset("modelnet40", home), "ply_data_test0.h5#2:5"
    test = data.splits["test"]

    def read(name: str) -> Image.Image:
        if name == broken:
            raise ValueError("torn")
        return test.read(name)

    torn = data._replace(splits={**data.splits, "test": test._replace(read=read)})
    results = evaluate(combinations(torn, heads=["zero-shot", "calip"]), bundled_model(), tmp_path / "torn", never)
    kept = [place for place in range(len(test.names)) if place // 6 != 2]
    names, labels = (tuple(column[place] for place in kept) for column in (test.names, test.labels))
    rest = data._replace(splits={**data.splits, "test": test._replace(names=names, labels=labels)})
    expected = evaluate(combinations(rest, heads=["zero-shot", "calip"]), bundled_model(), tmp_path / "rest", never)
    assert [row.unread for row in results.rows] == [{"test": Unread(1, broken, "torn")}] * 2
    assert [row.score for row in results.rows] == [row.score for row in expected.rows]
    assert results.rows[0].score.images == 14


def test_shortages_count_clouds(home: Path, tmp_path: Path) -> None:
    plan = combinations(read_dataset("modelnet40", home), heads=["tip"], shots=(9,), seeds=1)
    note = "modelnet40: 3 of the 3 classes have fewer than 9 images to draw from, the least 8: they give all of them"
    assert evaluate(plan, bundled_model(), tmp_path, never).notes == [note]
