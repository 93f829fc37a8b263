"""Support sets on disk: a folder of images per class, their features, and a manifest that says how all came to be.

manifest.json          written last: without it, or with one that the features do not match, there is no set
features.safetensors   features (n,E) fp32, labels (n,) int64, sha256 (n,32) uint8, the rows class by class
CLASS/NAME.png         the images of a class, in the order of their rows
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipkernels.data import Preprocess
from clipkernels.files import read_tensors, replacing
from clipkernels.support.features import (
    Encoder,
    Encoding,
    Progress,
    Report,
    check_tower,
    encode,
    encoder_of,
    forget_parts,
    write_features,
)
from clipkernels.support.folders import (
    copy_image,
    copy_name,
    folder_names,
    hash_of,
    images_in,
    is_copy,
    refuse_others,
)
from clipkernels.support.prompts import listed

FORMAT = "clipkernels.support.1"
FEATURES, MANIFEST = "features.safetensors", "manifest.json"
ABOUT = ("kind", "settings", "model", "pretrained")
VERSIONS = ("clipkernels", "torch", "open_clip_torch", "faiss-cpu", "diffusers", "transformers")


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
        one are removed; no other file is, and no other image may be in a class's folder.

        Args:
            folder: new, empty, or a support set of the same kind.
            copy: whether images that lie elsewhere are copied; otherwise the manifest says where they are.
        Raises:
            ValueError: other images in a class's folder, a set of another kind, an image that is not what was encoded.
            OSError: a file cannot be read or written.
        """
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        before = classes_before(root, self.about["kind"])
        names = folder_names(self.classes)
        sources = {image["sha256"]: image["source"] for each in before for image in each["images"] if "source" in image}
        entries: list[dict[str, Any]] = [
            {"name": name, "folder": at, "count": 0, "prompts": self.prompts[name], "images": []}
            for name, at in zip(self.classes, names, strict=True)
        ]
        for picture, label in zip(self.images, self.labels.tolist(), strict=True):
            each = entries[label]
            each["images"].append(_entry(root / each["folder"], each["count"], picture, copy, sources))
            each["count"] += 1
        _make_room(root, entries, [each["folder"] for each in before if each["folder"] not in names])
        for each in entries:
            for image in each["images"]:
                if "file" in image and "source" in image:
                    copy_image(image["source"], image["sha256"], root / each["folder"] / image["file"])
        who = Encoder(*(self.about[field] for field in Encoder._fields))
        digests = [bytes.fromhex(picture.sha256) for picture in self.images]
        write_features(root / FEATURES, self.features.cpu(), digests, who, {"labels": self.labels.cpu()})
        manifest = {
            "format": FORMAT,
            **self.about,
            "features": {"sha256": hash_of(root / FEATURES), "shape": list(self.features.shape)},
            "versions": _versions(),
            "classes": entries,
        }
        with replacing(root / MANIFEST) as temporary:
            Path(temporary).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        forget_parts(root / FEATURES, who)

    @staticmethod
    def load(folder: str | os.PathLike[str], model: nn.Module) -> SupportSet:
        """The support set of a folder, on the model's device.

        The tower must be the one that encoded it, patched or not, in any precision: where that is another, the two are
        compared in the lower one.

        Raises:
            ValueError: no support set, one of another tower, features that are not those of the manifest, or images
                that were added or removed since; a folder without any image is taken as it is.
        """
        root = Path(folder)
        manifest = read_manifest(root)
        check_tower(manifest["tower"], model, root, manifest)
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
            {key: manifest[key] for key in (*ABOUT, *Encoder._fields)},
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
    check_tower(manifest["tower"], model, root, manifest)
    if not all("file" in image for each in manifest["classes"] for image in each["images"]):
        raise ValueError(f"expected a support set with copies of its images, got {folder} without")
    paths = {
        each["name"]: [str(root / each["folder"] / file) for file in images_in(root / each["folder"])]
        for each in manifest["classes"]
    }
    refuse_empty(paths, "an image in the folder")
    flat = [path for each in paths.values() for path in each]
    encoding = encode(model, preprocess, flat, root / FEATURES, batch_size=batch_size, progress=progress, report=report)
    broken = sorted(set(flat) - set(encoding.paths))
    if broken:
        raise ValueError(f"expected images in the folders of {folder}, got {listed(broken)}: delete what is none")
    prompts = {each["name"]: each["prompts"] for each in manifest["classes"]}
    about = {key: manifest[key] for key in ABOUT}
    found = assemble(model, preprocess, prompts, encoding, paths, about)
    found.save(root)
    return found


