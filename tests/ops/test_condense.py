"""condense_tokens on both backends, compared with the reading in fp64."""

import pytest
import torch

import clipkernels as ck
from bench.naive.tca import condense, ranks
from clipkernels.backend import interpreting
from clipkernels.ops import unchecked
from clipkernels.testing import assert_same, assert_within_budget, with_gaps
from tests import readings
from tests.readings import read

KERNEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(device, batch=2, tokens=17, width=24, prefix=1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, width, generator=generator).to(dtype).to(device)
    return x, torch.rand(batch, tokens - prefix, generator=generator).to(device)


def eager(x, exact, source, index, weights, keep, centers, prefix=1):
    """Return merged and fused tokens for known choices, computed in plain PyTorch in the dtype of x."""
    patches, rows = x[:, prefix:], torch.arange(prefix + keep, prefix + keep + centers, device=x.device)
    member = source[:, None] == rows[:, None]
    center = torch.stack([image[chosen[keep:]] for image, chosen in zip(patches, index, strict=True)])
    distance = (patches[:, None] - center[:, :, None]).float().norm(dim=3)
    share = torch.where(distance == 0, 1, 1 / distance) * member
    merged = (share / share.sum(2, keepdim=True).clamp_min(1e-12)).to(x.dtype) @ patches
    merged = torch.where(member.any(2, keepdim=True), merged, center)
    fused = (weights * (source == prefix + keep + centers))[:, None].to(x.dtype) @ patches
    return torch.cat([merged, fused], 1)


SIZES = [
    (50, 1, 30, 12, 2),
    (65, 1, 23, 26, 4),
    (63, 0, 1, 62, 3),
    (65, 5, 0, 3, 3),
    (2, 1, 0, 1, 1),
    (197, 1, 137, 40, 2),
]


def _sweep():
    """Yield every size in every dtype; the quick tests run every size in fp32 and one size in the other dtypes."""
    for sizes in SIZES:
        for dtype in KERNEL_DTYPES:
            quick = dtype == torch.float32 or sizes == SIZES[1]
            yield pytest.param(*sizes, dtype, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(("tokens", "prefix", "keep", "merge", "centers", "dtype"), list(_sweep()))
def test_rows_match_the_reading(device, backend, tokens, prefix, keep, merge, centers, dtype):
    x, scores = inputs(device, tokens=tokens, prefix=prefix, dtype=dtype)
    actual = ck.ops.condense_tokens(x, scores, keep, merge, centers, prefix=prefix, backend=backend)
    exact, source, index, _ = read(readings.condense_tokens, x, scores, keep, merge, centers, prefix=prefix)
    assert torch.equal(actual.source, source) and torch.equal(actual.index, index)
    assert torch.equal(actual.tokens[:, : prefix + keep].double(), exact[:, : prefix + keep])
    eager_result = eager(x, exact, source, index, scores, keep, centers, prefix)
    assert_within_budget(actual.tokens[:, prefix + keep :], exact[:, prefix + keep :], eager_result)


def test_weights_weigh_the_fused_token_and_scores_choose(device, backend):
    x, scores = inputs(device)
    weights = torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(1)).to(device)
    actual = ck.ops.condense_tokens(x, scores, 5, 6, 2, weights, backend=backend)
    exact, source, _, _ = read(readings.condense_tokens, x, scores, 5, 6, 2, weights)
    assert torch.equal(actual.source, source)
    torch.testing.assert_close(actual.tokens.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", ["mean", "rank"])
def test_per_head_scores_with_ties_are_reduced_first(device, backend, heads):
    x, _ = inputs(device)
    # Multiples of 1/8 with four heads have exact sums, so that both backends see the same ties.
    scores = (torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(2)) * 8).round().div(8).to(device)
    actual = ck.ops.condense_tokens(x, scores, 4, 7, 3, heads=heads, backend=backend)
    exact, source, index, _ = read(readings.condense_tokens, x, scores, 4, 7, 3, heads=heads)
    assert torch.equal(actual.source, source) and torch.equal(actual.index, index)
    torch.testing.assert_close(actual.tokens.double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("centers", [2, 4])
@pytest.mark.parametrize("rate", [0.035, 0.1])
@pytest.mark.parametrize("heads", ["rank", "mean"])
def test_duplicate_tokens_and_tied_scores_follow_the_paper(device, backend, heads, rate, centers):
    x, _ = inputs(device, tokens=65)
    x[:, 2::3] = x[:, 1:-1:3]  # every third token repeats the one before it
    scores = (torch.rand(2, 4, 64, generator=torch.Generator().manual_seed(7)) * 8).round().div(32)
    step = ck.TCA(rate, centers=centers).plan(65, 6).steps[1]
    counts = (step.keep, step.merge, centers)
    actual = ck.ops.condense_tokens(x, scores.to(device), *counts, scores.to(device), heads, backend=backend)
    reduced = torch.stack([ranks(image) for image in scores]) if heads == "rank" else scores.mean(1)
    images = zip(x.cpu().double(), reduced.double(), scores.double().mean(1), strict=True)
    exact, source, index = zip(*(condense(*image, *counts) for image in images), strict=True)
    assert actual.source.tolist() == list(source) and actual.index.tolist() == list(index)
    torch.testing.assert_close(actual.tokens.double().cpu(), torch.stack(exact), atol=1e-5, rtol=1e-5)


def test_ties_go_to_the_higher_score_and_the_earlier_centre(device, backend):
    # Points on a line: the first centre is at 0, patches at ±2 are equally far from it, and the patch at 1 is halfway
    # to the second centre at 2.
    x = torch.tensor([[[9.0], [0], [2], [-2], [1], [5]]], device=device)
    scores = torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.1]], device=device)
    actual = ck.ops.condense_tokens(x, scores, 0, 4, 2, backend=backend)
    assert actual.index.tolist() == [[0, 1]]
    assert actual.source.tolist() == [[1, 2, 1, 1, 3]]
    # (1·0 + ½·(-2) + 1·1) / 2.5, then the second centre by itself.
    torch.testing.assert_close(actual.tokens[0, :, 0].cpu(), torch.tensor([9.0, 0.0, 2.0, 0.5]))


