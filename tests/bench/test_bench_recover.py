"""The study of recovery: rows per seed, their mean and bootstrap bound, and towers that are trained once."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import clipkernels as ck
from bench.studies import recover
from bench.studies.tiny_clip import read
from clipkernels.cli.parts.demo_images import QUICK, draw, save
from clipkernels.measure.timing import gmacs_for, plan_for

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(file: Path) -> list[dict[str, Any]]:
    return list(csv.DictReader(file.open(encoding="utf-8")))


def test_the_study_writes_a_row_per_seed_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save({"digits": draw(QUICK, seed=0)["digits"]}, tmp_path)
    folder, out = tmp_path / "digits", tmp_path / "recover.csv"
    options = ("--pool", folder, "--images", folder, "--photos", 24, "--held-out", 4, "--limit", 30, "--seeds", 2)
    options = (*options, "--method", "EViT(keep=0.7)", "--rerun", "--work", tmp_path / "work", "--out", out)
    monkeypatch.setattr(sys, "argv", ["recover.py", *map(str, options)])
    recover.main()
    rows = rows_of(out)
    assert [row["seed"] for row in rows] == ["", "as it comes", "0", "1", "mean", "0 again"]
    assert rows[2]["sha256"] == rows[5]["sha256"] != rows[3]["sha256"]
    for name in recover.FIGURES:
        seeds = [float(row[name]) for row in rows[2:4]]
        assert float(rows[4][name]) == pytest.approx(sum(seeds) / 2, abs=2e-5) and float(rows[0][name]) <= 1
    assert 0 < float(rows[4]["low"]) <= float(rows[4]["recall_at_1"])
    assert (rows[2]["photographs"], rows[2]["steps"]) == ("20", "1")
    assert json.loads(out.with_suffix(".json").read_text())["seeds"] == 2
    monkeypatch.setattr(ck.learn, "recover", lambda *_, **__: pytest.fail("the towers are there already"))
    recover.main()
    assert rows_of(out) == rows


def test_figures_are_those_of_a_literal_search(tmp_path: Path) -> None:
    save({"digits": draw(QUICK, seed=0)["digits"]}, tmp_path)
    photos, _ = read(tmp_path / "digits")
    images, model = torch.stack(list(recover.Photos(photos.images[:40]))), ck.bundled()[0]
    index, text = recover.embed(model, images), torch.randn(10, 128, generator=torch.Generator().manual_seed(0))
    reduced = recover.embed(ck.patch(model, ck.EViT(0.3)), images)
    judged = recover.judge(reduced, index, text, torch.zeros(40).long())
    for row in range(40):
        assert bool(judged.found[row]) == (int((index @ reduced[row]).argmax()) == row)
        assert bool(judged.correct[row]) == (int((text @ reduced[row]).argmax()) == 0)
    assert 0 < judged.figures()["recall_at_1"] < 1


def test_the_methods_cost_as_much_as_evit() -> None:
    tower = ck.tower_of(ck.bundled()[0])
    costs = [gmacs_for(tower, plan_for(tower, method)) for method in recover.methods(None).values()]
    assert len(costs) == 3 and all(cost == pytest.approx(costs[0], rel=0.03) for cost in costs)
    with pytest.raises(SystemExit, match="expected --method EViT"):
        recover.methods("ToMe(r=99)")
