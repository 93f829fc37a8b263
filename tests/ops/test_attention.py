"""attention and rank_tokens, compared with the full N×N attention in fp64."""

import pytest
import torch

import clipkernels as ck
from clipkernels.backend import interpreting
from clipkernels.testing import assert_within_budget, with_gaps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OTHER_DTYPES = [torch.float32, torch.float16]
SLOW = pytest.mark.slow
ODD = [1, 2, 63, 65, 257, 577]  # below, at and above the tile sizes of every backend


def qkv(device, batch, heads, tokens, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, width, generator=generator).to(device, dtype) for _ in range(3)]


def full_attention(q, k, size=None):
    """Return the attention (B,H,N,N) in fp64."""
    logits = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    return torch.softmax(logits if size is None else logits + size.double().log()[:, None, None], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [pytest.param(n, marks=SLOW) if n == 577 else n for n in ODD])
def test_output_and_cls_signal_match_full_attention(device, backend, tokens, dtype):
    q, k, v = qkv(device, 2, 3, tokens, 64, dtype)
    out, signal = ck.ops.attention(q, k, v, signal="cls", backend=backend)
    exact = full_attention(q, k)
    eager = (q @ k.mT / 8).softmax(-1)
    assert_within_budget(out, exact @ v.double(), eager @ v)
    assert signal.dtype == torch.float32
    assert_within_budget(signal, exact[:, :, 0, 1:], (q.float() @ k.float().mT / 8).softmax(-1)[:, :, 0, 1:])


def test_fp64_stays_fp64():
    q, k, v = qkv("cpu", 2, 3, 65, 64, torch.float64)
    out, signal = ck.ops.attention(q, k, v, signal="cls")
    torch.testing.assert_close(out, full_attention(q, k) @ v, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(signal, full_attention(q, k)[:, :, 0, 1:], atol=1e-14, rtol=1e-14)
    with pytest.raises(ValueError, match="takes float32, float16 or bfloat16, got float64"):
        ck.ops.attention(q, k, v, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 65, pytest.param(130, marks=SLOW), pytest.param(257, marks=SLOW)])
def test_the_received_signal_is_the_column_mean(device, backend, tokens, dtype):
    q, k, v = qkv(device, 2, 2, tokens, 64, dtype)
    _, signal = ck.ops.attention(q, k, v, signal="received", prefix=0, backend=backend)
    exact = full_attention(q, k).mean((1, 2))
    assert signal.dtype == torch.float32
    assert_within_budget(signal, exact, (q.float() @ k.float().mT / 8).softmax(-1).mean((1, 2)))


