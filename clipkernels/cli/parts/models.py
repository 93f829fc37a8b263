"""A model by its library's name for it, its preprocessing and tokenizer, its device and the precisions it may take.

The network is asked for nothing but what the user named: weights by tag, or a model of a hub.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import click
import torch
from PIL import Image
from torch import Tensor, nn

from clipkernels.cli.parts.output import quietly
from clipkernels.data import Preprocess, bundled
from clipkernels.images import first_line
from clipkernels.patching import tower_of

LIBRARIES = ("open_clip", "transformers", "timm")


class Loaded(NamedTuple):
    """A model in fp32 and eval mode, what makes a tensor (3,S,S) of a picture for it, and where its weights are from:
    "bundled", "random", a tag or a file."""

    model: nn.Module
    preprocess: Preprocess
    weights: str


def load(library: str, name: str | None, pretrained: str | None) -> Loaded:
    """The bundled model, or a library's.

    Raises:
        click.UsageError: an unknown model or tag, weights that are not there, a package that is not installed.
    """
    if name is None:
        refuse_unnamed(pretrained=pretrained, library=library if library != LIBRARIES[0] else None)
        model, preprocess, _ = bundled()
        return Loaded(model, preprocess, "bundled")
    loader = {"open_clip": load_open_clip, "transformers": load_transformers, "timm": load_timm}[library]
    model, preprocess, weights = loader(name, pretrained)
    return Loaded(model.float().eval(), preprocess, weights)


def load_clip(name: str | None, pretrained: str | None) -> tuple[nn.Module, Preprocess, Any]:
    """Model, preprocessing and tokenizer of a whole CLIP: the bundled ones, or open_clip's.

    Raises:
        click.UsageError: as in `load`, or a tokenizer that cannot be had.
    """
    if name is None:
        refuse_unnamed(pretrained=pretrained)
        return bundled()
    model, preprocess, _ = load_open_clip(name, pretrained)
    import open_clip

    with loading(name, pretrained):
        return model, preprocess, open_clip.get_tokenizer(name)


def load_open_clip(name: str, pretrained: str | None) -> Loaded:
    """open_clip's model; a name with a prefix such as hf-hub: brings its weights."""
    import open_clip  # here, so that the other verbs need none of it

    if ":" not in name:
        known(name, open_clip.list_models(), "open_clip")
        weights_of(name, pretrained, open_clip.list_pretrained_tags_by_model(name))
    with loading(name, pretrained):
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained, pretrained_text=False)
    return Loaded(model, preprocess, pretrained or ("random" if ":" not in name else name))


def load_timm(name: str, pretrained: str | None) -> Loaded:
    """timm's model; a name with the prefix hf-hub: or local-dir: brings its weights."""
    with imported("timm"):
        import timm
        from timm.models import load_checkpoint

    prefixed = ":" in name
    plain, _, tag = (name, "", "") if prefixed else name.partition(".")
    if prefixed and pretrained is not None:
        raise click.UsageError(f"expected no --pretrained with {name}, which brings its weights, got {pretrained}")
    if not prefixed:
        known(plain, timm.list_models(), "timm")
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{plain}.*")]
        if tag and tag not in tags:
            raise click.UsageError(f"expected one of {plain}'s tags ({', '.join(tags) or 'none'}), got {tag!r}")
        weights_of(name, pretrained, tags)
    with loading(name, pretrained):
        if pretrained is None or os.path.isfile(pretrained):
            model = timm.create_model(name, pretrained=prefixed)
            if pretrained is not None:
                load_checkpoint(model, pretrained, weights_only=True)
        else:
            model = timm.create_model(f"{plain}.{pretrained}", pretrained=True)
        preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return Loaded(model, preprocess, pretrained or (name if prefixed else "random"))


