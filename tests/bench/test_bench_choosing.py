"""The study of the choice of a method: its figures are those of a literal search, and its groups those of dedup."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

import clipkernels as ck
from bench.studies import choosing, choosing_tables, copies
from bench.studies.bootstrap import interval
from bench.studies.recover import Photos, embed
from bench.studies.tiny_clip import read
from clipkernels.cli.parts.demo_images import QUICK, draw, save

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(file: Path) -> list[dict[str, Any]]:
    return list(csv.DictReader(file.open(encoding="utf-8")))


def run(monkeypatch: pytest.MonkeyPatch, *options: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["choosing.py", *map(str, options)])
    choosing.main()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with 120 drawn digits."""
    save({"digits": draw(QUICK._replace(digits=120), seed=0)["digits"]}, tmp_path)
    return tmp_path / "digits"


def vectors(n: int, seed: int) -> Tensor:
    return normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)))


def test_the_study_writes_three_files_and_takes_saved_towers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ck.save(ck.patch(ck.bundled()[0], ck.ToMe(4)), tmp_path / "tower")
    monkeypatch.setattr(choosing, "METHODS", (ck.ToMe(4), ck.EViT(0.3)))
    out, tower = tmp_path / "choosing.csv", f"saved r=4={tmp_path / 'tower'}"
    run(monkeypatch, "--images", folder, "--limit", 120, "--copies", 30, "--tower", tower, "--out", out)
    towers, search, dedup = (rows_of(out.with_stem(f"choosing{suffix}")) for suffix in ("", "-search", "-dedup"))
    assert [row["method"] for row in towers] == ["dense", "ToMe(r=4)", "EViT(keep=0.3)", "saved r=4"]
    assert float(towers[0]["cosine"]) == 1 and float(towers[0]["accuracy_change"]) == 0
    assert towers[3] == {**towers[1], "method": "saved r=4"}  # the weights are the same
    dense, *others = [[row for row in search if row["method"] == each["method"]] for each in towers]
    assert [(row["gallery"], row["galleries"]) for row in dense] == [
        ("120", "1"),
        ("60", "2"),
        ("30", "4"),
        ("12", "8"),
    ]
    assert all(float(row["neighbours"]) == float(row["recall_at_1"]) == 1 for row in dense)
    assert [len(rows) for rows in others] == [12] * 3
    for row in search:
        for name in choosing.FIGURES:
            assert float(row[f"{name}_low"]) <= float(row[name]) <= float(row[f"{name}_high"])
    # EViT at .3 moves the embeddings most.
    (merged,), (pruned,) = ([row for row in rows if row["gallery"] == "120"][:1] for rows in others[:2])
    assert float(pruned["neighbours"]) < float(merged["neighbours"]) < 1
    assert [row["index"] for row in dedup] == ["dense"] * 3 + (["reduced"] * 5 + ["mixed"] * 5) * 3
    assert {row["threshold"] for row in dedup if row["chosen_for"] == "default"} == {"0.96"}
    assert len({row["threshold"] for row in dedup if (row["chosen_for"], row["aim"]) == ("dense", "0.99")}) == 1
    header = json.loads(out.with_stem("choosing-dedup").with_suffix(".json").read_text())
    assert (header["limit"], header["copies"], header["towers"]) == (120, 30, ["saved r=4"])


@pytest.mark.parametrize("spelling", ["folder", "=folder", "dense=folder"])
def test_a_saved_tower_needs_a_name(spelling: str) -> None:
    assert choosing.saved_tower("EViT(keep=0.7)=folder") == ("EViT(keep=0.7)", Path("folder"))
    with pytest.raises(argparse.ArgumentTypeError, match="expected NAME=FOLDER"):
        choosing.saved_tower(spelling)


def test_the_figures_are_those_of_a_literal_search() -> None:
    dense, reduced = vectors(40, 0), normalize(vectors(40, 0) + 0.3 * vectors(40, 1))
    labels = torch.arange(40) % 3
    values = choosing.compare(choosing.search(reduced, dense), choosing.search(dense, dense), labels)

    def nearest(query: Tensor, row: int) -> list[int]:
        return sorted(set(range(40)) - {row}, key=lambda other: -float(query[row] @ dense[other]))[:10]

    for row in range(40):
        hits, before = nearest(reduced, row), nearest(dense, row)
        itself = max(range(40), key=lambda other: float(reduced[row] @ dense[other])) == row
        classes = [sum(labels[other] == labels[row] for other in found) / 10 for found in (hits, before)]
        expected = [itself, len({*hits} & {*before}) / 10, hits[0] == before[0], classes[0], classes[0] - classes[1]]
        assert values[row].tolist() == pytest.approx([float(value) for value in expected])
    assert 0 < values[:, 1].mean() < 1 and 0 < values[:, 2].mean() < 1


