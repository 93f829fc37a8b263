"""ImageNet and its variants: WordNet folders, numbered folders, class names, subsets."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from clipkernels.evaluation import Dataset, read_dataset
from clipkernels.evaluation.datasets.imagenet import clip_names
from tests.evaluation.layouts import GOLDFISH, SHARK, TINCH, class_folders, class_names_file, paint, shade_of

SUBSET = "2 of the 3 classes have folders: images are classified among these alone"
NO_OTHERS = "there is no train and no val split"
# Set, folder of the set, folder of its images: as CoOp's DATASETS.md has them.
VARIANTS = (
    ("imagenet_a", "imagenet-adversarial", "imagenet-a"),
    ("imagenet_r", "imagenet-rendition", "imagenet-r"),
    ("imagenet_sketch", "imagenet-sketch", "images"),
)


def shades(data: Dataset, split: str = "test") -> list[int]:
    items = data.splits[split]
    return [shade_of(items.read(name)) for name in items.names]


def test_imagenet_in_coops_layout_is_read(tmp_path: Path) -> None:
    home = tmp_path / "imagenet"
    class_names_file(home)
    class_folders(home / "images/train", {SHARK: 1, TINCH: 2}, shade=10)
    class_folders(home / "images/val", {GOLDFISH: 1, SHARK: 1, TINCH: 1}, shade=20)
    data = read_dataset("imagenet", home)
    assert data.classes == ("tench", "goldfish", "great white shark")
    assert data.templates == ("a photo of a {}.",) and data.layout == "CoOp WordNet folders val/"
    assert data.splits["train"].labels == (0, 0, 2) and shades(data, "train") == [11, 12, 10]
    assert data.splits["test"].labels == (0, 1, 2) and shades(data) == [22, 20, 21]
    assert data.notes == ("there is no val split",)
    assert read_dataset("imagenet", tmp_path) == read_dataset("imagenet", home / "images") == data
    alone = read_dataset("imagenet", home, splits=["test"])
    assert alone.splits == {"test": data.splits["test"]} and alone.classes == data.classes
    assert read_dataset("imagenet", home / "images/val").classes == data.classes


def test_imagenet_without_images_around_val_is_read(tmp_path: Path) -> None:
    class_names_file(tmp_path)
    class_folders(tmp_path / "val", {GOLDFISH: 1, SHARK: 1, TINCH: 1})
    data = read_dataset("imagenet", tmp_path)
    assert list(data.splits) == ["test"] and data.notes == (NO_OTHERS,)
    with pytest.raises(ValueError, match=r"expected a split 'val' of imagenet, got 'test' in"):
        read_dataset("imagenet", tmp_path, splits=["val"])


def test_the_train_folder_of_imagenet_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {TINCH: 1, SHARK: 1})
    with pytest.raises(ValueError, match=r"expected the folder with train/ and val/, got '.*train': its images are to"):
        read_dataset("imagenet", tmp_path / "train")


@pytest.mark.parametrize(("name", "folder", "images"), VARIANTS, ids=[row[0] for row in VARIANTS])
def test_a_variant_with_a_subset_of_classes_is_read(tmp_path: Path, name: str, folder: str, images: str) -> None:
    home = tmp_path / folder
    class_names_file(home)
    class_folders(home / images, {SHARK: 1, TINCH: 2}, shade=30)
    (home / images / "README.txt").write_text("x")
    data = read_dataset(name, home)
    assert data.classes == ("tench", "great white shark")
    assert data.splits["test"].labels == (0, 0, 1) and shades(data) == [31, 32, 30]
    assert data.notes == (NO_OTHERS, SUBSET)
    assert read_dataset(name, tmp_path) == read_dataset(name, home / images) == data


def test_the_numbered_folders_of_imagenet_v2_are_places(tmp_path: Path) -> None:
    home = tmp_path / "imagenetv2"
    names = clip_names()
    home.mkdir()
    (home / "classnames.txt").write_text("".join(f"{wnid} {name}\n" for wnid, name in names.items()))
    folder = class_folders(home / "imagenetv2-matched-frequency-format-val", {"10": 1, "2": 1, "999": 1}, shade=5)
    data = read_dataset("imagenet_v2", home)
    assert data.classes == ("great white shark", "brambling", "toilet paper")
    assert data.splits["test"].labels == (0, 1, 2) and shades(data) == [6, 5, 7]
    assert data.layout == "CoOp numbered folders imagenetv2-matched-frequency-format-val/"
    assert read_dataset("imagenet_v2", folder) == data


def test_imagenet_v2_in_wordnet_folders_is_read(tmp_path: Path) -> None:
    class_names_file(tmp_path)
    class_folders(tmp_path / "imagenetv2-matched-frequency-format-val", {SHARK: 1, TINCH: 1})
    data = read_dataset("imagenet_v2", tmp_path)
    assert data.classes == ("tench", "great white shark") and data.layout.startswith("CoOp WordNet folders")


def test_the_names_are_clips_without_classnames_txt(tmp_path: Path) -> None:
    class_folders(tmp_path / "imagenet-a", {GOLDFISH: 1, TINCH: 1})
    data = read_dataset("imagenet_a", tmp_path)
    assert data.classes == ("tench", "goldfish")
    assert data.notes[0] == "there is no classnames.txt: the class names are CLIP's, as open_clip has them"


def test_the_ids_of_clips_names_are_those_of_imagenet() -> None:
    names = clip_names()
    assert len(names) == 1000 and list(names) == sorted(names)
    known = {"n01440764": "tench", "n02123045": "tabby cat", "n03773504": "missile", "n15075141": "toilet paper"}
    assert {wnid: names[wnid] for wnid in known} == known


def test_names_that_are_not_clips_are_noted(tmp_path: Path) -> None:
    class_names_file(tmp_path, "tench", "gold fish", "white shark")
    class_folders(tmp_path / "imagenet-a", {GOLDFISH: 1, SHARK: 1, TINCH: 1})
    data = read_dataset("imagenet_a", tmp_path)
    assert data.classes == ("tench", "gold fish", "white shark")
    assert (
        data.notes[0] == "2 names in classnames.txt are not CLIP's in open_clip, the first 'gold fish' for 'goldfish'"
    )


def test_the_classnames_of_imagenet_beside_a_variant_do(tmp_path: Path) -> None:
    class_names_file(tmp_path / "imagenet", "tench", "goldfish", "shark")
    class_folders(tmp_path / "imagenet-rendition/imagenet-r", {SHARK: 1, TINCH: 1})
    assert read_dataset("imagenet_r", tmp_path).classes == ("tench", "shark")


def test_classes_of_one_name_are_noted(tmp_path: Path) -> None:
    class_folders(tmp_path / "val", {"n03773504": 1, "n04008634": 1})  # open_clip calls both missile
    data = read_dataset("imagenet", tmp_path)
    assert data.classes == ("missile", "missile")
    assert data.notes[-1] == "the classes 0, 1 have the one name 'missile': no prompt tells them apart"


def test_no_names_at_all_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(tmp_path / "val", {TINCH: 1, SHARK: 1})
    monkeypatch.setitem(sys.modules, "open_clip.zero_shot_metadata", None)
    clip_names.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"^expected classnames.txt of CoOp in .*, got none: put it there$"):
            read_dataset("imagenet", tmp_path)
    finally:
        clip_names.cache_clear()


@pytest.mark.parametrize("line", ["tench", "n01440764", "n01440764 again", "n1440764 tench", "n02123045,cat"])
def test_a_faulty_classnames_txt_is_refused(tmp_path: Path, line: str) -> None:
    file = class_names_file(tmp_path)
    file.write_text(f"{file.read_text()}\n{line}\n")
    class_folders(tmp_path / "val", {TINCH: 1, SHARK: 1})
    with pytest.raises(ValueError, match=re.escape(f"one for each class, got {line!r} in line 5 of {file}")):
        read_dataset("imagenet", tmp_path)


@pytest.mark.parametrize(("name", "folder"), [("imagenet", "n99999999"), ("imagenet_v2", "3")])
def test_a_folder_without_a_class_name_is_refused(tmp_path: Path, name: str, folder: str) -> None:
    class_names_file(tmp_path)
    class_folders(tmp_path, {folder: 1, **({TINCH: 1} if name == "imagenet" else {"0": 1})})
    with pytest.raises(ValueError, match=rf"got none for '.*{folder}' among 3: complete classnames.txt"):
        read_dataset(name, tmp_path)


def test_validation_images_in_one_folder_are_refused(tmp_path: Path) -> None:
    paint(tmp_path / "images/val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match=r"expected a folder for each class in '.*images/val', got images: move each"):
        read_dataset("imagenet", tmp_path)


def test_a_folder_without_images_of_imagenet_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 1, "dog": 1})
    with pytest.raises(ValueError, match=r"^expected folders n01440764, … in images/val/, val/ of .*'cat', 'dog'$"):
        read_dataset("imagenet", tmp_path)
    (tmp_path / "val" / TINCH).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^expected images of the test split below '.*val', got none$"):
        read_dataset("imagenet", tmp_path)


def test_two_folders_of_a_variant_are_refused(tmp_path: Path) -> None:
    for folder in ("imagenet-sketch/images", "imagenet-s/sketch"):
        class_folders(tmp_path / folder, {TINCH: 1, SHARK: 1})
    with pytest.raises(ValueError, match=r"expected one folder of the set, got .*imagenet-sketch, .*imagenet-s: name"):
        read_dataset("imagenet_sketch", tmp_path)
