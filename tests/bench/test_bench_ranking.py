"""The study and the timing of golden rankings: selected patches, rows, resumption and equal results."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import clipkernels as ck
from bench.cost import ranking as ranking_cost
from bench.studies import ranking
from clipkernels.cli.parts.demo_images import QUICK, draw, save
from clipkernels.testing import open_clip_tower, randomized

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def test_fixed_scores_select_the_patches_that_stay(tiny: torch.nn.Module, images: torch.Tensor) -> None:
    predictor = ranking.FixedScores(65, 2)
    predictor.scores = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    ck.patch(tiny, ck.PatchRanking(predictor, 0.25))  # type: ignore[arg-type]
    source = ck.encode_image(tiny, images, source=True).source
    assert source is not None
    patches = (source[:, -1] >= 0).nonzero()[:, 1].view(3, 16)
    assert torch.equal(patches, predictor.scores.topk(16).indices.sort(1).values)


def test_the_ranking_study_writes_every_row_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    save({"digits": draw(QUICK, seed=0)["digits"]}, tmp_path)
    folder, out = tmp_path / "digits", tmp_path / "ranking.csv"
    options = ("--images", folder, "--pool", folder, "--limit", 6, "--golden", 3, "--ranked", 4, "--seeds", 2)
    options = (*options, "--blocks", 5, "--work", tmp_path / "work", "--out", out)
    monkeypatch.setattr(ranking, "REMOVED_SHARES", (0.0, 0.4))
    monkeypatch.setattr(ranking, "SHOTS", 1)
    monkeypatch.setattr(sys, "argv", ["ranking.py", *map(str, options)])
    ranking.main()
    rows = list(csv.DictReader(out.open()))
    assert [row["gone"] for row in rows] == ["0.0", *["0.4"] * 10]
    golden = next(row for row in rows if row["method"] == "golden, label")
    assert (golden["overlap"], golden["images"], golden["seeds"]) == ("100.0", "3", "1")
    assert all(row["images"] == "6" for row in rows if not row["method"].startswith("golden"))
    content = json.loads(out.with_suffix(".json").read_text())
    content["rows"] = content["rows"][:-1]
    out.with_suffix(".json").write_text(json.dumps(content))
    monkeypatch.setattr(ranking, "fit_predictor", lambda *_, **__: pytest.fail("the predictors exist already"))
    monkeypatch.setattr(ranking, "with_tokens", lambda *_: pytest.fail("the rows with tokens exist already"))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--plot", str(tmp_path / "ranking.png")])
    ranking.main()
    assert list(csv.DictReader(out.open())) == rows
    assert (tmp_path / "ranking.png").stat().st_size > 10_000


def test_both_forms_are_timed_and_rank_equally(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    # In fp64, because in fp32 some scores are equal up to rounding.
    tower = randomized(open_clip_tower("ViT-B-32", 4, width=64, image_size=32, patch_size=8)).double()
    monkeypatch.setattr(ck, "bundled", lambda: (tower, None, None))
    monkeypatch.setattr(ranking_cost, "IMAGES", 2)
    clock = iter([0.0, 2.0, 5.0, 5.0, 6.0, 10.0])  # two images and the loop's one, then one image and the loop's one
    monkeypatch.setattr(ranking_cost, "time", SimpleNamespace(process_time=lambda: next(clock)))
    row = ranking_cost.speed(images.double(), block=3)
    assert row["alike"] == "2 of 2"
    assert (row["seconds"], row["literal_seconds"], row["speedup"]) == (1.0, 3.5, 3.5)
    assert (row["speedup_p10"], row["speedup_p90"]) == (3.1, 3.9)
