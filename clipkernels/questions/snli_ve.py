"""SNLI-VE: an image of Flickr30k entails a sentence, contradicts it, or neither.

snli_ve_{split}.jsonl   a pair in each line: Flickr30K_ID (or Flikr30kID), sentence2, gold_label
{Flickr30k id}.jpg      the images

Source: SNLI-VE, arXiv 1901.06706; the layout is that of the files of necla-ml/SNLI-VE.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from clipkernels.evaluation.file_tree import relative_path
from clipkernels.messages import quantity
from clipkernels.questions.annotation_files import Annotations, line_error, read_json_lines

FILE = "snli_ve_{}.jsonl"
FOLDERS = ("", "flickr30k-images", "flickr30k_images", "images")
"""Folders in which the images may be."""
CLASSES = ("entailment", "neutral", "contradiction")
EXPECTED = "SNLI-VE's pairs (JSON Lines)"


class EntailmentPair(NamedTuple):
    """An image and a sentence about it.

    name: the id of the pair; the number of its line without one.
    image: name of the image file.
    text: the hypothesis.
    label: index of the class in `CLASSES`.
    """

    name: str
    image: str
    text: str
    label: int


class _Pair(msgspec.Struct):
    sentence2: str
    gold_label: Literal["entailment", "neutral", "contradiction", "-"]
    pair: str = msgspec.field(name="pairID", default="")
    # Three spellings: of the generator, of the published files, and of the readme.
    new: str | int | None = msgspec.field(name="Flickr30K_ID", default=None)
    old: str | int | None = msgspec.field(name="Flikr30kID", default=None)
    other: str | int | None = msgspec.field(name="Flickr30kID", default=None)


def read_snli_ve(folder: str | os.PathLike[str], split: str) -> Annotations:
    """The pairs of a split that have a label, as `EntailmentPair`; those with "-" are left out and counted.

    Args:
        folder: the folder of the file.
        split: "train", "dev" or "test".
    Raises:
        ValueError: a faulty line, or no pair with a label; the message names the file and the line.
        OSError: the file cannot be read.
    """
    file = Path(folder) / FILE.format(split)
    items, unlabelled = [], 0
    for number, pair in read_json_lines(file, EXPECTED, _Pair):
        image = next((name for name in (pair.new, pair.old, pair.other) if name is not None), None)
        if image is None:
            raise line_error(file, EXPECTED, number, "no Flickr30K_ID and no Flikr30kID")
        if pair.gold_label == "-":
            unlabelled += 1
            continue
        try:
            path = relative_path(str(image).removesuffix(".jpg") + ".jpg")
        except ValueError as error:
            raise line_error(file, EXPECTED, number, str(error)) from error
        items.append(EntailmentPair(pair.pair or str(number), path, pair.sentence2, CLASSES.index(pair.gold_label)))
    if not items:
        raise ValueError(f"expected {EXPECTED}, got {file} without a pair that has a label: get that file anew")
    notes = (f"left out {quantity(unlabelled, 'pair')} without a gold label",) if unlabelled else ()
    return Annotations(tuple(items), notes)
