"""CLIP-TD's protocol: every task is scored, a stopped run ends with the same figures, other runs are refused."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import clipkernels as ck
from clipkernels.questions import protocol as module
from clipkernels.questions import state as states
from clipkernels.questions.examples import read_examples, vqa_classes
from clipkernels.questions.plan import METHODS, Options, Plan, Training
from clipkernels.questions.protocol import run_protocol
from clipkernels.questions.results import Progress, Results
from clipkernels.questions.vqa import read_vqa
from tests.questions.annotation_folders import SPLITS, snli_ve_pair, write_colours, write_lines

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = Options(steps=4, batch_size=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each task, with 24 annotations to train on and as many to score."""
    folder = tmp_path_factory.mktemp("tasks")
    for task in SPLITS:
        write_colours(folder / task, task, 24)
    return {task: folder / task for task in SPLITS}


def plan_of(folder: Path, task: str, methods: Any = METHODS, shares: Any = (0.5, 1.0), **options: Any) -> Plan:
    first, second = SPLITS[task]
    classes = vqa_classes(read_vqa(folder, first), 50) if task == "vqa" else ()
    train, test = (read_examples(task, folder, folder / "images", split, classes) for split in (first, second))
    return Plan(train, test, methods, shares, **{"seeds": 1, **options})


def run(plan: Plan, out: Path, options: Options = FAST, **arguments: Any) -> Results:
    return run_protocol(plan, *ck.bundled(), options, out, **arguments)


def figures(results: Results) -> list[Any]:
    """The rows without their times."""
    return [row._replace(seconds=0.0) for row in results.rows]


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("vqa", ["accuracy", "accuracy (other)", "accuracy (yes/no)"]),
        ("snli-ve", ["accuracy", *(f"accuracy ({name})" for name in ("entailment", "neutral", "contradiction"))]),
        ("vcr", ["Q→A", "QA→R", "Q→AR"]),
    ],
)
def test_every_task_is_trained_and_scored(
    folders: dict[str, Path], tmp_path: Path, task: str, metrics: list[str]
) -> None:
    state = torch.random.get_rng_state()
    results = run(plan_of(folders[task], task), tmp_path / "out")
    assert torch.equal(state, torch.random.get_rng_state())
    assert [row.metric for row in results.rows[: len(metrics)]] == metrics
    assert [(row.share, row.method) for row in results.rows[:: len(metrics)]] == [
        (share, method) for share in (0.5, 1.0) for method in METHODS
    ]
    assert all(0 <= row.score <= 1 and row.scored == 24 and row.steps == 4 for row in results.rows)
    assert {row.share: row.train for row in results.rows} == {0.5: 12, 1.0: 24}
    weights = {row.method: row.weight for row in results.rows}
    assert weights["none"] is None is weights["finetune"] and weights["plain"] == 1
    assert weights["targeted"] is not None and 0 < weights["targeted"] < 1


def test_a_run_that_is_stopped_everywhere_ends_with_the_same_figures(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(folders["snli-ve"], "snli-ve", ("none", "targeted"), (1.0,))
    options = FAST._replace(steps=3, batch_size=12)
    expected = run(plan, tmp_path / "whole", options)
    stops: set[Progress] = set()

    def stop_once(progress: Progress) -> bool:
        """True where no run was stopped yet; of the texts, at the first one."""
        known = progress in stops or (progress.item == "text" and bool(stops))
        stops.add(progress)
        return not known

    results = run(plan, tmp_path / "out", options, progress=stop_once)
    while results.stopped:
        assert len(results.rows) < len(expected.rows)
        results = run(plan, tmp_path / "out", options, progress=stop_once)
    assert {progress.item for progress in stops} == {"text", "image", "step", "example"}
    assert sum(progress.item == "step" for progress in stops) == 2 * options.steps
    assert figures(results) == figures(expected)
    assert not (tmp_path / "out" / "state" / states.CHECKPOINT).exists()


def test_more_methods_are_added_and_other_settings_refused(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = run(plan_of(folders["snli-ve"], "snli-ve", ("none",), (0.5,)), out)
    steps = []
    train = module.train
    monkeypatch.setattr(module, "train", lambda *rest, **options: steps.append(rest[1]) or train(*rest, **options))
    both = run(plan_of(folders["snli-ve"], "snli-ve", ("none", "plain"), (0.5, 1.0)), out)
    assert steps == [12, 24, 24] and figures(both)[: len(first.rows)] == figures(first)
    with pytest.raises(ValueError, match=r"got one with steps 4 instead of 5: repeat it as it was"):
        run(plan_of(folders["snli-ve"], "snli-ve", ("none",)), out, FAST._replace(steps=5))
    with pytest.raises(ValueError, match=r"got one with .*another train split"):
        run(plan_of(folders["vcr"], "vcr", ("none",)), out)


def test_students_share_first_weights_and_labels_with_all_methods(folders: dict[str, Path]) -> None:
    plan = plan_of(folders["vqa"], "vqa")
    protocol = module.Protocol(plan, *ck.bundled(), FAST, lambda progress: False)
    learners = [protocol._learner(Training(method, 1.0, 3)) for method in ("none", "plain", "targeted")]
    states = [learner.student.state_dict() for learner in learners]  # type: ignore[union-attr]
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])
    objective = learners[1].objective  # type: ignore[union-attr]
    assert (objective.keep, objective.temperature, objective.weight) == (1.0, math.inf, None)  # type: ignore[union-attr]
    subsets = [
        plan.subset(plan.train, Training(method, share, 3))[0].examples
        for method, share in (("none", 0.5), ("finetune", 0.5), ("none", 1.0))
    ]
    few, same, every = ({example.item for example in subset} for subset in subsets)
    assert few == same and few < every and len(few) == 12