def test_the_keys_signal_is_the_head_mean_in_their_dtype(device, backend):
    q, k, v = qkv(device, 2, 3, 17, 64, torch.bfloat16)
    _, signal = ck.ops.attention(q, k, v, signal="keys", backend=backend)
    assert signal.dtype == torch.bfloat16
    assert_within_budget(signal, k.double().mean(1), k.mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_of_size_n_counts_as_n_copies(device, backend, dtype):
    q, k, v = qkv(device, 2, 2, 9, 64, dtype)
    size = torch.tensor([1.0, 3, 1, 2, 1, 1, 5, 1, 1], device=device).expand(2, -1)
    out, signal = ck.ops.attention(q, k, v, size=size, signal="cls", backend=backend)
    copies = size[0].long()
    repeated_k, repeated_v = (x.repeat_interleave(copies, 2) for x in (k, v))
    exact = full_attention(q, repeated_k)
    assert_within_budget(out, exact @ repeated_v.double(), (q @ repeated_k.mT / 8).softmax(-1) @ repeated_v)
    groups = torch.arange(9, device=device).repeat_interleave(copies)
    sums = torch.zeros(2, 2, 9, dtype=torch.float64, device=device).index_add_(2, groups, exact[:, :, 0])
    torch.testing.assert_close(signal.double(), sums[..., 1:], atol=1e-6, rtol=1e-5)


def test_leading_queries_alone_give_the_leading_rows(device, backend):
    q, k, v = qkv(device, 2, 3, 50, 64)
    size = torch.rand(2, 50, generator=torch.Generator().manual_seed(2)).to(device) + 0.5
    full_out, full_signal = ck.ops.attention(q, k, v, size, "cls", backend=backend)
    out, signal = ck.ops.attention(q[:, :, :1], k, v, size, "cls", backend=backend)
    torch.testing.assert_close(out, full_out[:, :, :1])
    torch.testing.assert_close(signal, full_signal)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_prefix_has_no_score_but_is_in_the_softmax(device, backend, prefix):
    q, k, v = qkv(device, 1, 2, 12, 64)
    _, signal = ck.ops.attention(q, k, v, signal="cls", prefix=prefix, backend=backend)
    torch.testing.assert_close(signal.double(), full_attention(q, k)[:, :, 0, prefix:], atol=1e-6, rtol=1e-5)


def test_packed_views_give_the_results_of_copies(device, backend):
    packed = torch.randn(2, 17, 3 * 2 * 64, generator=torch.Generator().manual_seed(1)).to(device)
    q, k, v = packed.unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
    assert not q.is_contiguous()
    actual = ck.ops.attention(q, k, v, signal="cls", backend=backend)
    expected = ck.ops.attention(q.contiguous(), k.contiguous(), v.contiguous(), signal="cls", backend=backend)
    torch.testing.assert_close(actual, expected)
    gaps = [with_gaps(x) for x in (q, k, v)]
    torch.testing.assert_close(ck.ops.attention(*gaps, signal="cls", backend=backend), expected)


def test_an_empty_batch_gives_empty_results(device, backend):
    q, k, v = qkv(device, 0, 2, 5, 64)
    out, signal = ck.ops.attention(q, k, v, signal="cls", backend=backend)
    assert out.shape == (0, 2, 5, 64) and signal.shape == (0, 2, 4)


def gradients(scores, q, k):
    """Return the gradients of q and k through scores, and the second ones."""
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(7)).to(scores)
    first = torch.autograd.grad((scores * weights).sum(), (q, k), create_graph=True)
    return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (q, k), retain_graph=True)


@pytest.mark.parametrize("sized", [True, pytest.param(False, marks=SLOW)])
@pytest.mark.parametrize("signal", ["cls", "received"])
def test_a_signal_that_weighs_has_the_gradient_of_the_softmax(device, backend, signal, sized):
    tokens = 130 if signal == "received" else 20  # more rows than are computed at once
    q, k, v = qkv(device, 1, 2, tokens, 8)
    size = torch.randint(0, 4, (1, tokens), generator=torch.Generator().manual_seed(3)).to(device) if sized else None
    double = [x.double().requires_grad_() for x in (q, k)]
    exact = full_attention(*double, size)[..., 2:]
    q, k = q.requires_grad_(), k.requires_grad_()
    _, scores = ck.ops.attention(q, k, v, size, signal, prefix=2, backend=backend)
    exact_scores = exact[:, :, 0] if signal == "cls" else exact.mean((1, 2))
    query = "cls" if signal == "cls" else "all"
    ranked = ck.ops.rank_tokens(q, k, query=query, size=size, prefix=2, backend=backend)
    exact_ranked = exact[:, :, 0].mean(1) if signal == "cls" else exact.mean((1, 2))
    for actual, expected in ((scores, exact_scores), (ranked, exact_ranked)):
        for gradient, wanted in zip(gradients(actual, q, k), gradients(expected, *double), strict=True):
            torch.testing.assert_close(gradient.double(), wanted, atol=1e-5 * wanted.abs().max().item(), rtol=1e-4)


def test_keys_and_ranks_choose_and_have_no_gradient(device, backend):
    q, k, v = (x.requires_grad_() for x in qkv(device, 1, 2, 5, 64))
    out, keys = ck.ops.attention(q, k, v, signal="keys", backend=backend)
    assert out.requires_grad and not keys.requires_grad
    assert not ck.ops.rank_tokens(q, k, heads="rank", backend=backend).requires_grad


