"""Plans against the published schedules and GMACs (TCA's tables, ToMe's released schedule)."""

import dataclasses

import pytest

import clipkernels as ck
from clipkernels.learn.patch_ranking import RankPredictor
from clipkernels.plan import Merge, Plan, Prune

B16 = {"width": 768, "patch": 16, "out": 512}
L14 = {"width": 1024, "patch": 14, "out": 768}


@pytest.mark.parametrize(
    ("keep", "tokens", "gmacs"),
    [(0.7, (197, 140, 100, 72), 11.62), (0.9, (197, 179, 163, 148), 15.41)],
)
def test_evit_on_b16_has_the_published_tokens_and_gmacs(keep, tokens, gmacs):
    plan = ck.EViT(keep).plan(tokens=197, blocks=12)
    assert plan.tokens == tuple(n for n, times in zip(tokens, (4, 3, 3, 3), strict=True) for _ in range(times))
    assert plan.gmacs(**B16) == pytest.approx(gmacs, abs=0.005)


def test_dense_towers_have_the_published_gmacs():
    assert ck.Dense().plan(tokens=197, blocks=12).gmacs(768) == pytest.approx(17.58, abs=0.005)
    assert ck.Dense().plan(tokens=257, blocks=24).gmacs(**L14) == pytest.approx(81.08, abs=0.005)


@pytest.mark.parametrize(
    ("r", "tokens", "blocks", "tower", "remaining", "gmacs"),
    [(13, 197, 12, B16, 41, 10.38), (8, 197, 12, B16, 101, 13.12), (7, 257, 24, L14, 89, 53.74)],
)
def test_tome_has_the_published_tokens_and_gmacs(r, tokens, blocks, tower, remaining, gmacs):
    plan = ck.ToMe(r).plan(tokens=tokens, blocks=blocks)
    assert plan.tokens[-1] == remaining
    assert plan.gmacs(**tower) == pytest.approx(gmacs, abs=0.005)


def _merged(method, tokens=197, blocks=12):
    return [step.r if step else 0 for step in method.plan(tokens=tokens, blocks=blocks).steps]


def test_tome_schedules_fall_rise_or_stay_with_inflect():
    assert _merged(ck.ToMe(13, inflect=-1)) == [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]
    assert _merged(ck.ToMe(13, inflect=1)) == [0, 2, 4, 7, 9, 11, 14, 16, 18, 21, 23, 26]
    assert _merged(ck.ToMe(13, inflect=0)) == [13] * 12


def test_tome_list_is_one_r_per_block_padded_with_zero():
    assert _merged(ck.ToMe([5, 3]), blocks=4) == [5, 3, 0, 0]
    assert _merged(ck.ToMe([1, 0]), blocks=2) == [1, 0]


def test_tome_int_is_clamped_to_half_of_the_patches_left():
    assert _merged(ck.ToMe(40), tokens=65, blocks=4) == [32, 16, 8, 4]
    assert ck.ToMe(40).plan(tokens=64, blocks=1, prefix=0).steps == (Merge(32),)


def test_evit_that_keeps_everything_has_no_step():
    plan = ck.EViT(1.0).plan(tokens=197, blocks=12)
    assert plan.steps == (None,) * 12
    assert plan.ideal_speedup(768) == 1


def test_evit_counts_follow_the_number_of_tokens():
    plan = ck.EViT(0.5).plan(tokens=577, blocks=12)
    assert plan.tokens[4] == 1 + 288 + 1


@pytest.mark.parametrize(("depth", "blocks"), [(24, [3, 6, 9]), (12, [3, 6, 9]), (6, [1, 3, 4]), (2, [0, 1])])
def test_default_blocks_follow_the_depth(depth, blocks):
    plan = ck.EViT(0.5).plan(tokens=197, blocks=depth)
    assert [index for index, step in enumerate(plan.steps) if step] == blocks


def test_prefix_tokens_are_not_counted_as_patches():
    plan = ck.EViT(0.5, blocks=(0,), fuse=False).plan(tokens=261, blocks=1, prefix=5)
    assert plan.steps == (Prune(keep=128, fuse=False),)
    assert plan.tokens == (261, 133)


def test_exact_gmacs_count_the_last_block_for_the_cls_row_alone():
    width, tokens = 8, 10
    plan = Plan((None,), tokens)
    stem = 3 * 4 * width * 9 + 5 * tokens * width + 5 * width + width * 16
    block = (2 * tokens + 2) * width**2 + 2 * tokens * width + 8 * width**2 + 5 * (tokens + 1) * width
    assert plan.gmacs(width, patch=2, out=16, exact=True) * 1e9 == pytest.approx(stem + block)


def test_ideal_speedups_of_four_towers_at_keep_half():
    towers = [(50, 12, 768, 32, 512), (197, 12, 768, 16, 512), (257, 24, 1024, 14, 768), (577, 24, 1024, 14, 768)]
    actual = [ck.EViT(0.5).plan(n, depth).ideal_speedup(*rest) for n, depth, *rest in towers]
    assert actual == pytest.approx([1.85, 1.99, 3.17, 3.27], abs=0.005)


