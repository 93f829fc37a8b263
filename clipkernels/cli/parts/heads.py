"""The heads of `clipkernels classify`: their options, and the file of a head that adapts to a stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType

import click
from click.core import ParameterSource
from torch import Tensor

from clipkernels.heads import CALIP, TDA, Head, Reservoir, TipAdapter, TipX, ZeroShot
from clipkernels.heads.presets import CALIP_PRESETS, RESERVOIR_PRESETS
from clipkernels.messages import quantity
from clipkernels.support import SupportSet

SAVE_EVERY = 30  # seconds
SUPPORTED = ("tip", "tipx")  # the heads that read a support set
STREAM_HEADS: dict[str, type[Reservoir] | type[TDA]] = {"tca": Reservoir, "tda": TDA}  # by --adapt; their presets agree


def check_head(
    context: click.Context, head: str | None, adapt: str | None, preset: str, reservoir: str | None, frozen: bool
) -> None:
    """Raise click.UsageError unless the options of a head belong together."""
    if adapt and head:
        raise click.UsageError(f"expected --adapt or --head, got both: --adapt {adapt} has a head of its own")
    owners = {
        "preset": (bool(adapt) or head == "calip", "--adapt or --head calip"),
        "reservoir": (bool(adapt), "--adapt"),
        "frozen": (bool(adapt), "--adapt"),
        "support": (head in SUPPORTED, "--head tip or tipx"),
    }
    for option, (fits, expected) in owners.items():
        if is_set(context, option) and not fits:
            raise click.UsageError(f"expected {expected} with --{option}, got {f'--head {head}' if head else 'none'}")
    if head in SUPPORTED and not is_set(context, "support"):
        raise click.UsageError(f"expected --support with --head {head}, got none: see clipkernels support build")
    known = RESERVOIR_PRESETS if adapt else CALIP_PRESETS
    if (adapt or head == "calip") and preset not in known:
        raise click.UsageError(f"expected --preset to be one of {', '.join(known)}, got {preset!r}")
    if frozen and (reservoir is None or not Path(reservoir).exists()):
        raise click.UsageError(f"expected --reservoir with a file that exists for --frozen, got {reservoir!r}")


def choose_head(
    head: str | None, adapt: str | None, preset: str, frozen: bool, support_set: SupportSet | None
) -> Callable[[Tensor], Head]:
    """Return a function that makes the head of the options from class embeddings (K,E)."""
    if adapt:
        return partial(STREAM_HEADS[adapt], preset=preset, frozen=frozen)
    if head == "calip":
        return partial(CALIP, preset=preset)
    if support_set is not None:
        adapter = TipX if head == "tipx" else TipAdapter
        return partial(adapter, features=support_set.features, labels=support_set.labels)
    return ZeroShot


def is_set(context: click.Context, option: str) -> bool:
    """Return true if an option was named on the command line."""
    return context.get_parameter_source(option) is ParameterSource.COMMANDLINE


class ReservoirFile:
    """The file of a head that learns: read on entry if it exists, written every 30 seconds and on exit.

    It is written on exit after an error or an interruption, too, and only if the head has seen images since it was
    read. Without a path nothing happens.
    """

    def __init__(self, head: Head, path: str | None) -> None:
        self.head, self.path = head, path
        self.seen, self.saved = 0, time.monotonic()

    def __enter__(self) -> ReservoirFile:
        """Read the file.

        Raises:
            click.UsageError: a folder, or a file that cannot be read or written.
            ValueError: a file of another kind of head, or of other classes or another capacity.
        """
        if self.path is None or not isinstance(self.head, (Reservoir, TDA)):
            return self
        path = Path(self.path)
        if path.is_dir():
            raise click.UsageError(f"expected a file for --reservoir, got the folder {path}")
        try:
            if not self.head.frozen:  # better now than after an hour
                with TemporaryFile(dir=path.absolute().parent):
                    pass
            if path.exists():
                self.head.load(path)
        except OSError as error:
            expected = "expected a file that can be read and written for --reservoir"
            raise click.UsageError(f"{expected}, got {path}: {error.strerror or error}") from error
        self.seen = self.head.seen
        if self.seen:
            cached = int(self.head.counts.sum())
            click.echo(f"{path}: resumed: {quantity(self.seen, 'image')} seen, {cached} cached", err=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.save()

    def save(self) -> None:
        """Write the file if the head has seen images since it was read.

        Raises:
            click.ClickException: the file cannot be written.
        """
        if self.path is None or not isinstance(self.head, (Reservoir, TDA)) or self.head.seen <= self.seen:
            return
        try:
            self.head.save(self.path)
        except OSError as error:
            raise click.ClickException(f"expected to write --reservoir {self.path}: {error.strerror}") from error

    def save_if_due(self) -> None:
        """Write the file if 30 seconds have passed since it was last written."""
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()
            self.saved = time.monotonic()
