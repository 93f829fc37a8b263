"""Models of open_clip, timm and transformers by their names, with preprocessing and tokenizer.

Nothing is downloaded but what the user named: weights by tag, or a model of a hub.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import click
import torch
from PIL import Image
from torch import nn

from clipkernels.artefacts.transformers import run_processor
from clipkernels.cli.parts.output import quietly
from clipkernels.data import Preprocess
from clipkernels.messages import first_line
from clipkernels.patching import tower_of


class Loaded(NamedTuple):
    """A model in fp32 and eval mode, its preprocessing from an image to a tensor (3,S,S), and its weights' source.

    The source is "bundled", "random", "saved", "exported", a tag, a file or a model of a hub.
    """

    model: nn.Module
    preprocess: Preprocess
    weights: str


def load_open_clip(name: str, pretrained: str | None) -> Loaded:
    """Return open_clip's model; a name with a prefix such as hf-hub: includes its weights."""
    import open_clip  # here, because not every verb needs it

    if ":" not in name:
        check_known(name, open_clip.list_models(), "open_clip")
        check_weights(name, pretrained, open_clip.list_pretrained_tags_by_model(name))
    with loading(name, pretrained):
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained, pretrained_text=False)
    return Loaded(model, preprocess, pretrained or ("random" if ":" not in name else name))


def load_timm(name: str, pretrained: str | None) -> Loaded:
    """Return timm's model; a name with the prefix hf-hub: or local-dir: includes its weights."""
    with imported("timm"):
        import timm
        from timm.models import load_checkpoint

    prefixed = ":" in name
    plain, _, tag = (name, "", "") if prefixed else name.partition(".")
    if prefixed and pretrained is not None:
        raise click.UsageError(f"expected no --pretrained with {name}, which includes its weights, got {pretrained}")
    if not prefixed:
        check_known(plain, timm.list_models(), "timm")
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{plain}.*")]
        if tag and tag not in tags:
            raise click.UsageError(f"expected one of {plain}'s tags ({', '.join(tags) or 'none'}), got {tag!r}")
        check_weights(name, pretrained, tags)
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
    """Return the model of a folder or of the hub; without `pretrained` only its configuration is read."""
    with imported("transformers"):
        from transformers import AutoConfig, AutoModel

    if os.path.isdir(name) and pretrained not in (None, "local"):
        raise click.UsageError(f"expected --pretrained local, for the weights in the folder {name}, got {pretrained!r}")
    check_weights(name, pretrained, None)
    where = hub_options(name, pretrained)
    missing: Sequence[str] = ()
    with loading(name, pretrained), bars_on_terminals():
        if pretrained is None:
            model = AutoModel.from_config(AutoConfig.from_pretrained(name, **where), trust_remote_code=False)
        else:
            model, info = AutoModel.from_pretrained(name, output_loading_info=True, **where)
            missing = sorted(info["missing_keys"])
    if missing:
        click.echo(f"warning: {name} has random weights in {len(missing)} places, such as {missing[0]}", err=True)
    preprocess = transformers_preprocess(name, where, tower_of(model).image_size)
    return Loaded(model, preprocess, pretrained or "random")


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Hide the progress bars of transformers where stderr is not a terminal, because there an error is one line."""
    from transformers.utils import logging

    hidden = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()


def hub_options(name: str, pretrained: str | None) -> dict[str, Any]:
    """Return the options of `from_pretrained` for a folder, or for a revision of a model of the hub."""
    folder = os.path.isdir(name)
    revision = {} if pretrained is None or folder else {"revision": pretrained}
    return {"local_files_only": folder, "trust_remote_code": False, **revision}


def load_transformers_tokenizer(name: str, pretrained: str | None) -> Any:
    """Return the tokenizer of a folder or of a model of the hub.

    Raises:
        click.ClickException: it has none, or one that cannot be loaded.
    """
    from transformers import AutoTokenizer

    with loading(name, pretrained):
        tokenizer = AutoTokenizer.from_pretrained(name, **hub_options(name, pretrained))
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers 5 makes one from the configuration alone
        raise click.ClickException(f"expected {name} to hold a tokenizer, got one without a vocabulary: save it there")
    return tokenizer


def transformers_preprocess(name: str, where: dict[str, Any], size: tuple[int, int]) -> Preprocess:
    """Return the preprocessing of a model: its own image processor if that makes tensors (3,S,S).

    Otherwise it is a resize and a centre crop, with the mean and deviation of the image processor, or CLIP's, and a
    warning says so.
    """
    from open_clip.transform import image_transform
    from transformers import AutoImageProcessor

    statistics = {}
    try:
        with quietly():
            processor: Any = AutoImageProcessor.from_pretrained(name, **where)
            preprocess = partial(run_processor, processor)
            if tuple(preprocess(Image.new("RGB", (64, 48))).shape) == (3, *size):
                return preprocess
        reason = "its image processor makes another shape"
        statistics = {key: getattr(processor, f"image_{key}", None) for key in ("mean", "std")}
    except Exception as error:  # OSError, ValueError or ImportError by version: it is missing or does not run
        reason = first_line(error)
    click.echo(f"warning: {name} has no image processor for {size}: resize and crop instead ({reason})", err=True)
    return image_transform(size, is_train=False, **statistics)


def check_known(name: str, names: Sequence[str], library: str) -> None:
    """Raise click.UsageError, with similar names, unless a library has a model."""
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, 3)) or f"{names[0]}, …"
        raise click.UsageError(f"expected one of {library}'s models ({near}), got {name!r}")


def check_weights(name: str, pretrained: str | None, tags: Sequence[str] | None) -> None:
    """Raise click.UsageError unless the weights are a file or a tag, and warn if they are random.

    Args:
        name: the model.
        pretrained: the weights, or None for random ones.
        tags: the tags of the model; None accepts every tag.
    """
    if pretrained is None:
        click.echo(f"warning: {name} has random weights without --pretrained: its answers mean nothing", err=True)
        torch.manual_seed(0)
    elif tags is not None and pretrained not in tags and not os.path.isfile(pretrained):
        listed = ", ".join(tags) or "none"
        raise click.UsageError(f"expected a checkpoint file or one of {name}'s tags ({listed}), got {pretrained!r}")


@contextmanager
def loading(name: str, pretrained: str | None) -> Iterator[None]:
    """Silence libraries, and raise the errors of a download, a checkpoint or a state dict as click.ClickException.

    A package that is not installed is a click.UsageError, as in `imported`.
    """
    try:
        with quietly():
            yield
    except Exception as error:
        source = "" if pretrained is None else f" with {pretrained}"
        kind = click.UsageError if isinstance(error, ImportError) else click.ClickException
        raise kind(f"expected a model that loads, got {name}{source}: {first_line(error)}") from error


@contextmanager
def imported(package: str) -> Iterator[None]:
    """Raise the failure of an import as a click.UsageError that names the package to install."""
    try:
        with quietly():
            yield
    except ImportError as error:
        expected = f"expected {package} to be installed (pip install {package})"
        raise click.UsageError(f"{expected}, got: {first_line(error)}") from error
