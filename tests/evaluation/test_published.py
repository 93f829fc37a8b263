"""Published figures: the file, its sums, and the look-up."""

from __future__ import annotations

from collections import defaultdict

import msgspec
import pytest

import clipkernels as ck
from clipkernels.cli.parts.methods import read_methods
from clipkernels.evaluation import DATASETS, MEANS, Figure, lookup, published_figures
from clipkernels.evaluation.published import CROSS_DATA, Row, _flatten

VIT = "ViT-B-16 openai"
HEADS = {"zero-shot", "calip", "tip", "tip-f", "tipx", "tda", "reservoir"}
ROW = Row(
    paper="A paper",
    arxiv="2410.14729",
    table="Table 1",
    source="memory",
    model=VIT,
    method="none",
    head="tda",
    shots=0,
    metric="accuracy",
    prompts="not stated",
    verified=False,
    values={"pets": 50.0},
)


def test_the_published_means_are_those_of_the_figures() -> None:
    tables: dict[tuple[object, ...], dict[str, float]] = defaultdict(dict)
    for figure in published_figures():
        if figure.metric == "accuracy":
            key = (figure.paper, figure.table, figure.source, figure.model, figure.method, figure.head, figure.shots)
            tables[key][figure.data] = figure.value
    checked = 0
    for row in tables.values():
        for mean in MEANS.keys() & row.keys():
            checked += 1
            assert row[mean] == pytest.approx(sum(row[name] for name in MEANS[mean]) / len(MEANS[mean]), abs=0.0051)
    assert checked >= 20


def test_the_means_name_sets() -> None:
    assert all(set(names) <= set(DATASETS) for names in MEANS.values())
    assert {name: len(names) for name, names in MEANS.items()} == {
        "mean of 10": 10,
        "mean of 11": 11,
        "mean of 5": 5,
        "mean of 4": 4,
    }


def test_known_figures_of_tca_are_there() -> None:
    (figure,) = lookup("eurosat", VIT, "tca:0.035", "reservoir")
    assert (figure.paper, figure.table, figure.value, figure.verified) == ("TCA", "Table 1", 70.43, True)
    means = {
        (method, head): lookup("mean of 10", VIT, method, head)[0].value
        for method, head in (
            *(("none", "zero-shot"), ("none", "tda"), ("evit:0.9", "zero-shot"), ("evit:0.7", "zero-shot")),
            *(("tca:0.035", "reservoir"), ("tca:0.1", "reservoir")),
        )
    }
    assert list(means.values()) == [64.59, 67.53, 65.17, 62.02, 68.69, 64.46]
    assert lookup("mean of 10", VIT, "tca:0.035", "reservoir", metric="gmacs")[0].value == 15.45
    assert all(lookup(name, VIT, "evit:0.9", "zero-shot") for name in CROSS_DATA)


def test_known_figures_of_the_other_papers_are_there() -> None:
    (tip,) = lookup("eurosat", "RN50 openai", "none", "tip-f", 16)
    assert (tip.paper, tip.value, tip.verified) == ("Tip-Adapter", 84.54, True)
    (tda,) = lookup("imagenet_a", "RN50 openai", "none", "tda")
    assert (tda.paper, tda.value, tda.verified) == ("TDA", 30.29, True)
    ranking = [figure for figure in published_figures() if figure.paper == "Patch Ranking" and figure.data == "pets"]
    assert [figure.value for figure in ranking] == [87.1, 87.2, 88.1, 87.7]
    calip = lookup("imagenet", "RN50 openai", "none", "calip")
    assert {figure.value for figure in calip} == {60.57} and not any(figure.verified for figure in calip)


def test_verified_figures_come_first() -> None:
    cell = lookup("imagenet", "RN50 openai", "none", "zero-shot")
    assert [figure.verified for figure in cell] == sorted((figure.verified for figure in cell), reverse=True)
    assert len(cell) >= 3 and cell[0].verified and not cell[-1].verified


def test_dense_and_none_are_one_method() -> None:
    assert lookup("pets", VIT, "dense", "tda") == lookup("pets", VIT, "none", "tda") != ()


def test_a_cell_that_no_paper_has_is_empty() -> None:
    assert lookup("pets", VIT, "evit:0.8", "zero-shot") == ()
    assert lookup("photos", VIT, "none", "zero-shot") == ()
    assert lookup("pets", "ViT-B-16 laion2b_s34b_b88k", "none", "zero-shot") == ()
    with pytest.raises(ValueError, match="shots must be an int of at least 0"):
        lookup("pets", VIT, "none", "tip", -1)


def test_every_figure_says_where_it_was_read() -> None:
    for figure in published_figures():
        assert isinstance(figure, Figure) and figure.head in HEADS
        assert figure.verified == ("commit" in figure.source)
        assert figure.verified != figure.source.startswith("memory")
        assert figure.metric in ("accuracy", "gmacs")


def test_the_methods_are_spelt_as_the_command_line_does() -> None:
    spelt = sorted({figure.method for figure in published_figures() if " " not in figure.method})
    assert spelt == ["evit:0.7", "evit:0.9", "none", "tca:0.035", "tca:0.1"]
    assert read_methods(spelt, None, None) == [ck.EViT(0.7), ck.EViT(0.9), None, ck.TCA(0.035), ck.TCA(0.1)]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"values": {"dogs": 1.0}}, "the unknown data set 'dogs'"),
        ({"values": {"pets": 100.5}}, "the accuracy 100.5 % on pets"),
        ({}, "two figures of A paper for"),
    ],
)
def test_faulty_rows_are_refused(change: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        _flatten([ROW, msgspec.structs.replace(ROW, **change)])


@pytest.mark.parametrize(
    "change",
    [
        *({"arxiv": "2410"}, {"shots": -1}, {"verified": "no"}, {"values": {}}, {"paper": ""}),
        *({"values": {"pets": "50"}}, {"values": {"pets": -1.0}}, {"colour": "red"}),
    ],
)
def test_rows_that_do_not_fit_the_schema_are_refused(change: dict[str, object]) -> None:
    content = {**msgspec.to_builtins(ROW), **change}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(content, Row)