@pytest.mark.parametrize("centers", [2, 4])
def test_equal_tokens_merge_to_themselves(device, backend, centers):
    x = torch.ones(1, 17, 8, device=device) * 0.3
    _, scores = inputs(device, batch=1)
    actual = ck.ops.condense_tokens(x, scores, 4, 8, centers, backend=backend)
    torch.testing.assert_close(actual.tokens[:, :-1], x[:, : 5 + centers])
    # All join the first centre; the others coincide with it and yield their own token.
    rows = actual.source[0][scores[0].argsort(descending=True)[4:12]]
    assert torch.equal(rows, torch.full_like(rows, 5))


def test_duplicates_of_a_centre_weigh_as_much_as_the_centre(device, backend):
    x = torch.tensor([[[0.0], [4], [4], [4.5], [0]]], device=device)  # at a distance whose inverse is exact
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1]], device=device)
    actual = ck.ops.condense_tokens(x, scores, 0, 3, 1, backend=backend)
    assert actual.tokens[0, 1, 0].item() == (4 + 4 + 2 * 4.5) / 4


@pytest.mark.parametrize("first", [0, 3, 5])
def test_first_chooses_the_first_centre(device, backend, first):
    x, scores = inputs(device)
    actual = ck.ops.condense_tokens(x, scores, 5, 6, 3, first=first, backend=backend)
    exact, source, index, _ = read(readings.condense_tokens, x, scores, 5, 6, 3, first=first)
    assert torch.equal(actual.index, index) and torch.equal(actual.source, source)
    torch.testing.assert_close(actual.tokens.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep", [0, 3, 12])
def test_nan_and_infinite_scores_still_write_the_exact_rows(device, backend, keep):
    x, _ = inputs(device)
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([[nan, 1, -inf, 2, nan, 0, -inf, -1] * 2, [nan] * 16], device=device)
    actual = ck.ops.condense_tokens(x, scores, keep, 4, 2, backend=backend)
    exact, source, index, _ = read(readings.condense_tokens, x, scores, keep, 4, 2)
    assert torch.equal(actual.source, source) and torch.equal(actual.index, index)
    torch.testing.assert_close(actual.tokens.double(), exact, atol=1e-5, rtol=1e-5)


def test_a_merging_token_of_nan_spoils_only_merged_tokens(device, backend):
    x, scores = inputs(device, batch=1)
    order = scores[0].argsort(descending=True)
    x[0, 1 + order[7]] = float("nan")
    actual = ck.ops.condense_tokens(x, scores, 5, 6, 2, backend=backend)
    assert actual.tokens[0, [0, 1, 2, 3, 4, 5, 8]].isfinite().all() and actual.tokens[0, 6:8].isnan().any()
    assert sorted(actual.source[0].tolist())[:5] == [1, 2, 3, 4, 5] and actual.source.max() == 8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("place", [1, 3, 5])
def test_a_merging_token_that_is_not_finite_has_no_share(device, backend, place, value):
    x, scores = inputs(device, batch=2)
    patch = scores[0].argsort(descending=True)[5 + place]
    x[0, 1 + patch, 3] = value
    tokens = ck.ops.condense_tokens(x, scores, 5, 6, 1, backend=backend).tokens[:1]
    others = torch.arange(17, device=device) != 1 + patch
    expected = ck.ops.condense_tokens(x[:1, others], scores[:1, others[1:]], 5, 5, 1, backend=backend).tokens
    torch.testing.assert_close(tokens, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("place", "first"), [(0, 0), (4, 4), (3, 0)])
def test_a_centre_that_is_not_finite_yields_its_own_token(device, backend, place, first, value):
    x, scores = inputs(device, batch=2)
    patch = scores[0].argsort(descending=True)[5 + place]
    x[0, 1 + patch, 3] = value
    condensed = ck.ops.condense_tokens(x, scores, 5, 6, 3, first=first, backend=backend)
    rows = 6 + (condensed.index[0, 5:] == patch).nonzero()[:, 0]  # several, because no centre is nearer to it
    expected = x[0, 1 + patch].expand(len(rows), -1)
    assert len(rows) and torch.equal(condensed.tokens[0, rows].nan_to_num(7), expected.nan_to_num(7))
    assert condensed.tokens.isfinite().sum() == condensed.tokens.numel() - len(rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", [float("nan"), float("-inf"), 0.0, -0.0])
def test_a_patch_of_weight_zero_may_hold_anything(device, backend, weight, value):
    x, scores = inputs(device)
    weights, patch = scores.clone(), scores[0].argsort(descending=True)[13]
    weights[0, patch] = weight
    results = []
    for held in (value, 0.0):
        x[0, 1 + patch, 3] = held
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        tokens = ck.ops.condense_tokens(leaves[0], scores, 5, 6, 2, leaves[1], backend=backend).tokens
        results.append((tokens, *torch.autograd.grad(tokens.square().sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        assert expected.isfinite().all() and torch.equal(actual, expected)


@pytest.mark.parametrize("place", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_merging_token_without_a_share_changes_no_gradient(device, backend, place, value):
    x, scores = inputs(device, batch=1)
    patch = 1 + scores[0].argsort(descending=True)[5 + place]
    others = torch.arange(17, device=device) != patch
    x[0, patch, 3] = value
    whole, rest = x.clone().requires_grad_(), x[:, others].requires_grad_()
    weights = torch.linspace(-1, 1, 24, device=device)
    tokens = ck.ops.condense_tokens(whole, scores, 5, 6, 1, backend=backend).tokens
    (actual,) = torch.autograd.grad((tokens * weights).sum(), whole)
    tokens = ck.ops.condense_tokens(rest, scores[:, others[1:]], 5, 5, 1, backend=backend).tokens
    (expected,) = torch.autograd.grad((tokens * weights).sum(), rest)
    torch.testing.assert_close(actual[:, others], expected)
    assert not actual[:, patch].any()


def test_normed_is_the_layer_norm_of_the_tokens(device, backend):
    x, scores = inputs(device, width=40)
    weight, bias = torch.randn(2, 40, generator=torch.Generator().manual_seed(3)).to(device)
    actual = ck.ops.condense_tokens(x, scores, 6, 6, 2, norm=(weight, bias, 1e-5), backend=backend)
    stored = actual.tokens.double()
    exact = torch.nn.functional.layer_norm(stored, (40,), weight.double(), bias.double(), 1e-5)
    eager_result = torch.nn.functional.layer_norm(actual.tokens, (40,), weight, bias, 1e-5)
    assert_within_budget(actual.normed, exact, eager_result)


def test_any_strides_give_the_same_result(device, backend):
    x, scores = inputs(device)
    expected = ck.ops.condense_tokens(x, scores, 6, 6, 2, scores, backend=backend)
    gaps = ck.ops.condense_tokens(with_gaps(x), with_gaps(scores), 6, 6, 2, with_gaps(scores), backend=backend)
    shared = ck.ops.condense_tokens(
        x[:1].expand(3, -1, -1), scores[:1].expand(3, -1), 6, 6, 2, scores[:1].expand(3, -1), backend=backend
    )
    assert_same(gaps.tokens, expected.tokens, backend)
    assert torch.equal(gaps.source, expected.source)
    assert_same(shared.tokens, expected.tokens[:1].expand(3, -1, -1), backend)


@pytest.mark.parametrize("per_head", [0, 2])
@pytest.mark.parametrize("centers", [1, 3])
def test_gradients_are_central_differences_away_from_ties(per_head, centers):
    x, scores = inputs("cpu", tokens=15, width=5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    weights = torch.rand(2, *([per_head] if per_head else []), 14, generator=generator).double()
    x, weights, scores = x.requires_grad_(), weights.requires_grad_(), scores.double().requires_grad_()

    def condense(x, scores, weights=None):
        return ck.ops.condense_tokens(x, scores, 3, 7, centers, weights).tokens

    assert torch.autograd.gradcheck(condense, (x, scores.detach(), weights))
    assert torch.autograd.gradcheck(condense, (x, scores))
    assert torch.autograd.gradgradcheck(condense, (x, scores.detach(), weights))


@pytest.mark.parametrize("scale", [1e-20, 1e-17, 1.0, 1e17])
def test_tiny_and_huge_tokens_have_a_finite_gradient(device, backend, scale):
    x, scores = inputs(device, tokens=15, width=5)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        wide = (x * scale).to(dtype).requires_grad_()
        name = "reference" if dtype == torch.float64 else backend
        tokens = ck.ops.condense_tokens(wide, scores, 3, 7, 2, backend=name).tokens
        weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1)).to(tokens)
        gradients.append(torch.autograd.grad((tokens * weights).sum(), wide)[0])
    actual, exact = gradients
    torch.testing.assert_close(actual.double(), exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


def test_a_weight_at_distance_zero_is_a_constant(device, backend):
    # A centre, a copy of it and a token at distance 2 weigh 1, 1 and ½. Only the last weight depends on the tokens.
    x = torch.tensor([[[9.0], [4], [4], [6], [1]]], device=device, requires_grad=True)
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1]], device=device)
    merged = ck.ops.condense_tokens(x, scores, 0, 3, 1, backend=backend).tokens[0, 1, 0]
    assert merged.item() == pytest.approx((4 + 4 + 6 / 2) / 2.5)
    (gradient,) = torch.autograd.grad(merged, x)
    # d merged / d weight = (6 - 4.4) / 2.5 = .64, and the weight's derivative is -1/4 at the token, ¼ at the centre.
    expected = [0, (1 + 0.16 * 2.5) / 2.5, 1 / 2.5, (0.5 - 0.16 * 2.5) / 2.5, 0]
    torch.testing.assert_close(gradient[0, :, 0].cpu(), torch.tensor(expected))


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_an_image_has_the_same_bits_alone_and_in_a_batch(device, batch, triton):
    x, scores = inputs(device, batch=3, tokens=65, width=48)
    norm = (torch.ones(48, device=device), torch.zeros(48, device=device), 1e-5)
    batch_result = ck.ops.condense_tokens(x, scores, 20, 24, 2, norm=norm, backend="triton")
    part_result = ck.ops.condense_tokens(x[3 - batch :], scores[3 - batch :], 20, 24, 2, norm=norm, backend="triton")
    rerun_result = ck.ops.condense_tokens(x, scores, 20, 24, 2, norm=norm, backend="triton")
    for expected, actual, rerun in zip(batch_result, part_result, rerun_result, strict=True):
        assert torch.equal(expected[3 - batch :], actual) and torch.equal(expected, rerun)


@pytest.mark.parametrize("programs", [1, 5, 256])
def test_the_fused_token_has_the_same_bits_from_any_programs(device, triton, set_kernels, programs):
    from clipkernels.kernels import prune as kernels

    x, scores = inputs(device, tokens=101, width=300)
    norm = (torch.ones(300, device=device), torch.zeros(300, device=device), 1e-5)
    expected = ck.ops.condense_tokens(x, scores, 20, 30, 3, norm=norm, backend=triton)
    set_kernels(kernels, "PROGRAMS", programs)
    actual = ck.ops.condense_tokens(x, scores, 20, 30, 3, norm=norm, backend=triton)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    exact, _, _, _ = read(readings.condense_tokens, x, scores, 20, 30, 3)
    torch.testing.assert_close(actual.tokens.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "per_head", "weighted"), [("mean", 0, 0), ("mean", 3, 0), ("rank", 3, 3), ("mean", 0, 1)]
)
def test_the_kernel_has_the_gradients_of_the_reference(device, heads, per_head, weighted, norm, triton):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 17, 24, generator=generator)
    x[1, 1:] = x[1, 1]  # equal patches, so that centres coincide
    scores = torch.rand(2, *([per_head] if per_head else []), 16, generator=generator).to(device).requires_grad_()
    weights = torch.rand(2, *([weighted] if weighted > 1 else []), 16, generator=generator).to(device).requires_grad_()
    weight, bias = (w.to(device).requires_grad_() for w in torch.randn(2, 24, generator=generator))
    x = x.to(device).requires_grad_()
    grads = []
    for backend in ("reference", "triton"):
        actual = ck.ops.condense_tokens(
            *(x, scores, 5, 6, 3, weights if weighted else None, heads, 1, 2),
            (weight, bias, 1e-5) if norm else None,
            backend=backend,
        )
        loss = (actual.tokens * torch.linspace(-1, 1, 24, device=device)).sum()
        if norm:
            loss = loss + (actual.normed * torch.linspace(2, -1, 24, device=device)).sum()
        leaves = (x, scores, weights, weight, bias)
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    for reference, kernel in zip(*grads, strict=True):
        assert reference.isfinite().all()
        torch.testing.assert_close(kernel, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("per_head", "weighted", "normed"),
    [(0, False, False), (2, True, True), pytest.param(0, True, False, marks=pytest.mark.slow)],
)
def test_the_operator_passes_opcheck(device, per_head, weighted, normed):
    pytest.importorskip("triton", reason="triton is not installed: it exists only on Linux")
    x, scores = inputs(device, tokens=12, width=16)
    scores = scores[:, None].repeat(1, per_head, 1) if per_head else scores
    weight = torch.ones(16, device=device) if normed else None
    weights = scores.clone().requires_grad_() if weighted else None
    tensors = (x.requires_grad_(), scores.requires_grad_(), 3, 4, 2, weights, "mean", 1, 0, weight, weight, 1e-5)
    torch.library.opcheck(torch.ops.clipkernels.condense_tokens.default, tensors)


def test_the_operator_compiles_into_one_graph(device):
    pytest.importorskip("triton", reason="triton is not installed: it exists only on Linux")
    x, scores = inputs(device)
    condensed = torch.compile(
        lambda x, s: ck.ops.condense_tokens(x, s, 5, 6, 2, backend="triton").tokens * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(condensed(x, scores), ck.ops.condense_tokens(x, scores, 5, 6, 2, backend="triton").tokens * 2)


def test_the_kernel_supports_strides_beyond_32_bits(tmp_path, triton):
    if not interpreting():
        pytest.skip("the sparse file is CPU memory, which only interpreted kernels can read")
    # A sparse file: 6 GiB of addresses, four pages of disk.
    stride = 2**30 + 8
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + 8, dtype=torch.float16)
    x = memory.as_strided((1, 4, 8), (4 * stride, stride, 1))
    values = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(4)).half()
    x.copy_(values)
    scores = torch.tensor([[0.25, 0.5, 0.125]])
    actual = ck.ops.condense_tokens(x, scores, 1, 1, 1, backend="triton")
    assert torch.equal(actual.tokens, torch.stack([values[:, 0], values[:, 2], values[:, 1], values[:, 3] / 8], 1))


