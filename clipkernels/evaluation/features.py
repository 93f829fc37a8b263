"""Features of a split that are encoded once: parts on disk, from which a run that was killed goes on.

features-KEY-N.safetensors  the features of 1,024 images or fewer, from image N on

KEY stands for the images, the method and the kinds of features. An image is known by its name, and by the size and the
time of its file: one that changed is encoded anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from clipkernels.classifier import eval_mode
from clipkernels.data import Preprocess
from clipkernels.encode import Encoded, encode_image, tower_weight
from clipkernels.evaluation.datasets import Items
from clipkernels.evaluation.plan import Model
from clipkernels.evaluation.results import Unread
from clipkernels.files import stamp_of
from clipkernels.formats import REMEDY, Count, Format, Line, TensorSpec
from clipkernels.images.batches import collate, image_shape
from clipkernels.images.reader import preprocessed
from clipkernels.messages import reason_of
from clipkernels.state_files import read_state, write_state

PART = 1024
"""Images of a part, rounded to whole batches."""
KINDS = ("tokens", "cls_path")
NOT_FINITE = "the model's features are not finite"


class PartHeader(msgspec.Struct, forbid_unknown_fields=True):
    """The header of a part.

    start, stop: places in the split.
    prefix: number of leading tokens that are not patches.
    kinds: features besides embeddings; none without an image.
    unread: place and reason of each image without features.
    """

    start: Count
    stop: Count
    prefix: Count
    kinds: list[Literal["tokens", "cls_path"]]
    unread: list[tuple[Count, Line]]


def _tensors(header: PartHeader) -> dict[str, TensorSpec]:
    shapes = {"tokens": "images* rows width*", "cls_path": "images* blocks channels"}
    return {
        "index": TensorSpec((torch.int64,), "images*", 0),
        "embedding": TensorSpec((torch.float32,), "images* width*"),
        **{kind: TensorSpec((torch.float32,), shapes[kind]) for kind in header.kinds},
    }


def _check(header: PartHeader, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless every image from start to stop has either features or a reason, in order."""
    read, unread = tensors["index"].tolist(), [place for place, _ in header.unread]
    in_order = read == sorted(read) and unread == sorted(unread)
    if not in_order or sorted(read + unread) != list(range(header.start, header.stop)):
        raise ValueError(f"features of other images than those from {header.start} to {header.stop}")


FORMAT = Format("clipkernels.evaluation_features.1", "features of an evaluation", PartHeader, _tensors, _check)


class Part(NamedTuple):
    """A part on disk: its header, the rows before it, and its tensors, memory-mapped."""

    header: dict[str, Any]
    before: int
    tensors: dict[str, Tensor]


