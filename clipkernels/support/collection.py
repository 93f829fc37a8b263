"""SuS-LC: a support set of the user's own images, retrieved with the sentences of each class.

    score(image, class) = max over the class's sentences of cos(image, sentence)

The images are encoded once. An image stands for the class that scores it highest, unless classes may share it. Exact
FAISS indices are searched with the images for their classes and with the sentences of each class for its images. The
hits are scored again in fp64, so that ties go to the lower index.
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
from clipkernels.arguments import (
    check_callable,
    check_calls,
    check_flags,
    check_int,
    check_names,
    check_path,
    check_range,
)
from clipkernels.classifier import prompt_embeddings
from clipkernels.data import Preprocess
from clipkernels.files import hash_of
from clipkernels.fingerprint import check_fingerprint, fingerprint
from clipkernels.images import Reader, draw_images, images_below
from clipkernels.messages import list_items
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
from clipkernels.support.folders import holds_set
from clipkernels.support.prompts import Prompts, check_prompts
from clipkernels.support.store import SupportSet, assemble, refuse_empty

COSINE_ROUNDING = 1e-5  # above the fp32 rounding error of a cosine
MAX_SCORES = 2**23  # held at a time, in fp64


def retrieve(
    model: nn.Module,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    prompts: Prompts,
    collection: str | os.PathLike[str] | tuple[Tensor, Sequence[str]],
    *,
    per_class: int = 100,
    minimum: float | None = None,
    shared: bool = False,
    limit: int | None = None,
    seed: int = 0,
    exif: bool = True,
    cache: str | os.PathLike[str] | None = None,
    name: str | None = None,
    pretrained: str | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
    report: Report = warnings.warn,
    note: Report = warnings.warn,
) -> SupportSet:
    """The images of a collection that are most similar to the sentences of each class, most similar first.

    An image is retrieved for one class, the one with the highest score, and ties go to the lower class. With `shared`,
    classes are retrieved independently, as published, so an image may appear in several. If files have the same
    content, only the first counts. Features are written to disk batch by batch, so an interrupted run resumes.

    Args:
        model: a model with a text tower that `ck.encode_image` takes.
        preprocess: a callable from a PIL image to a tensor (3,S,S).
        tokenizer: a callable from a list of n texts to token ids (n,T), or a tokenizer or a processor of transformers.
        prompts: the sentences of each class; its order is the order of the labels.
        collection: a folder of images; the file of features that an earlier call wrote beside it; or precomputed
            features (n,E), a tensor or an array, with the paths of their n files. Precomputed features must be this
            model's, which is not checked. Linked folders are followed; hidden files and folders, and support sets
            within the folder, are ignored.
        per_class: images per class; fewer, and a warning, if there are not enough.
        minimum: lowest score of a retrieved image.
        shared: retrieve an image for every class that ranks it high enough.
        limit: draw this many images of the collection at random; a larger limit adds to the same draw.
        seed: of the draw.
        exif: turn a folder's images as their EXIF orientation says.
        cache: file for a folder's features, by default FOLDER.KEY.safetensors beside the folder, where KEY depends on
            tower, method, preprocessing and reader. It stays for later calls, which encode changed and new images
            alone. An interrupted run leaves its features beside that file, in a folder whose name ends in .parts.
        name, pretrained: name and weights of the model, for the manifest.
        batch_size: images per forward.
        progress: called with the stage, the number of finished items and the number of all items.
        report: called with a line for each image file that cannot be read or that the preprocessing rejects.
        note: called with a line that counts the other files of a folder, if there are any.
    Raises:
        ValueError: classes without a hit (the message names them), a collection without images, features of another
            tower or width, text embeddings that are not finite, a random preprocessing, or numbers out of range.
        ImportError: FAISS is not installed.
        OSError: a file cannot be read or written.
    Source: SuS-X, arXiv 2211.16198, section 3.1 (LC); the index is the user's own instead of LAION-5B's.
    """
    prompts = check_prompts(prompts)
    counts = {"per_class": per_class, "batch_size": batch_size, **({} if limit is None else {"limit": limit})}
    for option, count in counts.items():
        check_int(option, count, 1)
    check_int("seed", seed, 0)
    if minimum is not None:
        check_range("minimum", minimum, -1, 1)
    check_flags(shared=shared, exif=exif)
    if cache is not None:
        check_path(cache=cache)
    if not isinstance(collection, tuple):
        check_path(collection=collection)
    check_names(name=name, pretrained=pretrained)
    check_callable(progress=progress)
    check_calls(report=report, note=note)
    faiss = _faiss()
    in_memory = isinstance(collection, tuple)
    source = "features in memory" if isinstance(collection, tuple) else str(collection)
    if not in_memory and Path(source).is_dir():
        encoder, names = encoder_of(model, preprocess, Reader(exif)), {"model": name, "pretrained": pretrained}
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "report": report}
        draw = None if limit is None else (limit, seed)
        encoding = _encode_folder(model, preprocess, encoder, Path(source), draw, cache, names, note, options)
    else:
        for option, used in {"cache": cache is not None, "exif=False": not exif}.items():
            if used:
                actual = "features" if in_memory else f"the file {collection}"
                raise ValueError(f"expected a folder of images with {option}, got {actual}")
        if isinstance(collection, tuple):
            encoding = _take_features(model, *collection)
        else:
            encoding = _read_collection(model, Path(source))
        if limit is not None:
            drawn = set(draw_images(encoding.paths, limit, seed))
            encoding = _take_rows(encoding, [row for row, path in enumerate(encoding.paths) if path in drawn])
    first = {digest: row for row, digest in reversed(list(enumerate(encoding.digests)))}
    distinct = sorted(first.values())
    features = encoding.features[distinct].contiguous()
    if not len(features):
        raise ValueError(f"expected a collection with images, got none in {source}")
    texts = [queries.cpu() for queries in prompt_embeddings(model, tokenizer, prompts)]
    for label, queries in zip(prompts, texts, strict=True):
        if not queries.isfinite().all():
            raise ValueError(f"expected finite text embeddings, got infinite or NaN values for {label!r}")
        if queries.shape[1] != features.shape[1]:
            raise ValueError(f"expected features (n,{queries.shape[1]}) of this model, got {tuple(features.shape)}")
    everything = torch.arange(len(features))
    best = everything if shared else _best_class(features, texts)
    index = _index_of(faiss, features) if shared else None
    chosen = {}
    for k, (label, queries) in enumerate(zip(prompts, texts, strict=True)):
        own = everything if shared else (best == k).nonzero()[:, 0]
        rows = own[_nearest(index or _index_of(faiss, features[own]), features[own], queries, per_class, minimum)]
        chosen[label] = [encoding.paths[distinct[row]] for row in rows.tolist()]
        if progress is not None:
            progress("retrieving", k + 1, len(prompts))
    wanted = "an image" if minimum is None else f"an image with a score of at least {minimum}"
    hint = "" if shared else ": an image goes to its highest-scoring class alone, unless classes share it (--shared)"
    refuse_empty(chosen, wanted, hint)
    few = [f"{label!r} ({len(paths)})" for label, paths in chosen.items() if len(paths) < per_class]
    if few:
        warnings.warn(f"expected {per_class} images per class, got fewer of {list_items(few)}", stacklevel=2)
    settings: dict[str, Any] = {"collection": source, "per_class": per_class, "minimum": minimum, "shared": shared}
    settings |= {} if limit is None else {"limit": limit, "seed": seed}
    about = {"kind": "LC", "settings": settings, "model": name, "pretrained": pretrained}
    return assemble(model, prompts, encoding, chosen, about)


def _encode_folder(
    model: nn.Module,
    preprocess: Preprocess,
    encoder: Encoder,
    folder: Path,
    draw: tuple[int, int] | None,
    cache: str | os.PathLike[str] | None,
    about: Mapping[str, str | None],
    note: Report,
    options: Mapping[str, Any],
) -> Encoding:
    """The features of a folder's images, or of those drawn by (limit, seed); their file is brought up to date.

    The file keeps the features of images that were encoded before and are not drawn or cannot be read this time.
    """
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
            f"expected features of {folder} by this tower, method, preprocessing and reader (--no-exif), got {file} "
            "with others: choose another cache (--cache)"
        )
    found = images_below(str(folder), holds_set)
    if found.note:
        note(found.note)
    drawn = sorted(draw_images(found.paths, *draw)) if draw else found.paths
    encoding = encode(model, preprocess, encoder, drawn, file, **options)
    if not encoding.paths:  # keep the old features, because the disk may just not be mounted
        raise ValueError(f"expected a collection with images, got none in {folder}")
    names = [os.path.relpath(path, folder) for path in encoding.paths]
    stored = encoding._replace(paths=names)
    left = {os.path.relpath(path, folder) for path in {*found.paths}.difference(drawn).union(encoding.unread)}
    if left and old_header:
        before = _read_stored(file, old_header)
        kept = _take_rows(before, [row for row, name in enumerate(before.paths) if name in left])
        features = torch.cat([encoding.features, kept.features])
        stored = Encoding(features, names + kept.paths, encoding.digests + kept.digests, encoder)
    if not old_header or {**old_header, **header} != old_header or _listing(file) != (stored.paths, stored.digests):
        digests = [bytes.fromhex(digest) for digest in stored.digests]
        write_features(file, stored.features, digests, encoder, {"paths": join_names(stored.paths)}, header)
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
    stored = _read_stored(file, header)
    return stored._replace(paths=[os.path.join(folder, name) for name in stored.paths])


def _read_stored(file: Path, header: Mapping[str, Any]) -> Encoding:
    """The features in a file of a collection, with the names of the images below its folder as paths."""
    _, tensors = read_state(file, FORMAT)
    digests = [bytes(row).hex() for row in tensors["sha256"].numpy()]
    return Encoding(tensors["features"], split_names(tensors["paths"]), digests, Encoder(**header["encoder"]))


def _take_rows(encoding: Encoding, rows: list[int]) -> Encoding:
    """The features of some of the files."""
    paths, digests = [encoding.paths[row] for row in rows], [encoding.digests[row] for row in rows]
    return encoding._replace(features=encoding.features[rows], paths=paths, digests=digests)


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
        features, files, [hash_of(Path(file)) for file in files], Encoder(fingerprint(model), "given", "given", "given")
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


def _best_class(features: Tensor, texts: Sequence[Tensor]) -> Tensor:
    """The class (n,) int64 with the sentence most similar to each image of features (n,E), ties to the lower class."""
    labels = torch.cat([torch.full((len(queries),), k) for k, queries in enumerate(texts)])
    columns = torch.cat(list(texts)).double().T
    best = []
    for block in features.split(max(1, MAX_SCORES // len(labels))):
        scores = (block.double() @ columns).float()
        best.append(labels.where(scores == scores.amax(1, keepdim=True), len(texts)).amin(1))
    return torch.cat(best)


def _index_of(faiss: Any, features: Tensor) -> Any:
    """An exact index of features (n,E)."""
    index = faiss.IndexFlatIP(features.shape[1])
    index.add(features.numpy())
    return index


def _nearest(index: Any, features: Tensor, queries: Tensor, wanted: int, minimum: float | None) -> list[int]:
    """The `wanted` rows of features (n,E) most similar to any of queries (m,E), best first, ties to the lower row."""
    n = len(features)
    k = min(n, 2 * wanted)
    if not n:
        return []
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
