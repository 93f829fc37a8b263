"""Support sets on disk: a folder of images per class, their features, and a manifest that says how all came to be.

manifest.json          says that the set is unfinished before anything changes, and what it is when all is there
features.safetensors   features (n,E) fp32, labels (n,) int64, sha256 (n,32) uint8, the rows class by class
CLASS/NAME.png         the images of a class, in the order of their rows
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipkernels.data import Preprocess
from clipkernels.files import read_tensors
from clipkernels.fingerprint import check_fingerprint
from clipkernels.support.features import (
    THREADS,
    Encoder,
    Encoding,
    Progress,
    Report,
    encode,
    encoder_of,
    remove_parts,
    write_features,
)
from clipkernels.support.folders import copy_image, folder_names, hash_of, images_in, refuse_foreign_images, stale_copies
from clipkernels.support.manifest import MANIFEST_KEYS, UNFINISHED, previous_classes, read_manifest, write_manifest
from clipkernels.support.prompts import list_names

FEATURES = "features.safetensors"


class Picture(NamedTuple):
    """An image file and the SHA-256 of its content."""

    path: str
    sha256: str


class SupportSet(NamedTuple):
    """Images that stand for classes, as `ck.TipAdapter` and `ck.TipX` take them.

    features (n,E): fp32, L2-normalised, class by class.
    labels (n,): int64, into `classes`.
    classes: in the order they were given in.
    prompts: the sentences of each class.
    images: the file of each row.
    about: the "kind", LC or SD, its "settings", "model" and "pretrained" as they were named, and what encoded them.
    """

    features: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    prompts: dict[str, list[str]]
    images: tuple[Picture, ...]
    about: dict[str, Any]

    @property
    def counts(self) -> Tensor:
        """Images of each class, (K,) int64."""
        return self.labels.bincount(minlength=len(self.classes))

    def save(self, folder: str | os.PathLike[str], copy: bool = True) -> None:
        """Writes the set to a folder, the manifest last; the same set gives the same files.

        An image that is in its class's folder already stays as it is. Copies of an earlier set that are not in this
        one are removed once everything else is there; no other file is, and no other image may be in a class's folder.
        What is refused is refused before anything changes.

        Args:
            folder: new, empty, or a support set of the same kind.
            copy: whether images that lie elsewhere are copied; otherwise the manifest says where they are.
        Raises:
            ValueError: other images in a class's folder, a set of another kind, an image that is gone, that is not
                what was encoded, or that is a copy to be removed and is not to be copied.
            OSError: a file cannot be read or written.
        """
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        before = previous_classes(root, self.about["kind"])
        entries, copies = _plan_files(root, self, before, copy)
        named = {each["folder"] for each in entries}
        gone = [each for each in before if each["folder"] not in named]
        stale = stale_copies(root, entries, [each["folder"] for each in gone])
        copies = _missing_copies(copies)
        _check_sources(entries, stale)
        features = {"sha256": "", "shape": list(self.features.shape)}
        said = {**self.about, "features": features}
        write_manifest(root, {**said, "classes": [*entries, *gone], UNFINISHED: True})
        for each in copies:
            copy_image(*each)
        who = Encoder(*(self.about[field] for field in Encoder._fields))
        digests = [bytes.fromhex(picture.sha256) for picture in self.images]
        write_features(root / FEATURES, self.features.cpu(), digests, who, {"labels": self.labels.cpu()})
        for path in stale:
            path.unlink()
        for parent in {path.parent for path in stale}:
            if not any(parent.iterdir()):
                parent.rmdir()
        features["sha256"] = hash_of(root / FEATURES)
        write_manifest(root, {**said, "classes": entries})
        remove_parts(root / FEATURES, who)

    @staticmethod
    def load(folder: str | os.PathLike[str], model: nn.Module) -> SupportSet:
        """The support set of a folder, on the model's device.

        The tower must be the one that encoded it, patched or not, in any precision: where that is another, the two are
        compared in the lower one; of float16 and bfloat16 neither is, and one does not serve the other.

        Raises:
            ValueError: no support set or an unfinished one, one of another tower, features that are not those of the
                manifest, or images that were added, removed or replaced since; a folder without any image is taken as
                it is.
        """
        root = Path(folder)
        manifest = read_manifest(root)
        check_fingerprint(manifest["tower"], model, root, manifest)
        expected = manifest["features"]
        came = hash_of(root / FEATURES) if (root / FEATURES).is_file() else "no file"
        if came != expected["sha256"]:
            raise ValueError(f"expected SHA-256 {expected['sha256']} of {root / FEATURES}, got {came}: build it again")
        tensors, _ = read_tensors(root / FEATURES)
        features, labels = tensors["features"], tensors["labels"]
        classes = manifest["classes"]
        listing = [k for k, each in enumerate(classes) for _ in each["images"]]
        if list(features.shape) != expected["shape"] or labels.tolist() != listing or len(features) != len(listing):
            raise ValueError(
                f"expected features {tuple(expected['shape'])} of {len(listing)} images in the manifest's order, got "
                f"{tuple(features.shape)} of others: build it again"
            )
        _check_images(root, classes)
        device = next(model.parameters()).device
        return SupportSet(
            features.to(device),
            labels.to(device),
            tuple(each["name"] for each in classes),
            {each["name"]: each["prompts"] for each in classes},
            tuple(
                Picture(
                    str(root / each["folder"] / image["file"]) if "file" in image else image["source"], image["sha256"]
                )
                for each in classes
                for image in each["images"]
            ),
            {key: manifest[key] for key in (*MANIFEST_KEYS, *Encoder._fields)},
        )


def refresh(
    folder: str | os.PathLike[str],
    model: nn.Module,
    preprocess: Preprocess,
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
    report: Report = warnings.warn,
) -> SupportSet:
    """The set of the images that a support set's folders hold now, saved there: take out what does not belong, add your
    own, then call this. Only what is new is encoded.

    Raises:
        ValueError: no support set, one of another tower or without copies of its images, a class without images, or a
            file that is no image.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    check_fingerprint(manifest["tower"], model, root, manifest)
    if not all("file" in image for each in manifest["classes"] for image in each["images"]):
        raise ValueError(f"expected a support set with copies of its images, got {folder} without")
    paths = {
        each["name"]: [str(root / each["folder"] / file) for file in images_in(root / each["folder"])]
        for each in manifest["classes"]
    }
    refuse_empty(paths, "an image in the folder")
    flat = [path for each in paths.values() for path in each]
    told: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "report": report}
    encoding = encode(model, preprocess, encoder_of(model, preprocess), flat, root / FEATURES, **told)
    broken = sorted(set(flat) - set(encoding.paths))
    if broken:
        raise ValueError(f"expected images in the folders of {folder}, got {list_names(broken)}: delete what is none")
    prompts = {each["name"]: each["prompts"] for each in manifest["classes"]}
    about = {key: manifest[key] for key in MANIFEST_KEYS}
    found = assemble(model, prompts, encoding, paths, about)
    found.save(root)
    return found


