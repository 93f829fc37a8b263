"""Image features that are encoded once: what is on disk already, by the image's content, is not encoded again.

FILE              features (n,E) fp32, L2-normalised; sha256 (n,32) uint8 of the image files; in the header, by whom
FILE.KEY.parts/   the same, one file per batch as it comes, until FILE is written
"""

from __future__ import annotations

import io
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

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipkernels.adapters import UnsupportedTower
from clipkernels.classifier import eval_mode
from clipkernels.data import Preprocess
from clipkernels.encode import encode_image
from clipkernels.files import METADATA_KEY, digest_table, map_tensors, read_metadata, read_tensors, write_tensors
from clipkernels.fingerprint import fingerprint
from clipkernels.methods import Dense
from clipkernels.patching import method_of

Progress = Callable[[str, int, int], object]
"""Called with what is being done, how many are, and of how many."""
Report = Callable[[str], object]
"""Called with a line about what was left out."""

FORMAT = "clipkernels.features.1"
THREADS = min(8, os.cpu_count() or 1)


class Encoder(NamedTuple):
    """What features depend on besides the image: the tower, by `fingerprint`; its method; its preprocessing."""

    tower: dict[str, str]
    method: str
    preprocess: str

    @property
    def key(self) -> str:
        """Eight characters that differ from those of another encoder."""
        return sha256(json.dumps(self).encode()).hexdigest()[:8]


class Encoding(NamedTuple):
    """Features (n,E) fp32, L2-normalised, of the files that could be read, with the SHA-256 of each, and by whom."""

    features: Tensor
    paths: list[str]
    digests: list[str]
    who: Encoder


def encoder_of(model: nn.Module, preprocess: Preprocess) -> Encoder:
    """What encodes: a model as it is now, and a preprocessing as it prints itself and by what it makes of one image.

    Raises:
        ValueError: a preprocessing that makes two different things of it.
    """
    try:
        method = method_of(model)
    except UnsupportedTower:  # a ResNet
        method = None
    how = "host" if method is None or isinstance(method, Dense) else repr(method)
    ramp = torch.arange(3 * 240 * 320).remainder(251).byte().view(240, 320, 3).numpy()
    made = {_bytes_hash(preprocess(Image.fromarray(ramp))) for _ in range(2)}
    if len(made) > 1:
        raise ValueError("preprocess must make the same of the same image, got two different tensors: take chance out")
    printed = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(preprocess))
    return Encoder(fingerprint(model), how, f"{printed}, {made.pop()[:16]}")


