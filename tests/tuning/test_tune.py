"""`ck.tune`: its forwards, its halves, its promise, its state, and what it returns."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from PIL import Image
from torch import Tensor

import clipkernels as ck
from clipkernels.cli.parts.demo_images import QUICK, draw
from clipkernels.tuning.budget import parse_budget
from clipkernels.tuning.candidates import Geometry, published
from clipkernels.tuning.decision import MAX_TIMED
from clipkernels.tuning.evaluations import Evaluation, slacks_of
from clipkernels.tuning.forwards import Part
from clipkernels.tuning.photographs import halve
from clipkernels.tuning.promise import MAX_TESTS, order_of_tests, pareto, run_tests
from clipkernels.tuning.results import Progress, Tuned
from clipkernels.tuning.state import FOLDER
from tests.tuning.fixed_times import fix_times, table_of

pytestmark = pytest.mark.usefixtures("one_thread")
FAST: dict[str, Any] = {"cost": "gmacs", "evaluations": 24, "families": ("merge", "prune")}


@pytest.fixture(scope="module")
def images() -> Tensor:
    """The 60 digits and 40 scenes of the quick demo, preprocessed (100,3,32,32)."""
    preprocess = ck.bundled()[1]
    pixels = [image for kind in draw(QUICK, seed=0).values() for image in kind.images]
    return torch.stack([preprocess(Image.fromarray(image)) for image in pixels])[:100]


@pytest.fixture(scope="module")
def tuned(images: Tensor) -> Tuned:
    """The result for a budget that some plans keep."""
    return ck.tune(ck.bundled()[0], images, "cosine_mean>=.97", **FAST)


class Stop:
    """Stops a run after a number of reports."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, progress: Progress) -> bool:
        self.left -= 1
        return self.left < 0


def test_embeddings_of_a_part_are_those_of_the_patched_model(images: Tensor) -> None:
    model = ck.bundled()[0]
    index = torch.tensor([5, 3, 40, 41, 7])
    methods = [ck.Dense(), ck.ToMe(5), ck.EViT(0.5), ck.TCA(0.1), ck.ToMe((0, 0, 8, 0, 4))]
    with ck.patched(model, ck.Dense()):
        tower = ck.tower_of(model)
        part, lean = Part(tower, images, index, 2), Part(tower, list(images), index, 2, limit=0)
        rows = [(part.embed(method.plan(65, 6)), lean.embed(method.plan(65, 6))) for method in methods]
    for method, (kept, read_again) in zip(methods, rows, strict=True):
        with ck.patched(model, method), torch.inference_mode():
            expected = torch.cat([ck.encode_image(model, images[pair]).embedding for pair in index.split(2)])
        expected = torch.nn.functional.normalize(expected, dim=1)
        assert torch.equal(read_again, expected) and torch.allclose(kept, expected, atol=1e-5)


def test_halves_do_not_depend_on_the_order(images: Tensor) -> None:
    halves = halve(images, (32, 32), 0.5, 0)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    shuffled = halve(images[order], (32, 32), 0.5, 0)
    assert torch.equal(order[shuffled.search], halves.search) and shuffled.digest == halves.digest
    assert len(halves.search) == len(halves.held_out) == 50
    assert set(halves.search.tolist()).isdisjoint(halves.held_out.tolist())
    assert not torch.equal(halve(images, (32, 32), 0.5, 1).search, halves.search)


def test_images_that_are_none_are_left_out(images: Tensor) -> None:
    items: list[Any] = [*images[:3], None, *images[3:20]]
    halves = halve(items, (32, 32), 0.25, 0)
    assert halves.skipped == (3,) and len(halves.search) == 5 and len(halves.held_out) == 15
    assert halves.digest == halve(images[:20], (32, 32), 0.25, 0).digest
    with pytest.raises(ValueError, match="at least 8 photographs"):
        halve(items[:8], (32, 32), 0.5, 0)
    with pytest.raises(ValueError, match=r"images\[1\]: images must be \(B,3,32,32\), got \(1,3,16,16\)"):
        halve([images[0], images[1, :, :16, :16]], (32, 32), 0.5, 0)