@pytest.mark.parametrize("multiple", [8, 16])
@pytest.mark.parametrize(
    "make",
    [
        lambda multiple: ck.EViT(0.7, multiple=multiple),
        lambda multiple: ck.EViT(0.5, fuse=False, multiple=multiple),
        lambda multiple: ck.TCA(0.1, multiple=multiple),
        lambda multiple: ck.PatchRanking(RankPredictor(197), multiple=multiple),
    ],
)
def test_a_multiple_rounds_the_remaining_tokens_up(make, multiple):
    def remaining(multiple):
        plan = make(multiple).plan(tokens=197, blocks=12)
        return [count for step, count in zip(plan.steps, plan.tokens[1:], strict=True) if step]

    # Each step keeps a share of the tokens that enter it, so only the first is the published count rounded up.
    assert remaining(multiple)[0] == -(-remaining(1)[0] // multiple) * multiple
    assert all(tokens % multiple == 0 for tokens in remaining(multiple))


def test_a_multiple_that_does_not_fit_is_ignored():
    assert ck.EViT(0.5, multiple=64).plan(10, 12).tokens == ck.EViT(0.5).plan(10, 12).tokens
    assert ck.EViT(1.0, multiple=8).plan(197, 12).steps == (None,) * 12


def test_random_subsets_differ_by_block_and_by_seed():
    seeds = [
        step.seed for seed in (0, 1) for step in ck.EViT(0.5, score="random", seed=seed).plan(50, 12).steps if step
    ]
    assert len(set(seeds)) == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ck.EViT(0), r"keep must be a number in \(0, 1\], got 0"),
        (lambda: ck.EViT(1.1), r"keep must be a number in \(0, 1\], got 1.1"),
        (lambda: ck.EViT("half"), "keep must be a number"),
        (lambda: ck.EViT(float("nan")), "keep must be a number"),
        (lambda: ck.EViT(0.5, score="best"), 'score must be "cls" or "random", got \'best\''),
        (lambda: ck.EViT(0.5, blocks=3), r"blocks must be a tuple of ints such as \(3, 6, 9\), got 3"),
        (lambda: ck.EViT(0.5, seed=-1), "seed must be an int of at least 0, got -1"),
        (lambda: ck.EViT(0.5, multiple=0), "multiple must be an int of at least 1, got 0"),
        (lambda: ck.TCA(0.1, multiple=1.5), "multiple must be an int of at least 1, got 1.5"),
        (lambda: ck.EViT(0.5, blocks=(12,)).plan(197, 12), r"blocks must be ints in \[0, 11\].*got 12"),
        (lambda: ck.EViT(0.5, blocks=(-1,)).plan(197, 12), "got -1"),
        (lambda: ck.ToMe(-1), "r must be an int of at least 0, got "),
        (lambda: ck.ToMe(1.5), "r must be an int of at least 0, got "),
        (lambda: ck.ToMe(True), "r must be an int of at least 0, got "),
        (lambda: ck.ToMe([3, -1]), r"r\[1\] must be an int of at least 0, got -1"),
        (lambda: ck.ToMe(8, inflect=2), r"inflect must be a number in \[-1, 1\], got 2"),
        (lambda: ck.ToMe(8, inflect=True), r"inflect must be a number in \[-1, 1\], got True"),
        (lambda: ck.ToMe([8, 1], inflect=0.5), "inflect must be 0 if r is given per block, got 0.5"),
        (lambda: ck.ToMe([1] * 13).plan(197, 12), "at most one entry per block, 12 here, got 13"),
    ],
)
def test_bad_arguments_are_refused_with_the_expected_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_methods_are_hashable_values():
    methods = {ck.EViT(0.7), ck.EViT(0.7), ck.ToMe([8, 8]), ck.ToMe((8, 8)), ck.ToMe(8, inflect=1), ck.Dense()}
    assert len(methods) == 4


def test_an_r_per_block_is_the_same_as_a_tuple_and_as_a_list():
    assert ck.ToMe([8, 1]) == ck.ToMe((8, 1)) != ck.ToMe(8, inflect=1)
    plan = ck.ToMe(r=(8, 1)).plan(tokens=197, blocks=2)
    assert plan.tokens == (197, 189, 188)
    assert _merged(dataclasses.replace(ck.ToMe([8, 1]), proportional=False), blocks=2) == [8, 1]
    assert _merged(eval(repr(ck.ToMe([8, 1])), {"ToMe": ck.ToMe}), blocks=2) == [8, 1]
    assert _merged(eval(repr(ck.ToMe(8, inflect=1)), {"ToMe": ck.ToMe}), blocks=3) == [0, 8, 16]
    assert _merged(ck.ToMe(range(3)), blocks=4) == [0, 1, 2, 0]


def test_gmacs_follow_the_width_of_the_mlp():
    narrow, wide = (ck.Dense().plan(197, 12).gmacs(768, mlp_ratio=ratio) for ratio in (2.0, 4.0))
    assert (wide - narrow) * 1e9 == pytest.approx(12 * 197 * 4 * 768**2)


@pytest.mark.parametrize(
    ("steps", "prefix", "message"),
    [
        ((Prune(80),), 1, "block 0 must keep 0 to 64 patches, got 80"),
        ((Prune(10), Prune(12)), 1, "block 1 must keep 0 to 11 patches, got 12"),
        ((Merge(33),), 1, "block 0 must merge 0 to 32 tokens, got 33"),
        ((Merge(31),), 5, "block 0 must merge 0 to 30 tokens, got 31"),
    ],
)
def test_a_plan_with_too_few_patches_is_refused(steps, prefix, message):
    with pytest.raises(ValueError, match=message):
        Plan(steps, 65, prefix)
