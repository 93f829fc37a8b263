"""Questions have right answers, shifts shift, and a study of distillation resumes."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import clipkernels as ck
from bench.studies import distill, questions
from clipkernels.cli.parts.demo_images import QUICK, draw, save

CLASSES = ("airplane", "cat", "dog", "ship")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_answer_stands_for_what_it_says() -> None:
    said = {question.text: question.says for question in questions.questions_of(CLASSES)}
    assert said["is this a cat?"] == ((1,), (0, 2, 3))
    assert said["is this a dog or an airplane?"] == ((2,), (0,))
    assert said["is this an animal or a vehicle?"] == ((1, 2), (0, 3))
    assert len(said) == 4 + 4 * 3 + 1


def test_questions_are_answered_right_and_neither_answer_gives_itself_away() -> None:
    every, labels = questions.questions_of(CLASSES), torch.arange(4).repeat(300)
    asked = questions.ask(torch.zeros(1200, 1), labels, every, seed=0)
    kinds = Counter()
    for label, at, answer in zip(labels.tolist(), asked.questions.tolist(), asked.labels.tolist(), strict=True):
        assert label in every[at].says[answer] and label not in every[at].says[1 - answer]
        kinds[every[at].kind, answer] += 1
    assert [kinds[kind, 0] + kinds[kind, 1] for kind in range(3)] == [400, 400, 400]
    assert all(160 < kinds[kind, 0] < 240 for kind in range(3))
    again = questions.ask(torch.zeros(1200, 1), labels, every, seed=0)
    assert torch.equal(asked.questions, again.questions) and torch.equal(asked.labels, again.labels)


def test_a_shift_masks_letters_alone_and_blurs_images() -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(200).repeat(4, 1)
    seen, said = questions.shifted(images, tokens, mask=999, letters=(50, 149), seed=0)
    changed = said != tokens
    assert (said[changed] == 999).all() and not changed[:, :50].any() and not changed[:, 150:].any()
    assert 0.15 < changed[:, 50:150].float().mean() < 0.35
    assert seen.shape == images.shape and 0 < (seen - images).std() < 2 * images.std()


def test_a_training_is_the_same_whatever_ran_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    every = questions.questions_of(CLASSES)
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    asked = questions.ask(images, torch.arange(4).repeat(3), every, seed=0)
    tokens = ck.bundled()[2]([question.text for question in every])
    school = distill.School(asked, asked, every, tokens, torch.randn(len(every), 2, 128))
    kept = distill.cache_of(tmp_path)
    monkeypatch.setattr(distill, "FEWEST", 3)
    found = []
    for method in (distill.NONE, "targeted", "targeted"):
        torch.manual_seed(len(found))
        state = torch.random.get_rng_state()
        found.append(distill.taught(distill.Run(1.0, method, 0), school, kept, 3)[0].state_dict())
        assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(found[1][name], found[2][name]) for name in found[1])
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_the_study_has_every_row_and_goes_on_where_it_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    save({"digits": draw(QUICK, seed=0)["digits"]}, tmp_path)
    folder, out = tmp_path / "digits", tmp_path / "distill.csv"
    options = ("--images", folder, "--pool", folder, "--limit", 9, "--labelled", 12, "--seeds", 2, "--steps", 2)
    options = (*options, "--work", tmp_path / "work", "--out", out, "--plot", tmp_path / "distill.png")
    monkeypatch.setattr(distill, "SHARES", (0.5, 1.0))
    monkeypatch.setattr(sys, "argv", ["distill.py", *map(str, options)])
    distill.main()
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 2 * 4 * 2 * 2 and (tmp_path / "distill.png").stat().st_size > 10_000
    kept = json.loads(out.with_suffix(".json").read_text())
    found = {(row["split"], row["share"], row["method"]): row for row in distill.summary(kept["rows"])}
    assert len(found) == 2 * 2 * 4 and all(row["seeds"] == 2 for row in found.values())
    assert found["clean", 1.0, distill.NONE]["over"] == 0
    left = [row for row in kept["rows"] if (row["method"], row["seed"]) != ("targeted", 1)]
    out.with_suffix(".json").write_text(json.dumps({**kept, "rows": left}))
    taught = []
    train = distill.taught
    monkeypatch.setattr(distill, "taught", lambda run, *rest: taught.append(run) or train(run, *rest))
    distill.main()
    assert [(run.method, run.seed) for run in taught] == [("targeted", 1)] * 2

    def figures(rows: list[dict[str, str]]) -> list[tuple[str, ...]]:
        return sorted(tuple(row[key] for key in ("share", "method", "seed", "split", "accuracy")) for row in rows)

    assert figures(list(csv.DictReader(out.open()))) == figures(rows)