class Fixed:
    """An evaluator whose figures are fixed: of the search half, and of the held-out half."""

    def __init__(self, figures: dict[ck.Plan, tuple[float, float]], error: float) -> None:
        self.figures, self.error, self.tested = figures, error, list[ck.Plan]()
        self.searched = {plan: self.evaluation(search) for plan, (search, _) in figures.items()}

    def evaluation(self, figure: float) -> Evaluation:
        """The evaluation of a figure with its error, for a bound of .9."""
        risk = 0.5 * math.erfc((figure - 0.9) / self.error / math.sqrt(2))
        return Evaluation(1 - figure, 1 - figure, figure, (figure,), (figure - self.error,), risk)

    def __call__(self, part: str, plan: ck.Plan) -> Evaluation:
        self.tested.append(plan)
        return self.evaluation(self.figures[plan][1])


class Count:
    """Costs of plans: the tokens that they leave."""

    dense = ck.Plan((None, None), 65, 1)

    def __call__(self, plan: ck.Plan) -> float:
        return float(plan.tokens[-1])


COUNT: Any = Count()


def merges(count: int) -> ck.Plan:
    """A plan that merges `count` tokens in the first block."""
    return ck.Plan((ck.Merge(count) if count else None, None), 65, 1)


def test_plans_near_the_budget_are_tested_from_costly_to_cheap() -> None:
    constraints = parse_budget("cosine_mean>=.9")
    figures = {merges(r): (0.992 - 0.005 * r, 0.992 - 0.005 * r) for r in range(24)}
    evaluator: Any = Fixed(figures, error=0.01)
    slacks = slacks_of(constraints, evaluator.searched)
    assert [slacks[merges(r)] for r in (8, 10, 12, 13)] == pytest.approx([5.1, 4.1, 3.1, 2.6], abs=0.1)
    order = order_of_tests(evaluator.searched, constraints, COUNT)
    assert [65 - plan.tokens[-1] for plan in order] == [8, 10, 13, 14, 15, 16, 17]
    results = run_tests(evaluator, order)
    # Each test has 5 % / 7 and what the tests before it have passed on: bounds at 2.5, 2.2, 2.0, 1.9 and 1.8 errors.
    assert [result.passed for result in results] == [True] * 4 + [False] * 3
    assert evaluator.tested == order


def test_a_test_that_fails_does_not_end_the_tests() -> None:
    held_out = {1: 0.93, 2: 0.89, 3: 0.93, 4: 0.918, 5: 0.925}
    evaluator: Any = Fixed({merges(r): (0.95, figure) for r, figure in held_out.items()}, error=0.01)
    results = run_tests(evaluator, [merges(r) for r in held_out])
    assert [result.passed for result in results] == [True, False, True, False, True]


def test_plans_that_break_the_budget_pass_in_one_of_twenty_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    plans = [merges(r) for r in range(1, MAX_TESTS + 1)]
    passes = 0
    for _ in range(2000):
        common, own = torch.randn(1, generator=generator), torch.randn(MAX_TESTS, generator=generator)
        noise = (0.5 * common + 0.75**0.5 * own).tolist()
        evaluator: Any = Fixed({plan: (0.9, 0.9 + 0.01 * x) for plan, x in zip(plans, noise, strict=True)}, 0.01)
        passes += any(result.passed for result in run_tests(evaluator, plans))
    assert 0.02 < passes / 2000 < 0.05


def test_a_plan_that_another_one_beats_clearly_is_not_tested() -> None:
    removed = {1: 0.96, 2: 0.95, 4: 0.919, 5: 0.925, 6: 0.924, 9: 0.91}
    evaluator: Any = Fixed({merges(r): (figure, figure) for r, figure in removed.items()}, error=0.01)
    constraints = parse_budget("cosine_mean>=.9")
    assert order_of_tests(evaluator.searched, constraints, COUNT) == [merges(r) for r in (1, 2, 5, 6, 9)]
    assert pareto(evaluator.searched, constraints, COUNT) == [merges(r) for r in (9, 6, 5, 2, 1)]


def test_many_plans_are_thinned_out_for_the_tests() -> None:
    figures = {merges(r): (0.93 - 0.0008 * r, 0.93) for r in range(1, 33)}
    evaluator: Any = Fixed(figures, error=0.01)
    order = order_of_tests(evaluator.searched, parse_budget("cosine_mean>=.9"), COUNT)
    assert MAX_TESTS - 1 <= len(order) <= MAX_TESTS and order[0] == merges(1) and order[-1] == merges(31)


