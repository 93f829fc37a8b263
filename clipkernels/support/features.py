"""Image features that are encoded once: images whose content is already in a file of features are not encoded again.

FILE              features (n,E) fp32, L2-normalised; sha256 (n,32) uint8 of the image files; the encoder in the header
FILE.KEY.parts/   the same, one file per encoded batch, until FILE is written

In the parts a row of zeros stands for an image whose features are not finite. It is not encoded again, so that an
interrupted run resumes with the same batches.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipkernels.adapters import UnsupportedTower, find_exported
from clipkernels.arguments import check_calls, check_model
from clipkernels.classifier import eval_mode
from clipkernels.data import Preprocess
from clipkernels.encode import encode_image, tower_weight
from clipkernels.fingerprint import fingerprint
from clipkernels.formats import Fingerprint, Format, Line, TensorSpec
from clipkernels.images import Reader, read_bytes
from clipkernels.images.batches import image_shape
from clipkernels.messages import reason_of, skip_message
from clipkernels.methods import Dense
from clipkernels.patching import method_of
from clipkernels.state_files import digest_table, read_state, write_state

Progress = Callable[[str, int, int], object]
"""Called with the stage, the number of finished items and the number of all items."""
Report = Callable[[str], object]
"""Called with a line about each image that is left out."""

THREADS = min(8, os.cpu_count() or 1)


class Encoder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything besides the image that determines its features: tower fingerprint, method, preprocessing, reader."""

    tower: Fingerprint
    method: Line
    preprocess: Line
    reader: Line

    @property
    def key(self) -> str:
        """Eight characters that identify the encoder."""
        return sha256(json.dumps(msgspec.structs.astuple(self)).encode()).hexdigest()[:8]

    @property
    def about(self) -> dict[str, Any]:
        """The fields as a dict."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields


class FeaturesHeader(msgspec.Struct, forbid_unknown_fields=True):
    """The header of a file of features; a collection's has the folder of its images, and names of the model."""

    encoder: Encoder
    folder: Line | msgspec.UnsetType = msgspec.UNSET
    model: Line | msgspec.UnsetType | None = msgspec.UNSET
    pretrained: Line | msgspec.UnsetType | None = msgspec.UNSET


def _tensors(header: FeaturesHeader) -> dict[str, TensorSpec]:
    return {
        "features": TensorSpec((torch.float32,), "images width", -1.001, 1.001),
        "sha256": TensorSpec((torch.uint8,), "images 32"),
        "labels": TensorSpec((torch.int64,), "images", 0, optional=True),  # of a support set
        "paths": TensorSpec((torch.uint8,), "bytes", optional=header.folder is msgspec.UNSET),  # of a collection
    }


