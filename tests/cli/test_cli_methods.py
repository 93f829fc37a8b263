"""Specifications of methods, and their names in tables."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

import clipkernels as ck
from clipkernels.cli.parts.methods import GRAMMARS, methods_for, name_of, read_methods
from clipkernels.learn.patch_ranking import RankPredictor


def read(spec: str) -> ck.Method | None:
    [method] = read_methods([spec], None, None)
    return method


@pytest.mark.parametrize(
    ("spec", "method", "name"),
    [
        ("evit", ck.EViT(0.7), "EViT(keep=0.7)"),
        ("evit:1", ck.EViT(1.0), "EViT(keep=1)"),
        ("evit:0.7:blocks=3/6/9", ck.EViT(0.7, (3, 6, 9)), "EViT(keep=0.7, blocks=(3, 6, 9))"),
        ("evit:blocks=3", ck.EViT(0.7, (3,)), "EViT(keep=0.7, blocks=(3,))"),
        (
            "evit:0.5:fuse=false:score=random:seed=3:multiple=8",
            ck.EViT(0.5, fuse=False, score="random", seed=3, multiple=8),
            "EViT(keep=0.5, fuse=False, score='random', seed=3, multiple=8)",
        ),
        ("tome", ck.ToMe(8), "ToMe(r=8)"),
        ("tome:8/8/4", ck.ToMe((8, 8, 4)), "ToMe(r=(8, 8, 4))"),
        ("tome:8:inflect=-1", ck.ToMe(8, -1.0), "ToMe(r=8, inflect=-1)"),
        ("tome:8:proportional=false", ck.ToMe(8, proportional=False), "ToMe(r=8, proportional=False)"),
        ("tca", ck.TCA(0.035), "TCA(rate=0.035)"),
        (
            "tca:0.1:blocks=1/2:centers=4:score=attention:seed=0",
            ck.TCA(0.1, (1, 2), 4, "attention", 0),
            "TCA(rate=0.1, blocks=(1, 2), centers=4, score='attention', seed=0)",
        ),
        ("dense", ck.Dense(), "Dense()"),
        ("none", None, "dense (host)"),
    ],
)
def test_a_specification_is_a_method_with_a_name(spec: str, method: ck.Method | None, name: str) -> None:
    assert (read(spec), name_of(read(spec))) == (method, name)


def test_the_example_of_every_grammar_is_a_specification() -> None:
    for name, grammar in GRAMMARS.items():
        assert name == "patch-ranking" or name_of(read(grammar.example))


def test_patch_ranking_takes_its_predictors_share_unless_specified(tmp_path: Path) -> None:
    predictor = RankPredictor(128, 3, 65)
    predictor.save(tmp_path / "predictor")
    specs = ["patch-ranking", "patch-ranking:0.5:multiple=8", "evit"]
    methods = read_methods(specs, str(tmp_path / "predictor"), None)
    assert [name_of(method) for method in methods] == [
        "PatchRanking(keep=0.6)",
        "PatchRanking(keep=0.5, multiple=8)",
        "EViT(keep=0.7)",
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "",
            "tome:8, evit:0.7, tca:0.1, patch-ranking:0.6, schedule.json, dense or none, got '': no such method",
        ),
        ("EViT", "got 'EViT': no such method"),
        ("evit:", "such as evit:0.7:blocks=3/6/9, got 'evit:': keep: expected a number, got ''"),
        ("evit:2", "got 'evit:2': keep must be a number in (0, 1], got 2.0"),
        ("evit:0.7:0.5", "got 'evit:0.7:0.5': the keys are blocks, fuse, score, seed, multiple, got '0.5'"),
        ("evit:0.7:block=3", "the keys are blocks, fuse, score, seed, multiple, got 'block=3'"),
        ("evit:0.7:blocks=3,6", "blocks: expected ints separated by /, got '3,6'"),
        ("evit:0.7:seed=1:seed=2", "seed is there twice"),
        ("evit:0.7:fuse=no", "fuse: expected true or false, got 'no'"),
        ("evit:0.7:score=best", 'score must be "cls" or "random", got \'best\''),
        ("tome:1.5", "such as tome:8:inflect=-1, got 'tome:1.5': r: expected an int, got '1.5'"),
        ("tome:8/", "r: expected ints separated by /, got '8/'"),
        ("tome:8/4:inflect=1", "inflect must be 0 if r is given per block, got 1.0"),
        ("tca:0.1:seed=x", "seed: expected an int, got 'x'"),
        ("dense:1", "such as dense, got 'dense:1': dense has no arguments, got '1'"),
        ("patch-ranking", "expected --predictor with patch-ranking, got none: see clipkernels train-predictor"),
    ],
)
def test_a_wrong_specification_is_one_line_with_an_example(spec: str, message: str) -> None:
    with pytest.raises(click.UsageError) as error:
        read(spec)
    assert message in str(error.value) and str(error.value).startswith("expected ") and "\n" not in str(error.value)


def test_methods_of_one_name_are_one_row() -> None:
    tower = ck.tower_of(ck.bundled()[0])
    methods = methods_for(tower, ["none", "evit:0.7", "dense", "evit:.70"], None, None)
    assert methods == {"dense (host)": None, "Dense()": ck.Dense(), "EViT(keep=0.7)": ck.EViT(0.7)}
