"""Models as the options of a verb name them, and the device they run on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import click
import torch
from torch import nn

from clipkernels.adapters import find_exported
from clipkernels.artefacts.header import is_artefact, read_header
from clipkernels.artefacts.load import load as load_artefact
from clipkernels.cli.parts.model_libraries import (
    Loaded,
    bars_on_terminals,
    hub_options,
    imported,
    load_open_clip,
    load_timm,
    load_transformers,
    load_transformers_tokenizer,
    loading,
    transformers_preprocess,
)
from clipkernels.data import Preprocess, bundled
from clipkernels.exporting.exported_model import load_exported
from clipkernels.messages import first_line
from clipkernels.patching import tower_of
from clipkernels.runtime.manifest import is_export, read_export

LIBRARIES = ("open_clip", "transformers", "timm")
NAME_HELP = (
    "The library's name for the model; transformers: a folder or a name on the hub; or a folder of ck.save, whose "
    "method runs too. classify and embed also take a folder of clipkernels export.  [default: the small bundled CLIP]"
)
WEIGHTS_HELP = (
    "Weights. open_clip, timm: a tag, which is downloaded, or a checkpoint file; transformers: a revision such as "
    "main, or local for the weights in a folder. Without it the weights are random."
)

BUNDLED_NOTE = (
    "note: without --model this is the bundled model for 32×32 images, a toy. It was trained on CIFAR-10's training "
    "photographs, digits and drawn scenes: figures on those do not hold for images that are new to it"
)
"""For verbs that give figures without --model."""


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name a model, --library, --model and --pretrained, to a command."""
    options = (
        click.option(
            "--library",
            type=click.Choice(LIBRARIES),
            default=LIBRARIES[0],
            show_default=True,
            help="Library that the model is from.",
        ),
        click.option("--model", "name", help=NAME_HELP),
        click.option("--pretrained", help=WEIGHTS_HELP),
    )
    for option in reversed(options):
        command = option(command)
    return command


def load(library: str, name: str | None, pretrained: str | None) -> Loaded:
    """Return the bundled model, a library's, or a folder's: of `ck.save`, patched with its method, or an exported one.

    Raises:
        click.UsageError: an unknown model or tag, or a package that is not installed.
        click.ClickException: a model that cannot be downloaded or loaded.
        ValueError: such a folder that is not as it was written.
    """
    if name is None:
        refuse_unnamed(pretrained=pretrained, library=library if library != LIBRARIES[0] else None)
        model, preprocess, _ = bundled()
        return Loaded(model, preprocess, "bundled")
    if is_artefact(name):
        model, preprocess, _ = load_saved(library, name, pretrained, text=False)
        return Loaded(model, preprocess, "saved")
    if is_export(name):
        model, preprocess, _ = load_from_export(library, name, pretrained, text=False)
        return Loaded(model, preprocess, "exported")
    loader = {"open_clip": load_open_clip, "transformers": load_transformers, "timm": load_timm}[library]
    model, preprocess, weights = loader(name, pretrained)
    return Loaded(model.float().eval(), preprocess, weights)


def load_clip(library: str, name: str | None, pretrained: str | None) -> tuple[nn.Module, Preprocess, Any]:
    """Return model, preprocessing and tokenizer of a whole CLIP: the bundled ones, a library's, or a folder's.

    Raises:
        click.UsageError: as in `load`, or timm, which has no text towers.
        click.ClickException: as in `load`, or a tokenizer that cannot be loaded.
        ValueError: as in `load`.
    """
    if name is not None and is_artefact(name):
        return load_saved(library, name, pretrained, text=True)
    if name is not None and is_export(name):
        return load_from_export(library, name, pretrained, text=True)
    if name is not None and library == "timm":
        expected = "expected a model with a text tower (--library open_clip or transformers)"
        raise click.UsageError(f"{expected}, got timm's {name}: timm has no text tower")
    model, preprocess, _ = load(library, name, pretrained)
    if name is None:
        return model, preprocess, bundled()[2]
    if library == "open_clip":
        import open_clip

        with loading(name, pretrained):
            return model, preprocess, open_clip.get_tokenizer(name)
    return model, preprocess, load_transformers_tokenizer(name, pretrained)