def test_no_example_of_the_domain_that_is_held_out_is_trained_on(folders: dict[str, Path]) -> None:
    plan = plan_of(folders["vcr"], "vcr", field="source", held_out=("lsmdc",))
    for share, count in ((0.5, 6), (1.0, 12)):
        examples = plan.subset(plan.train, Training("none", share, 0))[0].examples
        sources = [plan.train.items[example.item].source for example in examples]
        assert sources == ["movieclips"] * 2 * count  # an answer and a reason of each annotation


def test_images_that_are_missing_or_broken_are_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    write_colours(tmp_path, "snli-ve", 12)
    (tmp_path / "images" / "1.jpg").unlink()
    (tmp_path / "images" / "2.jpg").write_bytes(b"no image")
    (tmp_path / "images" / "13.jpg").write_bytes(b"no image")
    results = run(plan_of(tmp_path, "snli-ve", ("none", "finetune"), (1.0,)), tmp_path / "out")
    names = [Path(path).name for path in results.unread]
    assert names == ["2.jpg", "13.jpg"]
    assert {(row.train, row.scored) for row in results.rows} == {(10, 11)}
    assert "1 of the 12 files of the train split are missing, the first '1.jpg': left out 1 annotation" in str(
        results.notes
    )
    again = run(plan_of(tmp_path, "snli-ve", ("none", "finetune"), (1.0,)), tmp_path / "out")
    assert again.unread == results.unread and again.rows == results.rows


def test_images_that_changed_since_the_run_began_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    write_colours(tmp_path, "snli-ve", 12)
    image, other = (tmp_path / "images" / name for name in ("2.jpg", "3.jpg"))
    plan = plan_of(tmp_path, "snli-ve", ("none",), (0.5, 1.0))
    first = run(plan._replace(shares=(0.5,)), tmp_path / "out")
    os.utime(image, ns=(5, 5))  # another time alone is no other image
    assert figures(run(plan, tmp_path / "out"))[: len(first.rows)] == figures(first)
    content = image.read_bytes()
    image.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=r"expected the train images with which .* began, got other ones: put them"):
        run(plan, tmp_path / "out")
    image.write_bytes(b"no image")
    with pytest.raises(ValueError, match="expected the train images with which"):
        run(plan, tmp_path / "out")
    image.write_bytes(content)
    assert figures(run(plan._replace(shares=(0.5,)), tmp_path / "out")) == figures(first)


def test_broken_images_are_left_out_from_a_folder_that_moved(folders: dict[str, Path], tmp_path: Path) -> None:
    write_colours(tmp_path / "a", "snli-ve", 12)
    (tmp_path / "a" / "images" / "2.jpg").write_bytes(b"no image")
    first = run(plan_of(tmp_path / "a", "snli-ve", ("none",), (0.5,)), tmp_path / "out")
    (tmp_path / "a").rename(tmp_path / "b")
    again = run(plan_of(tmp_path / "b", "snli-ve", ("none",), (0.5, 1.0)), tmp_path / "out")
    assert figures(again)[: len(first.rows)] == figures(first)
    assert [*again.unread] == [str(tmp_path / "b" / "images" / "2.jpg")] and again.rows[-1].train == 11


