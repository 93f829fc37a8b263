"""match_tokens and merge_tokens, compared with their readings in fp64."""

import pytest
import torch

import clipkernels as ck
from clipkernels.backend import interpreting
from clipkernels.testing import assert_within_budget, with_gaps
from tests import readings
from tests.readings import read

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(device, *shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def duplicates(device, batch=3, tokens=16, width=8):
    """Return tokens drawn from four vectors, so that every similarity has many ties."""
    generator = torch.Generator().manual_seed(0)
    # Between signed unit axes, similarities are exactly -1, 0 or 1 in every precision.
    pool = torch.cat([torch.eye(width)[:2], -torch.eye(width)[:2]])
    return pool[torch.randint(4, (batch, tokens), generator=generator)].to(device)


@pytest.mark.parametrize(
    ("tokens", "prefix", "r"),
    [(2, 1, 0), (3, 1, 1), (4, 0, 2), (63, 1, 31), (64, 0, 32), (65, 1, 13), (65, 5, 30), (257, 1, 16)],
)
def test_matching_random_tokens_matches_the_reading(tokens, prefix, r):
    metric = torch.randn(2, tokens, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    match = ck.ops.match_tokens(metric, r, prefix)
    assert all(map(torch.equal, match, read(readings.match_tokens, metric, r, prefix)))


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("r", [0, 1, 4, 7])
def test_matching_duplicate_tokens_matches_the_reading(device, backend, prefix, r):
    metric = duplicates(device)
    match = ck.ops.match_tokens(metric, r, prefix, backend=backend)
    assert all(map(torch.equal, match, read(readings.match_tokens, metric, r, prefix)))


def test_prefix_tokens_neither_merge_nor_are_merged_into(device, backend):
    metric = torch.ones(1, 9, 4, device=device)
    match = ck.ops.match_tokens(metric, 3, prefix=3, backend=backend)
    assert match.source.tolist() == [[2, 3, 4]]
    assert match.target.tolist() == [[1, 1, 1]]


def test_a_nan_similarity_counts_as_minus_infinity(device, backend):
    metric = normal(device, 1, 8, 4, seed=2)
    metric[0, 2] = float("nan")
    match = ck.ops.match_tokens(metric, 2, prefix=0, backend=backend)
    assert all(map(torch.equal, match, read(readings.match_tokens, metric, 2, 0)))
    assert 1 in match.kept[0].tolist()


def test_matching_ignores_the_length_of_tokens(device, backend):
    metric = normal(device, 2, 33, 16, seed=3)
    scaled = metric * torch.logspace(-3, 3, 33, device=device)[None, :, None]
    for one, other in zip(
        ck.ops.match_tokens(metric, 9, backend=backend), ck.ops.match_tokens(scaled, 9, backend=backend), strict=True
    ):
        assert torch.equal(one, other)


def _sweep():
    """Yield every size in every dtype; the quick tests run fp32 to 65 tokens and one size in the other dtypes."""
    for tokens, r in ((1, 0), (2, 0), (3, 1), (63, 20), (65, 32), (257, 13)):
        for dtype in DTYPES:
            quick = tokens < 257 if dtype == torch.float32 else tokens == 63
            yield pytest.param(tokens, r, dtype, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize(("tokens", "r", "dtype"), list(_sweep()))
def test_merging_is_the_size_weighted_mean(device, backend, tokens, r, sized, dtype):
    x = normal(device, 2, tokens, 24, seed=4, dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    size = torch.randint(1, 9, (2, tokens), generator=generator).float().to(device) if sized else None
    match = ck.ops.match_tokens(normal(device, 2, tokens, 8, seed=5), r, backend=backend)
    merged = ck.ops.merge_tokens(x, match, size, backend=backend)
    exact, sizes, _ = read(readings.merge_tokens, x, match, size)
    assert torch.equal(merged.size.double(), sizes)
    for actual, image in zip(merged.tokens, exact, strict=True):
        assert_within_budget(actual, image, image.to(dtype))


def test_of_two_tokens_of_size_zero_the_target_remains(device, backend):
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    match = ck.ops.Match(*(torch.tensor([index], device=device) for index in ([0], [1, 2], [0, 2])))
    size = torch.tensor([[1.0, 0, 0, 1, 3, 1]], device=device)
    merged = ck.ops.merge_tokens(x, match, size, backend=backend)
    assert merged.size.tolist() == [[1, 0, 1, 4]]
    expected = torch.stack([x[:, 0], x[:, 1], x[:, 3], 0.75 * x[:, 4] + 0.25 * x[:, 5]], 1)
    torch.testing.assert_close(merged.tokens, expected)
    (gradient,) = torch.autograd.grad(merged.tokens.sum(), x)
    assert gradient[0, :, 0].tolist() == [1, 1, 0, 1, 0.75, 0.25]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38])
def test_a_source_of_size_zero_does_not_change_its_target(device, backend, value):
    x, match, size = _absent_token(device, 2, value)
    merged = ck.ops.merge_tokens(x, match, size, backend=backend)
    assert torch.equal(merged.tokens[0, 1:], torch.stack([x[0, 1], 0.75 * x[0, 3] + 0.25 * x[0, 4]]))
    (gradient,) = torch.autograd.grad(merged.tokens[:, 1:].sum(), x)
    assert gradient[0, :, 0].tolist() == [0, 1, 0, 0.75, 0.25]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38])