def test_rank_tokens_reduces_the_signal_over_heads(device, backend):
    q, k, v = qkv(device, 2, 3, 33, 64)
    _, cls = ck.ops.attention(q, k, v, signal="cls", backend=backend)
    _, received = ck.ops.attention(q, k, v, signal="received", backend=backend)
    torch.testing.assert_close(ck.ops.rank_tokens(q, k, backend=backend), cls.mean(1))
    torch.testing.assert_close(ck.ops.rank_tokens(q, k, query="all", backend=backend), received)
    ranks = (cls[..., :, None] > cls[..., None, :]).sum(-1)
    assert torch.equal(ck.ops.rank_tokens(q, k, heads="rank", backend=backend), ranks.sum(1) / 3)


def test_the_lower_index_of_equal_scores_ranks_higher(device, backend):
    q, k, _ = (x.round() for x in qkv(device, 1, 2, 1, 64))  # integers, whose products are exact in any order
    k = k.expand(1, 2, 5, 64)
    assert ck.ops.rank_tokens(q, k, heads="rank", backend=backend).tolist() == [[3, 2, 1, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(2, 3, 8)}, r"q must be \(B,H,M,D\)"),
        ({"q": torch.randn(2, 3, 8, 0)}, r"q must be \(B,H,M,D\) with D of at least 1, got \(2,3,8,0\)"),
        ({"k": torch.randn(2, 3, 8, 32)}, r"k must be \(B,H,N,D\) = \(2,3,N,64\) with N ≥ 8, got \(2,3,8,32\)"),
        ({"v": torch.randn(2, 3, 7, 64)}, r"v must be \(B,H,N,D\) = \(2,3,8,64\) like k, got \(2,3,7,64\)"),
        ({"v": torch.randn(2, 3, 8, 64).half()}, "v must be torch.float32 on cpu, got torch.float16 on cpu"),
        ({"q": torch.ones(2, 3, 8, 64, dtype=torch.int64)}, "q must be float32, float16, bfloat16 or float64"),
        ({"size": torch.ones(2, 7)}, r"size must be \(B,N\) = \(2,8\) on cpu, got \(2,7\) on cpu"),
        ({"signal": "all"}, 'signal must be "cls", "received", "keys" or None'),
        ({"q": torch.randn(2, 3, 1, 64), "signal": "received"}, "needs one query per key, 8, got 1"),
        ({"prefix": 9}, "prefix must be an int from 0 to N = 8, got 9"),
        ({"backend": "cuda"}, 'backend must be "auto", "triton" or "reference"'),
    ],
)
def test_errors_name_the_bad_argument(change, message):
    q, k, v = qkv("cpu", 2, 3, 8, 64)
    with pytest.raises(ValueError, match=message):
        ck.ops.attention(**{"q": q, "k": k, "v": v, **change})


def test_rank_over_all_queries_raises():
    q, k, _ = qkv("cpu", 1, 1, 4, 64)
    with pytest.raises(ValueError, match='query="all" is a mean over heads'):
        ck.ops.rank_tokens(q, k, heads="rank", query="all")


def test_received_and_rank_tokens_use_size_and_prefix(device, backend):
    q, k, v = qkv(device, 2, 3, 21, 64)
    size = torch.rand(2, 21, generator=torch.Generator().manual_seed(1)).to(device) * 5 + 1
    exact = full_attention(q, k, size)
    _, received = ck.ops.attention(q, k, v, size, "received", prefix=3, backend=backend)
    torch.testing.assert_close(received.double(), exact.mean((1, 2))[:, 3:], atol=1e-6, rtol=1e-5)
    all_queries = ck.ops.rank_tokens(q, k, query="all", size=size, prefix=3, backend=backend)
    torch.testing.assert_close(all_queries.double(), exact.mean((1, 2))[:, 3:], atol=1e-6, rtol=1e-5)
    first_query = ck.ops.rank_tokens(q, k, size=size, prefix=3, backend=backend)
    torch.testing.assert_close(first_query.double(), exact[:, :, 0, 3:].mean(1), atol=1e-6, rtol=1e-5)


