"""The heads of an evaluation: the features that they read, and how each is made and tuned.

    zero-shot, calip        once
    tda, reservoir          several orders of the stream
    tip, tipx, tip-f, calip-fs   several draws of labelled images, for each number of shots

For point clouds zero-shot, calip and tip read every view as an image, and `MultiView` weighs the views.
Weights are searched on a validation split alone. Without one a head keeps the published weights of the data set, or
those of ImageNet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipkernels.encode import Encoded
from clipkernels.evaluation.features import Features
from clipkernels.evaluation.shots import draw_order, draw_shots
from clipkernels.heads import CALIP, TDA, MultiView, Reservoir, TipAdapter, TipX, ZeroShot
from clipkernels.heads.presets import CALIP_PRESETS, RESERVOIR_PRESETS, TDA_PRESETS, TIP_PRESETS, TipPreset
from clipkernels.learn.calip_fs import FewShotCALIP
from clipkernels.learn.tip_f import TipAdapterF

PUBLISHED, DEFAULTS, VALIDATION, TRAINED = "published", "defaults", "validation split", "trained on the shots"
EQUAL_VIEWS = "equal views"
OTHER_DATA = "imagenet"
"""The data set whose published settings are for other data, too."""
WIDE_GRID = (50.0, 50.0)
"""Ends of TIP-X's grid, and of Tip-Adapter's for data without a published one."""


Report = Callable[[int, int], None]


class Data(NamedTuple):
    """The features that heads of one data set and method read.

    name: of the data set.
    text: class embeddings (K,E).
    test, train, val: features of the splits; train and val where a head reads them and they exist.
    support: features (n,E) and labels (n,) of a support set, or None.
    stream: for a method whose tokens depend on the anchors of a reservoir, a function from that head, an order (n,) and
        `report` to predictions, which encodes the images anew.
    report: called with the images that a head has read in a pass, and those of the pass; it may raise to stop.
    """

    name: str
    text: Tensor
    test: Features
    train: Features | None
    val: Features | None
    support: tuple[Tensor, Tensor] | None = None
    stream: Callable[[Any, Tensor, Report], Tensor] | None = None
    report: Report = lambda done, total: None


class HeadKind(NamedTuple):
    """A kind of head.

    kinds: what it reads besides embeddings, as `ck.encode_image` names it.
    predict: a function from the data, the shots, the seed and the batch size to the predicted classes (n,) of the test
        split.
    few_shot: it reads labelled images of the train split.
    supported: it also reads a support set in their place, with shots of 0.
    stream: its result depends on the order of the images.
    tuned: its weights are searched on the validation split.
    weighted: it has weights beside the cosines.
    presets: its published weights by data set; None if there are none, as of TIP-X, whose γ is ours.
    of_views: it also serves objects of several views.
    """

    kinds: tuple[str, ...]
    predict: Callable[[Data, int, int, int], Tensor]
    few_shot: bool = False
    supported: bool = False
    stream: bool = False
    tuned: bool = False
    weighted: bool = True
    presets: Mapping[str, Any] | None = None
    of_views: bool = False

    def runs(self, shots: int, seeds: int) -> int:
        """The number of runs: all seeds if results differ between them, else one."""
        return seeds if self.stream or (self.few_shot and shots) else 1


def weights_of(kind: HeadKind, data: Data) -> str:
    """Return where the weights of a head and of the views come from, for a report."""
    if data.test.views == 1:
        return _weights_of_head(kind, data)
    if data.val is not None:
        return f"{VALIDATION}, {len(data.val)} clouds"
    return ", ".join(part for part in (_weights_of_head(kind, data), EQUAL_VIEWS) if part)


def _weights_of_head(kind: HeadKind, data: Data) -> str:
    if not kind.weighted:
        return ""
    if kind.few_shot and not kind.tuned:
        return TRAINED
    if kind.tuned and data.val is not None:
        return f"{VALIDATION}, {len(data.val)} images"
    if kind.presets is None:
        return DEFAULTS
    return PUBLISHED if data.name in kind.presets else f"{PUBLISHED} for {OTHER_DATA}"


@torch.inference_mode()
def predictions(head: Any, data: Data, batch: int, order: Tensor | None = None) -> Tensor:
    """The predicted classes (n,) of the test split, in its own order; a stream is given to the head in `order`."""
    predicted = torch.empty(len(data.test), dtype=torch.int64)
    order = torch.arange(len(data.test)) if order is None else order
    for rows, features in zip(order.split(batch), batches(data, data.test, batch, order), strict=True):
        predicted[rows] = head(features).argmax(1).cpu()
    return predicted


def batches(data: Data, features: Features, size: int, order: Tensor | None = None) -> Iterator[Encoded]:
    """The features of a split in batches, reported."""
    done = 0
    for batch in features.batches(size, order):
        data.report(done, len(features))
        yield batch
        done += len(batch.embedding)


def over_views(head: Any, data: Data, batch: int) -> Any:
    """The head itself for images; for clouds the head over their views, weighed on the validation split if there is."""
    if data.test.views == 1:
        return head
    multi_view = MultiView(head, views=data.test.views)
    if data.val is not None:
        multi_view.fit(batches(data, data.val, batch), data.val.labels)
    return multi_view


def _zero_shot(data: Data, shots: int, seed: int, batch: int) -> Tensor:
    return predictions(over_views(ZeroShot(data.text), data, batch), data, batch)


def _calip(data: Data, shots: int, seed: int, batch: int) -> Tensor:
    head = CALIP(data.text, preset=_preset(data, CALIP_PRESETS))
    if data.val is not None:
        head.fit(batches(data, data.val, batch), data.val.image_labels)
    return predictions(over_views(head, data, batch), data, batch)


def _stream(make: Any, presets: Any, data: Data, shots: int, seed: int, batch: int) -> Tensor:
    head, order = make(data.text, preset=_preset(data, presets)), draw_order(len(data.test), seed)
    if make is Reservoir and data.stream is not None:
        return data.stream(head, order, data.report)
    return predictions(head, data, batch, order)


def _tip(make: Any, data: Data, shots: int, seed: int, batch: int) -> Tensor:
    head, preset = make(data.text, *_support(data, shots, seed)), _tip_preset(data)
    if data.val is not None:
        head.fit(data.val.embedding, data.val.image_labels, WIDE_GRID if make is TipX else preset.grid)
    elif make is TipAdapter:
        head.alpha, head.beta = preset.alpha, preset.beta
    return predictions(over_views(head, data, batch), data, batch)


def _tip_f(data: Data, shots: int, seed: int, batch: int) -> Tensor:
    support, preset = _support(data, shots, seed), _tip_preset(data)
    head = TipAdapterF(data.text, *support, preset.alpha, preset.beta)
    head.fit(*support, seed=seed)
    if data.val is not None:
        head.search(data.val.embedding, data.val.labels, preset.grid)
    return predictions(head, data, batch)


def _calip_fs(data: Data, shots: int, seed: int, batch: int) -> Tensor:
    assert data.train is not None
    rows = draw_shots(data.train.labels, len(data.text), shots, seed)
    head = FewShotCALIP(data.text)
    head.fit(data.train.take(rows), data.train.labels[rows], seed=seed)
    return predictions(head, data, batch)


def _support(data: Data, shots: int, seed: int) -> tuple[Tensor, Tensor]:
    """The features (n,E) and labels (n,) of labelled images, every view one, or of the support set with shots of 0."""
    if not shots:
        assert data.support is not None
        return data.support
    assert data.train is not None
    rows = draw_shots(data.train.labels, len(data.text), shots, seed)
    images = data.train.images_of(rows)
    return data.train.embedding[images], data.train.image_labels[images]


def _tip_preset(data: Data) -> TipPreset:
    """Tip-Adapter's published settings; for other data ImageNet's weights, and the widest grid."""
    published = TIP_PRESETS[OTHER_DATA]
    other = published if data.name.startswith(OTHER_DATA) else published._replace(grid=WIDE_GRID)
    return TIP_PRESETS.get(data.name, other)


def _preset(data: Data, presets: Any) -> str:
    return data.name if data.name in presets else OTHER_DATA


HEADS = {
    "zero-shot": HeadKind((), _zero_shot, weighted=False, of_views=True),
    "calip": HeadKind(("tokens",), _calip, tuned=True, presets=CALIP_PRESETS, of_views=True),
    "tda": HeadKind((), partial(_stream, TDA, TDA_PRESETS), stream=True, presets=TDA_PRESETS),
    "reservoir": HeadKind(
        ("cls_path",), partial(_stream, Reservoir, RESERVOIR_PRESETS), stream=True, presets=RESERVOIR_PRESETS
    ),
    "tip": HeadKind(
        *((), partial(_tip, TipAdapter)), few_shot=True, supported=True, tuned=True, presets=TIP_PRESETS, of_views=True
    ),
    "tipx": HeadKind((), partial(_tip, TipX), few_shot=True, supported=True, tuned=True),
    "tip-f": HeadKind((), _tip_f, few_shot=True, tuned=True, presets=TIP_PRESETS),
    "calip-fs": HeadKind(("tokens",), _calip_fs, few_shot=True),
}