def test_a_target_of_size_zero_becomes_its_source(value, device, backend):
    x, match, size = _absent_token(device, 1, value)
    merged = ck.ops.merge_tokens(x, match, size, backend=backend)
    assert torch.equal(merged.tokens[0, 1:], torch.stack([x[0, 2], 0.75 * x[0, 3] + 0.25 * x[0, 4]]))
    (gradient,) = torch.autograd.grad(merged.tokens[:, 1:].sum(), x)
    assert gradient[0, :, 0].tolist() == [0, 0, 1, 0.75, 0.25]


def _absent_token(device, at, value):
    """Return tokens of which one holds a value and has size 0, two pairs that merge with targets 1 and 3, and sizes."""
    x, size = normal(device, 1, 5, 4).mul(4).round().div(4), torch.tensor([[1.0, 2, 5, 3, 1]], device=device)
    x[0, at], size[0, at] = value, 0
    match = ck.ops.Match(*(torch.tensor([index], device=device) for index in ([0], [1, 2], [0, 1])))
    return x.requires_grad_(), match, size


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_sizes_of_any_dtype_weigh_alike(device, backend, dtype):
    x, size = normal(device, 2, 9, 4, seed=21), torch.tensor([[1, 0, 1, 1, 1, 0, 1, 1, 1]], device=device).expand(2, -1)
    match = ck.ops.match_tokens(x, 3, backend=backend)
    expected = ck.ops.merge_tokens(x, match, size.float(), backend=backend)
    actual = ck.ops.merge_tokens(x, match, size.to(dtype), backend=backend)
    assert torch.equal(actual.tokens, expected.tokens) and torch.equal(actual.size, expected.size)


def test_sizes_sum_to_the_initial_number_of_tokens(device, backend):
    x = normal(device, 3, 65, 16, seed=5)
    size = None
    for r in (32, 16, 8, 4):
        match = ck.ops.match_tokens(x, r, backend=backend)
        x, size, _ = ck.ops.merge_tokens(x, match, size, backend=backend)
        assert torch.equal(size.sum(1), torch.full((3,), 65.0, device=device))
    assert x.shape[1] == 5