def test_autocast_does_not_narrow_the_scores():
    q, k, v = qkv("cpu", 2, 4, 65, 64)
    expected = ck.ops.attention(q, k, v, signal="cls")[1]
    with torch.autocast("cpu", torch.bfloat16):
        actual = ck.ops.attention(q, k, v, signal="cls")[1]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *(pytest.param(dtype, marks=SLOW) for dtype in OTHER_DTYPES)])
@pytest.mark.parametrize("width", [16, 64, 72, 80, 88, 96, 104, 112, 128])
def test_the_kernel_supports_every_head_width_of_clip_towers(device, triton, width, dtype):
    q, k, v = qkv(device, 1, 2, 66, width, dtype)
    size = torch.arange(1.0, 67, device=device)[None]
    exact = full_attention(q, k, size)
    eager = (q @ k.mT * width**-0.5 + size.log()[:, None, None].to(dtype)).softmax(-1)
    fp32 = (q.float() @ k.float().mT * width**-0.5 + size.log()[:, None, None]).softmax(-1)
    out, cls = ck.ops.attention(q, k, v, size, "cls", backend=triton)
    assert_within_budget(out, exact @ v.double(), eager @ v)
    assert_within_budget(cls, exact[:, :, 0, 1:], fp32[:, :, 0, 1:])
    out, received = ck.ops.attention(q, k, v, size, "received", backend=triton)
    assert_within_budget(out, exact @ v.double(), eager @ v)
    assert_within_budget(received, exact.mean((1, 2))[:, 1:], fp32.mean((1, 2))[:, 1:])


