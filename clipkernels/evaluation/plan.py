"""The combinations of an evaluation, and the model that they are scored by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from clipkernels.data import Preprocess
from clipkernels.evaluation.captions import Captions
from clipkernels.evaluation.datasets import Dataset
from clipkernels.methods import Method
from clipkernels.support import SupportSet


class Combinations(NamedTuple):
    """The combinations to score.

    data: labelled data sets.
    supports: support sets that stand for the classes of a data set, by its name.
    captions: images with captions, by name.
    methods: methods by name; None is the host's own forward.
    heads: names of `heads.HEADS`.
    shots: labelled images per class; 0 is for the heads that read none, and for support sets.
    seeds: the number of draws of labelled images, and of orders of a stream.
    """

    data: Sequence[Dataset]
    supports: Mapping[str, SupportSet]
    captions: Mapping[str, Captions]
    methods: Mapping[str, Method | None]
    heads: Sequence[str]
    shots: Sequence[int]
    seeds: int


class Model(NamedTuple):
    """A model on its device with tokenizer and preprocessing, and how it encodes.

    workers: loader processes.
    precision: its name in reports.
    """

    model: nn.Module
    tokenizer: Any
    preprocess: Preprocess
    batch_size: int
    workers: int
    precision: str