def test_a_lucky_figure_is_drawn_to_those_of_similar_plans() -> None:
    figures = {merges(r): (0.95, 0.95) for r in range(1, 9)}
    evaluator: Any = Fixed(figures, error=0.01)
    lucky = evaluator.searched[merges(4)]._replace(figures=(0.97,), bounds=(0.96,))
    slacks = slacks_of(parse_budget("cosine_mean>=.9"), {**evaluator.searched, merges(4): lucky})
    assert slacks[merges(1)] == pytest.approx(5.125) and slacks[merges(4)] == pytest.approx(6.125)
    assert slacks[merges(4)] < (0.97 - 0.9) / 0.01


def test_a_budget_is_kept_on_photographs_that_were_held_out(images: Tensor, tuned: Tuned) -> None:
    assert tuned.reason is None and isinstance(tuned.schedule, ck.Schedule) and tuned.gmacs is not None
    [promise] = tuned.promises
    assert promise.images == 50 and promise.bound >= 0.97 and promise.figure >= promise.bound
    model, halves = ck.bundled()[0], halve(images, (32, 32), 0.5, 0)
    with torch.inference_mode():
        dense = ck.encode_image(model, images[halves.held_out]).embedding
        ck.patch(model, tuned.schedule)
        reduced = ck.encode_image(model, images[halves.held_out]).embedding
    cosine = torch.nn.functional.cosine_similarity(dense.double(), reduced.double()).mean()
    assert promise.figure == pytest.approx(float(cosine), abs=1e-5)
    assert tuned.cosines is not None and tuned.cosines[1] == pytest.approx(promise.figure)
    assert tuned.gmacs < tuned.dense_gmacs and tuned.evaluations <= 24 and tuned.speedup is None


def test_the_frontier_has_the_published_schedules_and_the_choice(tuned: Tuned) -> None:
    [chosen] = [row for row in tuned.rows if row.chosen]
    assert tuned.schedule is not None and chosen.plan.steps == tuned.schedule.steps and chosen.keeps
    assert [row.gmacs for row in tuned.rows] == sorted((row.gmacs for row in tuned.rows), reverse=True)
    names = {row.name for row in tuned.rows if row.published}
    assert "Dense()" in names and any(name.startswith("ToMe") for name in names)
    assert all(row.milliseconds is None for row in tuned.rows)
    assert not [row for row in tuned.rows if row.gmacs < chosen.gmacs and row.cosine_mean > chosen.cosine_mean]


def test_the_same_call_gives_the_same_schedule(images: Tensor, tuned: Tuned) -> None:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2))
    again = ck.tune(ck.bundled()[0], images[order], "cosine_mean>=.97", **FAST)
    assert again == tuned


def test_the_model_is_left_as_it_was(images: Tensor) -> None:
    model = ck.bundled()[0]
    ck.tune(model, images[:16], "gmacs<=.03", cost="gmacs", evaluations=8, families=("merge",))
    assert ck.method_of(model) is None and not model.training
    ck.patch(model, ck.EViT(0.7)).train()
    ck.tune(model, images[:16], "gmacs<=.03", cost="gmacs", evaluations=8, families=("merge",))
    assert ck.method_of(model) == ck.EViT(0.7) and model.training


def test_a_budget_of_operations_gives_the_least_damage_for_them(images: Tensor) -> None:
    tuned = ck.tune(ck.bundled()[0], images, "gmacs<=.032", **FAST)
    assert tuned.schedule is not None and tuned.gmacs is not None and tuned.gmacs <= 0.032 and tuned.promises == ()
    [chosen] = [row for row in tuned.rows if row.chosen]
    others = [row for row in tuned.rows if row.gmacs <= 0.032]
    assert chosen.cosine_mean == max(row.cosine_mean for row in others)


TIMED: dict[str, Any] = {"budget": "cosine_mean>=.5, speedup>=1.2", "evaluations": 8, "families": ("merge",)}