def test_wider_heads_run_on_the_reference(device):
    q, k, v = qkv(device, 1, 1, 5, 144)
    torch.testing.assert_close(
        ck.ops.attention(q, k, v)[0].double(), full_attention(q, k) @ v.double(), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(RuntimeError, match="the kernel of attention takes heads of at most 128 elements, got 144: use"):
        ck.ops.attention(q, k, v, backend="triton")


@pytest.mark.parametrize("signal", [pytest.param(None, marks=SLOW), "cls", "received"])
def test_an_image_has_the_same_bits_alone_and_in_a_batch(device, triton, signal):
    q, k, v = qkv(device, 3, 2, 70, 64)
    size = torch.arange(1.0, 71, device=device).expand(3, -1)
    parts = (slice(3), slice(2, 3), slice(3))
    results = [ck.ops.attention(q[b], k[b], v[b], size[b], signal, backend=triton) for b in parts]
    for batch, alone, rerun in zip(*results, strict=True):
        if batch is not None:
            assert torch.equal(batch[2:], alone) and torch.equal(batch, rerun)


@pytest.mark.parametrize("signal", ["cls", "received"])
def test_a_nan_key_makes_only_the_scores_of_its_image_nan(device, triton, signal):
    q, k, v = qkv(device, 2, 2, 40, 64)
    k[0, 1, 7, 3] = float("nan")
    out, scores = ck.ops.attention(q, k, v, signal=signal, backend=triton)
    exact_out, exact = ck.ops.attention(q, k, v, signal=signal, backend="reference")
    assert torch.equal(scores.isnan(), exact.isnan()) and torch.equal(out.isnan(), exact_out.isnan())
    torch.testing.assert_close(scores[1], exact[1])
    ranked = ck.ops.rank_tokens(q, k, query="all" if signal == "received" else "cls", backend=triton)
    assert ranked[0].isnan().all() and ranked[1].isfinite().all()


@pytest.mark.parametrize("nats", [0, 127, pytest.param(100, marks=SLOW), pytest.param(1000, marks=SLOW)])
@pytest.mark.parametrize("tokens", [9, 80])  # one tile of keys, and several
def test_a_key_of_size_zero_is_not_there(device, backend, tokens, nats):
    q, k, v = qkv(device, 1, 2, tokens, 64)
    hidden = 3
    k[:, :, 0] = q[:, :, 0] * (8 * nats / q[:, :, 0].square().sum(-1, keepdim=True))  # its logit for query 0
    size = torch.ones(1, tokens, device=device)
    size[:, :hidden] = 0
    exact = full_attention(q, k[:, :, hidden:])
    for signal, expected in (("cls", exact[:, :, 0]), ("received", exact.mean((1, 2)))):
        out, scores = ck.ops.attention(q, k, v, size, signal, prefix=0, backend=backend)
        torch.testing.assert_close(out.double(), exact @ v[:, :, hidden:].double(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scores[..., hidden:].double(), expected, atol=1e-6, rtol=1e-5)
        assert (scores[..., :hidden] == 0).all()
    for query, expected in (("cls", exact[:, :, 0].mean(1)), ("all", exact.mean((1, 2)))):
        ranked = ck.ops.rank_tokens(q, k, query=query, size=size, prefix=0, backend=backend)
        torch.testing.assert_close(ranked[:, hidden:].double(), expected, atol=1e-6, rtol=1e-5)
        assert (ranked[:, :hidden] == 0).all()


def hidden_by(value, device, tokens, part, dtype=torch.float32):
    """Return q, k, v whose keys or values (`part`) 2 and N-1 hold a value, their sizes of 0 there, and the others."""
    q, k, v = qkv(device, 1, 2, tokens, 64, dtype)
    size = torch.ones(1, tokens, device=device)
    size[0, 4] = 3
    others = [place for place in range(tokens) if place not in (2, tokens - 1)]
    size[0, [2, -1]] = 0
    (k if part == "k" else v)[0, :, [2, -1]] = value
    return q, k, v, size, others


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize("tokens", [9, 80])
def test_a_key_of_size_zero_may_hold_anything(device, backend, tokens, value):
    q, k, v, size, others = hidden_by(value, device, tokens, "k")
    exact = full_attention(q, k[:, :, others], size[:, others])
    for signal, expected in (("cls", exact[:, :, 0]), ("received", exact.mean((1, 2)))):
        out, scores = ck.ops.attention(q, k, v, size, signal, prefix=0, backend=backend)
        torch.testing.assert_close(out.double(), exact @ v[:, :, others].double(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scores[..., others].double(), expected, atol=1e-6, rtol=1e-5)
        assert (scores[..., [2, -1]] == 0).all()
    for query, expected in (("cls", exact[:, :, 0].mean(1)), ("all", exact.mean((1, 2)))):
        ranked = ck.ops.rank_tokens(q, k, query=query, size=size, prefix=0, backend=backend)
        torch.testing.assert_close(ranked[:, others].double(), expected, atol=1e-6, rtol=1e-5)
        assert (ranked[:, [2, -1]] == 0).all()
    ranks = ck.ops.rank_tokens(q, k, "rank", size=size, prefix=0, backend=backend)
    beaten = (exact[:, :, 0, :, None] > exact[:, :, 0, None]).sum(-1).sum(1)
    assert torch.equal(ranks[:, others], (beaten + 4).float() / 2)  # both heads of a key beat the two hidden keys
    keys = ck.ops.attention(q, k, v, size, "keys", backend=backend)[1]
    torch.testing.assert_close(keys[:, others], k.mean(1)[:, others])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["k", "v"])
def test_a_value_of_size_zero_may_hold_anything(part, dtype, value):
    q, k, v, size, others = hidden_by(value, "cpu", 9, part, dtype)
    exact = full_attention(q, k[:, :, others], size[:, others])
    eager = (q @ k[:, :, others].mT / 8 + size[:, others].log().to(dtype)[:, None, None]).softmax(-1)
    for signal in (None, "cls", "received", "keys"):
        out, _ = ck.ops.attention(q, k, v, size, signal, backend="reference")
        assert_within_budget(out, exact @ v[:, :, others].double(), eager @ v[:, :, others])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("signal", ["cls", "received"])
def test_a_key_of_size_zero_has_no_gradient(device, backend, signal, value):
    for part in "kv":
        q, k, v, size, others = hidden_by(value, device, 9, part)
        double = [x.double().requires_grad_() for x in (q, k[:, :, others], v[:, :, others])]
        exact = full_attention(*double[:2], size[:, others])
        exact_scores = exact[:, :, 0] if signal == "cls" else exact.mean((1, 2))
        expected = torch.autograd.grad((exact @ double[2]).square().sum() + exact_scores.square().sum(), double)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out, scores = ck.ops.attention(*inputs, size, signal, prefix=0, backend=backend)
        actual = torch.autograd.grad(out.square().sum() + scores.square().sum(), inputs)
        torch.testing.assert_close(actual[0].double(), expected[0], atol=1e-5, rtol=1e-4)
        for gradient, wanted in zip(actual[1:], expected[1:], strict=True):
            torch.testing.assert_close(gradient[:, :, others].double(), wanted, atol=1e-5, rtol=1e-4)
            assert (gradient[:, :, [2, -1]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [9, 80])
def test_an_image_without_a_key_gives_zeros(device, backend, tokens, dtype):
    q, k, v = qkv(device, 2, 2, tokens, 64, dtype)
    size = torch.ones(2, tokens, device=device)
    size[1] = 0
    for signal in (None, "cls", "received"):
        out, scores = ck.ops.attention(q, k, v, size, signal, backend=backend)
        expected = ck.ops.attention(q[:1], k[:1], v[:1], size[:1], signal, backend=backend)
        torch.testing.assert_close(out[:1], expected[0])
        assert (out[1] == 0).all() and (scores is None or (scores[1] == 0).all())
    ranked = ck.ops.rank_tokens(q, k, size=size, backend=backend)
    assert (ranked[1] == 0).all() and (ranked[0] > 0).all()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, scores = ck.ops.attention(q, k, v, size, "cls", backend=backend)
    for gradient in torch.autograd.grad(out.float().square().sum() + scores.square().sum(), (q, k, v)):
        assert (gradient[1] == 0).all() and gradient[0].isfinite().all() and gradient[0].any()


def test_fp64_takes_sizes_in_fp64():
    q, k, v = qkv("cpu", 2, 3, 65, 64, torch.float64)
    size = torch.randint(1, 9, (2, 65), generator=torch.Generator().manual_seed(0)).float()
    out, signal = ck.ops.attention(q, k, v, size, "cls")
    torch.testing.assert_close(out, full_attention(q, k, size) @ v, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(signal, full_attention(q, k, size)[:, :, 0, 1:], atol=1e-14, rtol=1e-14)
    ranked = ck.ops.rank_tokens(q, k, query="all", size=size)
    torch.testing.assert_close(ranked, full_attention(q, k, size).mean((1, 2))[:, 1:], atol=1e-14, rtol=1e-14)
    narrow = ck.ops.attention(q.float(), k.float(), v.float(), size.double(), "cls")
    assert narrow[0].dtype == narrow[1].dtype == torch.float32


def test_auto_and_the_fused_kernel_agree(device, triton, monkeypatch):
    # Without sizes `auto` runs SDPA and a score kernel; the kernel is one fused launch.
    q, k, v = qkv(device, 2, 2, 70, 64)
    monkeypatch.setattr(ck.backend, "choose", lambda *_, **__: "triton")
    for signal in ("cls", "received", "keys"):
        separate, fused = (ck.ops.attention(q, k, v, signal=signal, backend=name) for name in ("auto", triton))
        torch.testing.assert_close(separate, fused, atol=1e-5, rtol=1e-5)


def test_sdpa_computes_the_output_if_a_gradient_is_required(device, triton):
    q, k, v = (x.requires_grad_() for x in qkv(device, 1, 2, 20, 64))
    out, _ = ck.ops.attention(q, k, v, signal="cls", backend=triton)
    actual = torch.autograd.grad(out.square().sum(), (q, k, v))
    exact = torch.autograd.grad((full_attention(q, k) @ v.double()).square().sum(), (q, k, v))
    for gradient, expected in zip(actual, exact, strict=True):
        torch.testing.assert_close(gradient, expected.to(gradient.dtype), atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="clipkernels::attention has no backward"):
        torch.ops.clipkernels.attention(q, k, v, None, "", 1)[0].sum().backward()
    with pytest.raises(RuntimeError, match="clipkernels::rank_tokens has no backward with heads='rank'"):
        torch.ops.clipkernels.rank_tokens(q, k, None, "rank", "cls", 1).sum().backward()


@pytest.mark.parametrize("signal", ["", "cls", pytest.param("received", marks=SLOW)])
@pytest.mark.parametrize("sized", [True, pytest.param(False, marks=SLOW)])
def test_the_operators_pass_opcheck(device, sized, signal):
    pytest.importorskip("triton")
    packed = torch.randn(2, 9, 3 * 2 * 16, generator=torch.Generator().manual_seed(5)).to(device, torch.bfloat16)
    q, k, v = packed.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    size = torch.ones(2, 9, device=device) if sized else None
    torch.library.opcheck(torch.ops.clipkernels.attention.default, (q, k, v, size, signal, 1))
    leaves = [x.detach().clone().requires_grad_() for x in (q, k)]
    if signal:
        torch.library.opcheck(torch.ops.clipkernels.attention_scores.default, (*leaves, size, signal, 1))
    torch.library.opcheck(torch.ops.clipkernels.rank_tokens.default, (q, k, size, "rank", "cls", 1))
    for query in ("cls", "all"):
        torch.library.opcheck(torch.ops.clipkernels.rank_tokens.default, (*leaves, size, "mean", query, 1))


@pytest.mark.parametrize("signal", [None, "cls", "received", "keys"])
def test_attention_compiles_into_one_graph(device, signal):
    pytest.importorskip("triton")
    q, k, v = qkv(device, 2, 2, 17, 64)

    def attend(q, k, v, backend="triton"):
        out, scores = ck.ops.attention(q, k, v, signal=signal, backend=backend)
        ranks = ck.ops.rank_tokens(q, k, heads="rank", backend=backend)
        return out * 2, ranks, scores

    actual = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(actual, attend(q, k, v, "reference"), atol=1e-5, rtol=1e-5)


def test_the_kernels_support_strides_beyond_32_bits(tmp_path, triton):
    if not interpreting():
        pytest.skip("the sparse file is CPU memory, which only interpreted kernels can read")
    # A sparse file: 8 GiB of addresses, a few pages of disk. In units of 8 elements the stride itself fits 32 bits.
    stride = 2**31 + 16
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + 48, dtype=torch.float16)
    strided = memory.as_strided((3, 1, 1, 3, 16), (16, 3 * stride, 48, stride, 1))
    strided.copy_(torch.randn(3, 1, 1, 3, 16, generator=torch.Generator().manual_seed(4)))
    for signal in ("cls", "received"):
        actual = ck.ops.attention(*strided, signal=signal, backend=triton)
        torch.testing.assert_close(
            actual, ck.ops.attention(*strided.clone(), signal=signal, backend=triton), atol=0, rtol=0
        )
    assert torch.equal(
        ck.ops.rank_tokens(*strided[:2], backend=triton), ck.ops.rank_tokens(*strided[:2].clone(), backend=triton)
    )


@pytest.fixture(params=[False, pytest.param(True, marks=SLOW)], ids=["other", "hopper"])
def tiles(request, monkeypatch):
    """The kernel's tiles on a device: those of Hopper GPUs, or the others."""
    kernel = pytest.importorskip("clipkernels.kernels.attention", reason="triton is not installed")
    monkeypatch.setattr(kernel, "is_hopper", lambda device: request.param)


@pytest.mark.parametrize("signal", ["cls", "received"])
@pytest.mark.parametrize("width", [64, 72])
@pytest.mark.parametrize("tokens", [16, 64, 81, *(pytest.param(n, marks=SLOW) for n in (128, 129, 193, 400))])
def test_every_number_of_tiles_is_right_in_the_kernel(device, triton, tiles, tokens, width, signal):
    q, k, v = qkv(device, 1, 1, tokens, width, torch.float16)
    exact = full_attention(q, k)
    eager, fp32 = ((x(q) @ x(k).mT * width**-0.5).softmax(-1) for x in (torch.Tensor.half, torch.Tensor.float))
    out, scores = ck.ops.attention(q, k, v, signal=signal, prefix=0, backend=triton)
    assert_within_budget(out, exact @ v.double(), eager @ v)
    exact, fp32 = ((x[:, :, 0] if signal == "cls" else x.mean((1, 2))) for x in (exact, fp32))
    assert_within_budget(scores, exact, fp32)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), pytest.param(-float("inf"), marks=SLOW)])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=SLOW)])
