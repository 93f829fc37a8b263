"""Captions files: COCO, Karpathy, Flickr30k, CSV, and what goes wrong with them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from clipkernels.evaluation import Captions, read_captions
from tests.evaluation.layouts import paint

ALL_FLICKR = "all 2 images are one set: the published test split is that of dataset_flickr30k.json"


def write_json(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def coco(
    root: Path, annotations: Sequence[tuple[int, str]] | None = None, paths: Sequence[str] = ("1.jpg", "2.jpg")
) -> Path:
    """A captions_val2017.json with two images, whose captions are not in the images' order."""
    pairs = ((20, "A dog."), (10, "A  cat\n on a mat. "), (20, "Two dogs.")) if annotations is None else annotations
    notes = [{"image_id": image, "id": i, "caption": text} for i, (image, text) in enumerate(pairs)]
    images = [{"license": 3, "file_name": name, "id": 10 * i, "height": 8} for i, name in enumerate(paths, 1)]
    return write_json(
        root / "annotations" / "captions_val2017.json",
        {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": notes},
    )


def karpathy(*images: tuple[str, str, Sequence[str]], folder: str = "") -> dict[str, Any]:
    """A JSON of Karpathy: file names, splits and captions."""
    entries = [
        {
            **({"filepath": folder, "cocoid": i} if folder else {}),
            **{"sentids": [0], "filename": name, "imgid": i, "split": split},
            "sentences": [
                {"tokens": text.split(), "raw": text, "imgid": i, "sentid": j} for j, text in enumerate(texts)
            ],
        }
        for i, (name, split, texts) in enumerate(images)
    ]
    return {"images": entries, "dataset": "coco"}


def files(root: Path, *names: str) -> list[str]:
    return [str(paint(root / name)) for name in names]


def test_coco_captions_are_read(tmp_path: Path) -> None:
    names = files(tmp_path / "val2017", "1.jpg", "2.jpg")
    captions = read_captions(coco(tmp_path))
    assert captions == Captions(
        tuple(names),
        ("A cat on a mat.", "A dog.", "Two dogs."),
        (0, 1, 1),
        ("the images have 1 to 2 captions, most 1",),
        "COCO captions JSON",
    )


@pytest.mark.parametrize("folder", ["val2017", "images/val2017", "images", "annotations/val2017", "annotations"])
def test_the_images_beside_a_coco_file_do(tmp_path: Path, folder: str) -> None:
    names = files(tmp_path / folder, "1.jpg", "2.jpg")
    assert read_captions(coco(tmp_path)).names == tuple(names)


def test_the_images_may_be_elsewhere(tmp_path: Path) -> None:
    names = files(tmp_path / "elsewhere", "1.jpg", "2.jpg")
    file = coco(tmp_path / "data")
    assert read_captions(file, tmp_path / "elsewhere").names == tuple(names)
    with pytest.raises(ValueError, match=r"^expected the images of .*, such as '1.jpg', in .*, got none of them: name"):
        read_captions(file)


def test_the_test_split_of_karpathys_coco_is_read(tmp_path: Path) -> None:
    images = [("a.jpg", "train", ["x"]), ("b.jpg", "test", ["A man. ", "A man"]), ("c.jpg", "val", ["y"])]
    file = write_json(tmp_path / "dataset_coco.json", karpathy(*images, ("d.jpg", "test", ["Red"]), folder="val2014"))
    names = files(tmp_path / "val2014", "b.jpg", "d.jpg")
    captions = read_captions(file)
    assert captions.names == tuple(names)
    assert captions.texts == ("A man.", "A man", "Red") and captions.image_of == (0, 0, 1)
    assert captions.layout == "Karpathy's JSON, test split"


def test_the_test_split_of_karpathys_flickr30k_is_read(tmp_path: Path) -> None:
    images = [("1.jpg", "test", ["A", "B"]), ("2.jpg", "train", ["C", "D"]), ("3.jpg", "test", ["E", "F"])]
    file = write_json(tmp_path / "dataset_flickr30k.json", karpathy(*images))
    names = files(tmp_path / "flickr30k-images", "1.jpg", "3.jpg")
    assert read_captions(file) == Captions(
        tuple(names), ("A", "B", "E", "F"), (0, 0, 1, 1), (), "Karpathy's JSON, test split"
    )


def test_the_token_file_of_flickr30k_is_read(tmp_path: Path) -> None:
    file = tmp_path / "results_20130124.token"
    file.write_text('1.jpg#0\tA dog .\n1.jpg#1\tDogs, "two" .\r\n2.jpg#0\tA # sign .\n2.jpg#1\tTab\there\n\n')
    names = files(tmp_path / "flickr30k_images", "1.jpg", "2.jpg")
    captions = read_captions(file)
    assert captions.names == tuple(names) and captions.image_of == (0, 0, 1, 1)
    assert captions.texts == ("A dog .", 'Dogs, "two" .', "A # sign .", "Tab here")
    assert captions.notes == (ALL_FLICKR,) and captions.layout == "Flickr30k token file"


def test_csv_is_read(tmp_path: Path) -> None:
    file = tmp_path / "captions.csv"
    file.write_text('\ufeffImage,Caption\nb.jpg,"A dog, asleep"\na.jpg,"Two\nlines"\n\nb.jpg,Köter\n', encoding="utf-8")
    names = files(tmp_path, "b.jpg", "a.jpg")
    captions = read_captions(file)
    assert captions.names == tuple(names)
    assert captions.texts == ("A dog, asleep", "Köter", "Two lines") and captions.image_of == (0, 0, 1)
    assert captions.layout == "CSV image,caption"


def test_missing_images_are_counted(tmp_path: Path) -> None:
    names = files(tmp_path / "val2017", "2.jpg")
    captions = read_captions(coco(tmp_path))
    assert captions[:3] == (tuple(names), ("A dog.", "Two dogs."), (0, 0))
    assert captions.notes == ("1 of the 2 files of the test split are missing, the first '1.jpg'",)


def test_captions_beyond_a_number_are_left_out(tmp_path: Path) -> None:
    files(tmp_path / "val2017", "1.jpg", "2.jpg")
    captions = read_captions(coco(tmp_path), per_image=1)
    assert captions.texts == ("A cat on a mat.", "A dog.") and captions.image_of == (0, 1)
    assert captions.notes == ("left out 1 caption beyond 1 per image",)
    for number in (0, True, 1.5):
        with pytest.raises(ValueError, match="per_image must be an int of at least 1"):
            read_captions(coco(tmp_path), per_image=number)  # type: ignore[arg-type]


def test_what_has_no_partner_is_noted(tmp_path: Path) -> None:
    files(tmp_path / "val2017", "1.jpg", "2.jpg")
    captions = read_captions(coco(tmp_path, [(10, "A cat."), (30, "Nobody."), (10, " \n")]))
    assert captions[1:3] == (("A cat.",), (0,))
    assert captions.notes == (
        "left out 1 image without captions",
        "left out 1 caption of images that the file does not list",
        "left out 1 empty caption",
    )


@pytest.mark.parametrize("path", ["../1.jpg", "/etc/passwd", "C:\\1.jpg", ""])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    files(tmp_path / "val2017", "2.jpg")
    with pytest.raises(ValueError, match=r"a path must be relative|a file name for each image") as error:
        read_captions(coco(tmp_path, paths=(path, "2.jpg")))
    assert "captions_val2017.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([], "Expected `object`, got `array`"),
        ({"images": {}}, "Expected `array`, got `object` - at `$.images`"),
        ({"images": []}, "which has neither annotations nor sentences"),
        ({"images": [], "annotations": []}, "without captions"),
        ({"images": [], "annotations": [{"image_id": 1, "caption": 2}]}, "Expected `str`, got `int`"),
        ({"images": [], "annotations": [{"image_id": 1, "bbox": [1]}]}, "missing required field `caption`"),
        ({"images": [{"file_name": "a.jpg"}], "annotations": []}, "images with distinct ids"),
        ({"images": [{"file_name": "a.jpg", "id": 1}] * 2, "annotations": []}, "images with distinct ids"),
        ({"images": [{"id": 1}], "annotations": []}, "expected a file name for each image"),
        (karpathy(("a.jpg", "train", ["x"])), "images of the test split in"),
        (karpathy(("", "test", ["x"])), "expected a file name for each image"),
        (karpathy(("a.jpg", "test", [])), "without captions"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, content: Any, fault: str) -> None:
    file = write_json(tmp_path / "captions.json", content)
    with pytest.raises(ValueError, match=re.escape(fault)) as error:
        read_captions(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "which begins with ''"),
        ("image_name| comment_number| comment\na.jpg| 0| A dog\n", "which begins with 'image_name| comment_number"),
        ("a.jpg#0\tA dog\nb.jpg A cat\n", "got 'b.jpg A cat' in line 2 of"),
        ("image,caption\na.jpg,A dog, asleep\n", "line 2 of {file} with 3 cells instead of 2: quote captions"),
        ("image,caption\n", "without captions"),
        ("image,caption\na.jpg,\n", "without captions"),
        ("image\rx,caption\n", "which begins with 'image'"),
        ("\nimage,caption\na.jpg,x\ry\n", "line 4 of {file} with 1 cell instead of 2"),
        ('image,caption\na.jpg,"' + "x" * 200_000 + '"\n', "field larger than field limit"),
    ],
    ids=range(9),
)
def test_other_text_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "captions.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(fault.format(file=file))) as error:
        read_captions(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes(b"image,caption\na.jpg,K\xf6ter\n")
    with pytest.raises(ValueError, match=r"in UTF-8, got .*latin.csv: invalid start byte at byte 21$"):
        read_captions(tmp_path / "latin.csv")
    with pytest.raises(ValueError, match="which is not a regular file"):
        read_captions(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_captions(tmp_path / "nothing.json")
    with pytest.raises(TypeError, match="path must be a path"):
        read_captions(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="images must be a path"):
        read_captions(tmp_path / "latin.csv", 3)  # type: ignore[arg-type]


def test_a_quoted_header_of_csv_is_read(tmp_path: Path) -> None:
    file = tmp_path / "captions.csv"
    file.write_text('"caption","id","image"\r\n"A dog","7","a.jpg"\r\n')
    files(tmp_path, "a.jpg")
    assert read_captions(file).texts == ("A dog",)