def _check(header: FeaturesHeader, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless rows are L2-normalised or zero, and there is a path for each."""
    norms = tensors["features"].norm(dim=1)
    wrong = int(((norms - 1).abs() > 0.01)[norms > 0].sum())
    if wrong:
        raise ValueError(f"{wrong} of {len(norms)} rows of features that are not normalised")
    if "paths" in tensors:
        names = split_names(tensors["paths"])
        if len(names) != len(norms):
            raise ValueError(f"{len(names)} paths of {len(norms)} images")


FORMAT = Format("clipkernels.features.2", "features of images", FeaturesHeader, _tensors, _check)


class Encoding(NamedTuple):
    """Features (n,E) fp32, L2-normalised, of the readable files, with their paths, SHA-256 and encoder.

    unread: the files whose content could not be read this time.
    """

    features: Tensor
    paths: list[str]
    digests: list[str]
    encoder: Encoder
    unread: tuple[str, ...] = ()


def encoder_of(model: nn.Module, preprocess: Preprocess, reader: Reader) -> Encoder:
    """The encoder of a model in its current state, a preprocessing and a reader.

    The preprocessing is known by its repr and its output for one image.

    Raises:
        ValueError: a preprocessing with two different outputs for one image.
    """
    check_calls(preprocess=preprocess)
    check_model(model)
    exported = find_exported(model)
    try:
        method = None if exported else method_of(model)
    except UnsupportedTower:  # a ResNet
        method = None
    method_name = "host" if method is None or isinstance(method, Dense) else repr(method)
    if exported is not None and exported.method is not None:
        method_name = exported.method
    ramp = torch.arange(3 * 240 * 320).remainder(251).byte().view(240, 320, 3).numpy()
    hashes = {_bytes_hash(preprocess(Image.fromarray(ramp))) for _ in range(2)}
    if len(hashes) > 1:
        raise ValueError(
            "preprocess must be deterministic, got two different tensors for one image: remove random transforms"
        )
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(preprocess))
    return Encoder(fingerprint(model), method_name, f"{text}, {hashes.pop()[:16]}", reader.rules)


def encode(
    model: nn.Module,
    preprocess: Preprocess,
    encoder: Encoder,
    paths: Sequence[str],
    cache: str | os.PathLike[str],
    *,
    batch_size: int,
    progress: Progress | None,
    report: Report,
) -> Encoding:
    """The features of image files, in their order.

    A file that cannot be read, or that the preprocessing rejects, is reported and left out. Each batch is on disk
    before the next one starts, and an interrupted run resumes with the same batches. On one machine, with the same
    files and one `batch_size`, its features equal those of an uninterrupted run bit for bit. Features on disk stay
    unchanged; an image that is encoded in another batch may differ by rounding.

    Args:
        model: a model that `ck.encode_image` takes.
        preprocess: a callable from a PIL image to a tensor (3,S,S).
        encoder: the `encoder_of` this model and preprocessing; it names the rules that files are read by.
        paths: image files.
        cache: file of features; parts are written beside it.
        batch_size: images per forward.
        progress: called after each file, or None.
        report: called with a line for each file that is left out.
    Raises:
        ValueError: a cache that is not a file of features, or not as it was written.
        OSError: the cache cannot be written.
    """
    known = read_features(cache, encoder)
    weights = tower_weight(model)
    waiting: dict[bytes, Tensor] = {}
    readable: list[tuple[str, bytes]] = []
    unread: list[str] = []
    reader, shape = Reader.of(encoder.reader), image_shape(model, preprocess)

    def read(path: str) -> tuple[bytes | None, Tensor | str | None]:
        try:
            data = read_bytes(path)
        except Exception as error:
            return None, reason_of(error)
        digest = sha256(data).digest()
        return digest, None if digest in known else reader.prepare(data, preprocess, shape)

    @torch.inference_mode()
    def flush() -> None:
        images = torch.stack(list(waiting.values())).to(weights.device, weights.dtype)
        features = normalize(encode_image(model, images).embedding.float()).cpu()
        features = features.where(features.isfinite().all(1, keepdim=True), 0)
        folder = _parts_folder(cache, encoder)
        folder.mkdir(parents=True, exist_ok=True)
        write_features(folder / f"{uuid4().hex}.safetensors", features, list(waiting), encoder)
        known.update(zip(waiting, features, strict=True))
        waiting.clear()

    with ThreadPoolExecutor(THREADS) as pool, eval_mode(model):
        for done, (path, (digest, image)) in enumerate(_read_ahead(pool, read, paths, 2 * batch_size), 1):
            if isinstance(image, str):
                report(skip_message(path, image))
                unread += [path] * (digest is None)
            else:
                readable.append((path, digest))
                if image is not None and digest not in known:
                    waiting[digest] = image
                if len(waiting) == batch_size:
                    flush()
            if progress is not None:
                progress("encoding", done, len(paths))
        if waiting:
            flush()
    finite = [(path, digest) for path, digest in readable if known[digest].any()]
    for path in dict.fromkeys(path for path, digest in readable if not known[digest].any()):
        report(skip_message(path, "the model's features are not finite, or zero"))
    features = torch.stack([known[digest] for _, digest in finite]) if finite else torch.empty(0, 0)
    return Encoding(
        features, [path for path, _ in finite], [digest.hex() for _, digest in finite], encoder, tuple(unread)
    )


def read_features(cache: str | os.PathLike[str], encoder: Encoder) -> dict[bytes, Tensor]:
    """This encoder's features on disk, by the SHA-256 of the image files.

    Raises:
        ValueError: a file that does not hold features, or not those that were written.
        OSError: a file cannot be read.
    """
    known: dict[bytes, Tensor] = {}
    for file in (Path(cache), *sorted(_parts_folder(cache, encoder).glob("*.safetensors"))):
        if file.exists() and read_feature_header(file)["encoder"] == encoder.about:
            _, tensors = read_state(file, FORMAT)
            known.update(zip(map(bytes, tensors["sha256"].numpy()), tensors["features"], strict=True))
    return known


def write_features(
    path: str | os.PathLike[str],
    features: Tensor,
    digests: Sequence[bytes],
    encoder: Encoder,
    tensors: Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write features (n,E), the SHA-256 of their images, their encoder, and other tensors and metadata, atomically."""
    table = {"features": features, "sha256": digest_table(digests), **(tensors or {})}
    write_state(path, FORMAT, {"encoder": encoder.about, **(about or {})}, table)


def read_feature_header(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a file of features, without reading its tensors.

    Raises:
        ValueError: the file does not hold features.
        OSError: the file cannot be read.
    """
    return read_state(file, FORMAT, ())[0]


def join_names(names: Sequence[str]) -> Tensor:
    """File names as the bytes of the file system, each ended by a zero, (b,) uint8."""
    return torch.frombuffer(bytearray(b"".join(os.fsencode(name) + b"\0" for name in names)), dtype=torch.uint8)


def split_names(table: Tensor) -> list[str]:
    """The file names that `join_names` joined."""
    return [os.fsdecode(name) for name in table.numpy().tobytes().split(b"\0")[:-1]]


def remove_parts(cache: str | os.PathLike[str], encoder: Encoder) -> None:
    """Remove the parts that `encode` wrote beside a cache, after the cache holds all of them."""
    folder = _parts_folder(cache, encoder)
    if folder.is_dir():
        for file in folder.glob("*.safetensors"):
            file.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def _bytes_hash(tensor: Tensor) -> str:
    return sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _parts_folder(cache: str | os.PathLike[str], encoder: Encoder) -> Path:
    return Path(f"{os.fspath(cache)}.{encoder.key}.parts")


def _read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[str], Any], paths: Sequence[str], depth: int
) -> Iterator[tuple[str, Any]]:
    """Each path with the result of `read`, which runs up to `depth` files ahead."""
    waiting: deque[tuple[str, Future[Any]]] = deque()
    for path in paths:
        waiting.append((path, pool.submit(read, path)))
        if len(waiting) > depth:
            first, result = waiting.popleft()
            yield first, result.result()
    for first, result in waiting:
        yield first, result.result()
