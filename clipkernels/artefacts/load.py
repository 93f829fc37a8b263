"""`ck.load` and `ck.load_method`: a saved model with its method, and the method alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from clipkernels import adapters
from clipkernels.adapters import Tower
from clipkernels.arguments import check_device, check_model, check_path
from clipkernels.artefacts.contents import Artefact, has_text
from clipkernels.artefacts.header import FILE, Header, check_files, read_header
from clipkernels.artefacts.libraries import checkpoints_of
from clipkernels.artefacts.method_records import read_method
from clipkernels.artefacts.weights import restore_precisions
from clipkernels.fingerprint import check_fingerprint, fingerprint, same_tower
from clipkernels.learn.checkpoints import seeded
from clipkernels.methods import Method
from clipkernels.patching import patch, unpatch
from clipkernels.plan_records import record_plan
from clipkernels.tower import make_plan

Model = TypeVar("Model", bound=nn.Module)


def load(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Artefact:
    """The model that `ck.save` wrote, patched with its method, with its preprocessing and its tokenizer.

    Its embeddings equal those of the saved model bit for bit, on the same device, with the same number of threads, the
    same versions, and as many frozen weights (the loaded model has none). Nothing that the folder names is downloaded,
    unpickled or imported.

    Args:
        folder: a folder that `ck.save` wrote.
        device: the device of the model.
    Returns:
        Artefact(model, preprocess, tokenizer).
    Raises:
        ValueError: no such folder; files other than those that were written; a newer format; or a method whose plan
            this version makes differently.
        ImportError: the model's library is not installed.
        OSError: a file cannot be read.
    """
    check_path(folder=folder)
    return open_artefact(Path(folder), check_device(device))


def load_method(model: Model, folder: str | os.PathLike[str]) -> Model:
    """Patch a model in place with the method of a folder that `ck.save` wrote, and return it.

    It serves models that their own library has loaded, such as from the folder itself by `from_pretrained`. The model
    is unpatched if the folder has no method.

    Args:
        model: a model with the image tower of the folder, in any precision.
        folder: a folder that `ck.save` wrote.
    Raises:
        ValueError: another tower, by its fingerprint; or as in `ck.load`.
        UnsupportedTower, TypeError: as in `ck.patch`.
        OSError: a file cannot be read.
        On any error the model is as it was.
    """
    check_model(model)
    check_path(folder=folder)
    header = read_header(folder)
    check_fingerprint(header.tower, model, folder, {"model": header.model, "pretrained": header.library})
    return _patch(model, Path(folder), header)


def open_artefact(folder: Path, device: torch.device) -> Artefact:
    """The contents of an artefact; errors as in `load`."""
    header = read_header(folder)
    check_files(folder, header)
    with seeded(0):  # constructors draw weights, which must not move the caller's generator
        model, preprocess, tokenizer = checkpoints_of(header.library).read(folder, header)
    restore_precisions(model, header.precision, header.precisions)
    check_fingerprint(header.tower, model, folder, {"model": header.model, "pretrained": header.library})
    text = fingerprint(model, "text") if has_text(model) else {}
    if text.keys() and not same_tower(header.text_tower or {}, text):
        raise ValueError(f"expected the text tower of {folder}, got another one")
    model = model.to(device).eval()
    return Artefact(_patch(model, folder, header), preprocess, tokenizer)


def read_saved_method(folder: Path, header: Header, tower: Tower) -> Method | None:
    """The method of an artefact for a tower, or None if it has none.

    Raises:
        ValueError: a method that cannot be made, or with another plan for the tower than the header's.
        OSError: a file cannot be read.
    """
    if header.method is None:
        return None
    try:
        method = read_method(header.method, folder)
        plan = record_plan(make_plan(method, tower, tower.num_tokens))
    except ValueError as error:
        raise ValueError(f"expected a method that can be made, got {folder / FILE} with another: {error}") from error
    if plan != header.plan:
        raise ValueError(
            f"expected the plan of {method}, got {folder / FILE} with another one: update clipkernels to the version "
            f"that wrote it ({header.versions.get('clipkernels')}), or save the model again"
        )
    return method


def _patch(model: Model, folder: Path, header: Header) -> Model:
    """Patch a model with the method of a header, or unpatch it if there is none."""
    if header.method is None:
        return unpatch(model) if _is_patchable(model) else model
    method = read_saved_method(folder, header, adapters.find_tower(model))
    assert method is not None
    return patch(model, method)


def _is_patchable(model: nn.Module) -> bool:
    try:
        adapters.find_tower(model)
    except adapters.UnsupportedTower:
        return False
    return True