def assemble(
    model: nn.Module,
    prompts: Mapping[str, list[str]],
    encoding: Encoding,
    chosen: Mapping[str, Sequence[str]],
    about: Mapping[str, Any],
) -> SupportSet:
    """The support set of the files chosen for each class among those encoded, on the model's device."""
    rows = {path: row for row, path in enumerate(encoding.paths)}
    order = [rows[path] for name in prompts for path in chosen[name]]
    device = next(model.parameters()).device
    return SupportSet(
        encoding.features[order].to(device),
        torch.tensor([k for k, name in enumerate(prompts) for _ in chosen[name]], device=device),
        tuple(prompts),
        dict(prompts),
        tuple(Picture(encoding.paths[row], encoding.digests[row]) for row in order),
        {**about, **encoding.who._asdict()},
    )


def refuse_empty(chosen: Mapping[str, Sequence[str]], wanted: str) -> None:
    """Raises ValueError naming the classes without images."""
    empty = [name for name, paths in chosen.items() if not paths]
    if empty:
        raise ValueError(f"expected {wanted} of every class, got none for {list_names(empty)}")


def _plan_files(
    root: Path, found: SupportSet, before: Sequence[Mapping[str, Any]], copy: bool
) -> tuple[list[dict[str, Any]], list[tuple[Path, str, Path]]]:
    """What the manifest says of each class, and the source, the SHA-256 and the target of each copy."""
    sources = {image["sha256"]: image["source"] for each in before for image in each["images"] if "source" in image}
    entries: list[dict[str, Any]] = [
        {"name": name, "folder": at, "prompts": found.prompts[name], "images": []}
        for name, at in zip(found.classes, folder_names(found.classes), strict=True)
    ]
    copies = []
    for (path, digest), label in zip(found.images, found.labels.tolist(), strict=True):
        images, home, source = entries[label]["images"], root / entries[label]["folder"], Path(path).absolute()
        place = source.parent.resolve()
        image = {"sha256": digest}
        if place == home.resolve():
            image["file"] = source.name
        elif copy:
            image["file"] = f"{len(images):04}-{digest[:8]}{source.suffix.lower()}"
            copies.append((source, digest, home / image["file"]))
        # What lies in this set came from elsewhere, or from nowhere that is known.
        origin = sources.get(digest) if "file" in image and place.parent == root.resolve() else str(source)
        images.append(image if origin is None else {**image, "source": origin})
    return entries, copies