def load_transformers(name: str, pretrained: str | None) -> Loaded:
    """The model of a folder or of the hub; without `pretrained` its configuration alone is read."""
    with imported("transformers"):
        from transformers import AutoConfig, AutoModel

    folder = os.path.isdir(name)
    if folder and pretrained not in (None, "local"):
        raise click.UsageError(f"expected --pretrained local, for the weights in the folder {name}, got {pretrained!r}")
    weights_of(name, pretrained, None)
    where: dict[str, Any] = {"local_files_only": folder, "trust_remote_code": False}
    if pretrained is not None and not folder:
        where["revision"] = pretrained
    missing: Sequence[str] = ()
    with loading(name, pretrained):
        if pretrained is None:
            model = AutoModel.from_config(AutoConfig.from_pretrained(name, **where), trust_remote_code=False)
        else:
            model, info = AutoModel.from_pretrained(name, output_loading_info=True, **where)
            missing = sorted(info["missing_keys"])
    if missing:
        click.echo(f"warning: {name} has random weights in {len(missing)} places, such as {missing[0]}", err=True)
    preprocess = transformers_preprocess(name, where, tower_of(model).image_size)
    return Loaded(model, preprocess, pretrained or "random")


def transformers_preprocess(name: str, where: dict[str, Any], size: tuple[int, int]) -> Preprocess:
    """The image processor that comes with a model; where none does that makes (3,S,S), a resize and a crop of the
    centre with the mean and deviation that it names, or CLIP's."""
    from open_clip.transform import image_transform
    from transformers import AutoImageProcessor

    statistics = {}
    try:
        with quietly():
            processor: Any = AutoImageProcessor.from_pretrained(name, **where)
            preprocess = partial(run_processor, processor)
            if tuple(preprocess(Image.new("RGB", (64, 48))).shape) == (3, *size):
                return preprocess
        reason = "its image processor gives something else"
        statistics = {key: getattr(processor, f"image_{key}", None) for key in ("mean", "std")}
    except Exception as error:  # OSError, ValueError or ImportError by version: none is there, or none that runs
        reason = first_line(error)
    click.echo(f"warning: {name} has no image processor for {size}: resize and crop instead ({reason})", err=True)
    return image_transform(size, is_train=False, **statistics)


def run_processor(processor: Any, image: Image.Image) -> Tensor:
    """The pixels (3,S,S) that an image processor of transformers makes of a picture."""
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def refuse_unnamed(**options: str | None) -> None:
    """Raises click.UsageError for an option that says something of a model when no model is named."""
    for option, given in options.items():
        if given is not None:
            raise click.UsageError(f"expected --model with --{option} {given}, got no --model")


def known(name: str, names: Sequence[str], library: str) -> None:
    """Raises click.UsageError, with what comes close, unless a library knows a model."""
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, 3)) or f"{names[0]}, …"
        raise click.UsageError(f"expected one of {library}'s models ({near}), got {name!r}")


def weights_of(name: str, pretrained: str | None, tags: Sequence[str] | None) -> None:
    """Raises click.UsageError for weights that are no file and no tag (None: any may be one); warns without any."""
    if pretrained is None:
        click.echo(f"warning: {name} has random weights without --pretrained: its answers mean nothing", err=True)
        torch.manual_seed(0)
    elif tags is not None and pretrained not in tags and not os.path.isfile(pretrained):
        listed = ", ".join(tags) or "none"
        raise click.UsageError(f"expected a checkpoint file or one of {name}'s tags ({listed}), got {pretrained!r}")


@contextmanager
def loading(name: str, pretrained: str | None) -> Iterator[None]:
    """Quiet, with whatever a download, a broken checkpoint or a wrong state dict raises as a click.UsageError."""
    try:
        with quietly():
            yield
    except Exception as error:
        source = "" if pretrained is None else f" with {pretrained}"
        raise click.UsageError(f"expected a model that loads, got {name}{source}: {first_line(error)}") from error


@contextmanager
def imported(package: str) -> Iterator[None]:
    """An import whose failure names the package to install."""
    try:
        with quietly():
            yield
    except ImportError as error:
        wanted = f"expected {package} to be installed (pip install {package})"
        raise click.UsageError(f"{wanted}, got: {first_line(error)}") from error


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is.

    Raises:
        click.UsageError: no such device here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except Exception as error:  # torch raises RuntimeError, AssertionError or NotImplementedError by kind of device
        raise click.UsageError(f"expected a device of this machine, got {name!r}: {first_line(error)}") from error
    return torch.device(name)
