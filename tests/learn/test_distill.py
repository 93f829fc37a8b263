"""TargetedDistillation against the objective read one instance and one token at a time."""

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
    """A batch of which one instance has no word, another one region and one word."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype)

    words, regions = torch.rand(B, T, generator=generator) < 0.8, torch.rand(B, P, generator=generator) < 0.9
    words[1], words[2], regions[2] = False, torch.arange(T) == 3, torch.arange(P) == 4
    return TeacherFeatures(
        normal(B, E), normal(B, E), normal(B, P, E), normal(B, T, E), regions, words, normal(B, A, E)
    )


def states(dtype: torch.dtype = torch.float64, seed: int = 1) -> dict[str, Tensor]:
    """What a student makes of that batch."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"text": (B, T, D), "text_pooled": (B, D), "visual": (B, P, V), "visual_pooled": (B, V), "logits": (B, A)}
    made = {name: torch.randn(*size, generator=generator, dtype=dtype) for name, size in sizes.items()}
    return {name: each.requires_grad_() for name, each in made.items()}


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
    """The loss, and which tokens are chosen: the words of every instance, then the regions of every instance."""
    total, chosen = torch.zeros((), dtype=torch.float64), []
    for b in range(len(labels)):
        distance = torch.zeros((), dtype=torch.float64)
        for name, guide, there, whole, other in (
            ("text", features.words, features.words_mask, features.text, features.image),
            ("visual", features.regions, features.regions_mask, features.image, features.text),
        ):
            if getattr(distil, name) is None:
                continue
            project = getattr(distil, name).weight
            if name in states:
                real = [i for i in range(guide.shape[1]) if there is None or there[b, i]]
                scores = {i: math.exp(cosine_similarity(guide[b, i], other[b], 0) / distil.temperature) for i in real}
                total_score = sum(scores.values())
                share = {i: score / total_score for i, score in scores.items()}
                if name == "text" and prior is not None:
                    share = {i: value * float(prior[b, i]) for i, value in share.items()}
                best = sorted(real, key=lambda i: (-share[i], i))[: math.ceil(distil.keep * len(real))]
                chosen.append(set(best))
                of_chosen = sum(share[i] for i in best)
                for i in best:
                    far = (project @ states[name][b, i] - guide[b, i]).abs().sum() / E
                    distance = distance + (share[i] / of_chosen if of_chosen else 0) * far
            if f"{name}_pooled" in states:
                distance = distance + (project @ states[f"{name}_pooled"][b] - whole[b]).abs().sum() / E
        weight = 1.0
        if distil.weight is not None:
            alike = torch.stack([cosine_similarity(features.image[b], answer, 0) for answer in features.answers[b]])
            teacher = float((distil.scale * alike).softmax(0)[labels[b]])
            student = float(states["logits"][b].detach().softmax(0)[labels[b]])
            weight = {
                "ratio": teacher / (teacher + student),
                "teacher": teacher,
                "teacher_minus_student": max(teacher - student, 0),
            }[distil.weight]
        total = total + weight * distance / len(labels)
    return distil.strength * total, chosen


