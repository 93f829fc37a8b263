"""Queries of a search, encoded as the rows of the collection: by the same tower and, for images, the same method."""

from __future__ import annotations

import io
import os
import warnings
from typing import Any

import msgspec
import torch
from PIL import Image
from torch import Tensor, nn

from clipkernels.adapters import UnsupportedTower, find_exported
from clipkernels.adapters.text import find_text_encoder
from clipkernels.adapters.tokenizers import Tokenizer
from clipkernels.artefacts.header import is_artefact
from clipkernels.artefacts.load import load as load_artefact
from clipkernels.classifier import class_embeddings, eval_mode
from clipkernels.collection.manifest import Manifest, Settings
from clipkernels.data import Preprocess, bundled
from clipkernels.encode import encode_image, tower_weight
from clipkernels.exporting.exported_model import load_exported
from clipkernels.fingerprint import check_fingerprint, fingerprint, same_tower, short_fingerprint
from clipkernels.images import Reader
from clipkernels.images.batches import image_shape
from clipkernels.methods import Dense, Schedule
from clipkernels.patching import method_of, patch, unpatch
from clipkernels.plan_records import read_plan
from clipkernels.runtime.manifest import is_export

BUNDLED = ("clipkernels", "bundled", None)
"""Library, model and pretrained of the bundled model in a manifest."""
HOST = "host"
QueryImage = str | os.PathLike[str] | bytes | Image.Image


def check_towers(folder: object, settings: Settings, model: nn.Module, text: bool) -> None:
    """Raise ValueError unless a model has the image tower of a collection and, for texts, its text tower if known."""
    names = {"model": settings.model, "pretrained": settings.pretrained}
    check_fingerprint(settings.tower, model, folder, names)
    if text and settings.text_tower is not None:
        current = fingerprint(model, "text")
        if not same_tower(settings.text_tower, current):
            expected, actual = short_fingerprint(settings.text_tower), short_fingerprint(current)
            raise ValueError(f"expected the text tower of {folder} ({expected}), got another one ({actual})")


def load_recorded(
    manifest: Manifest, device: torch.device | str | None
) -> tuple[nn.Module, Preprocess | None, Tokenizer | None]:
    """The model of a collection in its precision, its preprocessing and its tokenizer, if it takes no library's name.

    That is the bundled model, the model of a folder of `ck.save`, patched with the method of the folder, or an exported
    folder, which stays on the CPU. It runs the schedule of the manifest, if that has one.

    Raises:
        ValueError: another model made the collection, or the folder is not as it was written.
        OSError: a file of the folder cannot be read.
        ImportError: the model's library is not installed.
    """
    settings = manifest.settings
    preprocess: Any
    tokenizer: Any
    if (settings.library, settings.model, settings.pretrained) == BUNDLED:
        model, preprocess, tokenizer = bundled()
        model = model.to(device)
    elif is_saved(settings):
        model, preprocess, tokenizer = load_artefact(str(settings.model), device=device or "cpu")
    elif is_from_export(settings):
        model, preprocess, tokenizer = load_exported(str(settings.model))
    else:
        name = settings.model or "a model from Python"
        raise ValueError(f"expected a model for a collection of {name}, got none: pass model, preprocess and tokenizer")
    precision = getattr(torch, settings.precision)
    if tower_weight(model).dtype != precision:
        model = model.to(precision)
    schedule = recorded_schedule(manifest)
    if schedule is not None:
        patch(model, schedule)
    elif settings.method == HOST and _method(model) is not None:  # the folder's own method was not wanted
        unpatch(model)
    return model, preprocess, tokenizer


def is_saved(settings: Settings) -> bool:
    """Return true if a collection's model is a folder of `ck.save`, which is there."""
    return settings.model is not None and settings.pretrained is None and is_artefact(settings.model)


def is_from_export(settings: Settings) -> bool:
    """Return true if a collection's model is an exported folder, which is there."""
    return settings.model is not None and settings.pretrained is None and is_export(settings.model)


def recorded_schedule(manifest: Manifest) -> Schedule | None:
    """The schedule that a collection was embedded with, or None for another method.

    Raises:
        ValueError: a record that is no plan.
    """
    if isinstance(manifest.schedule, msgspec.UnsetType):
        return None
    return Schedule.from_plan(read_plan(manifest.schedule))


def encode_text(model: nn.Module, tokenizer: Tokenizer, text: str) -> Tensor:
    """The embedding (E,) fp32 of a text, on the CPU.

    Raises:
        ValueError: the model has no text tower.
    """
    try:
        find_text_encoder(model)
    except UnsupportedTower as error:
        expected = "expected a model with a text tower for a text"
        raise ValueError(f"{expected}, got {type(model).__name__}, which has none: search with an image") from error
    # Learnt tokens may be coupled to tokens in the text tower.
    embed = getattr(getattr(_method(model), "tokens", None), "class_embeddings", class_embeddings)
    return embed(model, tokenizer, {text: [text]})[0].cpu()


@torch.no_grad()
def encode_picture(model: nn.Module, preprocess: Preprocess, image: QueryImage, rules: str) -> Tensor:
    """The embedding (E,) fp32 of an image, on the CPU.

    Args:
        model: a model that `ck.encode_image` takes.
        preprocess: a callable from a PIL image to a tensor (3,S,S).
        image: a file, its content, or a PIL image.
        rules: the rules that files are read by, as `Reader.rules`.
    Raises:
        ValueError: no image that can be read.
    """
    shape, reader = image_shape(model, preprocess), Reader.of(rules)
    if isinstance(image, Image.Image):
        with io.BytesIO() as file:
            image.convert("RGB").save(file, "PNG")
            content: Any = file.getvalue()
    else:
        content = image
    pixels = reader.prepare(content, preprocess, shape)
    if isinstance(pixels, str):
        name = image if isinstance(image, str | os.PathLike) else "one"
        raise ValueError(f"expected an image that can be read, got {name}: {pixels}")
    weights = tower_weight(model)
    with eval_mode(model):
        return encode_image(model, pixels[None].to(weights.device, weights.dtype)).embedding[0].float().cpu()


def warn_of_method(folder: object, settings: Settings, model: nn.Module) -> None:
    """Warn if images of a collection were encoded with another method than a model is patched with."""
    method, exported = _method(model), find_exported(model)
    actual = HOST if method is None else repr(method)
    if exported is not None:
        actual = exported.method or HOST
    if actual != settings.method and {actual, settings.method} != {HOST, repr(Dense())}:
        warnings.warn(
            f"the query is encoded with {actual}, the images of {folder} with {settings.method}: their similarities "
            "are lower than those of images encoded alike, and other images may come first",
            stacklevel=3,
        )


def _method(model: nn.Module) -> Any:
    try:
        return method_of(model)
    except UnsupportedTower:  # a ResNet
        return None