class Features:
    """The features of the readable objects of a split: images, or clouds of V images each that can all be read.

    labels: (n,) int64, of the objects.
    places: (n·V,) int64, the places of their images in the split.
    embedding: (n·V,E) float32, not normalised.
    views: V.
    unread: the objects without features, or None.
    """

    def __init__(self, parts: Sequence[Part], items: Items) -> None:
        self.parts = [part for part in parts if len(part.tensors["index"])]
        self.views = items.views
        places = torch.cat([part.tensors["index"] for part in parts])
        objects, total = places // self.views, len(items.names) // self.views
        self.rows = (torch.bincount(objects, minlength=total)[objects] == self.views).nonzero().flatten()
        self.places = places[self.rows]
        self.labels = torch.tensor(items.labels)[self.places[:: self.views]]
        embedding = torch.cat([part.tensors["embedding"] for part in self.parts or parts[:1]])
        self.embedding = embedding if len(self.rows) == len(embedding) else embedding[self.rows]
        faults = [(place, reason) for part in parts for place, reason in part.header["unread"]]
        self.unread = None
        if faults:
            place, reason = faults[0]
            self.unread = Unread(total - len(self.labels), items.names[place], reason)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_labels(self) -> Tensor:
        """The labels (n·V,) of the images."""
        return self.labels.repeat_interleave(self.views)

    def images_of(self, rows: Tensor) -> Tensor:
        """The places (m·V,) in `embedding` of the images of the objects at rows (m,)."""
        return (rows[:, None] * self.views + torch.arange(self.views)).flatten()

    def take(self, rows: Tensor) -> Encoded:
        """The features of the images (m·V) of the objects at rows (m,), in their order."""
        images = self.images_of(rows)
        extras: dict[str, Tensor] = {}
        for kind in KINDS:
            if kind in self.parts[0].tensors:
                extras[kind] = self._gather(kind, self.rows[images])
        return Encoded(self.embedding[images], **extras, prefix=self.parts[0].header["prefix"])

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Encoded]:
        """The features of `size` objects at a time, in an order (n,) of the objects or as they are."""
        order = torch.arange(len(self)) if order is None else order
        return (self.take(rows) for rows in order.split(size))

    def _gather(self, kind: str, rows: Tensor) -> Tensor:
        values: Tensor | None = None
        for part in self.parts:
            tensor = part.tensors[kind]
            places = ((rows >= part.before) & (rows < part.before + len(tensor))).nonzero().flatten()
            if len(places):
                chosen = tensor[rows[places] - part.before]
                values = chosen.new_empty(len(rows), *chosen.shape[1:]) if values is None else values
                values[places] = chosen
        assert values is not None
        return values


class Pictures(Dataset[tuple[int, "Tensor | str"]]):
    """The preprocessed images of a split by place, or the reason why there is none."""

    def __init__(self, items: Items, preprocess: Preprocess, shape: tuple[int, ...]) -> None:
        self.items, self.preprocess, self.shape = items, preprocess, shape

    def __len__(self) -> int:
        return len(self.items.names)

    def __getitem__(self, place: int) -> tuple[int, Tensor | str]:
        try:
            image = self.items.read(self.items.names[place])
        except Exception as error:  # Pillow's decoders raise exceptions of many kinds
            return place, reason_of(error)
        return place, preprocessed(image, self.preprocess, self.shape)


def split_key(items: Items) -> str:
    """The key of the images of a split: their names and labels, and the sizes and times of their files.

    It is kept, because a split may have a million images: call `forget_keys` when files may have changed.
    """
    return _split_key(items.names, items.labels, items.packed)


def forget_keys() -> None:
    """Forget the keys of splits."""
    _split_key.cache_clear()


@lru_cache(maxsize=64)
def _split_key(names: tuple[str, ...], labels: tuple[int, ...], packed: tuple[str, ...]) -> str:
    return key_of(names, labels, packed, [_stamp(file) for file in packed or names])


def _stamp(file: str) -> tuple[int, int] | None:
    """The size and the time of a file, which tell a changed one; None for a missing one."""
    try:
        return stamp_of(file)
    except (OSError, ValueError):
        return None