def test_the_order_of_the_sources_does_not_matter():
    generator = torch.Generator().manual_seed(6)
    x, size = (
        torch.randn(1, 65, 16, generator=generator, dtype=torch.float64),
        torch.rand(1, 65, generator=generator) + 1,
    )
    match = ck.ops.match_tokens(x, 30)
    shuffle = torch.randperm(30, generator=generator)
    shuffled = ck.ops.Match(match.kept, match.source[:, shuffle], match.target[:, shuffle])
    one, other = ck.ops.merge_tokens(x, match, size.double()), ck.ops.merge_tokens(x, shuffled, size.double())
    torch.testing.assert_close(one.tokens, other.tokens, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(one.size, other.size, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_equal_tokens_and_copying_others_is_bit_exact(device, backend, dtype):
    generator = torch.Generator().manual_seed(7)
    x = normal(device, 1, 64, 24, seed=7, dtype=dtype)
    x[:, ::2] = x[:, 1::2]
    size = torch.randint(1, 9, (1, 64), generator=generator).float().to(device)
    half = torch.arange(32, device=device)[None]
    match = ck.ops.Match(half[:, 16:], half[:, :16], half[:, :16])
    merged = ck.ops.merge_tokens(x, match, size, backend=backend)
    assert torch.equal(merged.tokens, torch.cat([x[:, 32::2], x[:, 1::2]], 1))


def test_any_strides_give_the_same_result(device, backend):
    x = normal(device, 2, 17, 24, seed=8)
    match = ck.ops.match_tokens(x, 5, backend=backend)
    gaps = ck.ops.match_tokens(with_gaps(x), 5, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(match, gaps, strict=True))
    assert torch.equal(
        ck.ops.merge_tokens(x, match, backend=backend).tokens,
        ck.ops.merge_tokens(with_gaps(x), match, backend=backend).tokens,
    )


def test_normed_is_the_layer_norm_of_the_tokens(device, backend):
    x = normal(device, 2, 17, 24, seed=9)
    weight, bias = normal(device, 2, 24, seed=10)
    merged = ck.ops.merge_tokens(
        x, ck.ops.match_tokens(x, 5, backend=backend), norm=(weight, bias, 1e-5), backend=backend
    )
    exact = torch.nn.functional.layer_norm(merged.tokens.double(), (24,), weight.double(), bias.double(), 1e-5)
    eager = torch.nn.functional.layer_norm(merged.tokens, (24,), weight, bias, 1e-5)
    assert_within_budget(merged.normed, exact, eager)


def test_merging_passes_gradcheck_and_matches_have_no_gradient():
    x = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(11), dtype=torch.float64).requires_grad_()
    match = ck.ops.match_tokens(x, 3)
    assert not any(index.requires_grad for index in match)
    size = torch.arange(1.0, 10).expand(2, -1).double()
    assert torch.autograd.gradcheck(lambda x: ck.ops.merge_tokens(x, match, size).tokens, x)


@pytest.mark.parametrize("hubs", [(0,), (3, 4), (0, 1, 2, 3, 4, 5, 6, 7)])
@pytest.mark.parametrize("sized", [False, True])
def test_a_target_takes_many_sources_at_a_time(device, backend, hubs, sized):
    x, r = normal(device, 2, 65, 40, seed=25), 30
    size = torch.arange(1.0, 66, device=device).expand(2, -1) if sized else None
    weight, bias = normal(device, 2, 40, seed=26)
    generator = torch.Generator().manual_seed(27)
    even = torch.stack([torch.randperm(33, generator=generator) for _ in range(2)])
    kept, source = even[:, r:].sort(1).values.to(device), even[:, :r].to(device)
    target = torch.tensor(hubs)[torch.randint(len(hubs), (2, r), generator=generator)].to(device)
    match = ck.ops.Match(kept, source, target)
    merged = ck.ops.merge_tokens(x, match, size, (weight, bias, 1e-5), backend=backend)
    exact, sizes, normed = read(readings.merge_tokens, x, match, size, (weight, bias, 1e-5))
    assert torch.equal(merged.size.double(), sizes)
    for actual, image in zip(merged.tokens, exact, strict=True):
        assert_within_budget(actual, image, image.float())
    torch.testing.assert_close(merged.normed.double(), normed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_any_batch_size_works(device, backend, batch):
    x = normal(device, 3, 17, 8, seed=12)[:batch]
    merged = ck.ops.merge_tokens(x, ck.ops.match_tokens(x, 4, backend=backend), backend=backend)
    assert merged.tokens.shape == (batch, 13, 8) and merged.size.shape == (batch, 13)


@pytest.mark.parametrize(
    ("metric", "r", "prefix", "message"),
    [
        (torch.randn(2, 9), 1, 1, r"metric must be \(B,N,D\) or \(B,H,N,D\), got \(2,9\)"),
        (torch.randn(2, 9, 4), 5, 1, r"r must be an int from 0 to \(N - prefix\)//2 = 4, got 5"),
        (torch.randn(2, 9, 4), -1, 1, "got -1"),
        (torch.randn(2, 9, 4), 1.0, 1, "got 1.0"),
        (torch.randn(2, 9, 4), 1, 10, "prefix must be an int from 0 to N = 9, got 10"),
        (torch.ones(2, 9, 4, dtype=torch.int32), 1, 1, "metric must be float32"),
    ],
)
def test_bad_arguments_of_match_tokens_raise(metric, r, prefix, message):
    with pytest.raises(ValueError, match=message):
        ck.ops.match_tokens(metric, r, prefix)


def test_a_match_of_other_tokens_raises():
    x = torch.randn(2, 9, 4)
    match = ck.ops.match_tokens(torch.randn(2, 11, 4), 2)
    with pytest.raises(ValueError, match="match must hold kept, source, target of shapes"):
        ck.ops.merge_tokens(x, match)
    with pytest.raises(ValueError, match="match must be int64"):
        ck.ops.merge_tokens(x, ck.ops.Match(*(i.int() for i in ck.ops.match_tokens(x, 2))))
    with pytest.raises(ValueError, match=r"size must be \(B,N\) = \(2,9\) on cpu, got \(2,8\) on cpu"):
        ck.ops.merge_tokens(x, ck.ops.match_tokens(x, 2), size=torch.ones(2, 8))


def test_the_prefix_stays_if_all_other_tokens_are_nan(device, backend):
    metric = torch.full((1, 9, 4), float("nan"), device=device)
    metric[0, :3] = 1
    for prefix in (1, 2, 3):
        match = ck.ops.match_tokens(metric, 3, prefix=prefix, backend=backend)
        assert match.source.min() * 2 >= prefix
        assert match.target.min() * 2 + 1 >= prefix


def test_autocast_does_not_narrow_the_similarities():
    metric = torch.randn(2, 65, 64, generator=torch.Generator().manual_seed(13))
    expected = ck.ops.match_tokens(metric, 26)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ck.ops.match_tokens(metric, 26)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_per_head_keys_are_averaged_in_their_dtype_first(device, backend):
    keys = (
        normal(device, 2, 3, 33, 16, seed=14) * 8
    ).round() / 8  # every mean is exact except for one rounding at the end
    for dtype in (torch.float32, torch.float16):
        actual = ck.ops.match_tokens(keys.to(dtype), 9, backend=backend)
        expected = ck.ops.match_tokens(keys.to(dtype).mean(1), 9, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("tokens", "prefix", "r"), [(3, 1, 1), (64, 0, 32), (65, 1, 13), (65, 5, 30), (257, 1, 16)])
def test_the_kernel_gives_the_matches_of_the_reference(device, triton, tokens, prefix, r):
    metric = normal(device, 2, tokens, 64, seed=15)
    actual = ck.ops.match_tokens(metric, r, prefix, backend=triton)
    expected = ck.ops.match_tokens(metric, r, prefix, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("programs", [1, 8, 50])
def test_an_image_in_any_number_of_parts_has_the_same_match(device, triton, set_kernels, programs):
    from clipkernels.kernels import merge as kernels

    set_kernels(kernels, "PROGRAMS", programs)
    for metric in (normal(device, 2, 161, 16, seed=28), duplicates(device, 2, 161, 16)):
        actual, expected = (ck.ops.match_tokens(metric, 40, backend=name) for name in (triton, "reference"))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_the_kernel_takes_a_metric_as_wide_as_tokens(device, triton):
    metric = normal(device, 2, 17, 768, seed=24)
    actual, expected = (ck.ops.match_tokens(metric, 6, backend=name) for name in (triton, "reference"))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_an_image_has_the_same_bits_alone_and_in_a_batch(device, triton):
    x, keys = normal(device, 3, 65, 48, seed=16), normal(device, 3, 2, 65, 16, seed=17)
    size = torch.arange(1.0, 66, device=device).expand(3, -1)
    norm = (x[0, 0], x[0, 1], 1e-5)

    def run(images):
        match = ck.ops.match_tokens(keys[images], 20, backend=triton)
        return *match, *ck.ops.merge_tokens(x[images], match, size[images], norm, backend=triton)

    for batch, alone, rerun in zip(run(slice(3)), run(slice(2, 3)), run(slice(3)), strict=True):
        assert torch.equal(batch[2:], alone) and torch.equal(batch, rerun)


def test_a_source_that_is_not_finite_spoils_only_its_target(device, backend):
    x = normal(device, 1, 9, 8, seed=18)
    x[0, 0], x[0, 2] = float("nan"), float("inf")
    pairs = torch.arange(2, device=device)[None]
    match = ck.ops.Match(torch.tensor([[2, 3, 4]], device=device), pairs, pairs)
    merged = ck.ops.merge_tokens(x, match, backend=backend).tokens
    assert merged[0, 3].isnan().all() and (merged[0, 4] == float("inf")).all()
    assert torch.equal(merged[:, [0, 1, 2, 5, 6]], x[:, [4, 6, 8, 5, 7]])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("sized", [False, True])
def test_the_kernel_has_the_gradients_of_the_reference(device, triton, sized, normed):
    x = normal(device, 2, 17, 24, seed=19).requires_grad_()
    weight, bias = (w.requires_grad_() for w in normal(device, 2, 24, seed=20).unbind())
    size = torch.arange(1.0, 18, device=device).expand(2, -1) if sized else None
    match = ck.ops.match_tokens(x, 7)
    grads = []
    for backend in ("reference", triton):
        merged = ck.ops.merge_tokens(x, match, size, (weight, bias, 1e-5) if normed else None, backend=backend)
        loss = (merged.tokens * torch.linspace(-1, 1, 24, device=device)).sum()
        if normed:
            loss = loss + (merged.normed * torch.linspace(2, -1, 24, device=device)).sum()
        grads.append(torch.autograd.grad(loss, (x, weight, bias), allow_unused=True, materialize_grads=True))
    for reference, kernel in zip(*grads, strict=True):
        torch.testing.assert_close(kernel, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("normed", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sized", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_operators_pass_opcheck(device, sized, normed):
    pytest.importorskip("triton")
    x = normal(device, 2, 9, 16, seed=21)
    match = ck.ops.match_tokens(x, 3)
    weight = torch.ones(16, device=device) if normed else None
    size = torch.ones(2, 9, device=device) if sized else None
    arguments = (x.requires_grad_(), *match, size, weight, weight, 1e-5)
    torch.library.opcheck(torch.ops.clipkernels.merge_tokens.default, arguments)
    torch.library.opcheck(torch.ops.clipkernels.match_tokens.default, (x.detach(), 3, 1))


def test_matching_and_merging_compile_into_one_graph(device):
    pytest.importorskip("triton")
    x = normal(device, 2, 17, 24, seed=22)

    def reduce(x, backend="triton"):
        match = ck.ops.match_tokens(x, 5, backend=backend)
        return ck.ops.merge_tokens(x, match, backend=backend).tokens * 2

    actual = torch.compile(reduce, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(actual, reduce(x, "reference"))


def test_the_kernels_support_strides_beyond_32_bits(tmp_path, triton):
    if not interpreting():
        pytest.skip("the sparse file is CPU memory, which only interpreted kernels can read")
    # A sparse file: 4 GiB of addresses, a few pages of disk.
    stride = 2**30 + 8
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + 8, dtype=torch.float16)
    x = memory.as_strided((1, 3, 8), (3 * stride, stride, 1))
    x.copy_(normal("cpu", 1, 3, 8, seed=23))
    match = ck.ops.match_tokens(x, 1, prefix=0, backend=triton)
    contiguous = x.clone()
    assert all(torch.equal(a, b) for a, b in zip(match, ck.ops.match_tokens(contiguous, 1, prefix=0), strict=True))
    actual, expected = (
        ck.ops.merge_tokens(x, match, backend=triton),
        ck.ops.merge_tokens(contiguous, match, backend=triton),
    )
    assert torch.equal(actual.tokens, expected.tokens)
