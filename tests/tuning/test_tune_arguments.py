"""What is known of the images of a tuning, and its budget, are checked before anything is encoded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import clipkernels as ck
from clipkernels.tuning.arguments import check_annotations, check_families, read_budget
from clipkernels.tuning.budget import parse_budget

FITTING: dict[str, Any] = {
    "labels": torch.tensor([0, 1, 2, 0]),
    "classes": torch.ones(3, 8),
    "captions": torch.ones(4, 8),
    "caption_ids": torch.tensor([0, 0, 1, 2]),
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels", torch.zeros(3, dtype=torch.int64), r"labels must be \(4,\) int64, got \(3\) torch.int64"),
        ("labels", torch.zeros(4), r"labels must be \(4,\) int64, got \(4\) torch.float32"),
        ("labels", torch.tensor([0, 1, 3, 0]), r"labels must be in \[0, 2\], got 0 to 3"),
        ("labels", torch.tensor([0, -1, 2, 0]), r"labels must be in \[0, 2\], got -1 to 2"),
        ("caption_ids", torch.zeros(4, 1, dtype=torch.int64), r"caption_ids must be \(4,\) int64, got \(4,1\)"),
        ("classes", torch.ones(8), r"classes must be \(K,E\), got \(8\)"),
        ("captions", torch.ones(3, 8), r"captions must be \(4,E\), got \(3,8\)"),
        ("captions", torch.ones(4, 8, dtype=torch.int64), "captions must be float32, .*, got torch.int64"),
    ],
)
def test_annotations_fit_the_images(name: str, value: Any, message: str) -> None:
    check_annotations(4, **FITTING)
    with pytest.raises(ValueError, match=f"^{message}"):
        check_annotations(4, **{**FITTING, name: value})


def test_a_budget_is_text_or_constraints() -> None:
    constraints = parse_budget("recall@1>=.9, gmacs<=1")
    assert read_budget("recall@1>=.9, gmacs<=1") == read_budget(list(constraints)) == constraints
    with pytest.raises(ValueError, match=r"^budget must have at least one term, got none"):
        read_budget([])
    with pytest.raises(TypeError, match=r"^budget must be text such as 'recall@1>=.99' or a list of constraints, got "):
        read_budget(["recall@1>=.9"])


def test_kinds_of_steps_are_known_and_not_none() -> None:
    check_families(("merge", "prune"))
    for wrong in ((), "merge", ("merge", "drop")):
        with pytest.raises(ValueError, match=r"^families must be "):
            check_families(wrong)


def test_a_refused_call_leaves_the_model_as_it_was() -> None:
    model = ck.patch(ck.bundled()[0], ck.ToMe(4))
    with pytest.raises(ValueError, match=r"^labels must be"):
        ck.tune(model, torch.zeros(4, 3, 32, 32), "accuracy_drop<=.1", labels=torch.zeros(3, dtype=torch.int64))
    assert ck.method_of(model) == ck.ToMe(4)
