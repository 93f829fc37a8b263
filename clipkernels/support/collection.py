"""SuS-LC: a support set of the user's own images, retrieved for the sentences of each class.

    score(image, class) = max over the class's sentences of cos(image, sentence)

The images are encoded once. An exact FAISS index answers each class's sentences; what it finds is scored again in fp64,
so that ties go to the lower index.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipkernels.classifier import prompt_embeddings
from clipkernels.data import Preprocess
from clipkernels.files import read_tensors
from clipkernels.fingerprint import check_fingerprint, fingerprint
from clipkernels.support.features import (
    Encoder,
    Encoding,
    Progress,
    Report,
    encode,
    encoder_of,
    remove_parts,
    read_feature_header,
    write_features,
)
from clipkernels.support.folders import find_images, hash_of
from clipkernels.support.prompts import Prompts, check_prompts
from clipkernels.support.store import SupportSet, assemble, refuse_empty

COSINE_ROUNDING = 1e-5  # beyond what fp32 rounds off a cosine


def retrieve(
    model: nn.Module,
    preprocess: Preprocess,
    tokenizer: Callable[[list[str]], Tensor],
    prompts: Prompts,
    collection: str | os.PathLike[str] | tuple[Tensor, Sequence[str]],
    *,
    per_class: int = 100,
    minimum: float | None = None,
    cache: str | os.PathLike[str] | None = None,
    name: str | None = None,
    pretrained: str | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
    report: Report = warnings.warn,
) -> SupportSet:
    """The images of a collection that are most like the sentences of each class, most alike first.

    Each class is retrieved by itself, as published: an image may serve several. Of files with the same content the
    first counts. What is encoded is on disk at once: a run that was stopped goes on.

    Args:
        model: with `encode_text`, and what `ck.encode_image` takes.
        preprocess: what makes a tensor (3,S,S) of a PIL image.
        tokenizer: a list of n texts to token ids (n,T).
        prompts: the sentences of each class; its order is that of the labels.
        collection: a folder of images; the file of features that an earlier call left beside it; or features (n,E) of
            your own, as a tensor or an array, with the n files they are of: that this model encoded them is then your
            word. A folder's hidden files and folders, and support sets within it, do not count.
        per_class: images per class, or as many as there are.
        minimum: the least score that counts.
        cache: where a folder's features are kept, by default in FOLDER.KEY.safetensors beside it, where KEY differs by
            tower, method and preprocessing; images that change are encoded again.
        name, pretrained: of the model, for the manifest.
        batch_size: images per forward.
        progress: called with what is being done, how many are, and of how many.
        report: called with a line for each file that is no image, or that the preprocessing rejects.
    Raises:
        ValueError: classes without a hit, which it names, a collection without images, features of another tower or
            width, text embeddings that are not finite, a preprocessing that is left to chance, or numbers out of range.
        ImportError: FAISS is not installed.
        OSError: a file cannot be read or written.
    Source: SuS-X, arXiv 2211.16198, section 3.1 (LC); the index is the user's own instead of LAION-5B's.
    """
    prompts = check_prompts(prompts)
    if isinstance(per_class, bool) or not isinstance(per_class, int) or per_class < 1:
        raise ValueError(f"per_class must be a positive int, got {per_class!r}")
    if minimum is not None and not -1 <= minimum <= 1:
        raise ValueError(f"minimum must be a cosine, from -1 to 1, got {minimum!r}")
    faiss = _faiss()
    if isinstance(collection, tuple):
        if cache is not None:
            raise ValueError("expected a folder of images with cache, got features")
        where, encoding = "features in memory", _take_features(model, *collection)
    elif Path(collection).is_dir():
        where, named = str(collection), {"model": name, "pretrained": pretrained}
        encoding = _encode_folder(model, preprocess, Path(where), cache, batch_size, progress, report, named)
    elif cache is not None:
        raise ValueError(f"expected a folder of images with cache, got the file {collection}")
    else:
        where, encoding = str(collection), _read_collection(model, Path(collection))
    first = {digest: row for row, digest in reversed(list(enumerate(encoding.digests)))}
    distinct = sorted(first.values())
    features = encoding.features[distinct].contiguous()
    if not len(features):
        raise ValueError(f"expected a collection with images, got none in {where}")
    texts = prompt_embeddings(model, tokenizer, prompts)
    for label, queries in zip(prompts, texts, strict=True):
        if not queries.isfinite().all():
            raise ValueError(f"expected finite text embeddings, got others for {label!r}")
        if queries.shape[1] != features.shape[1]:
            raise ValueError(f"expected features (n,{queries.shape[1]}) of this model, got {tuple(features.shape)}")
    index = faiss.IndexFlatIP(features.shape[1])
    index.add(features.numpy())
    chosen = {}
    for done, (label, queries) in enumerate(zip(prompts, texts, strict=True), 1):
        found = _nearest(index, features, queries.cpu(), per_class, minimum)
        chosen[label] = [encoding.paths[distinct[row]] for row in found]
        if progress is not None:
            progress("retrieving", done, len(prompts))
    refuse_empty(chosen, "an image" if minimum is None else f"an image with a score of at least {minimum}")
    settings = {"collection": where, "per_class": per_class, "minimum": minimum}
    about = {"kind": "LC", "settings": settings, "model": name, "pretrained": pretrained}
    return assemble(model, prompts, encoding, chosen, about)


def _encode_folder(
    model: nn.Module,
    preprocess: Preprocess,
    folder: Path,
    cache: str | os.PathLike[str] | None,
    batch_size: int,
    progress: Progress | None,
    report: Report,
    about: Mapping[str, str | None],
) -> Encoding:
    """The features of a folder's images, and the file of them brought up to date."""
    who = encoder_of(model, preprocess)
    root = folder.resolve()
    if cache is not None and Path(cache).is_dir():
        raise ValueError(f"expected cache (--cache) to be a file, got the folder {cache}")
    if cache is None and not root.name:
        raise ValueError(f"expected cache (--cache) for {folder}, got none: there is no place beside it")
    file = root.with_name(f"{root.name}.{who.key}.safetensors") if cache is None else Path(cache)
    if cache is None and not file.exists() and not os.access(file.parent, os.W_OK):
        raise ValueError(f"expected cache (--cache) for {folder}, got none: {file.parent} cannot be written to")
    header: dict[str, Any] = {"folder": _relative(root, file.resolve().parent), **about}
    before = _header(file) if file.exists() else {}
    if before and [before[key] for key in ("encoder", "folder")] != [who._asdict(), header["folder"]]:
        raise ValueError(
            f"expected features of {folder} by this tower, method and preprocessing, got {file} of others: "
            "name another file"
        )
    paths = find_images(folder)
    encoding = encode(model, preprocess, who, paths, file, batch_size=batch_size, progress=progress, report=report)
    if not encoding.paths:  # such as of a disk that is not mounted: what is known of it is kept
        raise ValueError(f"expected a collection with images, got none in {folder}")
    names = [os.path.relpath(path, folder) for path in encoding.paths]
    if not before or {**before, **header} != before or _listing(file) != (names, encoding.digests):
        table = torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)
        digests = [bytes.fromhex(digest) for digest in encoding.digests]
        write_features(file, encoding.features, digests, who, {"paths": table}, header)
    remove_parts(file, who)
    return encoding