def test_a_measured_table_is_the_cost_of_plans(images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ck.bundled()[0]
    table, timed = table_of(model, 8), fix_times(monkeypatch, plan=1.0)
    arguments: dict[str, Any] = {"images": images[:16], **TIMED, "state": tmp_path / "state"}
    tuned = ck.tune(model, cost=table, **arguments)
    assert tuned.schedule is not None and tuned.speedup == (1.5, 1.5, 1.5) and ck.method_of(model) is None
    [batches] = timed
    assert [tuple(batch.shape) for batch in batches] == [(8, 3, 32, 32)] * 2
    costs = [row.milliseconds for row in tuned.rows]
    assert costs == [table.milliseconds(row.plan) for row in tuned.rows] and costs == sorted(costs, reverse=True)
    [chosen] = [row for row in tuned.rows if row.chosen]
    assert 1.05 * 1.2 * table.milliseconds(chosen.plan) <= table.milliseconds(ck.Dense().plan(65, 6))
    # The times are kept with the forwards, and a table of other times is another run.
    fix_times(monkeypatch, plan=1000.0)
    assert ck.tune(model, cost=table, **arguments) == tuned
    with pytest.raises(ValueError, match=r"expected the run that state .* cost [0-9a-f]{64} instead of "):
        ck.tune(model, cost=replace(table, embed=1.0), **arguments)
    with pytest.raises(ValueError, match=r"expected a cost table of batch 4 \(it has 8\), got a cost table"):
        ck.tune(model, cost=table, batch_size=4, **arguments)


@pytest.mark.parametrize(
    ("budget", "seconds", "reason"),
    [
        ("cosine_mean>=.5, speedup>=1.2", 1.26, "expected speedup>=1.2, got a speed-up of 1.19 "),
        ("cosine_mean>=.5", 1.5, "expected a plan that is faster than dense, got a speed-up of 1.00 "),
    ],
)
def test_a_schedule_that_is_too_slow_is_not_returned(
    images: Tensor, budget: str, seconds: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, timed = ck.bundled()[0], fix_times(monkeypatch, plan=seconds)
    tuned = ck.tune(model, images[:16], cost=table_of(model, 8), **{**TIMED, "budget": budget})
    assert tuned.schedule is None and tuned.reason is not None and tuned.reason.startswith(reason)
    assert 1 <= len(timed) <= MAX_TIMED and tuned.speedup is not None


def test_a_budget_that_no_plan_keeps_says_so(images: Tensor) -> None:
    tuned = ck.tune(ck.bundled()[0], images, "cosine_p1>=.99999", **FAST)
    assert tuned.schedule is None and tuned.reason is not None and "cosine_p1>=0.99999" in tuned.reason
    assert not [row for row in tuned.rows if row.chosen] and tuned.promises[0].bound < 0.99999
    tuned = ck.tune(ck.bundled()[0], images, "cosine_mean>=.99, gmacs<=.01", **FAST)
    assert tuned.schedule is None and tuned.reason is not None and "gmacs<=0.01" in tuned.reason


def test_too_few_photographs_for_a_promise_are_a_warning(images: Tensor) -> None:
    stop = Stop(0)
    with pytest.warns(UserWarning, match="cosine_p1>=0.9 needs 299 held-out images for a bound at 95%, got 50"):
        assert ck.tune(ck.bundled()[0], images, "cosine_p1>=.9", progress=stop, **FAST).stopped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ck.tune(ck.bundled()[0], images, "cosine_mean>=.9", progress=stop, **FAST).stopped


def test_labels_and_captions_make_their_constraints_measurable(images: Tensor) -> None:
    model, generator = ck.bundled()[0], torch.Generator().manual_seed(0)
    with torch.inference_mode():
        dense = ck.encode_image(model, images).embedding
    classes = torch.randn(5, dense.shape[1], generator=generator)
    labels = (dense @ classes.T).argmax(1)
    extras: dict[str, Any] = {"labels": labels, "classes": classes, "captions": dense.clone()}
    tuned = ck.tune(model, images, "accuracy_drop<=.3, text_recall@5>=.5", **extras, **FAST)
    assert tuned.schedule is not None
    drop, recall = tuned.promises
    assert drop.figure <= drop.bound <= 0.3 and recall.figure >= recall.bound >= 0.5
    assert list(recall.trend) == [25, 50, 100] and drop.trend == {}
    for budget, missing in (("accuracy_drop<=.3", "labelled images"), ("text_recall@5>=.5", "captions")):
        with pytest.raises(ValueError, match=missing):
            ck.tune(model, images, budget, **FAST)


@pytest.mark.parametrize("against", ["dense", "same"])
def test_recall_is_promised_within_all_photographs(images: Tensor, against: Any) -> None:
    tuned = ck.tune(ck.bundled()[0], images, "recall@5>=.6", against=against, **FAST)
    assert tuned.schedule is not None
    [promise] = tuned.promises
    assert promise.bound >= 0.6 and list(promise.trend) == [25, 50, 100]


@pytest.mark.parametrize("after", [1, 9, 25])
def test_a_stopped_run_goes_on_to_the_same_result(images: Tensor, tuned: Tuned, tmp_path: Path, after: int) -> None:
    model, state = ck.bundled()[0], tmp_path / "state"
    stopped = ck.tune(model, images, "cosine_mean>=.97", state=state, progress=Stop(after), **FAST)
    assert stopped.stopped and stopped.schedule is None and ck.method_of(model) is None
    kept = {path.name: path.stat().st_mtime_ns for path in state.glob("plan-*")}
    again = ck.tune(model, images, "cosine_mean>=.97", state=state, **FAST)
    assert again == tuned
    assert kept == {path.name: path.stat().st_mtime_ns for path in state.glob("plan-*") if path.name in kept}
    FOLDER.remove(state)
    assert not state.exists()


def test_a_state_of_another_run_is_refused(images: Tensor, tmp_path: Path) -> None:
    model, state = ck.bundled()[0], tmp_path / "state"
    ck.tune(model, images, "cosine_mean>=.97", state=state, progress=Stop(9), **FAST)
    for options, expected in (
        ({"images": images[:90]}, "images 100 instead of 90, other pixels"),
        ({"budget": "cosine_mean>=.98"}, "budget cosine_mean>=0.97 instead of cosine_mean>=0.98"),
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"evaluations": 30}, "evaluations 24 instead of 30"),
        ({"families": ("merge",)}, "families merge/prune instead of merge"),
    ):
        arguments = {"images": images, "budget": "cosine_mean>=.97", **FAST, **options}
        with pytest.raises(ValueError, match="expected the run that state") as error:
            ck.tune(model, state=state, **arguments)
        assert expected in str(error.value)
    with torch.no_grad():
        model.visual.conv1.weight.mul_(1.01)
    with pytest.raises(ValueError, match="other tower"):
        ck.tune(model, images, "cosine_mean>=.97", state=state, **FAST)