def key_of(*parts: object) -> str:
    """Thirty-two characters that stand for values of JSON."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def encode(
    model: Model,
    items: Items,
    kinds: Collection[str],
    folder: Path,
    method: str,
    progress: Callable[[int, int, int], bool],
) -> Features | None:
    """The features of a split, those on disk and those of the rest, which are encoded and written in parts.

    Args:
        model: the model, which runs the method.
        items: the images of the split.
        kinds: what is kept besides embeddings: of "tokens" and "cls_path".
        folder: the folder of the parts.
        method: the method, in the key of the parts.
        progress: called with the images that are done, all of them, and those without features so far; a true result
            stops after the part.
    Returns:
        The features, or None if `progress` stopped it.
    Raises:
        ValueError: a part that is not as it was written, or no image that can be read.
        OSError: a part cannot be written.
    """
    total, kinds = len(items.names), sorted(kinds)
    size = -(-PART // model.batch_size) * model.batch_size
    starts = range(0, total, size)
    images = split_key(items)
    files = _parts_with(kinds, starts, lambda names: folder / f"features-{key_of(images, method, names, size)}")
    pictures = Pictures(items, model.preprocess, image_shape(model.model, model.preprocess))
    parts: list[Part] = []
    unread = 0
    with eval_mode(model.model):
        for start, file in zip(starts, files, strict=True):
            if not file.exists():
                stop = min(start + size, total)
                _encode_part(
                    model, pictures, range(start, stop), kinds, file,
                    lambda done, faults, before=unread: progress(done, total, before + faults),  # type: ignore[misc]
                )  # fmt: skip
            header, tensors = _read_part(file, kinds)
            parts.append(Part(header, sum(len(part.tensors["index"]) for part in parts), tensors))
            unread += len(header["unread"])
            if progress(header["stop"], total, unread) and header["stop"] < total:
                return None
    features = Features(parts, items)
    if features.unread is not None and not len(features):
        _, name, reason = features.unread
        raise ValueError(f"expected images that can be read, got {total} that cannot, such as {name}: {reason}")
    return features


def _parts_with(kinds: Sequence[str], starts: range, stem: Callable[[Sequence[str]], Path]) -> list[Path]:
    """The files of the parts with these kinds of features: those with more kinds, if all of them are on disk."""
    choices = [sorted({*kinds, *extra}) for count in range(len(KINDS) + 1) for extra in combinations(KINDS, count)]
    files = [[Path(f"{stem(choice)}-{start}.safetensors") for start in starts] for choice in choices]
    return next((parts for parts in files if all(part.exists() for part in parts)), files[0])


def _read_part(file: Path, kinds: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the memory-mapped tensors of a part, of these kinds; ValueError unless they are those written."""
    try:
        header, tensors = read_state(file, FORMAT, ["index", "embedding", *kinds], copy=False)
        _check(msgspec.convert(header, PartHeader), tensors)
    except ValueError as error:
        fault = str(error).removesuffix(f": {REMEDY}")
        raise ValueError(f"{fault}: delete {file.name}, and its images are encoded again") from error
    return header, tensors


@torch.inference_mode()
def _encode_part(
    model: Model,
    pictures: Pictures,
    places: range,
    kinds: Sequence[str],
    file: Path,
    progress: Callable[[int, int], object],
) -> None:
    """Write the features of the images at places of a split; `progress` gets those done and those without features."""
    weight = tower_weight(model.model)
    loader: DataLoader[Any] = DataLoader(
        Subset(pictures, list(places)), model.batch_size, collate_fn=collate, num_workers=model.workers
    )
    indices: list[int] = []
    columns: dict[str, list[Tensor]] = {"embedding": [], **{kind: [] for kind in kinds}}
    unread, prefix, done = [], 0, places.start
    for batch in loader:
        unread += batch.failed
        done += len(batch.indices) + len(batch.failed)
        if batch.images is not None:
            extras: dict[str, Any] = dict.fromkeys(kinds, True)
            encoded = encode_image(model.model, batch.images.to(weight), **extras)
            prefix = encoded.prefix
            finite = encoded.embedding.isfinite().all(1).cpu()
            for kind in kinds:
                finite &= getattr(encoded, kind).isfinite().flatten(1).all(1).cpu()
            indices += [index for index, good in zip(batch.indices, finite.tolist(), strict=True) if good]
            unread += [(i, NOT_FINITE) for i, good in zip(batch.indices, finite.tolist(), strict=True) if not good]
            for kind, values in columns.items():
                values.append(getattr(encoded, kind).float().cpu()[finite])
        progress(done, len(unread))
    tensors = {kind: torch.cat(values) for kind, values in columns.items() if values} or {
        "embedding": torch.empty(0, 0)
    }
    header = {
        "start": places.start, "stop": places.stop, "prefix": prefix, "unread": sorted(unread),
        "kinds": [kind for kind in KINDS if kind in tensors],
    }  # fmt: skip
    write_state(file, FORMAT, header, {"index": torch.tensor(indices, dtype=torch.int64), **tensors})
