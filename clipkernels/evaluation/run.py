"""An evaluation that is under way: its results, its features and its progress."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from clipkernels.evaluation.datasets import Items
from clipkernels.evaluation.features import Features, encode
from clipkernels.evaluation.plan import Combinations, Model
from clipkernels.evaluation.results import Progress, Results
from clipkernels.methods import Method
from clipkernels.patching import patched


class Stopped(Exception):
    """The caller stopped the evaluation."""


class Run:
    """An evaluation that is under way.

    Args:
        combinations, model: what is scored, and by which model.
        folder: the folder of the state.
        progress: called with the progress; a true result stops the run.
    """

    def __init__(
        self, combinations: Combinations, model: Model, folder: Path, progress: Callable[[Progress], bool]
    ) -> None:
        self.combinations, self.model, self.folder, self.progress = combinations, model, folder, progress
        self.results = Results([], [], {})

    def as_method(self, method: Method | None) -> AbstractContextManager[Any]:
        """A context in which the model runs a method."""
        return nullcontext() if method is None else patched(self.model.model, method)

    def features(
        self, data: str, split: str, items: Items, kinds: Collection[str], name: str, method: Method | None
    ) -> Features:
        """The features of images by the method that the model runs; images without features are added to the results.

        Args:
            data, split, name: of the data set, the split and the method, for the progress.
            items: the images.
            kinds: features besides embeddings.
            method: the method.
        Raises:
            Stopped: the caller stopped the run.
        """
        unread = self.results.unread.setdefault(data, {})

        def report(done: int, total: int) -> bool:
            return self.progress(Progress(f"{data}, {name}, {split}", done, total, len(unread)))

        features = encode(self.model, items, kinds, self.folder, repr(method), report)
        if features is None:
            raise Stopped
        unread |= features.unread
        return features

    def report(self, phase: str, done: int, total: int, data: str) -> None:
        """Report `done` of `total` runs of a phase on a data set; raise Stopped if the caller stops there."""
        if self.progress(Progress(phase, done, total, len(self.results.unread.get(data, {})))):
            raise Stopped
