"""An evaluation: its scores are those of the heads on the images; it stops, goes on, and keeps its features."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import clipkernels as ck
from clipkernels.evaluation import features
from clipkernels.evaluation.captions import read_captions
from clipkernels.evaluation.datasets import read_dataset
from clipkernels.evaluation.evaluate import evaluate
from clipkernels.evaluation.heads import HEADS
from clipkernels.evaluation.plan import Combinations, Model
from clipkernels.evaluation.results import Progress, Results, Row, Unread
from clipkernels.evaluation.shots import draw_order, draw_shots

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = {"dense (host)": None, "EViT(keep=0.7)": ck.EViT(0.7), "TCA(rate=0.1)": ck.TCA(0.1)}
BATCH = 32


def bundled_model() -> Model:
    model, preprocess, tokenizer = ck.bundled()
    return Model(model, tokenizer, preprocess, BATCH, 0, "fp32")


def combinations(folder: Path, **changes: Any) -> Combinations:
    plan = Combinations([read_dataset("scenes", folder)], {}, {}, METHODS, list(HEADS), (0, 1, 4), 2)
    return plan._replace(**changes)


def never(progress: Progress) -> bool:
    return False


def by_name(results: Results) -> dict[tuple[str, str, int], Row]:
    return {(row.method, row.head, row.shots): row for row in results.rows}


@pytest.fixture(scope="module")
def results(scene_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    """Every head and method on the scenes, and the folder of the state."""
    state = tmp_path_factory.mktemp("evaluation") / "state"
    return evaluate(combinations(scene_folder), bundled_model(), state, never), state


class Split:
    """A split, encoded all at once by the public functions."""

    def __init__(self, folder: Path, split: str, method: ck.Method | None) -> None:
        model, preprocess, tokenizer = ck.bundled()
        if method is not None:
            ck.patch(model, method)
        files = sorted((folder / split).rglob("*.png"))
        names = sorted(path.name for path in (folder / "train").iterdir())
        self.model, self.tokenizer, self.names = model.eval(), tokenizer, names
        self.images = torch.stack([preprocess(Image.open(file)) for file in files])
        self.labels = torch.tensor([names.index(file.parent.name) for file in files])
        with torch.inference_mode():
            self.encoded = ck.encode_image(model, self.images, tokens=True, cls_path=True)

    def text(self, templates: Any) -> Tensor:
        return ck.Classifier(self.model, self.tokenizer, self.names, templates).head.text  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("method", METHODS)
def test_the_accuracy_is_that_of_a_classifier(results: tuple[Results, Path], scene_folder: Path, method: str) -> None:
    split = Split(scene_folder, "test", METHODS[method])
    templates = read_dataset("scenes", scene_folder).templates
    with torch.inference_mode():
        classifier = ck.Classifier(split.model, split.tokenizer, split.names, templates)
        expected = (classifier(split.images).argmax(1) == split.labels).double().mean().item()
    row = by_name(results[0])[method, "zero-shot", 0]
    assert row.score.mean == pytest.approx(expected, abs=1e-12)
    assert (row.score.images, row.score.runs, row.unread, row.weights) == (90, 1, {}, "")


def test_a_stream_is_read_in_several_orders(results: tuple[Results, Path], scene_folder: Path) -> None:
    templates = read_dataset("scenes", scene_folder).templates
    for method in ("dense (host)", "TCA(rate=0.1)"):
        split = Split(scene_folder, "test", METHODS[method])
        shares = []
        for seed in range(2):
            classifier = ck.Classifier(split.model, split.tokenizer, split.names, templates, head=ck.Reservoir)
            order, right = draw_order(90, seed), 0
            with torch.inference_mode():
                for rows in order.split(BATCH):
                    right += int((classifier(split.images[rows]).argmax(1) == split.labels[rows]).sum())
            shares.append(right / 90)
        row = by_name(results[0])[method, "reservoir", 0]
        assert row.score.mean == pytest.approx(sum(shares) / 2, abs=1e-12)
        assert row.score.runs == 2 and row.score.spread is not None and row.weights == "published for imagenet"


def test_weights_are_searched_on_the_validation_split(results: tuple[Results, Path], scene_folder: Path) -> None:
    templates = read_dataset("scenes", scene_folder).templates
    train, val, test = (Split(scene_folder, split, ck.EViT(0.7)) for split in ("train", "val", "test"))
    shares = []
    for seed in range(2):
        rows = draw_shots(train.labels, 6, 4, seed)
        head = ck.TipAdapter(test.text(templates), train.encoded.embedding[rows], train.labels[rows])
        head.fit(val.encoded, val.labels, (50.0, 50.0))
        shares.append((head(test.encoded).argmax(1) == test.labels).double().mean().item())
    row = by_name(results[0])["EViT(keep=0.7)", "tip", 4]
    assert row.score.mean == pytest.approx(sum(shares) / 2, abs=1e-12)
    assert row.weights == "validation split, 60 images"


def test_calip_reads_the_patches(results: tuple[Results, Path], scene_folder: Path) -> None:
    templates = read_dataset("scenes", scene_folder).templates
    val, test = (Split(scene_folder, split, ck.EViT(0.7)) for split in ("val", "test"))
    head = ck.CALIP(test.text(templates))
    head.fit(val.encoded, val.labels)
    expected = (head(test.encoded).argmax(1) == test.labels).double().mean().item()
    assert by_name(results[0])["EViT(keep=0.7)", "calip", 0].score.mean == pytest.approx(expected, abs=1e-12)


def test_every_combination_has_a_row(results: tuple[Results, Path]) -> None:
    kinds = [(head, shots) for head, kind in HEADS.items() for shots in ((1, 4) if kind.few_shot else (0,))]
    assert list(by_name(results[0])) == [(method, *kind) for method in METHODS for kind in kinds]
    assert not results[0].skips and not any(row.unread for row in results[0].rows)


def test_a_second_run_encodes_nothing(
    results: tuple[Results, Path], scene_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(features, "encode_image", fail)
    again = evaluate(combinations(scene_folder), bundled_model(), results[1], never)
    assert again.rows == results[0].rows
    fewer = combinations(scene_folder, heads=["tip"], shots=(4,))
    assert [row.head for row in evaluate(fewer, bundled_model(), results[1], never).rows] == ["tip"] * 3


def test_a_stopped_run_goes_on(
    results: tuple[Results, Path], scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "PART", BATCH)
    plan = combinations(scene_folder, methods=dict(list(METHODS.items())[:2]))
    calls, stops = 0, 0
    while True:
        limit, calls = calls + 9, 0

        def stop(progress: Progress, limit: int = limit) -> bool:
            nonlocal calls
            calls += 1
            return calls >= limit

        result = evaluate(plan, bundled_model(), tmp_path, stop)
        if not result.stopped:
            break
        stops += 1
    assert stops >= 3
    expected = [row for row in results[0].rows if not row.method.startswith("TCA")]
    assert [(row.method, row.head, row.shots) for row in result.rows] == [
        (row.method, row.head, row.shots) for row in expected
    ]
    for row, other in zip(result.rows, expected, strict=True):
        assert row.score.mean == pytest.approx(other.score.mean, abs=0.03)  # batches differ, and with them rounding


def test_another_model_is_refused(results: tuple[Results, Path], scene_folder: Path) -> None:
    model = bundled_model()
    with torch.no_grad():
        model.model.visual.conv1.weight.mul_(1.01)
    with pytest.raises(ValueError, match="another tower"):
        evaluate(combinations(scene_folder), model, results[1], never)
    with pytest.raises(ValueError, match="batch_size 32 instead of 16"):
        evaluate(combinations(scene_folder), bundled_model()._replace(batch_size=16), results[1], never)


def test_the_model_is_unpatched_again(scene_folder: Path, tmp_path: Path) -> None:
    model = bundled_model()
    plan = combinations(scene_folder, methods={"EViT(keep=0.7)": ck.EViT(0.7)}, heads=["zero-shot"])
    evaluate(plan, model, tmp_path, never)
    assert ck.method_of(model.model) is None


def test_files_that_cannot_be_read_are_counted_and_named(scene_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(scene_folder, folder)
    broken = sorted((folder / "test").rglob("*.png"))[3]
    broken.write_bytes(b"no image")
    plan = combinations(folder, methods={"dense (host)": None}, heads=["zero-shot", "calip"])
    expected = {"test": Unread(1, str(broken), "not an image (no format that is read)")}
    for _ in range(2):  # again from the scores on disk
        result = evaluate(plan, bundled_model(), tmp_path / "state", never)
        assert [(row.score.images, row.unread) for row in result.rows] == [(89, expected)] * 2


def test_a_split_without_an_image_is_an_error(scene_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(scene_folder / "test", folder)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no image")
    plan = combinations(scene_folder, data=[read_dataset("broken", folder)], heads=["zero-shot"])
    with pytest.raises(ValueError, match="expected images that can be read, got 90 that cannot, such as"):
        evaluate(plan, bundled_model(), tmp_path / "state", never)


def test_heads_without_their_data_are_named(scene_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(scene_folder / "test", folder)
    plan = combinations(scene_folder, data=[read_dataset("plain", folder)], methods={"dense (host)": None})
    result = evaluate(plan._replace(heads=["zero-shot", "calip", "tip"]), bundled_model(), tmp_path / "state", never)
    assert [(row.head, row.weights) for row in result.rows] == [("zero-shot", ""), ("calip", "published for imagenet")]
    assert {(skip.head, skip.shots, skip.reason) for skip in result.skips} == {
        ("tip", shots, "the data set has no train split") for shots in (1, 4)
    }


def test_retrieval_has_recalls_in_both_directions(scene_folder: Path, tmp_path: Path) -> None:
    files = sorted((scene_folder / "test").rglob("*.png"))
    table = tmp_path / "captions.csv"
    root = scene_folder / "test"
    lines = [f"{file.relative_to(root)},a {file.parent.name} on a cluttered background." for file in files]
    table.write_text("image,caption\n" + "\n".join(lines) + "\n", encoding="utf-8")
    captions = read_captions(table, root)
    plan = combinations(scene_folder, data=[], captions={"scenes": captions}, methods={"EViT(keep=0.7)": ck.EViT(0.7)})
    rows = evaluate(plan, bundled_model(), tmp_path / "state", never).rows
    assert [row.metric for row in rows] == [
        f"{direction} R@{rank}" for direction in ("text to image", "image to text") for rank in (1, 5, 10)
    ]
    recalls = [row.score.mean for row in rows]
    assert recalls[0] < recalls[1] < recalls[2] and recalls[3] <= recalls[4] <= recalls[5]
    assert all(row.score.images == 90 for row in rows)
