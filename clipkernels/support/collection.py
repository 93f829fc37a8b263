"""SuS-LC: a support set of the user's own images, retrieved with the sentences of each class.

    score(image, class) = max over the class's sentences of cos(image, sentence)

The images are encoded once. An exact FAISS index is searched with the sentences of each class. The hits are scored
again in fp64, so that ties go to the lower index.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipkernels.adapters.tokenizers import Tokenizer
from clipkernels.classifier import prompt_embeddings
from clipkernels.data import Preprocess
from clipkernels.fingerprint import check_fingerprint, fingerprint
from clipkernels.state_files import read_state
from clipkernels.support.features import (
    FORMAT,
    Encoder,
    Encoding,
    Progress,
    Report,
    encode,
    encoder_of,
    join_names,
    read_feature_header,
    remove_parts,
    split_names,
    write_features,
)
from clipkernels.support.folders import find_images, hash_of
from clipkernels.support.prompts import Prompts, check_prompts
from clipkernels.support.store import SupportSet, assemble, refuse_empty

COSINE_ROUNDING = 1e-5  # above the fp32 rounding error of a cosine


def retrieve(
    model: nn.Module,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
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
    """The images of a collection that are most similar to the sentences of each class, most similar first.

    Classes are retrieved independently, as published, so an image may appear in several. If files have the same
    content, only the first counts. Features are written to disk batch by batch, so an interrupted run resumes.

    Args:
        model: a model with a text tower that `ck.encode_image` takes.
        preprocess: a callable from a PIL image to a tensor (3,S,S).
        tokenizer: a callable from a list of n texts to token ids (n,T), or a tokenizer or a processor of transformers.
        prompts: the sentences of each class; its order is the order of the labels.
        collection: a folder of images; the file of features that an earlier call wrote beside it; or precomputed
            features (n,E), a tensor or an array, with the paths of their n files. Precomputed features must be this
            model's, which is not checked. Hidden files and folders, and support sets within the folder, are ignored.
        per_class: images per class; fewer if there are not enough.
        minimum: lowest score of a retrieved image.
        cache: file for a folder's features, by default FOLDER.KEY.safetensors beside the folder, where KEY depends on
            tower, method and preprocessing. Changed images are encoded again.
        name, pretrained: name and weights of the model, for the manifest.
        batch_size: images per forward.
        progress: called with the stage, the number of finished items and the number of all items.
        report: called with a line for each file that is no image or that the preprocessing rejects.
    Raises:
        ValueError: classes without a hit (the message names them), a collection without images, features of another
            tower or width, text embeddings that are not finite, a random preprocessing, or numbers out of range.
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
        source, encoding = "features in memory", _take_features(model, *collection)
    elif Path(collection).is_dir():
        source, names = str(collection), {"model": name, "pretrained": pretrained}
        encoding = _encode_folder(model, preprocess, Path(source), cache, batch_size, progress, report, names)
    elif cache is not None:
        raise ValueError(f"expected a folder of images with cache, got the file {collection}")
    else:
        source, encoding = str(collection), _read_collection(model, Path(collection))
    first = {digest: row for row, digest in reversed(list(enumerate(encoding.digests)))}
    distinct = sorted(first.values())
    features = encoding.features[distinct].contiguous()
    if not len(features):
        raise ValueError(f"expected a collection with images, got none in {source}")
    texts = prompt_embeddings(model, tokenizer, prompts)
    for label, queries in zip(prompts, texts, strict=True):
        if not queries.isfinite().all():
            raise ValueError(f"expected finite text embeddings, got infinite or NaN values for {label!r}")
        if queries.shape[1] != features.shape[1]:
            raise ValueError(f"expected features (n,{queries.shape[1]}) of this model, got {tuple(features.shape)}")
    index = faiss.IndexFlatIP(features.shape[1])
    index.add(features.numpy())
    chosen = {}
    for done, (label, queries) in enumerate(zip(prompts, texts, strict=True), 1):
        rows = _nearest(index, features, queries.cpu(), per_class, minimum)
        chosen[label] = [encoding.paths[distinct[row]] for row in rows]
        if progress is not None:
            progress("retrieving", done, len(prompts))
    refuse_empty(chosen, "an image" if minimum is None else f"an image with a score of at least {minimum}")
    settings = {"collection": source, "per_class": per_class, "minimum": minimum}
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
    """The features of a folder's images; their file is brought up to date."""
    encoder = encoder_of(model, preprocess)
    root = folder.resolve()
    if cache is not None and Path(cache).is_dir():
        raise ValueError(f"expected cache (--cache) to be a file, got the folder {cache}")
    if cache is None and not root.name:
        raise ValueError(f"expected cache (--cache) for {folder}, got none: there is no folder beside it to write to")
    file = root.with_name(f"{root.name}.{encoder.key}.safetensors") if cache is None else Path(cache)
    if cache is None and not file.exists() and not os.access(file.parent, os.W_OK):
        raise ValueError(f"expected cache (--cache) for {folder}, got none: {file.parent} cannot be written to")
    header: dict[str, Any] = {"folder": _relative(root, file.resolve().parent), **about}
    old_header = _header(file) if file.exists() else {}
    if old_header and [old_header[key] for key in ("encoder", "folder")] != [encoder.about, header["folder"]]:
        raise ValueError(
            f"expected features of {folder} by this tower, method and preprocessing, got {file} with others: choose "
            "another cache (--cache)"
        )
    paths = find_images(folder)
    encoding = encode(model, preprocess, encoder, paths, file, batch_size=batch_size, progress=progress, report=report)
    if not encoding.paths:  # keep the old features, because the disk may just not be mounted
        raise ValueError(f"expected a collection with images, got none in {folder}")
    names = [os.path.relpath(path, folder) for path in encoding.paths]
    if not old_header or {**old_header, **header} != old_header or _listing(file) != (names, encoding.digests):
        digests = [bytes.fromhex(digest) for digest in encoding.digests]
        write_features(file, encoding.features, digests, encoder, {"paths": join_names(names)}, header)
    remove_parts(file, encoder)
    return encoding


