"""Support sets on disk: a folder of images per class, their features, and a manifest of their origin.

manifest.json          marks the set as unfinished before any change, and describes it once it is complete
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
from clipkernels.files import hash_of
from clipkernels.fingerprint import check_fingerprint
from clipkernels.images import Reader
from clipkernels.messages import list_names
from clipkernels.state_files import read_state
from clipkernels.support.features import (
    FORMAT,
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
from clipkernels.support.folders import (
    copy_image,
    folder_names,
    images_in,
    refuse_foreign_images,
    stale_copies,
)
from clipkernels.support.manifest import MANIFEST_KEYS, UNFINISHED, previous_classes, read_manifest, write_manifest

FEATURES = "features.safetensors"


class Picture(NamedTuple):
    """An image file and the SHA-256 of its content."""

    path: str
    sha256: str


class SupportSet(NamedTuple):
    """Images that represent classes, for `ck.TipAdapter` and `ck.TipX`.

    features (n,E): fp32, L2-normalised, class by class.
    labels (n,): int64 index into `classes`.
    classes: class names, in the order of the prompts.
    prompts: the sentences of each class.
    images: the file of each row.
    about: "kind", LC or SD; "settings"; "model" and "pretrained", the names from the call; and the encoder's "tower",
        "method", "preprocess" and "reader", the rules that image files are read by.
    """

    features: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    prompts: dict[str, list[str]]
    images: tuple[Picture, ...]
    about: dict[str, Any]

    @property
    def counts(self) -> Tensor:
        """The number of images of each class, (K,) int64."""
        return self.labels.bincount(minlength=len(self.classes))

    def save(self, folder: str | os.PathLike[str], copy: bool = True) -> None:
        """Write the set to a folder, the manifest last; equal sets give equal files.

        An image that is already in its class's folder is left unchanged. Copies of an earlier set that are not in this
        one are removed after everything else is written. No other file is removed, and a class's folder may not hold
        other images. A ValueError is raised before any change.

        Args:
            folder: a new or empty folder, or a support set of the same kind.
            copy: copy the images that lie elsewhere; otherwise the manifest holds their paths.
        Raises:
            ValueError: foreign images in a class's folder, a set of another kind, an image that is missing or has
                changed since it was encoded, or an image that is not copied although this call would remove it.
            OSError: a file cannot be read or written.
        """
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        before = previous_classes(root, self.about["kind"])
        entries, copies = _plan_files(root, self, before, copy)
        folders = {entry["folder"] for entry in entries}
        removed = [entry for entry in before if entry["folder"] not in folders]
        stale = stale_copies(root, entries, [entry["folder"] for entry in removed])
        copies = _missing_copies(copies)
        _check_sources(entries, stale)
        features = {"sha256": "", "shape": list(self.features.shape)}
        manifest = {**self.about, "features": features}
        write_manifest(root, {**manifest, "classes": [*entries, *removed], UNFINISHED: True})
        for source, digest, target in copies:
            copy_image(source, digest, target)
        encoder = Encoder(*(self.about[field] for field in Encoder.__struct_fields__))
        digests = [bytes.fromhex(picture.sha256) for picture in self.images]
        write_features(root / FEATURES, self.features.cpu(), digests, encoder, {"labels": self.labels.cpu()})
        for path in stale:
            path.unlink()
        for parent in {path.parent for path in stale}:
            if not any(parent.iterdir()):
                parent.rmdir()
        features["sha256"] = hash_of(root / FEATURES)
        write_manifest(root, {**manifest, "classes": entries})
        remove_parts(root / FEATURES, encoder)

    @staticmethod
    def load(folder: str | os.PathLike[str], model: nn.Module) -> SupportSet:
        """The support set of a folder, on the model's device.

        The model must be the one that encoded the set, patched or not. If precisions differ, fingerprints are compared
        in the lower one; float16 and bfloat16 are not interchangeable. Class folders without any images are accepted.

        Raises:
            ValueError: no support set or an unfinished one, a set of another tower, features that are not those of the
                manifest, or images that were added, removed or replaced since.
        """
        root = Path(folder)
        manifest = read_manifest(root)
        check_fingerprint(manifest["tower"], model, root, manifest)
        expected = manifest["features"]
        actual = hash_of(root / FEATURES) if (root / FEATURES).is_file() else "no file"
        if actual != expected["sha256"]:
            raise ValueError(
                f"expected SHA-256 {expected['sha256']} of {root / FEATURES}, got {actual}: build the set again"
            )
        _, tensors = read_state(root / FEATURES, FORMAT)
        features, labels = tensors["features"], tensors.get("labels", torch.empty(0, dtype=torch.int64))
        classes = manifest["classes"]
        listing = [k for k, entry in enumerate(classes) for _ in entry["images"]]
        if list(features.shape) != expected["shape"] or labels.tolist() != listing or len(features) != len(listing):
            raise ValueError(
                f"expected features {tuple(expected['shape'])} of {len(listing)} images in the manifest's order, got "
                f"{tuple(features.shape)} in another order or of other images: build the set again"
            )
        _check_images(root, classes)
        device = next(model.parameters()).device
        return SupportSet(
            features.to(device),
            labels.to(device),
            tuple(entry["name"] for entry in classes),
            {entry["name"]: entry["prompts"] for entry in classes},
            tuple(
                Picture(
                    str(root / entry["folder"] / image["file"]) if "file" in image else image["source"], image["sha256"]
                )
                for entry in classes
                for image in entry["images"]
            ),
            {key: manifest[key] for key in (*MANIFEST_KEYS, *Encoder.__struct_fields__)},
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
    """Rebuild a support set from the images that are in its folders now, and save it there.

    Delete images that do not belong or add your own, then call this. Only new images are encoded. Whether their EXIF
    orientation counts stays as it was when the set was built.

    Args:
        folder: a support set with copies of its images.
        model: the model that encoded the set.
        preprocess: a callable from a PIL image to a tensor (3,S,S).
        batch_size: images per forward.
        progress: called with the stage, the number of finished items and the number of all items.
        report: called with a line for each image file that cannot be read or that the preprocessing rejects.
    Returns:
        The new SupportSet.
    Raises:
        ValueError: no support set, one of another tower or without copies of its images, a class without images, or a
            file that is not an image.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    check_fingerprint(manifest["tower"], model, root, manifest)
    if not all("file" in image for entry in manifest["classes"] for image in entry["images"]):
        raise ValueError(f"expected a support set with copies of its images, got {folder} without copies")
    paths = {
        entry["name"]: [str(root / entry["folder"] / file) for file in images_in(root / entry["folder"])]
        for entry in manifest["classes"]
    }
    refuse_empty(paths, "an image in the folder")
    flat = [path for of_class in paths.values() for path in of_class]
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "report": report}
    encoder = encoder_of(model, preprocess, Reader.of(manifest["reader"]))
    encoding = encode(model, preprocess, encoder, flat, root / FEATURES, **options)
    broken = sorted(set(flat) - set(encoding.paths))
    if broken:
        raise ValueError(
            f"expected only images in the folders of {folder}, got unreadable {list_names(broken)}: delete these files"
        )
    prompts = {entry["name"]: entry["prompts"] for entry in manifest["classes"]}
    about = {key: manifest[key] for key in MANIFEST_KEYS}
    support_set = assemble(model, prompts, encoding, paths, about)
    support_set.save(root)
    return support_set


