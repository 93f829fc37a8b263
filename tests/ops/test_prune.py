"""prune_tokens on both backends, compared with the reading in fp64."""

import itertools

import pytest
import torch

import clipkernels as ck
from clipkernels.backend import interpreting
from clipkernels.testing import assert_same, assert_within_budget, with_gaps
from tests import readings
from tests.readings import read

KERNEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(device, batch=2, tokens=17, width=24, prefix=1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, width, generator=generator).to(dtype).to(device)
    return x, torch.rand(batch, tokens - prefix, generator=generator).to(device)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(
    ("tokens", "prefix", "keep"),
    [(2, 1, 1), (2, 1, 0), (1, 1, 0), (1, 0, 1), (63, 0, 31), (65, 1, 64), (65, 5, 17), (257, 1, 128)],
)
def test_kept_rows_are_bit_equal_and_the_fused_row_in_budget(device, backend, dtype, tokens, prefix, keep):
    check(backend, *inputs(device, tokens=tokens, prefix=prefix, dtype=dtype), keep, prefix)


def test_the_577_tokens_of_a_336_pixel_tower_prune(device, backend):
    # Few kept rows, because at this length every tile of them takes the interpreter seconds.
    check(backend, *inputs(device, batch=1, tokens=577), 31, 1)


def check(backend, x, scores, keep, prefix):
    actual = ck.ops.prune_tokens(x, scores, keep, fuse=True, prefix=prefix, backend=backend)
    exact, index, _ = read(readings.prune_tokens, x, scores, keep, True, prefix=prefix)
    assert torch.equal(actual.index, index)
    assert torch.equal(actual.tokens[:, :-1].double(), exact[:, :-1])
    dropped = torch.ones_like(scores).scatter(1, index, 0)
    eager = ((scores * dropped)[:, None].to(x.dtype) @ x[:, prefix:])[:, 0]
    assert_within_budget(actual.tokens[:, -1], exact[:, -1], eager)


def test_ties_go_to_the_lower_index(device, backend):
    x, _ = inputs(device, batch=1, tokens=9)
    scores = torch.tensor([[1.0, 2, 1, 2, 1, 2, 1, 1]], device=device)
    assert ck.ops.prune_tokens(x, scores, 5, backend=backend).index.tolist() == [[0, 1, 2, 3, 5]]
    assert ck.ops.prune_tokens(x, torch.zeros_like(scores), 3, backend=backend).index.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("keep", range(9))
