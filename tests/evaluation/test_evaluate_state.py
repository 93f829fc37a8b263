"""The state of an evaluation: changed files, more heads, damage, and everything that has no score."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

import clipkernels as ck
from clipkernels.evaluation import features
from clipkernels.evaluation.datasets import Dataset, read_dataset
from clipkernels.evaluation.evaluate import evaluate
from clipkernels.evaluation.heads import HEADS, WIDE_GRID, Data, _tip_preset, weights_of
from clipkernels.evaluation.plan import Combinations, Model
from clipkernels.evaluation.results import Progress, Results, Unread
from clipkernels.evaluation.shots import shortage_note
from clipkernels.evaluation.speed import measure_speeds, noise_batch

pytestmark = pytest.mark.usefixtures("one_thread")
DENSE = {"dense (host)": None}


def bundled_model() -> Model:
    model, preprocess, tokenizer = ck.bundled()
    return Model(model, tokenizer, preprocess, 32, 0, "fp32")


def never(progress: Progress) -> bool:
    return False


def run(data: Dataset, state: Path, heads: tuple[str, ...] = ("zero-shot",), **changes: Any) -> Results:
    """The results of heads by the dense tower, with shots of 0."""
    plan = Combinations([data], {}, {}, DENSE, heads, (0,), 2)
    return evaluate(plan._replace(**changes), bundled_model(), state, never)


@pytest.fixture
def photos(scene_folder: Path, tmp_path: Path) -> Path:
    """A copy of the test split as a plain folder."""
    return shutil.copytree(scene_folder / "test", tmp_path / "photos")


def test_a_file_that_changed_is_encoded_anew(photos: Path, tmp_path: Path) -> None:
    data = read_dataset("photos", photos)
    before = run(data, tmp_path / "state").rows[0].score.mean
    for name in data.splits["test"].names:
        with Image.open(name) as image:
            changed = ImageOps.invert(image.convert("RGB"))
        changed.save(name)
    after = run(data, tmp_path / "state").rows[0].score.mean
    assert after == run(data, tmp_path / "other").rows[0].score.mean != before


def test_a_file_that_was_mended_is_read(photos: Path, tmp_path: Path) -> None:
    data = read_dataset("photos", photos)
    name = data.splits["test"].names[3]
    content = Path(name).read_bytes()
    Path(name).write_bytes(b"no image")
    assert run(data, tmp_path / "state").rows[0].unread["test"].name == name
    Path(name).write_bytes(content)
    row = run(data, tmp_path / "state").rows[0]
    assert (row.score.images, row.unread) == (90, {})


def cifar_in(folder: Path, shade: int) -> Dataset:
    """CIFAR-10's binary version with ten images of one shade."""
    home = folder / "cifar-10-batches-bin"
    home.mkdir(parents=True)
    (home / "batches.meta.txt").write_text("".join(f"class {number}\n" for number in range(10)), encoding="utf-8")
    (home / "test_batch.bin").write_bytes(b"".join(bytes([label]) + bytes([shade]) * 3072 for label in range(10)))
    return read_dataset("cifar10", folder)


def test_packed_files_of_another_folder_are_other_images(tmp_path: Path) -> None:
    for name, shade in (("dark", 20), ("light", 230)):
        run(cifar_in(tmp_path / name, shade), tmp_path / "state")
    assert len(list((tmp_path / "state").glob("features-*"))) == 2