def assemble(
    model: nn.Module,
    prompts: Mapping[str, list[str]],
    encoding: Encoding,
    chosen: Mapping[str, Sequence[str]],
    about: Mapping[str, Any],
) -> SupportSet:
    """The support set of the files chosen for each class, a subset of those encoded, on the model's device."""
    rows = {path: row for row, path in enumerate(encoding.paths)}
    order = [rows[path] for name in prompts for path in chosen[name]]
    device = next(model.parameters()).device
    return SupportSet(
        encoding.features[order].to(device),
        torch.tensor([k for k, name in enumerate(prompts) for _ in chosen[name]], device=device),
        tuple(prompts),
        dict(prompts),
        tuple(Picture(encoding.paths[row], encoding.digests[row]) for row in order),
        {**about, **encoding.encoder.about},
    )


def refuse_empty(chosen: Mapping[str, Sequence[str]], wanted: str, hint: str = "") -> None:
    """Raise ValueError, which names them, if there are classes without images."""
    empty = [name for name, paths in chosen.items() if not paths]
    if empty:
        raise ValueError(f"expected {wanted} for every class, got none for {list_names(empty)}{hint}")


def _plan_files(
    root: Path, support_set: SupportSet, before: Sequence[Mapping[str, Any]], copy: bool
) -> tuple[list[dict[str, Any]], list[tuple[Path, str, Path]]]:
    """The manifest's entry of each class, and the source, SHA-256 and target of each copy."""
    sources = {image["sha256"]: image["source"] for entry in before for image in entry["images"] if "source" in image}
    entries: list[dict[str, Any]] = [
        {"name": name, "folder": folder, "prompts": support_set.prompts[name], "images": []}
        for name, folder in zip(support_set.classes, folder_names(support_set.classes), strict=True)
    ]
    copies = []
    for (path, digest), label in zip(support_set.images, support_set.labels.tolist(), strict=True):
        images, class_folder, source = entries[label]["images"], root / entries[label]["folder"], Path(path).absolute()
        parent = source.parent.resolve()
        image = {"sha256": digest}
        if parent == class_folder.resolve():
            image["file"] = source.name
        elif copy:
            image["file"] = f"{len(images):04}-{digest[:8]}{source.suffix.lower()}"
            copies.append((source, digest, class_folder / image["file"]))
        # An image that already lies in this set keeps its recorded origin, which may be unknown.
        origin = sources.get(digest) if "file" in image and parent.parent == root.resolve() else str(source)
        images.append(image if origin is None else {**image, "source": origin})
    return entries, copies