def test_nan_and_infinite_scores_still_keep_the_exact_count(device, backend, keep):
    x, _ = inputs(device, batch=2, tokens=9)
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([[nan, 1, -inf, inf, nan, 0, -inf, -1], [nan] * 8], device=device)
    actual = ck.ops.prune_tokens(x, scores, keep, fuse=keep > 0, backend=backend)
    exact, index, _ = read(readings.prune_tokens, x, scores, keep, keep > 0)
    assert torch.equal(actual.index, index)
    torch.testing.assert_close(actual.tokens.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("score", [float("nan"), float("-inf"), 0.0, -0.0])
def test_a_patch_of_weight_zero_may_hold_anything(device, backend, score, value):
    x, scores = inputs(device, batch=2, tokens=9)
    scores[0, 4] = score
    results = []
    for held in (value, 0.0):
        x[0, 5, 3] = held
        leaves = x.clone().requires_grad_(), scores.clone().requires_grad_()
        tokens = ck.ops.prune_tokens(*leaves, 3, fuse=True, backend=backend).tokens
        results.append((tokens, *torch.autograd.grad(tokens.square().sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        assert expected.isfinite().all() and torch.equal(actual, expected)


def test_the_gradient_of_a_score_of_zero_is_that_of_its_patch(device, backend):
    x, scores = inputs(device, batch=1, tokens=9)
    scores[0, 4] = 0
    fused = ck.ops.prune_tokens(x, scores.requires_grad_(), 3, fuse=True, backend=backend).tokens[0, -1]
    torch.testing.assert_close(torch.autograd.grad(fused.sum(), scores)[0][0, 4], x[0, 5].sum())


def test_a_patch_that_is_not_finite_spoils_only_its_row(device, backend):
    x, scores = inputs(device, batch=1, tokens=9)
    order = scores[0].argsort(descending=True) + 1
    x[0, order[0], 2], x[0, order[6], 3] = float("nan"), float("inf")
    scores.requires_grad_()
    tokens = ck.ops.prune_tokens(x, scores, 3, fuse=True, backend=backend).tokens[0]
    assert tokens[-1, 3] == float("inf") and tokens.isfinite().sum() == tokens.numel() - 2
    gradient = torch.autograd.grad(tokens[-1, 5:].sum(), scores)[0][0]
    assert gradient[order[:3] - 1].tolist() == [0, 0, 0]


def test_keeping_all_patches_appends_a_row_of_zeros(device, backend):
    x, scores = inputs(device)
    actual = ck.ops.prune_tokens(x, scores, 16, fuse=True, backend=backend)
    assert torch.equal(actual.tokens[:, :-1], x)
    assert torch.equal(actual.tokens[:, -1], torch.zeros_like(x[:, 0]))


@pytest.mark.parametrize("heads", ["mean", "rank"])
def test_per_head_scores_are_reduced_first(device, backend, heads):
    x, _ = inputs(device)
    # Multiples of 1/8 with four heads have exact sums, so that both backends see the same ties.
    scores = (torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(2)) * 8).round().div(8).to(device)
    actual = ck.ops.prune_tokens(x, scores, 7, True, heads, backend=backend)
    exact, index, _ = read(readings.prune_tokens, x, scores, 7, True, heads)
    assert torch.equal(actual.index, index)
    torch.testing.assert_close(actual.tokens.double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_normed_is_the_layer_norm_of_the_tokens(device, backend, dtype):
    x, scores = inputs(device, width=40, dtype=dtype)
    weight, bias = torch.randn(2, 40, generator=torch.Generator().manual_seed(3)).to(device)
    actual = ck.ops.prune_tokens(x, scores, 9, True, norm=(weight, bias, 1e-5), backend=backend)
    stored = actual.tokens.double()
    exact = torch.nn.functional.layer_norm(stored, (40,), weight.double(), bias.double(), 1e-5)
    eager = torch.nn.functional.layer_norm(actual.tokens, (40,), weight.to(dtype), bias.to(dtype), 1e-5)
    assert_within_budget(actual.normed, exact, eager)


def test_any_strides_give_the_same_result(device, backend):
    x, scores = inputs(device)
    expected = ck.ops.prune_tokens(x, scores, 6, True, backend=backend)
    gaps = ck.ops.prune_tokens(with_gaps(x), with_gaps(scores), 6, True, backend=backend)
    shared = ck.ops.prune_tokens(x[:1].expand(3, -1, -1), scores[:1].expand(3, -1), 6, True, backend=backend)
    assert_same(gaps.tokens, expected.tokens, backend)
    assert torch.equal(gaps.index, expected.index)
    assert_same(shared.tokens, expected.tokens[:1].expand(3, -1, -1), backend)


def test_the_kernel_supports_strides_beyond_32_bits(tmp_path, triton):
    # A sparse file: 4 GiB of addresses, three pages of disk.
    stride = 2**30 + 8
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + 8, dtype=torch.float16)
    x = memory.as_strided((1, 3, 8), (3 * stride, stride, 1))
    values = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(4)).half()
    x.copy_(values)
    scores = torch.tensor([[0.25, 0.5]])
    if not interpreting():
        pytest.skip("the sparse file is CPU memory, which only interpreted kernels can read")
    actual = ck.ops.prune_tokens(x, scores, 1, fuse=True, backend="triton")
    assert torch.equal(actual.tokens, torch.stack([values[:, 0], values[:, 2], values[:, 1] / 4], 1))


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_an_image_has_the_same_bits_alone_and_in_a_batch(device, batch, triton):
    x, scores = inputs(device, batch=3, tokens=65, width=48)
    norm = (torch.ones(48, device=device), torch.zeros(48, device=device), 1e-5)
    batch_result = ck.ops.prune_tokens(x, scores, 20, True, norm=norm, backend="triton")
    part_result = ck.ops.prune_tokens(x[3 - batch :], scores[3 - batch :], 20, True, norm=norm, backend="triton")
    rerun_result = ck.ops.prune_tokens(x, scores, 20, True, norm=norm, backend="triton")
    for expected, actual, rerun in zip(batch_result, part_result, rerun_result, strict=True):
        assert torch.equal(expected[3 - batch :], actual) and torch.equal(expected, rerun)


@pytest.mark.parametrize("programs", [1, 5, 256])
def test_the_fused_token_has_the_same_bits_from_any_programs(device, triton, set_kernels, programs):
    from clipkernels.kernels import prune as kernels

    x, scores = inputs(device, tokens=101, width=300)
    norm = (torch.ones(300, device=device), torch.zeros(300, device=device), 1e-5)
    expected = ck.ops.prune_tokens(x, scores, 20, True, norm=norm, backend=triton)
    set_kernels(kernels, "PROGRAMS", programs)
    actual = ck.ops.prune_tokens(x, scores, 20, True, norm=norm, backend=triton)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    exact, _, _ = read(readings.prune_tokens, x, scores, 20, True)
    torch.testing.assert_close(actual.tokens.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "per_head"), [("mean", 0), ("mean", 3), ("rank", 3)])
@pytest.mark.parametrize("fuse", [False, True])
def test_the_kernel_has_the_gradients_of_the_reference(device, fuse, heads, per_head, norm, triton):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 17, 24, generator=generator).to(device).requires_grad_()
    scores = torch.rand(2, *([per_head] if per_head else []), 16, generator=generator).to(device).requires_grad_()
    weight, bias = (w.to(device).requires_grad_() for w in torch.randn(2, 24, generator=generator))
    grads = []
    for backend in ("reference", "triton"):
        actual = ck.ops.prune_tokens(
            x, scores, 7, fuse, heads, 1, (weight, bias, 1e-5) if norm else None, backend=backend
        )
        loss = (actual.tokens * torch.linspace(-1, 1, 24, device=device)).sum()
        if norm:
            loss = loss + (actual.normed * torch.linspace(2, -1, 24, device=device)).sum()
        grads.append(torch.autograd.grad(loss, (x, scores, weight, bias), allow_unused=True, materialize_grads=True))
    for reference, kernel in zip(*grads, strict=True):
        torch.testing.assert_close(kernel, reference, atol=1e-4, rtol=1e-4)