def test_a_folder_of_something_else_is_refused(images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"got .* with 'notes.txt': choose another one"):
        ck.tune(ck.bundled()[0], images, "cosine_mean>=.97", state=tmp_path, **FAST)
    with pytest.raises(ValueError, match=r"with 'notes.txt'"):
        FOLDER.remove(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"budget": "recall>=.9"}, "recall@K"),
        ({"against": "both"}, "against"),
        ({"families": ("merges",)}, "families"),
        ({"evaluations": 2}, "evaluations"),
        ({"search_share": 1.0}, "search_share"),
        ({"budget": "speedup>=1.5"}, "measured cost"),
        ({"budget": "recall@200>=.9"}, "more than 200 images"),
    ],
)
def test_wrong_arguments_are_refused(images: Tensor, options: dict[str, Any], expected: str) -> None:
    arguments = {"budget": "cosine_mean>=.97", **FAST, **options}
    with pytest.raises(ValueError, match=expected):
        ck.tune(ck.bundled()[0], images, **arguments)


def test_other_pools_and_prefixes_are_tuned() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0, global_pool="avg", class_token=True, img_size=48).eval()
    images = torch.randn(16, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    tuned = ck.tune(model, images, "cosine_mean>=.5", cost="gmacs", evaluations=12, families=("merge", "prune"))
    geometry = Geometry.of(ck.tower_of(model))
    assert geometry.last == geometry.blocks and len(published(geometry)) > 4
    assert tuned.schedule is not None and ck.patch(model, tuned.schedule)(images).shape == (16, 64)
