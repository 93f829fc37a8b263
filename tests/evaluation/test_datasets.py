"""Datasets on disk: CoOp's splits, FGVC Aircraft, plain folders, and what goes wrong with them."""

from __future__ import annotations

import os
import pickle
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from clipkernels.evaluation import DATASETS, Dataset, read_dataset
from clipkernels.evaluation.datasets.dataset import FileReader
from clipkernels.heads.presets import CALIP_PRESETS, RESERVOIR_PRESETS
from clipkernels.images import Reader
from tests.evaluation.layouts import COOP, aircraft_set, class_folders, coop_set, paint, shade_of, write_split

PETS = ("oxford_pets", "images", "split_zhou_OxfordPets.json")


def shades(data: Dataset, split: str) -> list[int]:
    """The shades of a split's images, read by name."""
    items = data.splits[split]
    return [shade_of(items.read(name)) for name in items.names]


def pets(root: Path, **splits: list[tuple[Any, Any, Any]]) -> Path:
    """The Pets' folder with two images a.jpg and b.jpg, and a split file of its own."""
    home = root / "oxford_pets"
    paint(home / "images" / "a.jpg", 1)
    paint(home / "images" / "b.jpg", 2)
    write_split(home / PETS[2], **splits)
    return home


TWO = [("a.jpg", 0, "cat"), ("b.jpg", 1, "dog")]


def test_every_preset_names_a_set() -> None:
    assert set(RESERVOIR_PRESETS) | set(CALIP_PRESETS) <= set(DATASETS)
    assert set(DATASETS) == set(RESERVOIR_PRESETS) | {"cifar10", "cifar100", "modelnet40", "scanobjectnn"}


@pytest.mark.parametrize(("name", "folder", "images", "file", "template"), COOP, ids=[row[0] for row in COOP])
def test_a_split_file_of_coop_is_read(
    tmp_path: Path, name: str, folder: str, images: str, file: str, template: str
) -> None:
    home = coop_set(tmp_path, folder, images, file)
    data = read_dataset(name, home)
    assert (data.name, data.layout, data.notes) == (name, f"CoOp {file}", ())
    assert data.classes == ("pink primrose", "Bengal", "abyssinian")
    assert data.templates == (template,)
    assert list(data.splits) == ["train", "val", "test"]
    assert data.splits["train"].labels == (0, 0, 1, 1, 2, 2)
    assert data.splits["val"].labels == (0, 1, 2)
    assert data.splits["test"].labels == (0, 0, 1, 1, 2, 2)
    assert data.splits["val"].names[1] == str(home / images / "Bengal/sub/val_0.jpg")
    assert shades(data, "train") == [100, 101, 102, 103, 104, 105]
    assert shades(data, "val") == [150, 151, 152]
    assert shades(data, "test") == [200, 201, 202, 203, 204, 205]


@pytest.mark.parametrize(("name", "folder", "images", "file", "template"), COOP, ids=[row[0] for row in COOP])
def test_the_folder_around_a_set_and_its_images_do(
    tmp_path: Path, name: str, folder: str, images: str, file: str, template: str
) -> None:
    expected = read_dataset(name, coop_set(tmp_path, folder, images, file))
    assert read_dataset(name, tmp_path) == expected
    assert read_dataset(name, tmp_path / folder / images) == expected


def test_fgvc_aircraft_is_read(tmp_path: Path) -> None:
    home = aircraft_set(tmp_path)
    data = read_dataset("fgvc", home)
    assert data.classes == ("707-320", "BAe 146-200")
    assert data.templates == ("a photo of a {}, a type of aircraft.",)
    assert (data.layout, data.notes) == ("FGVC text files", ())
    assert {split: items.labels for split, items in data.splits.items()} == dict.fromkeys(data.splits, (0, 1))
    assert [shades(data, split) for split in ("train", "val", "test")] == [[10, 11], [12, 13], [14, 15]]
    assert read_dataset("fgvc", tmp_path) == read_dataset("fgvc", home / "images") == data