def test_the_reference_passes_gradcheck_in_double():
    x, scores = inputs("cpu", tokens=6, width=3, dtype=torch.float64)
    scores = scores.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, s: ck.ops.prune_tokens(x, s, 2, fuse=True).tokens, (x.requires_grad_(), scores)
    )


def _forms():
    """Yield every form of the operator; the quick tests run the least and the most of it."""
    for form in itertools.product([False, True], [0, 2], [False, True]):
        quick = form in ((False, 0, False), (True, 2, True))
        yield pytest.param(*form, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(("fuse", "per_head", "normed"), list(_forms()))
def test_the_operator_passes_opcheck(device, fuse, per_head, normed):
    pytest.importorskip("triton")
    x, scores = inputs(device, tokens=9, width=16)
    scores = scores[:, None].repeat(1, per_head, 1) if per_head else scores
    weight = torch.ones(16, device=device) if normed else None
    arguments = (x.requires_grad_(), scores.requires_grad_(), 3, fuse, "mean", 1, weight, weight, 1e-5)
    torch.library.opcheck(torch.ops.clipkernels.prune_tokens.default, arguments)


def test_the_operator_compiles_into_one_graph(device):
    pytest.importorskip("triton")
    x, scores = inputs(device)
    pruned = torch.compile(
        lambda x, s: ck.ops.prune_tokens(x, s, 5, backend="triton").tokens * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(pruned(x, scores), ck.ops.prune_tokens(x, scores, 5).tokens * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 17)}, r"x must be \(B,N,C\), got \(2,17\)"),
        ({"x": torch.randn(2, 17, 0)}, r"x must be \(B,N,C\) with C of at least 1, got \(2,17,0\)"),
        ({"scores": torch.rand(2, 15)}, r"scores must be \(B,P\) = \(2,16\) or \(B,H,P\), got \(2,15\)"),
        ({"scores": torch.rand(2, 0, 16)}, r"got \(2,0,16\)"),
        ({"scores": torch.ones(2, 16, dtype=torch.int64)}, "scores must be float32"),
        ({"keep": 17}, "keep must be an int from 0 to P = 16, got 17"),
        ({"keep": -1}, "got -1"),
        ({"keep": 0.5}, "got 0.5"),
        ({"prefix": 18}, "prefix must be an int from 0 to N = 17"),
        ({"heads": "max"}, 'heads must be "mean" or "rank", got \'max\''),
        (
            {"norm": (torch.ones(23), torch.ones(24), 1e-5)},
            r"norm's weight must be \(C,\) = \(24\) on cpu, got \(23\)",
        ),
        ({"norm": (torch.ones(24), torch.ones(24))}, r"norm must be \(weight, bias, eps\), got 2 values"),
        ({"norm": (torch.ones(24), torch.ones(24), "1")}, "norm's eps must be a positive number, got '1'"),
    ],
)
def test_errors_name_the_bad_argument_on_every_backend(backend, change, message):
    x, scores = inputs("cpu")
    with pytest.raises(ValueError, match=message):
        ck.ops.prune_tokens(**{"x": x, "scores": scores, "keep": 4, **change}, backend=backend)


def test_a_strided_norm_gives_the_same_result(device, backend):
    x, scores = inputs(device)
    pair = torch.randn(24, 2, generator=torch.Generator().manual_seed(6)).to(device)
    actual = ck.ops.prune_tokens(x, scores, 4, norm=(pair[:, 0], pair[:, 1], 1e-5), backend=backend).normed
    exact = torch.nn.functional.layer_norm(x[:, :1], (24,), pair[:, 0], pair[:, 1])
    torch.testing.assert_close(actual[:, :1], exact)


def test_scores_may_have_another_dtype_than_the_tokens():
    x, scores = inputs("cpu")
    for x_dtype, dtype in (
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.float16, torch.float32),
    ):
        actual = ck.ops.prune_tokens(x.to(x_dtype), scores.to(dtype), 5, fuse=True)
        exact, index, _ = read(readings.prune_tokens, x.to(x_dtype), scores.to(dtype), 5, True)
        assert torch.equal(actual.index, index) and actual.tokens.dtype == x_dtype
        torch.testing.assert_close(
            actual.tokens.double(), exact, atol=2e-3 if x_dtype == torch.float16 else 1e-6, rtol=1e-3
        )
    with pytest.raises(
        (ValueError, RuntimeError), match=r"got float64|triton is not installed|the tensors are on the CPU"
    ):
        ck.ops.prune_tokens(x, scores.double(), 5, backend="triton")
