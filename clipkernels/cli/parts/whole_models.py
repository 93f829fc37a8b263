"""Whole models, with everything that `ck.save` needs to write them again."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import click
from torch import nn

from clipkernels.artefacts.contents import has_text
from clipkernels.artefacts.header import is_artefact, read_header
from clipkernels.artefacts.save import save
from clipkernels.artefacts.transformers import run_processor
from clipkernels.cli.parts.models import load, load_clip, load_saved, load_transformers_tokenizer, loading
from clipkernels.data import Preprocess
from clipkernels.runtime.manifest import is_export


class WholeModel(NamedTuple):
    """A model in fp32 and eval mode, its preprocessing, and the arguments of `ck.save` that belong to it."""

    model: nn.Module
    preprocess: Preprocess
    parts: dict[str, Any]


def load_whole(library: str, name: str | None, pretrained: str | None) -> WholeModel:
    """Return a model and the parts that `ck.save` needs; errors as in `load`.

    Raises:
        click.UsageError: also for an exported folder, which has no model in PyTorch.
    """
    if name is None:
        model, preprocess, tokenizer = load_clip(library, name, pretrained)
        return WholeModel(model, preprocess, {"tokenizer": tokenizer})
    if is_artefact(name):
        model, preprocess, tokenizer = load_saved(library, name, pretrained, text=False)
        config = _saved_config(Path(name), read_header(name).library)
        return WholeModel(model, preprocess, {"config": config, "tokenizer": tokenizer, **_processor(preprocess)})
    if is_export(name):
        raise click.UsageError(f"expected a model in PyTorch, got {name}, which is exported: name the model itself")
    model, preprocess, _ = load(library, name, pretrained)
    parts: dict[str, Any] = {}
    if library == "open_clip":
        import open_clip

        with loading(name, pretrained):
            config = open_clip.get_model_config(name)
            # Weights may bring another activation than the configuration, such as OpenAI's.
            quick = any(type(module).__name__ == "QuickGELU" for module in model.modules())
            parts = {"config": {**config, "quick_gelu": quick}, "tokenizer": open_clip.get_tokenizer(name)}
    elif library == "transformers" and has_text(model):
        with suppress(click.ClickException):  # a model without a tokenizer is saved without one
            parts["tokenizer"] = load_transformers_tokenizer(name, pretrained)
    return WholeModel(model, preprocess, {**parts, **_processor(preprocess)})


def check_saving(model: nn.Module, out: str, parts: dict[str, Any]) -> None:
    """Raise ValueError, before hours of work are lost to it, unless a model can be saved beside the folder `out`.

    Raises:
        OSError: the folder cannot be written.
    """
    target = Path(os.path.abspath(out))
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        save(model, Path(folder, "trial"), **parts)


def _processor(preprocess: Any) -> dict[str, Any]:
    """The image processor of transformers in a preprocessing, as an argument of `ck.save`."""
    return {"preprocess": preprocess.args[0]} if getattr(preprocess, "func", None) is run_processor else {}


def _saved_config(folder: Path, library: str) -> Any:
    """The configuration in an artefact that its model does not carry."""
    files = {"open_clip": "open_clip_config.json", "timm": "config.json"}
    if library not in files:
        return None
    content = json.loads((folder / files[library]).read_text(encoding="utf-8"))
    return content if library == "open_clip" else content.get("model_args") or None
