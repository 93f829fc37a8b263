"""An evaluation that is under way: its results, its features and its progress."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipkernels.classifier import PROMPTS_PER_BATCH, class_embeddings
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
        self.results = Results([], [], [])
        self.texts: dict[str, Tensor] = {}

    def as_method(self, method: Method | None) -> AbstractContextManager[Any]:
        """A context in which the model runs a method."""
        return nullcontext() if method is None else patched(self.model.model, method)

    def features(
        self, data: str, split: str, items: Items, kinds: Collection[str], name: str, method: Method | None
    ) -> Features:
        """The features of images by the method that the model runs.

        Args:
            data, split, name: of the data set, the split and the method, for the progress.
            items: the images.
            kinds: features besides embeddings.
            method: the method.
        Raises:
            Stopped: the caller stopped the run.
        """

        def report(done: int, total: int, errors: int) -> bool:
            return self.progress(Progress(f"{data}, {name}, {split}", done, total, errors))

        features = encode(self.model, items, kinds, self.folder, repr(method), report)
        if features is None:
            raise Stopped
        return features

    def encode_texts(self, key: str, phase: str, item: str, prompts: Mapping[str, Sequence[str]]) -> Tensor:
        """The class embeddings (K,E) fp32 of prompts on the CPU, encoded once for all methods.

        Args:
            key: stands for the prompts in this run.
            phase, item: of the progress.
            prompts: the prompts of each class.
        Raises:
            Stopped: the caller stopped the run.
        """
        if key not in self.texts:
            names, parts = list(prompts), []
            step = max(1, PROMPTS_PER_BATCH // max(map(len, prompts.values())))
            for start in range(0, len(names), step):
                self.report(phase, start, len(names), item)
                part = {name: prompts[name] for name in names[start : start + step]}
                parts.append(class_embeddings(self.model.model, self.model.tokenizer, part).float().cpu())
            self.texts[key] = torch.cat(parts)
        return self.texts[key]

    def report(self, phase: str, done: int, total: int, item: str = "image") -> None:
        """Report `done` of `total` items of a phase; raise Stopped if the caller stops there."""
        if self.progress(Progress(phase, done, total, 0, item)):
            raise Stopped
