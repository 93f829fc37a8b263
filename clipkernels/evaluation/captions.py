"""Images with captions, for retrieval: COCO's and Karpathy's JSON, Flickr30k's token file, CSV."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import msgspec

from clipkernels.arguments import check_int, check_path
from clipkernels.evaluation.file_tree import FileTree, missing_note, relative_path
from clipkernels.evaluation.text_files import read_json, read_text
from clipkernels.messages import list_items, quantity

TOKEN = re.compile(r"(?P<name>[^\t]+)#\d+\t(?P<text>.*)")
"""A line of Flickr30k's token file: an image, the number of its caption, and the caption."""
FOLDERS = ("images", "flickr30k-images", "flickr30k_images", "")
"""Folders beside a captions file in which its images may be."""
SPLIT = "test"
EXPECTED = "a captions file (COCO's or Karpathy's JSON, Flickr30k's token file, or CSV with image,caption)"

Pairs = Sequence[tuple[str, str]]
"""Relative path of an image and one of its captions."""


class Captions(NamedTuple):
    """Images and their captions.

    names: paths of the images, each of which has a caption.
    texts: the captions, with single blanks.
    image_of: the index of the image of each caption.
    notes: sentences for a report: missing files, captions that were left out.
    layout: the layout that was read.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    image_of: tuple[int, ...]
    notes: tuple[str, ...]
    layout: str


class _Sentence(msgspec.Struct):
    raw: str


class _Image(msgspec.Struct):
    """An image of COCO's JSON, which has an id, or of Karpathy's, which has a split and sentences."""

    id: int | str | None = None
    file_name: str = ""
    filename: str = ""
    filepath: str = ""
    split: str = ""
    sentences: list[_Sentence] | None = None


class _Annotation(msgspec.Struct):
    image_id: int | str
    caption: str


class _Content(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation] | None = None


def read_captions(
    path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None, *, per_image: int | None = None
) -> Captions:
    """The images and captions of a captions file.

    COCO's captions_val2017.json, the test split of Karpathy's dataset_coco.json or dataset_flickr30k.json, Flickr30k's
    results_20130124.token, or CSV with the columns image and caption. Images that are missing are left out with their
    captions and counted in the notes. No image is opened.

    Args:
        path: the captions file.
        images: the folder that the file's image names are relative to; None looks beside the file.
        per_image: captions per image at most, the first ones, because COCO has images with more than five; None is all.
    Raises:
        TypeError: paths of another type.
        ValueError: another format, a faulty file, a path that leaves the folder, no image with a caption.
        OSError: the file cannot be read.
    """
    check_path(path=path)
    if images is not None:
        check_path(images=images)
    if per_image is not None:
        check_int("per_image", per_image, 1)
    file = Path(os.path.abspath(path))
    pairs, layout, notes = _read(file)
    try:
        # One check for each image, because every image has several captions.
        paths = {name: relative_path(name) for name in dict.fromkeys(name for name, _ in pairs)}
    except ValueError as error:
        raise ValueError(f"expected {EXPECTED}, got {file} with {error}") from error
    texts: dict[str, list[str]] = {}
    empty = 0
    for name, text in pairs:
        caption = " ".join(text.split())
        empty += not caption
        if caption:
            texts.setdefault(paths[name], []).append(caption)
    if empty:
        notes.append(f"left out {quantity(empty, 'empty caption')}")
    if not texts:
        raise ValueError(f"expected {EXPECTED}, got {file} without captions: name another one")
    folders = _folders(file) if images is None else [Path(os.path.abspath(os.path.expanduser(images)))]
    found = _find(texts, folders)
    if not found:
        raise ValueError(
            f"expected the images of {file}, such as {next(iter(texts))!r}, in {list_items(map(str, folders))}, got "
            "none of them: name their folder (images=, --images)"
        )
    notes.append(missing_note(SPLIT, (name for name in texts if name not in found), len(texts)) or "")
    kept = {name: texts[name][:per_image] for name in found}
    cut = sum(len(texts[name]) for name in found) - sum(map(len, kept.values()))
    if cut:
        notes.append(f"left out {quantity(cut, 'caption')} beyond {per_image} per image")
    counts = Counter(map(len, kept.values()))
    if len(counts) > 1:
        notes.append(f"the images have {min(counts)} to {max(counts)} captions, most {counts.most_common(1)[0][0]}")
    image_of = [index for index, captions in enumerate(kept.values()) for _ in captions]
    every = [caption for captions in kept.values() for caption in captions]
    return Captions(tuple(found.values()), tuple(every), tuple(image_of), tuple(note for note in notes if note), layout)


def _read(file: Path) -> tuple[Pairs, str, list[str]]:
    """The pairs of a captions file, its layout and notes; raises ValueError for another format."""
    if file.suffix.lower() == ".json":
        return _read_json(file)
    text = read_text(file, EXPECTED)
    first = next(iter(text.lstrip().splitlines()), "")
    if TOKEN.match(first):
        pairs = list(_token_pairs(text, file))
        count = len(dict.fromkeys(name for name, _ in pairs))
        note = f"all {quantity(count, 'image')} are one set: the published test split is that of dataset_flickr30k.json"
        return pairs, "Flickr30k token file", [note]
    if {"image", "caption"} <= {cell.strip().strip('"').lower() for cell in first.split(",")}:
        return list(_csv_pairs(text, file)), "CSV image,caption", []
    raise ValueError(f"expected {EXPECTED}, got {file}, which begins with {first!r:.80}")


def _read_json(file: Path) -> tuple[Pairs, str, list[str]]:
    content = read_json(file, EXPECTED, _Content)
    if any(image.sentences is not None for image in content.images):
        wanted = [image for image in content.images if image.split == SPLIT]
        if not wanted:
            splits = list_items(sorted({image.split for image in content.images}))
            raise ValueError(f"expected images of the {SPLIT} split in {file}, got the splits {splits}")
        _check_names((image.filename for image in wanted), file)
        pairs = [
            ("/".join(part for part in (image.filepath, image.filename) if part), sentence.raw)
            for image in wanted
            for sentence in image.sentences or ()
        ]
        silent = sum(not image.sentences for image in wanted)
        return pairs, "Karpathy's JSON, test split", _silent_notes(silent)
    if content.annotations is None:
        raise ValueError(f"expected {EXPECTED}, got {file}, which has neither annotations nor sentences")
    _check_names((image.file_name for image in content.images), file)
    names: Mapping[int | str | None, str] = {image.id: image.file_name for image in content.images}
    if len(names) < len(content.images) or None in names:
        raise ValueError(f"expected images with distinct ids, got {file}, in which two have one or one has none")
    known = [(names[note.image_id], note.caption) for note in content.annotations if note.image_id in names]
    strangers = len(content.annotations) - len(known)
    notes = _silent_notes(len(names) - len(dict.fromkeys(name for name, _ in known)))
    if strangers:
        notes.append(f"left out {quantity(strangers, 'caption')} of images that the file does not list")
    order = {name: index for index, name in enumerate(names.values())}
    return sorted(known, key=lambda pair: order[pair[0]]), "COCO captions JSON", notes


def _check_names(names: Iterable[str], file: Path) -> None:
    if not all(names):
        raise ValueError(f"expected a file name for each image, got {file} with an image without one")


def _silent_notes(count: int) -> list[str]:
    return [f"left out {quantity(count, 'image')} without captions"] if count else []


def _token_pairs(text: str, file: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        match = TOKEN.fullmatch(line.rstrip("\r"))
        if match is None:
            raise ValueError(
                f"expected a line such as '36979.jpg#0<tab>A dog.', got {line!r:.80} in line {number} of {file}"
            )
        yield match["name"], match["text"]


def _csv_pairs(text: str, file: Path) -> Iterator[tuple[str, str]]:
    reader = csv.reader(StringIO(text, newline=""))
    try:
        header = [cell.strip().lower() for cell in next(filter(None, reader))]
        image, caption = header.index("image"), header.index("caption")
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(f"{quantity(len(row), 'cell')} instead of {len(header)}: quote captions with commas")
            yield row[image].strip(), row[caption]
    except (csv.Error, ValueError) as error:
        raise ValueError(
            f"expected CSV with image,caption, got line {reader.line_num} of {file} with {error}"
        ) from error


def _folders(file: Path) -> list[Path]:
    """The folders beside a captions file, or beside its folder, in which its images may be."""
    split = file.stem.partition("_")[2]  # of captions_val2017
    names = ([split, f"images/{split}"] if split else []) + list(FOLDERS)
    folders = dict.fromkeys(home / name for home in (file.parent, file.parent.parent) for name in names)
    return [folder for folder in folders if folder.is_dir()]


def _find(names: Iterable[str], folders: Sequence[Path]) -> dict[str, str]:
    """The paths of the images that exist in the first of the folders that has one."""
    for folder in folders:
        tree = FileTree(folder)
        paths = {name: tree.find(name) for name in names}
        found = {name: path for name, path in paths.items() if path is not None}
        if found:
            return found
    return {}
