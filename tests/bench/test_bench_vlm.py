"""bench/vlm.py: a row for every variant, with the counts of the plan and the operations of a prefill."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", "5.23", reason="transformers 5.23 or later is not installed")

from bench import vlm  # it needs transformers


@pytest.mark.usefixtures("one_thread")
def test_every_variant_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "vlm.csv"
    sizes = ["--layers", "4", "--width", "64", "--heads", "2", "--image-size", "128", "--words", "8"]
    monkeypatch.setattr(sys, "argv", ["vlm", *sizes, "--rounds", "1", "--out", str(out)])
    vlm.main()
    rows = {row["variant"]: row for row in csv.DictReader(out.open())}
    counts = {name: int(row["image_tokens"]) for name, row in rows.items()}
    assert counts[vlm.HOST] == counts[vlm.DENSE] == 64
    assert counts["Select(0.5)"] == 32 and counts["Select(0.1)"] == 7
    assert all(float(row["ideal_speedup"]) >= 1 for row in rows.values())
    # Four blocks over 8 words and 64 image tokens, by hand.
    layer = 72 * (4 * 64**2 + 3 * 64 * 192) + 2 * 72**2 * 64
    language = 4 * layer + 64 * 32000 + 2 * 64 * 64**2
    arguments = vlm.parse()
    tower = vlm.gmacs(vlm.build(arguments), vlm.ck.Dense(), 64, arguments) - language / 1e9
    assert tower == pytest.approx(vlm.ck.Dense().plan(65, 4).gmacs(64, out=64), rel=1e-6)


@torch.no_grad()
def test_variants_share_their_weights() -> None:
    arguments = vlm.argparse.Namespace(image_size=64, width=64, layers=2, heads=2, precision="fp32", words=4)
    model = vlm.build(arguments)
    variant = vlm.shared_copy(model)
    assert all(a is b for a, b in zip(model.parameters(), variant.parameters(), strict=True))
    assert variant.model is not model.model