def test_texts_that_are_cut_are_counted(folders: dict[str, Path], tmp_path: Path) -> None:
    write_colours(tmp_path, "snli-ve", 12)
    # The bundled CLIP reads 62 letters between the start and the end.
    texts = ["x" * 62, "x" * 63, "y" * 63, "y" * 63]
    pairs = [snli_ve_pair(number, "1", text, "neutral") for number, text in enumerate(texts)]
    write_lines(tmp_path / "snli_ve_train.jsonl", pairs)
    plan = plan_of(tmp_path, "snli-ve", ("none",), (1.0,))
    for _ in range(2):
        notes = run(plan, tmp_path / "out").notes
        assert "train: 2 texts cut, because CLIP reads 64 tokens" in notes and "test: " not in str(notes[2:])


def test_nothing_left_to_train_on_or_to_score_is_said_with_the_counts(folders: dict[str, Path], tmp_path: Path) -> None:
    everything = plan_of(folders["vcr"], "vcr", ("none",), field="source", held_out=("lsmdc", "movieclips"))
    message = "expected annotations to train on, got none that can be used: .*held out by source: lsmdc, movieclips"
    with pytest.raises(ValueError, match=message):
        run(everything, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_colours(tmp_path, "snli-ve", 6)
    for number in range(7, 13):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(b"no image")
    phases = []
    with pytest.raises(ValueError, match=r"to score, got none .*; 6 images cannot be read; skipped .*7\.jpg: not an"):
        run(plan_of(tmp_path, "snli-ve", ("none",)), tmp_path / "out", progress=lambda p: phases.append(p.phase))
    assert not any(phase.startswith("training") for phase in phases)


@pytest.mark.parametrize(("name", "value"), [("lr", math.inf), ("strength", math.nan), ("temperature", math.inf)])
def test_settings_that_are_not_finite_are_refused(
    folders: dict[str, Path], tmp_path: Path, name: str, value: float
) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number in .*0, inf"):
        run(plan_of(folders["vcr"], "vcr"), tmp_path / "out", FAST._replace(**{name: value}))
    assert not (tmp_path / "out").exists()


def test_shares_that_differ_have_names_that_differ() -> None:
    assert Training("none", 0.29, 0).name == "none, 29 %, seed 0"
    assert Training("none", 0.3333333, 0).name != Training("none", 0.3333334, 0).name


def test_a_domain_that_is_held_out_is_scored_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(folders["vcr"], "vcr", ("none",), (1.0,), field="source", held_out=("lsmdc",))
    results = run(plan, tmp_path)
    assert [(row.split, row.metric, row.train, row.scored) for row in results.rows] == [
        (split, metric, 12, 12) for split in ("same", "shifted") for metric in ("Q→A", "QA→R", "Q→AR")
    ]
    assert "held out by source: lsmdc" in results.notes


def test_a_split_without_annotations_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(folders["vcr"], "vcr", ("none",), (1.0,), field="source", held_out=("lsmdc",))
    values = plan.test.values("source")
    others = tuple(example for example in plan.test.examples if values[example.item] != "lsmdc")
    results = run(plan._replace(test=plan.test._replace(examples=others)), tmp_path)
    assert {row.split for row in results.rows} == {"same"}
    assert "test: no annotation is left for the split shifted" in results.notes


def test_a_student_learns_colours_and_clip_whole_is_tuned(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(folders["vqa"], "vqa", ("none",), (1.0,))
    results = run(plan, tmp_path / "student", FAST._replace(steps=80, batch_size=24, lr=5e-3))
    scores = {row.metric: row.score for row in results.rows}
    assert scores["accuracy (yes/no)"] == pytest.approx(1.0) and scores["accuracy (other)"] > 0.9
    tuned = run(plan._replace(methods=("finetune",)), tmp_path / "clip", FAST._replace(tuned="full", steps=2))
    assert {row.steps for row in tuned.rows} == {2}


def test_answers_outside_of_the_vocabulary_are_no_labels(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["vqa"]
    classes = vqa_classes(read_vqa(folder, "train2014"), 2)
    assert classes == ("yes", "blue")
    train, test = (read_examples("vqa", folder, folder / "images", split, classes) for split in SPLITS["vqa"])
    results = run(Plan(train, test, ("none",), (1.0,), 1), tmp_path)
    assert {(row.train, row.classes, row.scored) for row in results.rows} == {(16, 2, 24)}
    assert "train: 8 annotations whose answer is no class, left out" in results.notes
