"""The settings of a run, by its model and its arguments, and the circumstances that are noted beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import msgspec
import torch
from torch import nn

from clipkernels import __version__, adapters
from clipkernels.adapters import UnsupportedTower
from clipkernels.adapters.text import find_text_encoder
from clipkernels.collection.manifest import Settings
from clipkernels.collection.packages import pyarrow
from clipkernels.data import Preprocess
from clipkernels.encode import encode_image, tower_weight
from clipkernels.fingerprint import fingerprint
from clipkernels.images import Reader
from clipkernels.images.batches import image_shape
from clipkernels.methods import Dense, Schedule
from clipkernels.patching import method_of
from clipkernels.plan_records import PlanRecord, record_plan
from clipkernels.support.features import encoder_of
from clipkernels.tower import make_plan


class Name(NamedTuple):
    """The names that load a model from the command line, and its method's specification; None for one from Python."""

    library: str | None = None
    model: str | None = None
    pretrained: str | None = None
    method: str | None = None


def settings_of(
    model: nn.Module,
    preprocess: Preprocess,
    reader: Reader,
    name: Name,
    raw: bool,
    dtype: Literal["float32", "float16"] | None,
    text: str | None,
    columns: Mapping[str, Any],
) -> Settings:
    """The settings of a run.

    Raises:
        UnsupportedTower: a model that `ck.encode_image` does not take, or without a text tower for captions.
    """
    about, weight = encoder_of(model, preprocess, reader), tower_weight(model)
    exported = adapters.find_exported(model)
    try:
        tower = adapters.find_tower(model)
        tokens = list(make_plan(method_of(model) or Dense(), tower, tower.num_tokens).tokens)
    except UnsupportedTower:  # a ResNet, or an exported model
        tokens = list(exported.tokens) if exported else []
    if text is not None:
        find_text_encoder(model)
    shape = image_shape(model, preprocess)
    with torch.inference_mode():
        blank = torch.zeros(1, *shape, device=weight.device, dtype=weight.dtype)
        width = encode_image(model, blank).embedding.shape[1]
    return Settings(
        library=name.library, model=name.model, pretrained=name.pretrained,
        tower=about.tower, text_tower=None if text is None else fingerprint(model, "text"),
        method=about.method, tokens=tokens, precision=cast(Any, str(weight.dtype).removeprefix("torch.")),
        preprocess=about.preprocess, reader=about.reader,
        width=width, dtype=dtype or ("float32" if weight.dtype in (torch.float32, torch.float64) else "float16"),
        normalised=not raw, text=text, columns={column: str(kind) for column, kind in columns.items()},
    )  # fmt: skip


def schedule_of(model: nn.Module) -> PlanRecord | msgspec.UnsetType:
    """The record of the plan of a model that is patched with a `ck.Schedule`; unset for another method."""
    try:
        method = method_of(model)
    except UnsupportedTower:  # a ResNet
        return msgspec.UNSET
    if not isinstance(method, Schedule):
        return msgspec.UNSET
    return record_plan(method.plan(method.tokens, len(method.steps), method.prefix))


def notes_of(model: nn.Module, batch_size: int, compiled: bool) -> dict[str, Any]:
    """The circumstances of a run that may change the last bits of an embedding."""
    return {
        "batch_size": batch_size, "threads": torch.get_num_threads(), "compiled": compiled,
        "device": tower_weight(model).device.type, "clipkernels": __version__, "torch": str(torch.__version__),
        "pyarrow": pyarrow().__version__,
    }  # fmt: skip
