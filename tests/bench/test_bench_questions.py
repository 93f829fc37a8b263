"""Questions have correct answers, shifts change words and images, and the distillation study resumes."""

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


def test_every_answer_stands_for_its_classes() -> None:
    answers = {question.text: question.says for question in questions.questions_of(CLASSES)}
    assert answers["is this a cat?"] == ((1,), (0, 2, 3))
    assert answers["is this a dog or an airplane?"] == ((2,), (0,))
    assert answers["is this an animal or a vehicle?"] == ((1, 2), (0, 3))
    assert len(answers) == 4 + 4 * 3 + 1


def test_answers_are_correct_and_balanced() -> None:
    every, labels = questions.questions_of(CLASSES), torch.arange(4).repeat(300)
    question_set = questions.ask(torch.zeros(1200, 1), labels, every, seed=0)
    kinds = Counter()
    for label, index, answer in zip(
        labels.tolist(), question_set.questions.tolist(), question_set.labels.tolist(), strict=True
    ):
        assert label in every[index].says[answer] and label not in every[index].says[1 - answer]
        kinds[every[index].kind, answer] += 1
    assert [kinds[kind, 0] + kinds[kind, 1] for kind in range(3)] == [400, 400, 400]
    assert all(160 < kinds[kind, 0] < 240 for kind in range(3))
    again = questions.ask(torch.zeros(1200, 1), labels, every, seed=0)
    assert torch.equal(question_set.questions, again.questions) and torch.equal(question_set.labels, again.labels)


def test_a_shift_masks_only_letters_and_blurs_images() -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(200).repeat(4, 1)
    shifted_images, shifted_tokens = questions.shifted(images, tokens, mask=999, letters=(50, 149), seed=0)
    changed = shifted_tokens != tokens
    assert (shifted_tokens[changed] == 999).all() and not changed[:, :50].any() and not changed[:, 150:].any()
    assert 0.15 < changed[:, 50:150].float().mean() < 0.35
    assert shifted_images.shape == images.shape and 0 < (shifted_images - images).std() < 2 * images.std()


def test_a_training_does_not_depend_on_earlier_ones(tmp_path: Path) -> None:
    every = questions.questions_of(CLASSES)
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    question_set = questions.ask(images, torch.arange(4).repeat(3), every, seed=0)
    tokens = ck.bundled()[2]([question.text for question in every])
    answers = torch.randn(len(every), 2, 128)
    data = distill.StudyData(question_set, question_set, every, tokens, answers, distill.task_of(tokens))
    cached = distill.cache_of(tmp_path)
    states = []
    for method in (distill.NONE, "targeted", "targeted"):
        torch.manual_seed(len(states))
        state = torch.random.get_rng_state()
        states.append(distill.train(distill.Run(1.0, method, 0), data, cached, 3)[0].state_dict())
        assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(states[1][name], states[2][name]) for name in states[1])
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_the_distillation_study_writes_every_row_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    content = json.loads(out.with_suffix(".json").read_text())
    summary = {(row["split"], row["share"], row["method"]): row for row in distill.summary(content["rows"])}
    assert len(summary) == 2 * 2 * 4 and all(row["seeds"] == 2 for row in summary.values())
    assert summary["clean", 1.0, distill.NONE]["over"] == 0
    remaining = [row for row in content["rows"] if (row["method"], row["seed"]) != ("targeted", 1)]
    out.with_suffix(".json").write_text(json.dumps({**content, "rows": remaining}))
    runs = []
    train = distill.train
    monkeypatch.setattr(distill, "train", lambda run, *rest: runs.append(run) or train(run, *rest))
    distill.main()
    assert [(run.method, run.seed) for run in runs] == [("targeted", 1)] * 2

    def figures(rows: list[dict[str, str]]) -> list[tuple[str, ...]]:
        return sorted(tuple(row[key] for key in ("share", "method", "seed", "split", "accuracy")) for row in rows)

    assert figures(list(csv.DictReader(out.open()))) == figures(rows)
