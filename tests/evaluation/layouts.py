"""Tiny made-up copies of published sets, each in its own layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Set, folder of the set, folder of its images, split file, prompt: as CoOp's DATASETS.md and readers have them.
COOP = (
    ("caltech101", "caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json", "a photo of a {}."),
    ("dtd", "dtd", "images", "split_zhou_DescribableTextures.json", "{} texture."),
    ("eurosat", "eurosat", "2750", "split_zhou_EuroSAT.json", "a centered satellite photo of {}."),
    ("food101", "food-101", "images", "split_zhou_Food101.json", "a photo of {}, a type of food."),
    ("flowers", "oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json", "a photo of a {}, a type of flower."),
    ("pets", "oxford_pets", "images", "split_zhou_OxfordPets.json", "a photo of a {}, a type of pet."),
    ("cars", "stanford_cars", "", "split_zhou_StanfordCars.json", "a photo of a {}."),
    ("sun397", "sun397", "SUN397", "split_zhou_SUN397.json", "a photo of a {}."),
    ("ucf101", "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", "a photo of a person doing {}."),
)
TINCH, GOLDFISH, SHARK = "n01440764", "n01443537", "n01484850"


def paint(path: Path, shade: int = 0) -> Path:
    """Write an image of one shade of grey, which the reader gives back exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(path, "PNG")
    return path


def shade_of(image: Image.Image) -> int:
    """The shade of a painted image; it fails for an image in another mode."""
    assert image.mode == "RGB" and image.size == (8, 8)
    red, green, blue = image.getpixel((0, 0))  # type: ignore[misc]
    assert red == green == blue
    return int(red)


def write_split(file: Path, **splits: Sequence[tuple[Any, Any, Any]]) -> Path:
    """Write a split file of CoOp."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(splits, ensure_ascii=False), encoding="utf-8")
    return file


def coop_set(root: Path, folder: str, images: str, file: str) -> Path:
    """A set with a split file: three classes, for which label order is not the order of names; 2, 1 and 2 images each.

    The image at place i of the train, val and test lists has the shade 100, 150 or 200 plus i.
    """
    home = root / folder
    names = ("pink_primrose", "Bengal", "abyssinian")
    splits: dict[str, list[tuple[str, int, str]]] = {}
    for split, count, shade in (("train", 2, 100), ("val", 1, 150), ("test", 2, 200)):
        entries = splits.setdefault(split, [])
        for label, name in enumerate(names):
            for i in range(count):
                path = f"{name}/sub/{split}_{i}.jpg"
                paint(home / images / path, shade + len(entries))
                entries.append((path, label, name))
    write_split(home / file, **splits)
    return home


def aircraft_set(root: Path) -> Path:
    """FGVC Aircraft with two variants and one image of each in train, val and test, with shades 10 to 15."""
    home = root / "fgvc_aircraft"
    home.mkdir(parents=True)
    variants = ("707-320", "BAe 146-200")
    (home / "variants.txt").write_text("\n".join(variants) + "\n")
    number = 0
    for split in ("train", "val", "test"):
        lines = []
        for variant in variants:
            paint(home / "images" / f"{number:07}.jpg", 10 + number)
            lines.append(f"{number:07} {variant}\n")
            number += 1
        (home / f"images_variant_{split}.txt").write_text("".join(lines))
    return home


def class_folders(root: Path, counts: Mapping[str, int], shade: int = 0) -> Path:
    """A folder of images per class, whose shades count up in the order given."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            paint(root / name / f"{i}.JPEG", shade)
            shade += 1
    return root


def class_names_file(folder: Path, *names: str) -> Path:
    """A classnames.txt with tench, goldfish and great white shark, or other names for them."""
    lines = zip((TINCH, GOLDFISH, SHARK), names or ("tench", "goldfish", "great white shark"), strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "classnames.txt"
    file.write_text("".join(f"{wnid} {name}\n" for wnid, name in lines))
    return file


def cifar_file(path: Path, labels: Sequence[int], label_bytes: int, seed: int) -> np.ndarray:
    """Write a file of CIFAR's binary version; return its pixels (n,32,32,3)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 32, 32, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for label, image in zip(labels, pixels, strict=True):
            file.write(bytes([19] * (label_bytes - 1) + [label]))  # 19 is a coarse label of CIFAR-100
            file.write(image.transpose(2, 0, 1).tobytes())
    return pixels
