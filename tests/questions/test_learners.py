"""Learners: the loss is cross-entropy plus the objective on the right states, and CLIP's head reads its features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import clipkernels as ck
from clipkernels.learn.distill import TargetedDistillation, Teacher, TeacherCache, align_grid
from clipkernels.questions.batches import Batch, ExampleBatches
from clipkernels.questions.learners import ClipLearner, StudentLearner
from clipkernels.questions.protocol import Protocol
from tests.questions.test_protocol import FAST, folders, plan_of

__all__ = ["folders"]
pytestmark = pytest.mark.usefixtures("one_thread")
INDICES = torch.tensor([5, 0, 3])


def source_of(folder: Path, task: str, cache: Path) -> tuple[Protocol, ExampleBatches]:
    """The protocol of a task, and its batches to train on, with features in fp32."""
    protocol = Protocol(plan_of(folder, task), *ck.bundled(), FAST, lambda progress: False)
    cached = TeacherCache(cache, protocol.teacher, torch.float32)
    return protocol, protocol._batches(protocol.plan.train, cached, protocol.tokens)


def learner_of(protocol: Protocol) -> StudentLearner:
    torch.manual_seed(0)
    objective = TargetedDistillation(protocol.teacher, protocol.width, protocol.width)
    return StudentLearner(protocol.student_class(protocol.task), objective).eval()


def test_the_loss_of_vcr_distills_the_text_with_the_right_choice(folders: dict[str, Path], tmp_path: Path) -> None:
    protocol, source = source_of(folders["vcr"], "vcr", tmp_path)
    (batch,) = source.read([INDICES], features=True)
    examples = [protocol.plan.train.examples[index] for index in INDICES.tolist()]
    assert batch.tokens.shape[:2] == (3, 4) and batch.labels.tolist() == [each.label for each in examples]
    learner = learner_of(protocol)
    loss, weight = learner.loss(batch)

    teacher = Teacher(*[ck.bundled()[place] for place in (0, 2)])
    outputs = [learner.student(batch.images[row].expand(4, -1, -1, -1), batch.tokens[row]) for row in range(3)]
    logits = torch.stack([output.logits[:, 0] for output in outputs])
    states = {
        name: torch.stack([getattr(output, name)[each.label] for output, each in zip(outputs, examples, strict=True)])
        for name in ("text", "visual", "pooled")
    }
    right = [f"{each.text} {each.choices[each.label]}" for each in examples]
    features = teacher(batch.images, right)._replace(
        answers=torch.stack([teacher(None, [f"{each.text} {c}" for c in each.choices]).text for each in examples])
    )
    features = features.align(torch.arange(batch.tokens.shape[2]), align_grid((4, 4), (8, 8)))
    expected = learner.objective(  # type: ignore[misc]
        features, text=states["text"], visual=states["visual"], text_pooled=states["pooled"],
        visual_pooled=states["pooled"], logits=logits, labels=batch.labels,
    )  # fmt: skip
    assert torch.allclose(loss, cross_entropy(logits, batch.labels) + expected.loss, atol=1e-4)
    assert weight == pytest.approx(float(expected.weight.mean()), abs=1e-4)


def test_the_targets_of_vqa_are_the_shares_of_its_annotators(folders: dict[str, Path], tmp_path: Path) -> None:
    protocol, source = source_of(folders["vqa"], "vqa", tmp_path)
    (batch,) = source.read([INDICES], features=True)
    classes = protocol.plan.train.classes
    assert classes == ("yes", "blue", "green", "red")
    # Nine of "is it blue?" say yes, and the tenth is no class; seven of "what color is it?" say red, three green.
    assert torch.allclose(batch.targets, torch.tensor([[1, 0, 0, 0], [0, 0, 0.3, 0.7], [1, 0, 0, 0]]))
    assert torch.equal(batch.candidates.gather(1, batch.right[:, None])[:, 0], batch.labels)
    assert batch.features.answers is not None and batch.features.answers.shape[1] == batch.candidates.shape[1]
    loss, _ = learner_of(protocol).loss(batch)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("task", ["snli-ve", "vcr"])
def test_clip_whole_begins_like_its_head_on_frozen_features(
    folders: dict[str, Path], tmp_path: Path, task: str
) -> None:
    protocol, source = source_of(folders[task], task, tmp_path)
    (batch,) = source.read([INDICES], texts=True)
    answers, width = protocol.task.answers, protocol.teacher.width
    frozen = ClipLearner(protocol.model, width, answers, "linear")
    whole = ClipLearner(protocol.model, width, answers, "full", protocol.task.length, protocol.task.padding)
    whole.head.load_state_dict(frozen.head.state_dict())
    whole.train()
    short: Batch = batch._replace(features=batch.features._replace(image=None), texts=None)
    assert torch.allclose(whole(short), frozen(batch), atol=1e-4)
    assert whole(short).shape == (3, batch.targets.shape[1])
    whole.loss(short)[0].backward()
    assert whole.model is not protocol.model and not whole.model.training  # type: ignore[union-attr]
    trained = [weight for weight in whole.model.visual.parameters() if weight.grad is not None]  # type: ignore[union-attr]
    assert trained and all(weight.grad is None for weight in protocol.model.parameters())