def same(came: Tensor, expected: Tensor, tolerance: float = 1e-6) -> bool:
    return torch.allclose(came.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weight", ["ratio", "teacher", "teacher_minus_student", None])
@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_loss_and_gradients_match_the_literal_objective(weight: Any, keep: float) -> None:
    distil, taught, own = objective(weight=weight, keep=keep, strength=0.7), features(), states()
    prior = torch.rand(B, T, generator=torch.Generator().manual_seed(3))
    expected, chosen = literal(distil, taught, own, LABELS, prior)
    wanted = [own[name] for name in ("text", "text_pooled", "visual", "visual_pooled")] + list(distil.parameters())
    gradients = torch.autograd.grad(expected, wanted)
    found = distil(taught, **own, labels=LABELS, prior=prior)
    assert same(found.loss, expected)
    for came, gradient in zip(torch.autograd.grad(found.loss, wanted), gradients, strict=True):
        assert same(came, gradient)
    shares = [*found.text, *found.visual]
    expected_sets = [*chosen[0::2], *chosen[1::2]]
    assert [set(row.nonzero()[:, 0].tolist()) for row in shares] == expected_sets
    assert same(found.loss, 0.7 * (found.weight * found.distance).mean())


@pytest.mark.parametrize("missing", ["text", "visual", "text_pooled", "visual_pooled"])
def test_any_part_of_the_objective_is_optional(missing: str) -> None:
    distil, taught, own = objective(), features(), states()
    del own[missing]
    assert same(distil(taught, **own, labels=LABELS).loss, literal(distil, taught, own, LABELS)[0])


@pytest.mark.parametrize(("name", "needs"), [("text_pooled", "text"), ("visual_pooled", "image")])
def test_a_pooled_state_alone_needs_only_its_own_target(name: str, needs: str) -> None:
    taught, own, distil = features(), states(), objective(weight=None)
    found = distil(TeacherFeatures(**{needs: getattr(taught, needs)}), **{name: own[name]})
    assert same(found.loss, literal(distil, taught, {name: own[name]}, LABELS)[0])


@pytest.mark.parametrize("branch", ["text", "visual"])
def test_one_branch_needs_no_features_of_the_other(branch: str) -> None:
    taught, own = features(), states()
    distil = TargetedDistillation(E, **{branch: D if branch == "text" else V}).double()
    assert len(list(distil.parameters())) == 1
    own = {name: each for name, each in own.items() if name.startswith((branch, "logits"))}
    less = {"text": {"regions": None, "regions_mask": None}, "visual": {"words": None, "words_mask": None}}[branch]
    assert same(distil(taught._replace(**less), **own, labels=LABELS).loss, literal(distil, taught, own, LABELS)[0])


def test_plain_distillation_averages_all_tokens() -> None:
    distil = objective(keep=1.0, temperature=math.inf, weight=None)
    taught, own = features()._replace(words_mask=None, regions_mask=None), states()
    own = {name: own[name] for name in ("text", "visual")}
    text = (own["text"] @ distil.text.weight.T - taught.words).abs().mean((1, 2))
    visual = (own["visual"] @ distil.visual.weight.T - taught.regions).abs().mean((1, 2))
    found = distil(taught, **own)
    assert same(found.distance, text + visual) and same(found.loss, (text + visual).mean())
    assert torch.equal(found.weight, torch.ones(B)) and same(found.text, torch.full((B, T), 1 / T))


def test_the_students_mask_removes_more_tokens() -> None:
    distil, taught, own = objective(), features(), states()
    mask = torch.rand(B, P, generator=torch.Generator().manual_seed(5)) < 0.5
    both = taught._replace(regions_mask=taught.regions_mask & mask)
    assert torch.equal(
        distil(taught, **own, labels=LABELS, visual_mask=mask).loss, distil(both, **own, labels=LABELS).loss
    )


def test_values_at_padding_make_no_difference() -> None:
    distil, taught, own = objective(), features(), states()
    spoilt = taught._replace(
        words=taught.words.masked_fill(~taught.words_mask[..., None], math.nan),
        regions=taught.regions.masked_fill(~taught.regions_mask[..., None], math.inf),
    )
    wanted = [own["text"], own["visual"], *distil.parameters()]
    results = []
    for each, text in (
        (taught, own["text"]),
        (spoilt, torch.where(taught.words_mask[..., None], own["text"], math.nan)),
    ):
        found = distil(each, **{**own, "text": text}, labels=LABELS)
        results.append((found.loss, *torch.autograd.grad(found.loss, wanted)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


def test_an_instance_of_only_padding_has_only_pooled_terms() -> None:
    distil, taught, own = objective(weight=None), features(), states()
    empty = taught._replace(
        words_mask=torch.zeros(B, T, dtype=torch.bool), regions_mask=torch.zeros(B, P, dtype=torch.bool)
    )
    pooled = {name: own[name] for name in ("text_pooled", "visual_pooled")}
    found = distil(empty, **own)
    assert torch.equal(found.distance, distil(empty, **pooled).distance)
    assert not found.text.any() and not found.visual.any()
    tokens = {name: own[name] for name in ("text", "visual")}
    alone = distil(empty, **tokens)
    assert torch.equal(alone.distance, torch.zeros(B))
    assert not any(grad.any() for grad in torch.autograd.grad(alone.loss, [*tokens.values(), *distil.parameters()]))


def test_instances_without_tokens_have_zero_distance() -> None:
    distil, taught, own = objective(weight=None), features(), states()
    none = taught._replace(words=taught.words[:, :0], words_mask=None)
    assert torch.equal(distil(none, text=own["text"][:, :0]).distance, torch.zeros(B))


def test_a_prior_of_zeros_gives_zero_distance() -> None:
    distil, taught, own = objective(weight=None), features(), states()
    found = distil(taught, text=own["text"], prior=torch.zeros(T))
    assert torch.equal(found.distance, torch.zeros(B)) and not found.text.any()


@pytest.mark.parametrize(("keep", "real", "count"), [(0.4, 5, 2), (0.4, 6, 3), (0.1, 30, 3), (0.01, 9, 1), (1.0, 9, 9)])
def test_the_share_of_chosen_tokens_excludes_padding(keep: float, real: int, count: int) -> None:
    mask = torch.arange(32)[None] % 32 < real
    assert select_top(torch.rand(1, 32), mask, keep).sum() == count


def test_ties_choose_the_lower_index_and_never_padding() -> None:
    mask = torch.tensor([[False, True, True, False, True, True]])
    assert select_top(torch.zeros(1, 6), mask, 0.5).tolist() == [[False, True, True, False, False, False]]


def test_relevance_is_the_softmax_of_the_cosines() -> None:
    taught = features()
    came = relevance_of(taught.words, taught.image, torch.ones(B, T, dtype=torch.bool), 0.3)
    expected = (cosine_similarity(taught.words, taught.image[:, None], dim=2) / 0.3).softmax(1)
    assert same(came, expected, 1e-12)


def test_weights_use_the_true_answer_and_have_no_gradient() -> None:
    taught, own = features(), states()
    found = objective(weight="ratio")(taught, **own, labels=LABELS)
    assert not found.weight.requires_grad
    (grad,) = torch.autograd.grad(found.loss, own["logits"], allow_unused=True)
    assert grad is None
    sure = own["logits"].detach().clone()
    sure[torch.arange(B), LABELS] = 100.0
    less = objective(weight="teacher_minus_student")(taught, **{**own, "logits": sure}, labels=LABELS)
    assert torch.equal(less.weight, torch.zeros(B))


def test_an_instance_without_a_true_answer_has_weight_zero() -> None:
    taught, own = features(), states()
    labels = torch.tensor([3, -100, 4, A])
    found = objective()(taught, **own, labels=labels)
    all_known = objective()(taught, **own, labels=LABELS)
    assert (found.weight[[1, 3]] == 0).all() and torch.equal(found.weight[[0, 2]], all_known.weight[[0, 2]])


def test_negative_priors_count_as_zero() -> None:
    taught, own, distil = features(), states(), objective()
    prior = torch.randn(T, generator=torch.Generator().manual_seed(0))
    results = [distil(taught, **own, labels=LABELS, prior=each).loss for each in (prior, prior.clamp(min=0))]
    assert torch.equal(*results)


def test_an_empty_batch_has_zero_loss() -> None:
    taught = TeacherFeatures(*(None if each is None else each[:0] for each in features()))
    found = objective()(taught, **{name: each[:0] for name, each in states().items()}, labels=LABELS[:0])
    assert found.loss == 0 and found.distance.shape == (0,)


def test_half_precision_states_are_projected_in_half_precision() -> None:
    taught, distil = features(torch.float32), objective(torch.float32)
    own = {name: each.detach().bfloat16().requires_grad_() for name, each in states(torch.float32).items()}
    own["text_pooled"] = own["text_pooled"].detach().float().requires_grad_()
    found = distil(taught, **own, labels=LABELS)
    wide = distil(taught, **{name: each.float() for name, each in own.items()}, labels=LABELS)
    assert found.loss.dtype == torch.float32 and 0 < (found.loss - wide.loss).abs() < 0.01 * wide.loss
    found.loss.backward()
    assert own["text"].grad.dtype == torch.bfloat16 and distil.text.weight.grad.dtype == torch.float32


def test_zero_confidence_of_teacher_and_student_has_weight_zero() -> None:
    taught, own = features(torch.float32), states(torch.float32)
    hopeless = torch.full((B, A), 300.0)
    hopeless[torch.arange(B), LABELS] = -300.0
    opposite = taught.image[:, None] * torch.ones(1, A, 1)
    opposite[torch.arange(B), LABELS] *= -1
    found = objective(torch.float32, weight="ratio")(
        taught._replace(answers=opposite), **{**own, "logits": hopeless}, labels=LABELS
    )
    assert torch.equal(found.weight, torch.zeros(B)) and found.loss == 0


def test_half_features_choose_the_same_tokens_as_in_fp32() -> None:
    half = TeacherFeatures(*(each.half() if each.is_floating_point() else each for each in features()))
    wide = TeacherFeatures(*(each.float() if each.is_floating_point() else each for each in half))
    own, distil = states(torch.float32), objective(torch.float32)
    one, other = (distil(each, **own, labels=LABELS) for each in (half, wide))
    assert torch.equal(one.text, other.text) and torch.equal(one.visual, other.visual)
    assert same(one.loss, other.loss)


def test_autocast_projects_in_low_precision_and_weights_in_fp32() -> None:
    taught, own, distil = features(torch.float32), states(torch.float32), objective(torch.float32)
    exact = distil(taught, **own, labels=LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        low = distil(taught, **own, labels=LABELS)
    assert torch.equal(low.text, exact.text) and torch.equal(low.visual, exact.visual)
    assert torch.equal(low.weight, exact.weight) and low.loss.dtype == torch.float32
    assert 0 < (low.loss - exact.loss).abs() < 0.02 * exact.loss
    low.loss.backward()
    assert all(each.grad.dtype == torch.float32 for each in (own["text"], *distil.parameters()))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_objective_compiles_to_one_equal_graph(backend: str) -> None:
    taught, own, distil = features(torch.float32), states(torch.float32), objective(torch.float32)
    wanted = [own["text"], own["visual"], *distil.parameters()]
    eager = distil(taught, **own, labels=LABELS)
    compiled = torch.compile(distil, fullgraph=True, backend=backend)(taught, **own, labels=LABELS)
    assert same(compiled.loss, eager.loss, 1e-5) and same(compiled.text, eager.text, 1e-5)
    results = (torch.autograd.grad(found.loss, wanted) for found in (compiled, eager))
    for came, expected in zip(*results, strict=True):
        assert same(came, expected, 1e-5)


def test_two_processes_get_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    script = Path(gloo_distill.__file__)
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen([sys.executable, script, str(rank), "2", tmp_path], env=environment) for rank in range(2)]
    taught = gloo_distill.build()
    taught(*gloo_distill.batch()).backward()
    assert [run.wait(600) for run in runs] == [0, 0]
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert set(one) == {*taught.state_dict()}
    for name, parameter in taught.named_parameters():
        assert parameter.grad is not None and parameter.grad.any()
        assert torch.equal(one[name], two[name]) and same(one[name], parameter.grad)


def test_training_moves_the_student_toward_its_teacher() -> None:
    torch.manual_seed(0)
    taught, labels = features(torch.float32), LABELS
    student, answer = nn.Linear(V, V), nn.Linear(V, A)
    distil = TargetedDistillation(E, visual=V, weight=None)
    x = torch.randn(B, P, V)
    optimizer = torch.optim.AdamW([*student.parameters(), *answer.parameters(), *distil.parameters()], 0.05)
    losses = []
    for _ in range(60):
        states = student(x)
        logits = answer(states.mean(1))
        found = distil(taught, visual=states, visual_pooled=states.mean(1), logits=logits, labels=labels)
        loss = cross_entropy(logits, labels) + found.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(found.distance.detach().mean()))
    assert losses[-1] < 0.7 * losses[0]


def test_the_state_dict_holds_only_the_projections() -> None:
    assert {name: tuple(each.shape) for name, each in objective().state_dict().items()} == {
        "text.weight": (E, D),
        "visual.weight": (E, V),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected the width of the student's text or visual states, got neither"),
        ({"text": 0}, "widths must be at least one, got teacher=12, text=0, visual=None"),
        ({"text": 4, "keep": 0}, "keep must be a number in (0, 1], got 0"),
        ({"text": 4, "keep": math.nan}, "keep must be a number in (0, 1], got nan"),
        ({"text": 4, "temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"text": 4, "weight": "students"}, "weight must be one of ratio, teacher, teacher_minus_student or None"),
        ({"text": 4, "strength": -1.0}, "scale and strength must be finite"),
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
    taught, own = features(), {**states(), "labels": LABELS}
    taught = taught._replace(
        **{name: each for name, each in changes.items() if name in taught._fields and name != "text"}
    )
    own |= {name: each for name, each in changes.items() if name not in taught._fields or name == "text"}
    with pytest.raises(ValueError) as error:
        objective()(taught, **own)
    assert message in str(error.value)


def test_states_without_their_branch_are_refused_by_name() -> None:
    distil = TargetedDistillation(E, visual=V).double()
    with pytest.raises(
        ValueError, match="expected no text states, got some: construct this module with text= their width"
    ):
        distil(features(), **states(), labels=LABELS)