def assemble(
    model: nn.Module,
    preprocess: Preprocess,
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
        {**about, **encoder_of(model, preprocess)._asdict()},
    )


def refuse_empty(chosen: Mapping[str, Sequence[str]], wanted: str) -> None:
    """Raises ValueError naming the classes without images."""
    empty = [name for name, paths in chosen.items() if not paths]
    if empty:
        raise ValueError(f"expected {wanted} of every class, got none for {listed(empty)}")


def classes_before(root: Path, kind: str) -> list[dict[str, Any]]:
    """What a folder's manifest says of its classes, nothing where there is none.

    Raises:
        ValueError: it is of another kind.
    """
    if not (root / MANIFEST).exists():
        return []
    manifest = read_manifest(root)
    if manifest["kind"] != kind:
        raise ValueError(f"expected a support set of kind {kind} in {root}, got {manifest['kind']}")
    return manifest["classes"]


def read_manifest(root: Path) -> dict[str, Any]:
    """What a support set says of itself.

    Raises:
        ValueError: there is none, or it is no manifest.
    """
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        found = manifest["format"]
        if found != FORMAT:
            raise ValueError(f"format {found!r}")
        parts = [manifest[key] for key in (*ABOUT, *Encoder._fields)]
        parts += [manifest["features"]["sha256"], manifest["features"]["shape"], dict(manifest["tower"])]
        for each in manifest["classes"]:
            files = [each["folder"], *(image["file"] for image in each["images"] if "file" in image)]
            parts += [each["name"], each["prompts"], *(image["sha256"] for image in each["images"])]
            outside = [file for file in files if os.path.basename(file) != file or file in ("", "..")]
            if outside:
                raise ValueError(f"the name {outside[0]!r}")
    except FileNotFoundError as error:
        raise ValueError(f"expected a support set, got {root} without {MANIFEST}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected the manifest of a support set, got {root / MANIFEST} with {error}") from error
    return manifest


def _entry(folder: Path, rank: int, picture: Picture, copy: bool, sources: Mapping[str, str]) -> dict[str, str]:
    """What the manifest says of an image: its file in the class's folder, its source elsewhere, or both."""
    source = Path(picture.path).absolute()
    if source.resolve().parent == folder.resolve():
        known = {"source": sources[picture.sha256]} if picture.sha256 in sources else {}
        return {"file": source.name, "sha256": picture.sha256, **known}
    entry = {"source": str(source), "sha256": picture.sha256}
    return {"file": copy_name(rank, picture.sha256, picture.path), **entry} if copy else entry


def _make_room(root: Path, entries: Sequence[Mapping[str, Any]], gone: Sequence[str]) -> None:
    """Removes copies of an earlier set that are not in this one, once it is sure that nothing else is in the way."""
    stale: dict[Path, list[str]] = {}
    for each in entries:
        wanted = {image.get("file") for image in each["images"]}
        folder = root / each["folder"]
        stale[folder] = [name for name in images_in(folder) if name not in wanted]
        refuse_others(folder, [name for name in stale[folder] if not is_copy(folder / name)])
    for name in gone:
        stale[root / name] = [file for file in images_in(root / name) if is_copy(root / name / file)]
    for folder, files in stale.items():
        for name in files:
            (folder / name).unlink()
        if files and not any(folder.iterdir()):
            folder.rmdir()


def _check_images(root: Path, classes: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where some images, but not all, are other than the manifest has them."""
    there = {(each["folder"], name) for each in classes for name in images_in(root / each["folder"])}
    meant = {(each["folder"], image["file"]) for each in classes for image in each["images"] if "file" in image}
    if there and there != meant:
        raise ValueError(
            f"expected the {len(meant)} images of the manifest in {root}, got {len(there - meant)} more and "
            f"{len(meant - there)} fewer: refresh it"
        )


def _versions() -> dict[str, str]:
    """The packages that made a set."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
