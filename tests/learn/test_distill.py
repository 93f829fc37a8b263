"""TargetedDistillation against a literal loop over instances and tokens."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from clipkernels.learn.distill import TargetedDistillation, TeacherFeatures
from clipkernels.learn.distill.objective import relevance_of, select_top
from tests.learn import gloo_distill

pytestmark = pytest.mark.usefixtures("one_thread")
B, T, P, D, V, E, A = 4, 7, 10, 6, 8, 12, 5


def features(dtype: torch.dtype = torch.float64, seed: int = 0) -> TeacherFeatures:
    """A batch in which one instance has no word, and another has one region and one word."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype)

    words, regions = torch.rand(B, T, generator=generator) < 0.8, torch.rand(B, P, generator=generator) < 0.9
    words[1], words[2], regions[2] = False, torch.arange(T) == 3, torch.arange(P) == 4
    return TeacherFeatures(
        normal(B, E), normal(B, E), normal(B, P, E), normal(B, T, E), regions, words, normal(B, A, E)
    )


def states(dtype: torch.dtype = torch.float64, seed: int = 1) -> dict[str, Tensor]:
    """A student's states and logits for that batch."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"text": (B, T, D), "text_pooled": (B, D), "visual": (B, P, V), "visual_pooled": (B, V), "logits": (B, A)}
    tensors = {name: torch.randn(*size, generator=generator, dtype=dtype) for name, size in sizes.items()}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


LABELS = torch.tensor([3, 0, 4, 1])


def objective(dtype: torch.dtype = torch.float64, **options: Any) -> TargetedDistillation:
    torch.manual_seed(2)
    return TargetedDistillation(E, text=D, visual=V, **options).to(dtype)


def literal(
    distil: TargetedDistillation,
    features: TeacherFeatures,
    states: dict[str, Tensor],
    labels: Tensor,
    prior: Tensor | None = None,
) -> tuple[Tensor, list[set[int]]]:
    """The loss and the chosen tokens, of every instance in turn: its words, then its regions."""
    total, chosen = torch.zeros((), dtype=torch.float64), []
    for b in range(len(labels)):
        distance = torch.zeros((), dtype=torch.float64)
        for name, guide, mask, whole, other in (
            ("text", features.words, features.words_mask, features.text, features.image),
            ("visual", features.regions, features.regions_mask, features.image, features.text),
        ):
            if getattr(distil, name) is None:
                continue
            project = getattr(distil, name).weight
            if name in states:
                valid = [i for i in range(guide.shape[1]) if mask is None or mask[b, i]]
                scores = {i: math.exp(cosine_similarity(guide[b, i], other[b], 0) / distil.temperature) for i in valid}
                total_score = sum(scores.values())
                share = {i: score / total_score for i, score in scores.items()}
                if name == "text" and prior is not None:
                    share = {i: value * float(prior[b, i]) for i, value in share.items()}
                best = sorted(valid, key=lambda i: (-share[i], i))[: math.ceil(distil.keep * len(valid))]
                chosen.append(set(best))
                of_chosen = sum(share[i] for i in best)
                for i in best:
                    far = (project @ states[name][b, i] - guide[b, i]).abs().sum() / E
                    distance = distance + (share[i] / of_chosen if of_chosen else 0) * far
            if f"{name}_pooled" in states:
                distance = distance + (project @ states[f"{name}_pooled"][b] - whole[b]).abs().sum() / E
        weight = 1.0
        if distil.weight is not None:
            cosines = torch.stack([cosine_similarity(features.image[b], answer, 0) for answer in features.answers[b]])
            teacher = float((distil.scale * cosines).softmax(0)[labels[b]])
            student = float(states["logits"][b].detach().softmax(0)[labels[b]])
            weight = {
                "ratio": teacher / (teacher + student),
                "teacher": teacher,
                "teacher_minus_student": max(teacher - student, 0),
            }[distil.weight]
        total = total + weight * distance / len(labels)
    return distil.strength * total, chosen


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> bool:
    return torch.allclose(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weight", ["ratio", "teacher", "teacher_minus_student", None])
@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_loss_and_gradients_match_the_literal_objective(weight: Any, keep: float) -> None:
    distil, teacher, student = objective(weight=weight, keep=keep, strength=0.7), features(), states()
    prior = torch.rand(B, T, generator=torch.Generator().manual_seed(3))
    expected, chosen = literal(distil, teacher, student, LABELS, prior)
    inputs = [student[name] for name in ("text", "text_pooled", "visual", "visual_pooled")] + list(distil.parameters())
    gradients = torch.autograd.grad(expected, inputs)
    result = distil(teacher, **student, labels=LABELS, prior=prior)
    assert same(result.loss, expected)
    for actual, gradient in zip(torch.autograd.grad(result.loss, inputs), gradients, strict=True):
        assert same(actual, gradient)
    shares = [*result.text, *result.visual]
    expected_sets = [*chosen[0::2], *chosen[1::2]]
    assert [set(row.nonzero()[:, 0].tolist()) for row in shares] == expected_sets
    assert same(result.loss, 0.7 * (result.weight * result.distance).mean())


@pytest.mark.parametrize("missing", ["text", "visual", "text_pooled", "visual_pooled"])
def test_any_part_of_the_objective_is_optional(missing: str) -> None:
    distil, teacher, student = objective(), features(), states()
    del student[missing]
    assert same(distil(teacher, **student, labels=LABELS).loss, literal(distil, teacher, student, LABELS)[0])


@pytest.mark.parametrize(("name", "needs"), [("text_pooled", "text"), ("visual_pooled", "image")])
def test_a_pooled_state_alone_needs_only_its_own_target(name: str, needs: str) -> None:
    teacher, student, distil = features(), states(), objective(weight=None)
    result = distil(TeacherFeatures(**{needs: getattr(teacher, needs)}), **{name: student[name]})
    assert same(result.loss, literal(distil, teacher, {name: student[name]}, LABELS)[0])


@pytest.mark.parametrize("branch", ["text", "visual"])
def test_one_branch_needs_no_features_of_the_other(branch: str) -> None:
    teacher, student = features(), states()
    distil = TargetedDistillation(E, **{branch: D if branch == "text" else V}).double()
    assert len(list(distil.parameters())) == 1
    student = {name: tensor for name, tensor in student.items() if name.startswith((branch, "logits"))}
    less = {"text": {"regions": None, "regions_mask": None}, "visual": {"words": None, "words_mask": None}}[branch]
    assert same(
        distil(teacher._replace(**less), **student, labels=LABELS).loss, literal(distil, teacher, student, LABELS)[0]
    )


def test_plain_distillation_averages_all_tokens() -> None:
    distil = objective(keep=1.0, temperature=math.inf, weight=None)
    teacher, student = features()._replace(words_mask=None, regions_mask=None), states()
    student = {name: student[name] for name in ("text", "visual")}
    text = (student["text"] @ distil.text.weight.T - teacher.words).abs().mean((1, 2))
    visual = (student["visual"] @ distil.visual.weight.T - teacher.regions).abs().mean((1, 2))
    result = distil(teacher, **student)
    assert same(result.distance, text + visual) and same(result.loss, (text + visual).mean())
    assert torch.equal(result.weight, torch.ones(B)) and same(result.text, torch.full((B, T), 1 / T))


def test_the_students_mask_removes_more_tokens() -> None:
    distil, teacher, student = objective(), features(), states()
    mask = torch.rand(B, P, generator=torch.Generator().manual_seed(5)) < 0.5
    both = teacher._replace(regions_mask=teacher.regions_mask & mask)
    assert torch.equal(
        distil(teacher, **student, labels=LABELS, visual_mask=mask).loss, distil(both, **student, labels=LABELS).loss
    )


def test_values_at_padding_make_no_difference() -> None:
    distil, teacher, student = objective(), features(), states()
    spoilt = teacher._replace(
        words=teacher.words.masked_fill(~teacher.words_mask[..., None], math.nan),
        regions=teacher.regions.masked_fill(~teacher.regions_mask[..., None], math.inf),
    )
    inputs = [student["text"], student["visual"], *distil.parameters()]
    results = []
    for batch, text in (
        (teacher, student["text"]),
        (spoilt, torch.where(teacher.words_mask[..., None], student["text"], math.nan)),
    ):
        result = distil(batch, **{**student, "text": text}, labels=LABELS)
        results.append((result.loss, *torch.autograd.grad(result.loss, inputs)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


def test_an_instance_of_only_padding_has_only_pooled_terms() -> None:
    distil, teacher, student = objective(weight=None), features(), states()
    empty = teacher._replace(
        words_mask=torch.zeros(B, T, dtype=torch.bool), regions_mask=torch.zeros(B, P, dtype=torch.bool)
    )
    pooled = {name: student[name] for name in ("text_pooled", "visual_pooled")}
    result = distil(empty, **student)
    assert torch.equal(result.distance, distil(empty, **pooled).distance)
    assert not result.text.any() and not result.visual.any()
    tokens = {name: student[name] for name in ("text", "visual")}
    alone = distil(empty, **tokens)
    assert torch.equal(alone.distance, torch.zeros(B))
    assert not any(grad.any() for grad in torch.autograd.grad(alone.loss, [*tokens.values(), *distil.parameters()]))


def test_instances_without_tokens_have_zero_distance() -> None:
    distil, teacher, student = objective(weight=None), features(), states()
    none = teacher._replace(words=teacher.words[:, :0], words_mask=None)
    assert torch.equal(distil(none, text=student["text"][:, :0]).distance, torch.zeros(B))


def test_a_prior_of_zeros_gives_zero_distance() -> None:
    distil, teacher, student = objective(weight=None), features(), states()
    result = distil(teacher, text=student["text"], prior=torch.zeros(T))
    assert torch.equal(result.distance, torch.zeros(B)) and not result.text.any()


@pytest.mark.parametrize(("keep", "real", "count"), [(0.4, 5, 2), (0.4, 6, 3), (0.1, 30, 3), (0.01, 9, 1), (1.0, 9, 9)])
def test_the_share_of_chosen_tokens_excludes_padding(keep: float, real: int, count: int) -> None:
    mask = torch.arange(32)[None] % 32 < real
    assert select_top(torch.rand(1, 32), mask, keep).sum() == count


def test_ties_choose_the_lower_index_and_never_padding() -> None:
    mask = torch.tensor([[False, True, True, False, True, True]])
    assert select_top(torch.zeros(1, 6), mask, 0.5).tolist() == [[False, True, True, False, False, False]]


def test_relevance_is_the_softmax_of_the_cosines() -> None:
    teacher = features()
    actual = relevance_of(teacher.words, teacher.image, torch.ones(B, T, dtype=torch.bool), 0.3)
    expected = (cosine_similarity(teacher.words, teacher.image[:, None], dim=2) / 0.3).softmax(1)
    assert same(actual, expected, 1e-12)


def test_weights_use_the_true_answer_and_have_no_gradient() -> None:
    teacher, student = features(), states()
    result = objective(weight="ratio")(teacher, **student, labels=LABELS)
    assert not result.weight.requires_grad
    (grad,) = torch.autograd.grad(result.loss, student["logits"], allow_unused=True)
    assert grad is None
    sure = student["logits"].detach().clone()
    sure[torch.arange(B), LABELS] = 100.0
    less = objective(weight="teacher_minus_student")(teacher, **{**student, "logits": sure}, labels=LABELS)
    assert torch.equal(less.weight, torch.zeros(B))


def test_an_instance_without_a_true_answer_has_weight_zero() -> None:
    teacher, student = features(), states()
    labels = torch.tensor([3, -100, 4, A])
    result = objective()(teacher, **student, labels=labels)
    all_known = objective()(teacher, **student, labels=LABELS)
    assert (result.weight[[1, 3]] == 0).all() and torch.equal(result.weight[[0, 2]], all_known.weight[[0, 2]])


def test_negative_priors_count_as_zero() -> None:
    teacher, student, distil = features(), states(), objective()
    prior = torch.randn(T, generator=torch.Generator().manual_seed(0))
    results = [distil(teacher, **student, labels=LABELS, prior=q).loss for q in (prior, prior.clamp(min=0))]
    assert torch.equal(*results)


def test_an_empty_batch_has_zero_loss() -> None:
    teacher = TeacherFeatures(*(None if tensor is None else tensor[:0] for tensor in features()))
    result = objective()(teacher, **{name: tensor[:0] for name, tensor in states().items()}, labels=LABELS[:0])
    assert result.loss == 0 and result.distance.shape == (0,)


def test_half_precision_states_are_projected_in_half_precision() -> None:
    teacher, distil = features(torch.float32), objective(torch.float32)
    student = {name: tensor.detach().bfloat16().requires_grad_() for name, tensor in states(torch.float32).items()}
    student["text_pooled"] = student["text_pooled"].detach().float().requires_grad_()
    result = distil(teacher, **student, labels=LABELS)
    wide = distil(teacher, **{name: tensor.float() for name, tensor in student.items()}, labels=LABELS)
    assert result.loss.dtype == torch.float32 and 0 < (result.loss - wide.loss).abs() < 0.01 * wide.loss
    result.loss.backward()
    assert student["text"].grad.dtype == torch.bfloat16 and distil.text.weight.grad.dtype == torch.float32


def test_zero_confidence_of_teacher_and_student_has_weight_zero() -> None:
    teacher, student = features(torch.float32), states(torch.float32)
    hopeless = torch.full((B, A), 300.0)
    hopeless[torch.arange(B), LABELS] = -300.0
    opposite = teacher.image[:, None] * torch.ones(1, A, 1)
    opposite[torch.arange(B), LABELS] *= -1
    result = objective(torch.float32, weight="ratio")(
        teacher._replace(answers=opposite), **{**student, "logits": hopeless}, labels=LABELS
    )
    assert torch.equal(result.weight, torch.zeros(B)) and result.loss == 0


def test_half_features_choose_the_same_tokens_as_in_fp32() -> None:
    half = TeacherFeatures(*(tensor.half() if tensor.is_floating_point() else tensor for tensor in features()))
    wide = TeacherFeatures(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in half))
    student, distil = states(torch.float32), objective(torch.float32)
    one, other = (distil(teacher, **student, labels=LABELS) for teacher in (half, wide))
    assert torch.equal(one.text, other.text) and torch.equal(one.visual, other.visual)
    assert same(one.loss, other.loss)


def test_autocast_projects_in_low_precision_and_weights_in_fp32() -> None:
    teacher, student, distil = features(torch.float32), states(torch.float32), objective(torch.float32)
    exact = distil(teacher, **student, labels=LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        low = distil(teacher, **student, labels=LABELS)
    assert torch.equal(low.text, exact.text) and torch.equal(low.visual, exact.visual)
    assert torch.equal(low.weight, exact.weight) and low.loss.dtype == torch.float32
    assert 0 < (low.loss - exact.loss).abs() < 0.02 * exact.loss
    low.loss.backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in (student["text"], *distil.parameters()))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_objective_compiles_to_one_equal_graph(backend: str) -> None:
    teacher, student, distil = features(torch.float32), states(torch.float32), objective(torch.float32)
    inputs = [student["text"], student["visual"], *distil.parameters()]
    eager = distil(teacher, **student, labels=LABELS)
    compiled = torch.compile(distil, fullgraph=True, backend=backend)(teacher, **student, labels=LABELS)
    assert same(compiled.loss, eager.loss, 1e-5) and same(compiled.text, eager.text, 1e-5)
    results = (torch.autograd.grad(result.loss, inputs) for result in (compiled, eager))
    for actual, expected in zip(*results, strict=True):
        assert same(actual, expected, 1e-5)


def test_two_processes_get_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    script = Path(gloo_distill.__file__)
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen([sys.executable, script, str(rank), "2", tmp_path], env=environment) for rank in range(2)]
    teacher = gloo_distill.build()
    teacher(*gloo_distill.batch()).backward()
    assert [run.wait(600) for run in runs] == [0, 0]
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert set(one) == {*teacher.state_dict()}
    for name, parameter in teacher.named_parameters():
        assert parameter.grad is not None and parameter.grad.any()
        assert torch.equal(one[name], two[name]) and same(one[name], parameter.grad)


def test_training_moves_the_student_toward_its_teacher() -> None:
    torch.manual_seed(0)
    teacher, labels = features(torch.float32), LABELS
    student, answer = nn.Linear(V, V), nn.Linear(V, A)
    distil = TargetedDistillation(E, visual=V, weight=None)
    x = torch.randn(B, P, V)
    optimizer = torch.optim.AdamW([*student.parameters(), *answer.parameters(), *distil.parameters()], 0.05)
    losses = []
    for _ in range(60):
        states = student(x)
        logits = answer(states.mean(1))
        result = distil(teacher, visual=states, visual_pooled=states.mean(1), logits=logits, labels=labels)
        loss = cross_entropy(logits, labels) + result.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(result.distance.detach().mean()))
    assert losses[-1] < 0.7 * losses[0]


def test_the_state_dict_holds_only_the_projections() -> None:
    assert {name: tuple(tensor.shape) for name, tensor in objective().state_dict().items()} == {
        "text.weight": (E, D),
        "visual.weight": (E, V),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected the width of the student's text or visual states, got neither"),
        ({"text": 0}, "text must be an int of at least 1, got 0"),
        ({"text": 4, "keep": 0}, "keep must be a number in (0, 1], got 0"),
        ({"text": 4, "keep": math.nan}, "keep must be a number in (0, 1], got nan"),
        ({"text": 4, "temperature": 0.0}, "temperature must be a number in (0, inf], got 0.0"),
        ({"text": 4, "weight": "students"}, 'weight must be "ratio", "teacher", "teacher_minus_student" or None, got'),
        ({"text": 4, "strength": -1.0}, "strength must be a number in [0, inf), got -1.0"),
    ],
)
def test_bad_constructor_arguments_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        TargetedDistillation(E, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None, "text_pooled": None, "visual": None, "visual_pooled": None}, "expected states of the student"),
        ({"labels": None}, "expected labels with weight 'ratio', got none"),
        ({"logits": None}, "expected logits with weight 'ratio', got none"),
        ({"answers": None}, "expected features.answers with weight 'ratio', got none"),
        ({"image": None}, "expected features.image, got none"),
        ({"words": None}, "expected features.words, got none"),
        ({"text": torch.zeros(B, T, 3)}, f"text must be (4,7,{D}), got (4,7,3)"),
        (
            {"text": torch.zeros(B, T + 1, D)},
            "features.words, one for each of the student's tokens, must be (4,8,12), got (4,7,12)",
        ),
        (
            {"visual": torch.zeros(B, P + 1, V), "regions_mask": None},
            "features.regions, one for each of the student's tokens, must be (4,11,12), got (4,10,12)",
        ),
        ({"visual_pooled": torch.zeros(B, 3)}, f"visual_pooled must be (4,{V}), got (4,3)"),
        ({"logits": torch.zeros(B, A + 1)}, "logits must be (4,5), got (4,6)"),
        ({"labels": LABELS[:2]}, "labels must be (4), got (2)"),
        ({"image": torch.zeros(3)}, f"features.image must be (4,{E}), got (3)"),
        ({"image": torch.zeros(B, 3)}, f"features.image must be (4,{E}), got (4,3)"),
        ({"visual_mask": torch.ones(B, 2, dtype=torch.bool)}, "visual_mask must be (4,10), got (4,2)"),
        ({"text_mask": torch.ones(B, T, dtype=torch.int64)}, "text_mask must be torch.bool, got torch.int64"),
        ({"words_mask": torch.ones(B, T)}, "features.words_mask must be torch.bool, got torch.float32"),
        ({"labels": LABELS.double()}, "labels must be torch.int64, got torch.float64"),
        ({"prior": torch.ones(T + 1)}, "prior must be (7), got (8)"),
        ({"prior": torch.ones(B, 1)}, "prior must be (4,7), got (4,1)"),
        ({"text": torch.zeros(B, T, D, device="meta")}, "text must be on cpu like the projections, got meta"),
        ({"regions": torch.zeros(B, P, E, device="meta")}, "must be on cpu like the projections, got meta"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    teacher, student = features(), {**states(), "labels": LABELS}
    teacher = teacher._replace(
        **{name: tensor for name, tensor in changes.items() if name in teacher._fields and name != "text"}
    )
    student |= {name: tensor for name, tensor in changes.items() if name not in teacher._fields or name == "text"}
    with pytest.raises(ValueError) as error:
        objective()(teacher, **student)
    assert message in str(error.value)


def test_states_without_their_branch_are_refused_by_name() -> None:
    distil = TargetedDistillation(E, visual=V).double()
    with pytest.raises(
        ValueError, match="expected no text states, got some: construct this module with text= their width"
    ):
        distil(features(), **states(), labels=LABELS)