def test_more_merging_patches_than_a_kernel_holds_take_the_reference(device, triton, monkeypatch):
    x, scores = inputs(device, batch=1, tokens=530, width=4)
    with pytest.raises(RuntimeError, match="the kernel of condense_tokens merges at most 512 patches, got 513"):
        ck.ops.condense_tokens(x, scores, 5, 513, 2, backend=triton)
    expected = ck.ops.condense_tokens(x, scores, 5, 513, 2)
    assert expected.tokens.shape == (1, 9, 4)
    # The entry of towers has the same limit.
    arguments = (x, scores, 5, 513, 2, None, "mean", 1, 0, None)
    assert all(map(torch.equal, unchecked.condense_tokens(*arguments)[:3], expected[:3]))
    monkeypatch.setenv("CLIPKERNELS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="the kernel of condense_tokens merges at most 512 patches, got 513"):
        unchecked.condense_tokens(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge": 0}, "merge must be an int from 1 to P - keep = 12, got 0"),
        ({"merge": 13}, "got 13"),
        ({"centers": 0}, "centers must be an int from 1 to merge = 6, got 0"),
        ({"centers": 7}, "got 7"),
        ({"first": 6}, "first must be an int from 0 to merge - 1 = 5, got 6"),
        ({"keep": 17}, "keep must be an int from 0 to P = 16"),
        ({"weights": torch.rand(2, 15)}, r"weights must be \(B,P\) = \(2,16\) or \(B,H,P\), got \(2,15\)"),
        ({"scores": torch.rand(2, 15)}, r"scores must be \(B,P\) = \(2,16\)"),
        ({"heads": "max"}, 'heads must be "mean" or "rank"'),
    ],
)
def test_errors_name_the_bad_argument_on_every_backend(backend, change, message):
    x, scores = inputs("cpu")
    arguments = {"x": x, "scores": scores, "keep": 4, "merge": 6, "centers": 2, **change}
    with pytest.raises(ValueError, match=message):
        ck.ops.condense_tokens(**arguments, backend=backend)
