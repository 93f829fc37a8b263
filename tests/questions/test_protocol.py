"""CLIP-TD's protocol: every task trains and scores, a stopped run ends with the same figures, other runs are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import clipkernels as ck
from clipkernels.questions import protocol as module
from clipkernels.questions import state as states
from clipkernels.questions import training
from clipkernels.questions.examples import read_examples, vqa_classes
from clipkernels.questions.protocol import METHODS, Options, Plan, run_protocol
from clipkernels.questions.results import Progress, Results
from clipkernels.questions.vqa import read_vqa
from tests.questions.annotation_folders import SPLITS, write_colours

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
