"""Ctrl-C and SIGTERM: the first one stops a run after its batch, a second one at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click


@contextmanager
def stopping(unit: str = "batch") -> Iterator[list[int]]:
    """Yield a list that holds the signal after Ctrl-C or SIGTERM; a second signal ends the process at once.

    The line on stderr says that the run stops after this `unit`.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        click.echo(f"stopping after this {unit}; a second signal stops at once", err=True)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