@pytest.mark.parametrize("width", [64, pytest.param(72, marks=SLOW)])
def test_a_key_of_size_zero_may_hold_anything_in_the_kernel(device, triton, tiles, width, dtype, junk):
    q, k, v = qkv(device, 2, 1, 70, width, dtype)
    size = torch.ones(2, 70, device=device)
    size[0, [0, 5, 69]] = 0  # of each tile, and query 0 itself
    size[1] = 0
    dirty_k, dirty_v = k.clone(), v.clone()
    dirty_k[size[:, None] == 0] = junk
    dirty_v[size[:, None] == 0] = junk
    for signal in (None, "cls", "received"):
        clean = ck.ops.attention(q, k, v, size, signal, backend=triton)
        dirty = ck.ops.attention(q, dirty_k, dirty_v, size, signal, backend=triton)
        for expected, actual in zip(clean, dirty, strict=True):
            if expected is not None:
                assert torch.equal(actual, expected) and actual[0].any() and not actual[1].any()
    for query in ("cls", "all"):
        expected, actual = (ck.ops.rank_tokens(q, x, query=query, size=size, backend=triton) for x in (k, dirty_k))
        assert torch.equal(actual, expected) and actual[0].any() and not actual[1].any()


def test_low_logits_do_not_vanish_beside_a_key_of_size_zero_in_the_kernel(device, triton, tiles):
    q, k, v = qkv(device, 1, 1, 70, 64)
    k = k - 400 * 8 * q[:, :, :1] / q[:, :, :1].square().sum()  # query 0 has logits of -400 nats
    k[:, :, [3, 69]] = 0
    size = torch.ones(1, 70, device=device)
    size[:, [3, 69]] = 0
    out, scores = ck.ops.attention(q, k, v, size, "cls", prefix=0, backend=triton)
    exact = full_attention(q, k, size)
    torch.testing.assert_close(scores.double(), exact[:, :, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out[:, :, 0].double(), (exact @ v.double())[:, :, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "width", "share"), [(197, 64, 0.73), (257, 64, 0.63), (577, 64, 0.88), (729, 72, 0.85), (729, 80, 0.94)]
)
def test_tiles_compute_few_products_in_vain(tokens, width, share):
    kernel = pytest.importorskip("clipkernels.kernels.attention", reason="triton is not installed")
    blocks = kernel.config(tokens, tokens, width, torch.bfloat16, None, True)
    rows = -(-tokens // blocks["BLOCK_M"]) * blocks["BLOCK_M"]
    keys = (tokens - 1) // blocks["BLOCK_N"] * blocks["BLOCK_N"] + blocks["TAIL"]
    products = rows * keys * (blocks["BLOCK_D"] + blocks["REST"])
    assert keys >= tokens and blocks["BLOCK_D"] + blocks["REST"] >= width
    assert round(tokens * tokens * width / products, 2) == share
