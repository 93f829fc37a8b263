"""The sources of a plan that an earlier run left, some of which may not be there any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipkernels.collection.sources import find_sources
from clipkernels.collection.sources.items import Answers, Source
from clipkernels.messages import first_line, printable

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass
class AbsentSource:
    """A source that cannot be found. It holds no items, and each that was planned has the reason."""

    name: str
    reason: str
    note: str | None = None

    def list(self, columns: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """Yield nothing."""
        return iter(())

    def columns(self) -> dict[str, pa.DataType]:
        """No columns."""
        return {}

    def fetch(self, ids: Sequence[str], places: Sequence[int], columns: Sequence[str]) -> Answers:
        """The reason for each item."""
        return [f"its source cannot be read: {self.reason}"] * len(ids)


def find_planned(names: Sequence[str], find: Callable[[Sequence[str]], list[Source]]) -> list[Source]:
    """The sources of a plan, in its order; those that cannot be found are absent.

    Args:
        names: paths and globs.
        find: finds sources by name.
    Raises:
        ValueError: no source that is there can have the columns of images or ids.
    """
    absent: dict[int, Source] = {}
    for index, name in enumerate(names):
        try:
            find_sources([name])
        except (ValueError, OSError) as error:
            absent[index] = AbsentSource(printable(name), first_line(error))
    present = [name for index, name in enumerate(names) if index not in absent]
    sources = iter(find(present) if present else ())
    return [absent[index] if index in absent else next(sources) for index in range(len(names))]
