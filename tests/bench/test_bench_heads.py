"""bench/studies/heads.py and bench/cost/heads.py: fused forms equal the literal ones, and a study resumes."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

import clipkernels as ck
from bench.cost import heads as heads_cost
from bench.studies import heads
from clipkernels.cli.parts.demo_images import QUICK, draw, save

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", heads_cost.COMPUTATIONS)
def test_fused_and_literal_forms_are_equal(name: str) -> None:
    case = heads_cost.case_of(name, batch=3, patches=9, classes=5, width=16, shots=3)
    torch.testing.assert_close(*(form(*case.inputs) for form in case.forms.values()), atol=1e-3, rtol=1e-4)


def test_few_shots_are_balanced_and_differ_by_seed() -> None:
    labels = torch.arange(60) % 5
    features = heads.Features(ck.Encoded(torch.arange(60.0)[:, None], torch.zeros(60, 2, 1)), labels)
    first, second = (heads.draw_shots(features, 4, seed) for seed in (0, 1))
    assert first.labels.bincount().tolist() == [4] * 5 and len(first.encoded.embedding.unique()) == 20
    assert torch.equal(first.encoded.embedding[:, 0].long() % 5, first.labels)
    assert not torch.equal(first.encoded.embedding, second.encoded.embedding)


def test_the_head_study_writes_every_head_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    save({"digits": draw(QUICK, seed=0)["digits"]}, tmp_path)
    folder, out = tmp_path / "digits", tmp_path / "heads.csv"
    options = ("--images", folder, "--pool", folder, "--limit", 40, "--seeds", 2, "--per-class", 2, "--out", out)
    monkeypatch.setattr(heads, "METHODS", {"CLIP": None, "EViT": ck.EViT(0.7)})
    monkeypatch.setattr(heads, "SHOTS", (1,))
    monkeypatch.setattr(sys, "argv", ["heads.py", *map(str, options)])
    heads.main()
    rows = list(csv.DictReader(out.open()))
    assert [row["head"] for row in rows if row["tower"] == "EViT"] == [*heads.heads_of_patches(torch.ones(1, 1))]
    assert sum(row["tower"] == "CLIP" for row in rows) == 3 + 6 + 3
    assert all(float(row["gain"]) == 0 for row in rows if row["head"] == "zero-shot")
    content = json.loads(out.with_suffix(".json").read_text())
    content["rows"] = [row for row in content["rows"] if row["tower"] == "CLIP"]
    out.with_suffix(".json").write_text(json.dumps(content))
    monkeypatch.setattr(heads, "retrieved", lambda *_: pytest.fail("the first tower is done already"))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--plot", str(tmp_path / "heads.png")])
    heads.main()
    assert list(csv.DictReader(out.open())) == rows
    assert (tmp_path / "heads.png").stat().st_size > 10_000