def test_only_the_wanted_splits_are_read(tmp_path: Path) -> None:
    home = coop_set(tmp_path, *PETS)
    for file in (home / "images").rglob("train_*.jpg"):
        file.unlink()
    data = read_dataset("pets", home, splits=["test", "val"])
    assert list(data.splits) == ["val", "test"]
    assert len(data.classes) == 3 and data.notes == ()
    with pytest.raises(ValueError, match=r"the 6 files of the train split of pets in '.*images', such as 'pink"):
        read_dataset("pets", home)


def test_missing_files_are_counted(tmp_path: Path) -> None:
    home = coop_set(tmp_path, *PETS)
    (home / "images" / "Bengal/sub/test_1.jpg").unlink()
    (home / "images" / "abyssinian/sub/test_0.jpg").unlink()
    data = read_dataset("pets", home)
    assert data.notes == ("2 of the 6 files of the test split are missing, the first 'Bengal/sub/test_1.jpg'",)
    assert data.splits["test"].labels == (0, 0, 1, 2)
    assert shades(data, "test") == [200, 201, 202, 205]


def test_a_folder_is_listed_once_and_no_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = coop_set(tmp_path, *PETS)
    listed: list[str] = []
    opened: list[str] = []
    scandir, stat = os.scandir, os.stat

    def record_scandir(path: Any) -> Any:
        listed.append(str(path))
        return scandir(path)

    def record_stat(path: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "scandir", record_scandir)
    monkeypatch.setattr(os, "stat", record_stat)
    read_dataset("pets", home)
    assert sorted(listed) == sorted(set(listed))
    assert len([path for path in listed if "images" in path]) == 7
    assert not [path for path in opened if path.endswith(".jpg")]


def test_backslashes_of_windows_separate_parts(tmp_path: Path) -> None:
    home = pets(tmp_path, test=[("\\sub\\c.jpg", 0, "cat"), ("b.jpg", 1, "dog")])
    paint(home / "images" / "sub" / "c.jpg", 3)
    assert shades(read_dataset("pets", home), "test") == [3, 2]


@pytest.mark.parametrize(
    "path",
    [
        "../a.jpg",
        "x/../../a.jpg",
        "/etc/passwd",
        "C:\\a.jpg",
        "C:/a.jpg",
        "\\\\host\\a.jpg",
        "..\\a.jpg",
        "",
        "a\0.jpg",
    ],
)
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    home = pets(tmp_path, test=[*TWO, (path, 0, "cat")])
    with pytest.raises(ValueError, match="a path must be relative and stay in the folder of the data") as error:
        read_dataset("pets", home)
    assert repr(path) in str(error.value) and PETS[2] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ([("a.jpg", "0", "cat")], "Expected `int`, got `str` - at `$.test[0][1]`"),
        ([("a.jpg", True, "cat")], "Expected `int`, got `bool`"),
        ([("a.jpg", 0)], "Expected `array` of length 3"),
        ([("a.jpg", 0, None)], "Expected `str`, got `null`"),
        ({"a.jpg": 0}, "Expected `array`, got `object`"),
        ([("a.jpg", 0, "cat"), ("b.jpg", 0, "dog")], "the two names 'cat' and 'dog' of label 0"),
        ([("a.jpg", 0, "cat"), ("b.jpg", 2, "dog")], "2 labels from 0 to 2, which must be 0 to 1"),
        ([("a.jpg", -1, "cat"), ("b.jpg", 0, "dog")], "2 labels from -1 to 0, which must be 0 to 1"),
        ([("a.jpg", 0, "cat"), ("b.jpg", 10**12, "dog")], "2 labels from 0 to 1000000000000"),
        ([("a.jpg", 0, "cat"), ("b.jpg", 1, " ")], "an empty class name of label 1"),
        ([("a.jpg", 0, "cat")], "1 class in the lists train, val and test, where two are needed"),
        ([], "0 classes in the lists train, val and test"),
    ],
)
def test_a_faulty_split_file_is_refused(tmp_path: Path, entries: Any, fault: str) -> None:
    home = pets(tmp_path, test=entries)
    with pytest.raises(ValueError, match=re.escape(fault)) as error:
        read_dataset("pets", home)
    assert str(home / PETS[2]) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff\xfe", b'{"test": [["\xff", 0, "cat"]]}', b'{"test": ' + b"[" * 100_000],
    ids=range(6),
)
def test_a_split_file_of_other_content_is_refused(tmp_path: Path, content: bytes) -> None:
    home = pets(tmp_path)
    (home / PETS[2]).write_bytes(content)
    with pytest.raises(ValueError, match=r"^expected CoOp's split file, got .*split_zhou_OxfordPets.json: ?[^\n]+$"):
        read_dataset("pets", home)


