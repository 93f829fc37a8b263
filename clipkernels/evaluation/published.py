"""Figures that papers print, to set beside measured ones.

`clipkernels/data/published.json` holds a row of a table per entry. A figure is verified if it was read in the paper or
in its authors' repository; the others are from memory, and `source` says so. Figures that nobody could look up are
absent.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files
from typing import Annotated, NamedTuple

import msgspec

from clipkernels.arguments import check_int
from clipkernels.evaluation.datasets import DATASETS
from clipkernels.evaluation.text_files import read_json

CROSS_DATA = ("fgvc", "caltech101", "cars", "dtd", "eurosat", "flowers", "food101", "pets", "sun397", "ucf101")
SHIFTED = ("imagenet_a", "imagenet_v2", "imagenet_r", "imagenet_sketch")
MEANS = {
    "mean of 10": CROSS_DATA,
    "mean of 11": ("imagenet", *CROSS_DATA),
    "mean of 5": ("imagenet", *SHIFTED),
    "mean of 4": SHIFTED,
}
"""Names of the means that tables print, with their sets: the ten cross-data sets, these and ImageNet, ImageNet with its
four variants, the variants alone."""

Line = Annotated[str, msgspec.Meta(min_length=1, max_length=300)]


class Row(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A row of a published table; the fields are those of `Figure`, with a value for each data set."""

    paper: Line
    arxiv: Annotated[str, msgspec.Meta(pattern=r"^\d{4}\.\d{5}\Z")]
    table: Line
    source: Line
    model: Line
    method: Line
    head: Line
    shots: Annotated[int, msgspec.Meta(ge=0)]
    metric: Line
    prompts: Line
    verified: bool
    values: Annotated[dict[Line, Annotated[float, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1)]
    note: str = ""


class Figure(NamedTuple):
    """A published figure.

    paper, arxiv, table: the paper that prints it.
    source: the place where it was read.
    data: a key of `DATASETS`, or of `MEANS`.
    model: open_clip's names of the architecture and the weights: "ViT-B-16 openai".
    method: as `--method` spells it, or the paper's words where ours computes something else.
    head: "zero-shot", "calip", "tip", "tip-f", "tipx", "tda" or "reservoir".
    shots: labelled images per class.
    metric: "accuracy" in percent, or "gmacs".
    prompts: the prompts behind it.
    value: the figure.
    verified: it was read in the paper or in its authors' repository.
    note: a caveat, or "".
    """

    paper: str
    arxiv: str
    table: str
    source: str
    data: str
    model: str
    method: str
    head: str
    shots: int
    metric: str
    prompts: str
    value: float
    verified: bool
    note: str


OTHER_MODELS = {
    "openai/clip-vit-base-patch16": "ViT-B-16 openai",
    "ViT-B-16-quickgelu openai": "ViT-B-16 openai",
    "RN50-quickgelu openai": "RN50 openai",
}
"""Other names of models with published figures: transformers', and those of open_clip's second configuration."""


def published_model(name: str | None, pretrained: str | None) -> str:
    """The name in published figures of a model, from the names of its architecture and weights."""
    full = f"{name} {pretrained}"
    return OTHER_MODELS.get(full) or OTHER_MODELS.get(name or "") or full


@cache
def published_figures() -> tuple[Figure, ...]:
    """Every published figure, in the order of the file.

    Raises:
        ValueError: a file that does not fit the schema, names of other data sets, percentages above 100, or two figures
            of one paper for the same cell.
    """
    with as_file(files("clipkernels.data").joinpath("published.json")) as path:
        rows = read_json(path, "the published figures", list[Row])
        try:
            return _flatten(rows)
        except ValueError as error:
            raise ValueError(f"expected the published figures, got {path} with {error}") from error


def lookup(
    data: str, model: str, method: str, head: str, shots: int = 0, *, metric: str = "accuracy"
) -> tuple[Figure, ...]:
    """The published figures of one measurement, verified ones first; usually none or one.

    Args:
        data: a key of `DATASETS`, or of `MEANS`.
        model: open_clip's names of the architecture and the weights, separated by a blank.
        method: as `--method` spells it; "dense" and "none" are one method here.
        head: the name of the head.
        shots: labelled images per class.
        metric: "accuracy" or "gmacs".
    """
    check_int("shots", shots, 0)
    wanted = (data, model, "none" if method == "dense" else method, head, shots, metric)
    cell = [
        figure
        for figure in published_figures()
        if (figure.data, figure.model, figure.method, figure.head, figure.shots, figure.metric) == wanted
    ]
    return tuple(sorted(cell, key=lambda figure: not figure.verified))


def _flatten(rows: list[Row]) -> tuple[Figure, ...]:
    """The figures of rows; raises ValueError for the first fault."""
    figures: dict[tuple[object, ...], Figure] = {}
    for row in rows:
        fields = msgspec.structs.asdict(row)
        for data, value in fields.pop("values").items():
            if data not in DATASETS and data not in MEANS:
                raise ValueError(f"the unknown data set {data!r:.80}")
            if row.metric == "accuracy" and value > 100:
                raise ValueError(f"the accuracy {value} % on {data}")
            figure = Figure(**fields, data=data, value=value)
            key = (row.arxiv, row.table, data, row.model, row.method, row.head, row.shots, row.metric)
            if key in figures:
                raise ValueError(f"two figures of {row.paper} for {list(key[2:])}")
            figures[key] = figure
    return tuple(figures.values())
