"""Models by their library's names, with preprocessing and tokenizer, and the device they run on.

Nothing is downloaded but what the user named: weights by tag, or a model of a hub.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import click
import torch
from PIL import Image
from torch import nn

from clipkernels.artefacts.header import is_artefact, read_header
from clipkernels.artefacts.load import load as load_artefact
from clipkernels.artefacts.transformers import run_processor
from clipkernels.cli.parts.output import quietly
from clipkernels.data import Preprocess, bundled
from clipkernels.messages import first_line
from clipkernels.patching import tower_of

LIBRARIES = ("open_clip", "transformers", "timm")
NAME_HELP = (
    "The library's name for the model; transformers: a folder or a name on the hub; or a folder of ck.save, whose "
    "method runs too.  [default: the small bundled CLIP]"
)
WEIGHTS_HELP = (
    "Weights. open_clip, timm: a tag, which is downloaded, or a checkpoint file; transformers: a revision such as "
    "main, or local for the weights in a folder. Without it the weights are random."
)


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


class Loaded(NamedTuple):
    """A model in fp32 and eval mode, its preprocessing from an image to a tensor (3,S,S), and its weights' source.

    The source is "bundled", "random", "saved", a tag, a file or a model of a hub.
    """

    model: nn.Module
    preprocess: Preprocess
    weights: str


def load(library: str, name: str | None, pretrained: str | None) -> Loaded:
    """Return the bundled model, a library's, or that of a folder of `ck.save`, patched with the folder's method.

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


def refuse_unnamed(**options: str | None) -> None:
    """Raise click.UsageError for an option about a model when no model is named."""
    for option, value in options.items():
        if value is not None:
            raise click.UsageError(f"expected --model with --{option} {value}, got no --model")


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


def cast_towers(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a model on a device, in eval mode and in `dtype`, all but the scale and the bias of its logits.

    The scale is stored as its logarithm, whose rounding to bf16 may change it by more than a percent.
    """
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