def test_a_split_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    home = pets(tmp_path, test=TWO)
    file = home / PETS[2]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_dataset("pets", home).classes == ("cat", "dog")


def test_two_classes_of_one_name_are_kept_and_noted(tmp_path: Path) -> None:
    data = read_dataset("pets", pets(tmp_path, test=[("a.jpg", 0, "crane"), ("b.jpg", 1, "crane")]))
    assert data.classes == ("crane", "crane")
    assert "the classes 0, 1 have the one name 'crane': no prompt tells them apart" in data.notes


def test_missing_splits_and_repeated_files_are_noted(tmp_path: Path) -> None:
    data = read_dataset("pets", pets(tmp_path, train=TWO, test=[*TWO, ("a.jpg", 0, "cat")]))
    assert data.notes == (
        "there is no val split",
        "the test split names 1 file twice",
        "2 files of the train split are also in the test split",
    )
    with pytest.raises(ValueError, match=r"images of the splits 'val', got lists of 'train', 'test' for pets"):
        read_dataset("pets", tmp_path, splits=["val"])


def test_names_match_in_any_unicode_form(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café/crème.jpg") for form in ("NFC", "NFD"))
    assert composed != decomposed
    home = pets(tmp_path, test=[(composed, 0, "crème_brûlée"), ("b.jpg", 1, "寿司")])
    paint(home / "images" / decomposed, 7)
    data = read_dataset("pets", home)
    assert data.classes == ("crème brûlée", "寿司")
    assert shades(data, "test") == [7, 2] and data.notes == ("there is no train and no val split",)


def test_links_are_followed_and_broken_ones_are_missing(tmp_path: Path) -> None:
    home = pets(tmp_path, test=[*TWO, ("link/c.jpg", 0, "cat"), ("d.jpg", 1, "dog")])
    paint(tmp_path / "elsewhere" / "c.jpg", 9)
    (home / "images" / "link").symlink_to(tmp_path / "elsewhere")
    (home / "images" / "d.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "alias").symlink_to(home)
    data = read_dataset("pets", tmp_path / "alias")
    assert shades(data, "test") == [1, 2, 9]
    assert data.notes[1] == "1 of the 4 files of the test split are missing, the first 'd.jpg'"


def test_images_beside_the_split_file_do(tmp_path: Path) -> None:
    home = coop_set(tmp_path, "eurosat", "", "split_zhou_EuroSAT.json")
    assert shades(read_dataset("eurosat", home), "val") == [150, 151, 152]


def test_two_folders_of_a_set_are_refused(tmp_path: Path) -> None:
    for folder in ("food-101", "food101"):
        coop_set(tmp_path, folder, "images", "split_zhou_Food101.json")
    with pytest.raises(ValueError, match=r"^expected one folder of the set, got .*food-101, .*food101: name one"):
        read_dataset("food101", tmp_path)
    assert read_dataset("food101", tmp_path / "food101").notes == ()


def test_a_folder_without_its_split_file_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "2750", {"Forest": 1, "River": 1})
    with pytest.raises(ValueError) as error:
        read_dataset("eurosat", tmp_path)
    assert str(error.value) == (
        f"expected split_zhou_EuroSAT.json in {str(tmp_path)!r} or in a folder eurosat there, got {str(tmp_path)!r} "
        "with '2750': put the file beside 2750 as DATASETS.md of github.com/KaiyangZhou/CoOp says, or give the set a "
        "name of your own to read a folder of class folders"
    )
    (tmp_path / "2750").rename(tmp_path / "images")
    with pytest.raises(ValueError, match=r"^expected variants.txt in .*fgvc-aircraft-2013b/data"):
        read_dataset("fgvc", tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("variants.txt", "707-320\n707-320\n", "expected two or more distinct variants"),
        ("variants.txt", "", "expected two or more distinct variants"),
        ("images_variant_test.txt", "0000000 777\n", "got '0000000 777' in line 1 of"),
        ("images_variant_test.txt", "\n0000000\n", "got '0000000' in line 2 of"),
        ("images_variant_test.txt", "../0000000 707-320\n", "a path must be relative"),
        ("images_variant_test.txt", "9999999 707-320\n", "the 1 file of the test split of fgvc"),
    ],
)
def test_faulty_files_of_fgvc_are_refused(tmp_path: Path, file: str, content: str, fault: str) -> None:
    home = aircraft_set(tmp_path)
    (home / file).write_text(content)
    with pytest.raises(ValueError, match=re.escape(fault)):
        read_dataset("fgvc", home)