def _relative(path: Path, start: Path) -> str:
    """A path relative to the folder `start`, or unchanged if it lies on another drive."""
    try:
        return os.path.relpath(path, start)
    except ValueError:
        return str(path)


def _read_collection(model: nn.Module, file: Path) -> Encoding:
    """The features of a file that `_encode_folder` wrote with this tower, and the encoder that it names."""
    header = _header(file)
    check_fingerprint(header["encoder"]["tower"], model, file, header)
    folder = os.path.normpath(file.resolve().parent / header["folder"])
    _, tensors = read_state(file, FORMAT)
    paths = [os.path.join(folder, name) for name in split_names(tensors["paths"])]
    digests = [bytes(row).hex() for row in tensors["sha256"].numpy()]
    return Encoding(tensors["features"], paths, digests, Encoder(**header["encoder"]))


def _listing(file: Path) -> tuple[list[str], list[str]]:
    """The image names in a file of features, and their SHA-256."""
    _, tensors = read_state(file, FORMAT, ("paths", "sha256"))
    return split_names(tensors["paths"]), [bytes(row).hex() for row in tensors["sha256"].numpy()]


def _take_features(model: nn.Module, features: Any, paths: Sequence[str]) -> Encoding:
    """Precomputed features of the caller, who is responsible for the model, method and preprocessing."""
    features = torch.as_tensor(features).detach().cpu()
    if features.ndim != 2 or len(features) != len(paths) or not features.is_floating_point():
        actual = f"{tuple(features.shape)} {features.dtype}"
        raise ValueError(f"expected floating-point features (n,E) of {len(paths)} files, got {actual}")
    features = normalize(features.float())
    if not features.isfinite().all():
        raise ValueError("expected finite features, got infinite or NaN values")
    files = [os.path.abspath(path) for path in paths]
    repeated = len(files) - len(set(files))
    if repeated:
        raise ValueError(f"expected distinct files, got {repeated} repeated")
    return Encoding(
        features, files, [hash_of(Path(file)) for file in files], Encoder(fingerprint(model), "given", "given")
    )


def _header(file: Path) -> dict[str, Any]:
    """The metadata of a file of a collection's features.

    Raises:
        ValueError: the file does not exist, or holds something else or not what was written.
    """
    if not file.exists():
        raise ValueError(f"expected a folder of images or a file of features, got {file}, which does not exist")
    header = read_feature_header(file)
    if "folder" not in header:
        raise ValueError(f"expected the features of a collection, got {file}, which names no folder")
    return header


def _nearest(index: Any, features: Tensor, queries: Tensor, wanted: int, minimum: float | None) -> list[int]:
    """The `wanted` rows of features (n,E) most similar to any of queries (m,E), best first, ties to the lower row."""
    n = len(features)
    k = min(n, 2 * wanted)
    while True:
        scores, rows = index.search(queries.numpy(), k)
        # If a sentence's k-th score is not clearly worse, rows beyond k may tie with the wanted ones.
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