def _relative(path: Path, start: Path) -> str:
    """A path from a folder, or as it is where it lies on another drive."""
    try:
        return os.path.relpath(path, start)
    except ValueError:
        return str(path)


def _read_collection(model: nn.Module, file: Path) -> Encoding:
    """The features of a file that `_encode_folder` wrote with this tower, by the encoder that it names."""
    about = _header(file)
    check_fingerprint(about["encoder"]["tower"], model, file, about)
    folder = os.path.normpath(file.resolve().parent / about["folder"])
    names, digests = _listing(file)
    features = read_tensors(file)[0]["features"]
    return Encoding(features, [os.path.join(folder, name) for name in names], digests, Encoder(**about["encoder"]))


def _listing(file: Path) -> tuple[list[str], list[str]]:
    """The images of a file of features, and their SHA-256."""
    with safe_open(file, "pt") as tensors:
        names = json.loads(bytes(tensors.get_tensor("paths").numpy()))
        return names, [bytes(row).hex() for row in tensors.get_tensor("sha256").numpy()]


def _take_features(model: nn.Module, features: Any, paths: Sequence[str]) -> Encoding:
    """Features of the caller's own, who vouches for the model and knows the rest."""
    features = torch.as_tensor(features).detach().cpu()
    if features.ndim != 2 or len(features) != len(paths) or not features.is_floating_point():
        came = f"{tuple(features.shape)} {features.dtype}"
        raise ValueError(f"expected floating-point features (n,E) of {len(paths)} files, got {came}")
    features = normalize(features.float())
    if not features.isfinite().all():
        raise ValueError("expected finite features, got others")
    files = [os.path.abspath(path) for path in paths]
    twice = len(files) - len(set(files))
    if twice:
        raise ValueError(f"expected files that differ, got {twice} of them again")
    return Encoding(
        features, files, [hash_of(Path(file)) for file in files], Encoder(fingerprint(model), "given", "given")
    )


def _header(file: Path) -> dict[str, Any]:
    """What a file of features says of them.

    Raises:
        ValueError: it is none.
    """
    if not file.exists():
        raise ValueError(f"expected a folder of images or a file of features, got {file}, which is not there")
    about = read_feature_header(file)
    if "folder" not in about:
        raise ValueError(f"expected the features of a collection, got {file}, which names none")
    return about


def _nearest(index: Any, features: Tensor, queries: Tensor, wanted: int, minimum: float | None) -> list[int]:
    """The rows of features (n,E) most like any of queries (m,E), best first, ties to the lower row."""
    n = len(features)
    k = min(n, 2 * wanted)
    while True:
        scores, rows = index.search(queries.numpy(), k)
        # Unless the k-th of some sentence is clearly worse, others may tie with what is wanted.
        if k == n or (scores[:, -1] < scores[:, wanted - 1] - COSINE_ROUNDING).all():
            break
        k = min(n, 2 * k)
    candidates = torch.from_numpy(rows).unique()
    best = (features[candidates].double() @ queries.double().T).amax(1).float()
    best, order = best.sort(descending=True, stable=True)
    if minimum is not None:
        order = order[best >= minimum]
    return candidates[order[:wanted]].tolist()


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("retrieval needs FAISS, which is not installed: pip install clipkernels[support]") from error
    return faiss