def test_a_plain_folder_is_the_test_split(tmp_path: Path) -> None:
    class_folders(tmp_path, {"hot_dog": 2, "Zebra": 1, "ant": 1}, shade=40)
    data = read_dataset("photos", tmp_path)
    assert data.classes == ("Zebra", "ant", "hot dog")
    assert (data.layout, data.templates) == ("folder of folders", ("a photo of a {}.",))
    assert data.notes == ("there is no train and no val split",)
    assert list(data.splits) == ["test"]
    assert data.splits["test"].labels == (0, 1, 2, 2)
    assert shades(data, "test") == [42, 43, 40, 41]


def test_a_plain_folder_with_splits_is_read(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"cat": 2, "dog": 1})
    class_folders(tmp_path / "validation", {"dog": 1})
    class_folders(tmp_path / "test", {"cat": 1, "emu": 1}, shade=60)
    data = read_dataset("photos", tmp_path)
    assert data.classes == ("cat", "dog", "emu")
    assert {split: items.labels for split, items in data.splits.items()} == {
        "train": (0, 0, 1),
        "val": (1,),
        "test": (0, 2),
    }
    assert data.layout == "folder of folders in train/, validation/, test/" and data.notes == ()
    alone = read_dataset("photos", tmp_path, splits=["test"])
    assert alone.classes == data.classes and alone.splits == {"test": data.splits["test"]}
    assert shades(alone, "test") == [60, 61]


def test_val_is_the_test_split_where_there_is_no_test(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"cat": 1, "dog": 1})
    class_folders(tmp_path / "val", {"cat": 1, "dog": 1}, shade=5)
    data = read_dataset("photos", tmp_path)
    assert list(data.splits) == ["train", "test"] and shades(data, "test") == [5, 6]
    assert data.notes == (
        "there is no test folder: the images of val/ are the test split",
        "there is no val split",
    )


def test_a_train_folder_alone_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"cat": 1, "dog": 1})
    with pytest.raises(ValueError, match=r"expected test/ or val/ beside '.*train': name that folder itself"):
        read_dataset("photos", tmp_path)
    assert read_dataset("photos", tmp_path / "train").classes == ("cat", "dog")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    data = read_dataset("vehicles", class_folders(tmp_path, {"car": 1, "train": 1, "test": 1}))
    assert data.classes == ("car", "test", "train") and list(data.splits) == ["test"]