def _missing_copies(copies: Sequence[tuple[Path, str, Path]]) -> list[tuple[Path, str, Path]]:
    """The copies that do not exist yet.

    Raises:
        ValueError: a source that is missing or has changed since it was encoded, or another image at a copy's path.
    """
    missing = []
    for source, digest, target in copies:
        if target.exists():
            refuse_foreign_images(target.parent, [] if hash_of(target) == digest else [target.name])
            continue
        actual = hash_of(source) if source.is_file() else "no file"
        if actual != digest:
            raise ValueError(f"expected {source} as it was encoded, SHA-256 {digest}, got {actual}: encode it again")
        missing.append((source, digest, target))
    return missing


def _check_sources(entries: Sequence[Mapping[str, Any]], stale: Sequence[Path]) -> None:
    """Raise ValueError if an image that is not copied is missing, or would be removed."""
    removed = {path.resolve() for path in stale}
    for entry in entries:
        for image in entry["images"]:
            source = Path(image.get("source", ""))
            if "file" not in image and (not source.is_file() or source.resolve() in removed):
                reason = "is a copy of the earlier set" if source.is_file() else "does not exist"
                raise ValueError(f"expected images that can stay where they are, got {source}, which {reason}")


def _check_images(root: Path, classes: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless the images are those of the manifest, or all of them are missing."""
    actual = {(entry["folder"], name) for entry in classes for name in images_in(root / entry["folder"])}
    expected = {(entry["folder"], image["file"]) for entry in classes for image in entry["images"] if "file" in image}
    if actual and actual != expected:
        raise ValueError(
            f"expected the {len(expected)} images of the manifest in {root}, got {len(actual - expected)} more and "
            f"{len(expected - actual)} fewer: refresh the set"
        )
    files = [
        (root / entry["folder"] / image["file"], image["sha256"])
        for entry in classes
        for image in entry["images"]
        if actual and "file" in image
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(hash_of, [path for path, _ in files]))
    changed = [str(path) for (path, recorded), digest in zip(files, digests, strict=True) if digest != recorded]
    if changed:
        raise ValueError(
            f"expected the images of the manifest, got other content in {list_names(changed)}: refresh the set"
        )