def _missing_copies(copies: Sequence[tuple[Path, str, Path]]) -> list[tuple[Path, str, Path]]:
    """The copies that are not there yet.

    Raises:
        ValueError: a source that is gone or is not what was encoded, or another image in its copy's place.
    """
    missing = []
    for source, digest, target in copies:
        if target.exists():
            refuse_foreign_images(target.parent, [] if hash_of(target) == digest else [target.name])
            continue
        came = hash_of(source) if source.is_file() else "no file"
        if came != digest:
            raise ValueError(f"expected {source} as it was encoded, SHA-256 {digest}, got {came}: encode it again")
        missing.append((source, digest, target))
    return missing


def _check_sources(entries: Sequence[Mapping[str, Any]], stale: Sequence[Path]) -> None:
    """Raises ValueError where an image that is not copied is gone, or would be."""
    removed = {path.resolve() for path in stale}
    for each in entries:
        for image in each["images"]:
            source = Path(image.get("source", ""))
            if "file" not in image and (not source.is_file() or source.resolve() in removed):
                what = "is a copy of the set before" if source.is_file() else "is not there"
                raise ValueError(f"expected images that can stay where they are, got {source}, which {what}")


def _check_images(root: Path, classes: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where some images, but not all, are other than the manifest has them."""
    there = {(each["folder"], name) for each in classes for name in images_in(root / each["folder"])}
    meant = {(each["folder"], image["file"]) for each in classes for image in each["images"] if "file" in image}
    if there and there != meant:
        raise ValueError(
            f"expected the {len(meant)} images of the manifest in {root}, got {len(there - meant)} more and "
            f"{len(meant - there)} fewer: refresh it"
        )
    kept = [
        (root / each["folder"] / image["file"], image["sha256"])
        for each in classes
        for image in each["images"]
        if there and "file" in image
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        came = list(pool.map(hash_of, [path for path, _ in kept]))
    others = [str(path) for (path, digest), hashed in zip(kept, came, strict=True) if hashed != digest]
    if others:
        raise ValueError(f"expected the images of the manifest, got others in {list_names(others)}: refresh it")