def test_hidden_and_other_files_are_left_out(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 1, "dog": 1})
    for name in (".DS_Store", "cat/.DS_Store", "cat/._0.JPEG", "dog/notes.txt", ".git/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    paint(tmp_path / "stray.png")
    (tmp_path / "empty").mkdir()
    data = read_dataset("photos", tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.splits["test"].names == (str(tmp_path / "cat/0.JPEG"), str(tmp_path / "dog/0.JPEG"))
    assert data.notes == (
        "left out 1 image outside of the classes' folders",
        "left out 1 folder without images, the first 'empty'",
        "there is no train and no val split",
        "skipped 1 .txt: not images",
    )


def test_folders_beside_the_splits_are_noted(tmp_path: Path) -> None:
    for folder in ("val", "test", "extra"):
        class_folders(tmp_path / folder, {"cat": 1, "dog": 1})
    (tmp_path / "extra").rename(tmp_path / "held_out")
    notes = read_dataset("photos", tmp_path).notes
    assert notes == (f"left out 'held_out' in {tmp_path.name}/, which are no splits", "there is no train split")


def test_the_one_folder_in_an_unpacked_archive_is_the_set(tmp_path: Path) -> None:
    class_folders(tmp_path / "archive" / "photos", {"cat": 1, "dog": 1})
    assert read_dataset("photos", tmp_path).classes == ("cat", "dog")


def test_images_below_a_class_in_folders_count(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 1, "dog": 1})
    paint(tmp_path / "dog" / "puppies" / "p.png", 77)
    assert shades(read_dataset("photos", tmp_path), "test") == [0, 1, 77]


@pytest.mark.parametrize(
    ("folders", "fault"),
    [
        ({"a_b": 1, "a b": 1}, "distinct class names"),
        ({"cat": 1, "dog": 0}, "expected two or more classes in"),
        ({"cat": 0, "dog": 0}, "expected a folder of images per class"),
        ({}, "expected a folder of images per class, got an empty folder"),
        ({"_": 1, "dog": 1}, "got '_' without a name: rename one"),
    ],
)
def test_a_plain_folder_without_classes_is_refused(tmp_path: Path, folders: dict[str, int], fault: str) -> None:
    class_folders(tmp_path, folders)
    with pytest.raises(ValueError, match=fault) as error:
        read_dataset("photos", tmp_path)
    assert "\n" not in str(error.value)


def test_images_without_folders_are_refused(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"got '.*' with 'a.png': put the images of each class into a folder"):
        read_dataset("photos", tmp_path)


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    for folder in ("val", "Validation", "test"):
        class_folders(tmp_path / folder, {"cat": 1, "dog": 1})
    with pytest.raises(ValueError, match="expected one folder of the val split, got 'Validation' and 'val'"):
        read_dataset("photos", tmp_path)


def test_two_unicode_forms_of_a_folder_are_refused(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    class_folders(tmp_path, dict.fromkeys(names, 1))
    if len(os.listdir(tmp_path)) < 2:
        pytest.skip("this file system holds one form")
    with pytest.raises(ValueError, match="in two Unicode forms: rename one"):
        read_dataset("photos", tmp_path)


def test_a_link_to_a_folder_above_ends(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 1, "dog": 1})
    (tmp_path / "dog" / "loop").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    assert len(read_dataset("photos", tmp_path).splits["test"].names) == 2


def test_a_link_that_leads_round_alone_ends(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="expected a folder of images per class"):
        read_dataset("photos", tmp_path)


def test_another_spelling_of_a_set_is_noted(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 1, "dog": 1})
    for name, known in (("ImageNet-V2", "imagenet_v2"), ("flowers102", "flowers"), ("oxford_pets", "pets")):
        note = f"{name!r} is read as a plain folder: the published set is called {known!r} here"
        assert read_dataset(name, tmp_path).notes[-1] == note
    with pytest.raises(ValueError, match=r"\(the published set is called 'cars' here\)$"):
        read_dataset("stanford-cars", tmp_path / "dog")


def test_the_reader_is_the_callers(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 1, "dog": 1})
    items = read_dataset("photos", tmp_path, reader=Reader(exif=False)).splits["test"]
    assert items.read == FileReader(Reader(exif=False))
    assert read_dataset("photos", tmp_path).splits["test"].read == FileReader(Reader())


def test_a_dataset_is_pickled(tmp_path: Path) -> None:
    data = read_dataset("pets", coop_set(tmp_path, *PETS))
    assert pickle.loads(pickle.dumps(data)) == data


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"name": ""}, "name must be the name of a set"),
        ({"name": 3}, "name must be the name of a set"),
        ({"name": "a\nb"}, "name must be the name of a set"),
        ({"splits": ["dev"]}, "splits must be some of 'train', 'val', 'test'"),
        ({"splits": "test"}, "splits must be some of"),
        ({"splits": []}, "splits must be some of"),
        ({"path": "/nowhere/at/all"}, "expected a folder for photos, got '/nowhere/at/all', which does not exist"),
        ({"path": __file__}, "which is a file: name its folder, and unpack archives"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        read_dataset(**{"name": "photos", "path": tmp_path, **arguments})


def test_arguments_of_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="path must be a path"):
        read_dataset("photos", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"reader must be a clipkernels\.images\.Reader"):
        read_dataset("photos", tmp_path, reader=print)  # type: ignore[arg-type]