def encode(
    model: nn.Module,
    preprocess: Preprocess,
    who: Encoder,
    paths: Sequence[str],
    cache: str | os.PathLike[str],
    *,
    batch_size: int,
    progress: Progress | None,
    report: Report,
) -> Encoding:
    """The features of image files by an encoder, which is that of the model and the preprocessing, in their order; a
    file that is no image, or that the preprocessing rejects, is reported and left out.

    Each batch is on disk before the next one starts, and a run that was stopped goes on from there with the same
    batches. On one machine, with the same files and one `batch_size`, its features are those of a run that was not, bit
    for bit. What is on disk stays as it is; an image that is encoded in another batch may differ by rounding.

    Raises:
        ValueError: a cache that is no safetensors file.
        OSError: an image cannot be read, or the cache cannot be written.
    """
    known = read_features(cache, who)
    # The patches' convolution tells the precision: open_clip keeps some other weights of a half tower in fp32.
    weights = next((each for each in model.parameters() if each.ndim == 4), next(model.parameters()))
    waiting: dict[bytes, Tensor] = {}
    kept: list[tuple[str, bytes]] = []

    def read(path: str) -> tuple[bytes, Tensor | str | None]:
        data = Path(path).read_bytes()
        digest = sha256(data).digest()
        if digest in known:
            return digest, None
        try:
            return digest, preprocess(Image.open(io.BytesIO(data)).convert("RGB"))
        except UnidentifiedImageError:
            return b"", "in no format that Pillow knows"
        except Exception as error:  # Pillow's decoders raise whatever a broken file makes them, and so do transforms
            return b"", (" ".join(str(error).split()) or type(error).__name__)[:200]

    @torch.inference_mode()
    def flush() -> None:
        images = torch.stack(list(waiting.values())).to(weights.device, weights.dtype)
        features = normalize(encode_image(model, images).embedding.float()).cpu()
        folder = _parts_folder(cache, who)
        folder.mkdir(parents=True, exist_ok=True)
        write_features(folder / f"{uuid4().hex}.safetensors", features, list(waiting), who)
        known.update(zip(waiting, features, strict=True))
        waiting.clear()

    with ThreadPoolExecutor(THREADS) as pool, eval_mode(model):
        for done, (path, (digest, image)) in enumerate(_read_ahead(pool, read, paths, 2 * batch_size), 1):
            if isinstance(image, str):
                report(f"no image: {path}: {image}")
            else:
                kept.append((path, digest))
                if image is not None and digest not in known:
                    waiting[digest] = image
                if len(waiting) == batch_size:
                    flush()
            if progress is not None:
                progress("encoding", done, len(paths))
        if waiting:
            flush()
    finite = [(path, digest) for path, digest in kept if known[digest].isfinite().all()]
    for path, _ in set(kept) - set(finite):
        report(f"no features: {path}: the model gives numbers that are not finite")
    features = torch.stack([known[digest] for _, digest in finite]) if finite else torch.empty(0, 0)
    return Encoding(features, [path for path, _ in finite], [digest.hex() for _, digest in finite], who)


def read_features(cache: str | os.PathLike[str], who: Encoder) -> dict[bytes, Tensor]:
    """What this encoder made of images before, by the SHA-256 of their files."""
    known: dict[bytes, Tensor] = {}
    for file in (Path(cache), *sorted(_parts_folder(cache, who).glob("*.safetensors"))):
        if file.exists() and read_feature_header(file).get("encoder") == who._asdict():
            tensors, _ = read_tensors(file)
            if {"features", "sha256"} <= set(tensors):
                known.update(zip(map(bytes, tensors["sha256"].numpy()), tensors["features"], strict=True))
    return known


def write_features(
    path: str | os.PathLike[str],
    features: Tensor,
    digests: Sequence[bytes],
    who: Encoder,
    more: Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes features (n,E) with the SHA-256 of their images and who encoded them, whole or not at all."""
    header = json.dumps({"format": FORMAT, "encoder": who._asdict(), **(about or {})})
    # One entry: safetensors writes several in any order, and the same features are to give the same file.
    write_tensors(path, {"features": features, "sha256": digest_table(digests), **(more or {})}, {METADATA_KEY: header})


def read_feature_header(file: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says of its features, nothing where it is another's; the tensors are not read.

    Raises:
        ValueError: it is no safetensors file.
        OSError: it cannot be read.
    """
    about = read_metadata(map_tensors(file)[1])
    return about if about.get("format") == FORMAT and "encoder" in about else {}


def remove_parts(cache: str | os.PathLike[str], who: Encoder) -> None:
    """Removes what `encode` left beside a cache that holds all of it now."""
    folder = _parts_folder(cache, who)
    if folder.is_dir():
        for file in folder.glob("*.safetensors"):
            file.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def _bytes_hash(tensor: Tensor) -> str:
    return sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _parts_folder(cache: str | os.PathLike[str], who: Encoder) -> Path:
    return Path(f"{os.fspath(cache)}.{who.key}.parts")


def _read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[str], Any], paths: Sequence[str], depth: int
) -> Iterator[tuple[str, Any]]:
    """Each path with what is read of it, which happens up to `depth` ahead."""
    waiting: deque[tuple[str, Future[Any]]] = deque()
    for path in paths:
        waiting.append((path, pool.submit(read, path)))
        if len(waiting) > depth:
            first, result = waiting.popleft()
            yield first, result.result()
    for first, result in waiting:
        yield first, result.result()