def test_galleries_of_a_size_are_disjoint_and_nested() -> None:
    parts = choosing.galleries(5000, seed=0)
    assert {size: len(sets) for size, sets in parts.items()} == {5000: 1, 2500: 2, 1250: 4, 500: 8}
    for sets in parts.values():
        assert len(torch.cat(sets).unique()) == sum(map(len, sets))
    for larger, smaller in ((5000, 2500), (2500, 1250), (1250, 500)):
        assert all(any(set(part.tolist()) <= set(whole.tolist()) for whole in parts[larger]) for part in parts[smaller])


def test_an_interval_is_that_of_a_bootstrap() -> None:
    values = np.random.default_rng(1).random((50, 2))
    rng = np.random.default_rng(0)
    means = [values[rng.integers(50, size=50)].mean(0) for _ in range(2000)]
    assert interval(values) == pytest.approx(np.percentile(means, (2.5, 97.5), axis=0))
    assert interval(values[:, 0]) == pytest.approx(interval(values)[:, 0])


def test_copies_are_mild_and_of_different_photographs(folder: Path) -> None:
    pixels = read(folder)[0].images[:60]
    draws, images = copies.draw(pixels, 20, seed=0), torch.stack(list(Photos(pixels)))
    assert len(torch.cat([part.rows for part in draws]).unique()) == 60
    for part in draws:
        assert part.kinds.bincount().tolist() == [7, 7, 6]
        change = (part.images - images[part.rows]).abs().mean((1, 2, 3))
        assert (change > 0).all() and (change[part.kinds != 1] < 0.2).all()
    model = ck.bundled()[0]
    cosines = (embed(model, draws[0].images) * embed(model, images[draws[0].rows])).sum(1)
    crop, brightness = (cosines[draws[0].kinds == kind].mean() for kind in (1, 2))  # JPEG changes drawn digits a lot
    assert 1 > brightness > crop > 0.99
    with pytest.raises(SystemExit, match="expected at most 20 --copies of 60"):
        copies.draw(pixels, 21, seed=0)


def test_duplicates_are_those_that_dedup_does_not_keep(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from clipkernels.collection.duplicates import find_duplicates

    pixels = read(folder)[0].images[:60]
    (tmp_path / "photos").mkdir()
    for row, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "photos" / f"{row:02}.png")
    model, preprocess, _ = ck.bundled()
    ck.embed(model, [str(tmp_path / "photos")], tmp_path / "collection", preprocess=preprocess)
    removed = copies.duplicates(embed(model, torch.stack(list(Photos(pixels)))))
    sizes = set()
    for at in (0, 40, 80, len(copies.THRESHOLDS) - 1):
        table = find_duplicates(tmp_path / "collection", copies.THRESHOLDS[at]).table
        groups, ids = table.column("group").to_pylist(), table.column("id").to_pylist()
        extra = {int(ids[row][:2]) for row in range(1, len(ids)) if groups[row] == groups[row - 1]}
        assert set(removed[at].nonzero()[:, 0].tolist()) == extra
        sizes.add(len(extra))
    assert len(sizes) > 2


def test_a_threshold_is_the_lowest_that_keeps_the_precision() -> None:
    # Two photographs and two copies; from high to low a copy, another copy and both photographs are removed.
    removed = torch.zeros(len(copies.THRESHOLDS), 4, dtype=torch.bool)
    removed[3:, 2] = True
    removed[5:, 3] = True
    removed[8:, 0] = True
    assert copies.threshold_for(removed, 2, 0.99) == copies.THRESHOLDS[7]
    assert copies.threshold_for(removed, 2, 0.6) == copies.THRESHOLDS[-1]
    result = copies.figures([removed[8], removed[4]], [torch.tensor([0, 1])] * 2, 2)
    assert (result["precision"], result["recall"]) == (round((2 / 3 + 1) / 2, 4), 0.75)
    assert (result["recall_jpeg"], result["recall_crop"]) == (1, 0.5)


def test_the_tables_of_the_guides_have_the_measured_numbers() -> None:
    tables = choosing_tables.tables(ROOT / "bench" / "results" / "amd-epyc-2-cores")
    for key, table in tables.items():
        guide = (ROOT / "docs" / ("embed.md" if key == "embed" else "choosing.md")).read_text(encoding="utf-8")
        assert "|\n" + "\n".join(table) + "\n\n" in guide, "python -m bench.studies.choosing_tables prints the tables"
    assert [len(table) for table in tables.values()][-1] == 13 and len(tables["cost"]) >= 10