def load_saved(library: str, name: str, pretrained: str | None, text: bool) -> tuple[nn.Module, Preprocess, Any]:
    """Return model, preprocessing and tokenizer of a folder of `ck.save`; the tokenizer may be None without `text`.

    Raises:
        click.UsageError: options that do not go with such a folder, a model without text, or a missing library.
        ValueError: the folder is not as it was written.
    """
    header = read_header(name)
    if pretrained not in (None, "local"):
        raise click.UsageError(f"expected no --pretrained with {name}, which holds its weights, got {pretrained}")
    if library not in (LIBRARIES[0], header.library):
        raise click.UsageError(f"expected no --library with {name}, a model of {header.library}, got {library}")
    if text and header.text_tower is None:
        raise click.UsageError(f"expected a model with a text tower, got {name}: {header.library}'s {header.model}")
    if text and header.tokenizer is None:
        raise click.UsageError(f"expected {name} to hold a tokenizer, got none: pass tokenizer= to ck.save")
    with imported(header.library), bars_on_terminals() if header.library == "transformers" else nullcontext():
        model, preprocess, tokenizer = load_artefact(name)
    if preprocess is None:
        preprocess = transformers_preprocess(name, hub_options(name, "local"), tower_of(model).image_size)
    return model.float(), preprocess, tokenizer


def load_from_export(library: str, name: str, pretrained: str | None, text: bool) -> tuple[nn.Module, Preprocess, Any]:
    """Return an exported folder as a model, its preprocessing and its tokenizer, which may be None without `text`.

    Raises:
        click.UsageError: options that do not go with such a folder, one without text, or a missing package.
        ValueError: the folder is not as it was written.
    """
    info = read_export(name)
    if pretrained not in (None, "local") or library not in (LIBRARIES[0], info["name"]["library"]):
        option = "--library" if pretrained in (None, "local") else "--pretrained"
        value = library if option == "--library" else pretrained
        raise click.UsageError(f"expected no {option} with {name}, which was exported with its weights, got {value}")
    for part, noun in (("text", "text tower"), ("tokenizer", "tokenizer")) if text else ():
        if info[part] is None:
            raise click.UsageError(f"expected an exported folder with a {noun}, got {name} without: export it again")
    try:
        return load_exported(name)
    except ImportError as error:
        raise click.UsageError(str(error)) from error


def refuse_unnamed(**options: str | None) -> None:
    """Raise click.UsageError for an option about a model when no model is named."""
    for option, value in options.items():
        if value is not None:
            raise click.UsageError(f"expected --model with --{option} {value}, got no --model")


def cast_towers(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a model on a device, in eval mode and in `dtype`, all but the scale and the bias of its logits.

    The scale is stored as its logarithm, whose rounding to bf16 may change it by more than a percent.

    Raises:
        click.UsageError: another precision than fp32 for an exported model, which has its own.
    """
    exported = find_exported(model)
    if exported is not None and dtype != torch.float32:
        expected = f"expected no --precision with an exported model, which has its own ({exported.runtime})"
        raise click.UsageError(f"{expected}, got {str(dtype).removeprefix('torch.')}")
    numbers = {name: getattr(model, name, None) for name in ("logit_scale", "logit_bias")}
    copies = {name: number.detach().clone() for name, number in numbers.items() if number is not None}
    model = model.to(device, dtype).eval()
    for name, number in copies.items():
        setattr(model, name, nn.Parameter(number.to(device)))
    return model


def choose_device(name: str | None) -> torch.device:
    """Return the named device, or CUDA where there is one, else the CPU.

    Raises:
        click.UsageError: this machine has no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except Exception as error:  # torch raises RuntimeError, AssertionError or NotImplementedError by kind of device
        raise click.UsageError(f"expected a device of this machine, got {name!r}: {first_line(error)}") from error
    return torch.device(name)