def test_features_with_more_serve_heads_that_need_less(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = read_dataset("photos", photos)
    run(data, tmp_path / "state", ("calip",))

    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(features, "encode_image", fail)
    again = run(data, tmp_path / "state", ("zero-shot", "tda")).rows
    monkeypatch.undo()
    assert again == run(data, tmp_path / "other", ("zero-shot", "tda")).rows


@pytest.mark.parametrize(
    ("pattern", "damage", "message"),
    [
        ("features-*", lambda content: content[:-100], "delete features-.*, and its images are encoded again"),
        ("features-*", lambda content: content[:-4] + b"\0\0\0\1", "delete features-.*, and its images are enc"),
        ("row-*", lambda content: content[:-20], "delete row-.*, and it is scored again"),
        ("row-*", lambda content: content.replace(b'"runs": 1', b'"runs": 2'), "delete row-.*, and it is scored again"),
    ],
)
def test_a_damaged_file_is_named_with_a_remedy(
    photos: Path, tmp_path: Path, pattern: str, damage: Any, message: str
) -> None:
    data, state = read_dataset("photos", photos), tmp_path / "state"
    expected = run(data, state).rows
    file = next(state.glob(pattern))
    file.write_bytes(damage(file.read_bytes()))
    heads = ("zero-shot",) if pattern == "row-*" else ("zero-shot", "tda")
    with pytest.raises(ValueError, match=message) as error:
        run(data, state, heads)
    assert "\n" not in str(error.value)
    file.unlink()
    assert run(data, state, heads).rows[:1] == expected


def test_images_without_finite_features_are_counted(photos: Path, tmp_path: Path) -> None:
    data = read_dataset("photos", photos)
    model = bundled_model()
    poisoned = data.splits["test"].names[7]

    class Poison:
        """Preprocessing that gives NaN for one image."""

        def __init__(self) -> None:
            self.pixels = model.preprocess(data.splits["test"].read(poisoned))

        def __call__(self, image: Image.Image) -> torch.Tensor:
            pixels = model.preprocess(image)
            return pixels * float("nan") if torch.equal(pixels, self.pixels) else pixels

    plan = Combinations([data], {}, {}, DENSE, ["zero-shot", "calip"], (0,), 1)
    rows = evaluate(plan, model._replace(preprocess=Poison()), tmp_path / "state", never).rows
    expected = {"test": Unread(1, poisoned, "the model's features are not finite")}
    assert [(row.score.images, row.unread) for row in rows] == [(89, expected)] * 2


def test_faults_of_the_train_split_are_named(scene_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(scene_folder, tmp_path / "data")
    broken = sorted((folder / "train").rglob("*.png"))[0]
    broken.write_bytes(b"no image")
    rows = run(read_dataset("scenes", folder), tmp_path / "state", ("zero-shot", "tip"), shots=(1,)).rows
    assert [row.unread for row in rows] == [
        {}, {"train": Unread(1, str(broken), "not an image (no format that is read)")}
    ]  # fmt: skip


def test_heads_without_shots_have_their_row_with_any_shots(scene_folder: Path, tmp_path: Path) -> None:
    result = run(read_dataset("scenes", scene_folder), tmp_path / "state", ("zero-shot", "tip"), shots=(1, 4))
    assert [(row.head, row.shots) for row in result.rows] == [("zero-shot", 0), ("tip", 1), ("tip", 4)]


def test_a_head_without_labelled_images_is_named(photos: Path, tmp_path: Path) -> None:
    result = run(read_dataset("photos", photos), tmp_path / "state", ("zero-shot", "tip"))
    reason = "no labelled images are chosen (shots of 1 or more), and no support set"
    assert [(skip.head, skip.shots, skip.reason) for skip in result.skips] == [("tip", 0, reason)]


def test_classes_with_too_few_images_are_counted(scene_folder: Path, tmp_path: Path) -> None:
    result = run(read_dataset("scenes", scene_folder), tmp_path / "state", ("tip",), shots=(1, 1000))
    assert len(result.notes) == 1 and "classes have fewer than 1000 images to draw from, the least" in result.notes[0]
    assert shortage_note([0, 0, 1, 1], 2, 2) is None
    assert shortage_note([0, 0, 1], 3, 2) == (
        "2 of the 3 classes have fewer than 2 images to draw from, the least 0: they give all of them"
    )


def test_a_set_without_a_test_split_is_refused(photos: Path, tmp_path: Path) -> None:
    data = read_dataset("photos", photos)
    train = data._replace(splits={"train": data.splits["test"]})
    with pytest.raises(ValueError, match="expected a test split of photos, got 'train' alone: complete the data"):
        run(train, tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_texts_and_streams_report_progress(photos: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    plan = Combinations(
        [read_dataset("photos", photos)], {}, {}, {**DENSE, "TCA(rate=0.1)": ck.TCA(0.1)}, ["reservoir"], (0,), 2
    )
    evaluate(plan, bundled_model(), tmp_path / "state", lambda progress: bool(seen.append(progress)))
    stream = [each for each in seen if each.phase == "photos, TCA(rate=0.1), reservoir, run 2 of 2"]
    assert [(each.done, each.total, each.item) for each in stream] == [
        (0, 90, "image"),
        (32, 90, "image"),
        (64, 90, "image"),
    ]
    assert len([each for each in seen if each.item == "class"]) == 1  # texts are encoded once for all methods


def test_a_stream_stops_and_goes_on(photos: Path, tmp_path: Path) -> None:
    data = read_dataset("photos", photos)
    plan = Combinations([data], {}, {}, {"TCA(rate=0.1)": ck.TCA(0.1)}, ["zero-shot", "reservoir"], (0,), 2)
    stop = "photos, TCA(rate=0.1), reservoir, run 2 of 2"
    result = evaluate(plan, bundled_model(), tmp_path / "state", lambda progress: progress.phase == stop)
    assert result.stopped
    rows = evaluate(plan, bundled_model(), tmp_path / "state", never).rows
    assert rows == evaluate(plan, bundled_model(), tmp_path / "other", never).rows


def test_timing_stops(tmp_path: Path) -> None:
    model, methods = bundled_model()._replace(batch_size=2), {"dense (host)": None, "EViT(keep=0.7)": ck.EViT(0.7)}
    images, seen = noise_batch(model), []

    def stop(progress: Progress) -> bool:
        seen.append(progress)
        return len(seen) == 3

    assert measure_speeds(model, methods, images, 4, tmp_path, stop) is None
    assert [(each.done, each.total, each.item) for each in seen] == [(count, 10, "forward") for count in (1, 2, 3)]
    assert not list(tmp_path.iterdir())
    speeds = measure_speeds(model, methods, images, 4, tmp_path, never)
    assert speeds is not None and list(speeds) == list(methods)


@pytest.mark.parametrize(
    ("name", "alpha", "grid"),
    [
        ("imagenet", 1.17, (7, 3)), ("imagenet_v2", 1.17, (7, 3)), ("eurosat", 2, (12, 10)), ("flowers", 10, (50, 50)),
        ("photos", 1.17, WIDE_GRID),
    ],
)  # fmt: skip
def test_tip_adapter_takes_its_published_settings(name: str, alpha: float, grid: tuple[float, float]) -> None:
    none: Any = None
    preset = _tip_preset(Data(name, none, none, none, none))
    assert (preset.alpha, preset.beta, preset.grid) == (alpha, 1, grid)


@pytest.mark.parametrize(
    ("head", "name", "expected"),
    [
        ("zero-shot", "dtd", ""),
        ("tda", "dtd", "published"),
        ("reservoir", "photos", "published for imagenet"),
        ("tip", "imagenet_a", "published for imagenet"),
        ("tipx", "dtd", "defaults"),
        ("calip-fs", "dtd", "trained on the shots"),
    ],
)
def test_the_report_says_whose_weights_a_head_has(head: str, name: str, expected: str) -> None:
    none: Any = None
    images: Any = SimpleNamespace(views=1)
    assert weights_of(HEADS[head], Data(name, none, images, none, none)) == expected
