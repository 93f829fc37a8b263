"""How far a long run is: a bar on a terminal, else a line every 30 seconds."""

from __future__ import annotations

import time
from typing import Protocol

import click
from rich.progress import Progress as Bars

from clipkernels.cli.parts.output import progress
from clipkernels.messages import quantity

SECONDS_BETWEEN_LINES = 30


class State(Protocol):
    """The items of a run that are done, all of its items, and those that are left out so far."""

    @property
    def done(self) -> int: ...

    @property
    def total(self) -> int: ...

    @property
    def errors(self) -> int: ...


class Reporter:
    """How far a run is: a bar on a terminal, else a line every 30 seconds.

    Calling it with the state of a run returns true once a signal has come.

    Args:
        stop: holds the signal once one has come, as `stopping` yields it.
        activity: the word for what is done, such as "embedding".
        item: the noun of what is counted.
        first: the activity before the first state, such as a listing.
    """

    def __init__(self, stop: list[int], activity: str, item: str = "image", first: str | None = None) -> None:
        self.stop, self.activity, self.item, self.before = stop, activity, item, first or activity
        self.usual = activity
        self.last: State | None = None
        self.started = self.shown = self.began = self.updated = time.monotonic()
        self.first: tuple[float, int] | None = None

    def __enter__(self) -> Reporter:
        self.bar: Bars = progress()
        self.bar.start()
        self.task = self.bar.add_task(self.before, total=None)
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def begin(self, activity: str) -> None:
        """Start another activity; its rate counts from the last state, because its first batch may be done by now."""
        if activity != self.activity:
            self.activity, self.first, self.began = activity, None, self.updated

    def line(self, text: str) -> None:
        """Write a line above the bar."""
        self.bar.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def __call__(self, state: State, note: str = "") -> bool:
        now = time.monotonic()
        rate = self.rate(state, now)
        self.last, self.updated = state, now
        notes = f", {quantity(state.errors, 'error')}" if state.errors else ""
        notes += f", {note}" if note else ""
        speed = f"{rate:.1f} {self.item}s/s"
        description = f"{self.activity}, {speed}{notes}"
        self.bar.update(self.task, description=description, completed=state.done, total=state.total)
        if self.bar.disable and now - self.shown >= SECONDS_BETWEEN_LINES:
            self.shown = now
            left = duration((state.total - state.done) / rate if rate else 0.0)
            lead = "" if self.activity == self.usual else f"{self.activity}: "
            counts = f"{state.done} of {quantity(state.total, self.item)}"
            click.echo(f"{lead}{counts}, {speed}{notes}, {left} left", err=True)
        return bool(self.stop)

    def rate(self, state: State, now: float) -> float:
        """Return items per second after the first batch, which waits for the sources; of that one, since the start."""
        since, before = self.first or (self.began, 0)
        if self.first is None:
            self.first = now, state.done
        return (state.done - before) / max(now - since, 1e-9)


def duration(seconds: float) -> str:
    """Return a time for people: "2 h 5 min", "4 min 10 s", "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
