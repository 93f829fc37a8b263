"""attention and rank_tokens against the whole N×N attention in fp64."""

import pytest
import torch

import clipkernels as ck
from clipkernels.backend import interpreting
from clipkernels.testing import assert_within_budget, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDER = [torch.float32, torch.float16]  # than bfloat16
SLOW = pytest.mark.slow
ODD = [1, 2, 63, 65, 257, 577]  # below, at and above the tile sizes of every backend


def qkv(device, batch, heads, tokens, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, width, generator=generator).to(device, dtype) for _ in range(3)]


def whole(q, k, size=None):
    """The attention (B,H,N,N) in fp64."""
    logits = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    return torch.softmax(logits if size is None else logits + size.double().log()[:, None, None], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [pytest.param(n, marks=SLOW) if n == 577 else n for n in ODD])
def test_output_and_cls_signal_match_the_whole_attention(device, backend, tokens, dtype):
    q, k, v = qkv(device, 2, 3, tokens, 64, dtype)
    out, signal = ck.ops.attention(q, k, v, signal="cls", backend=backend)
    exact = whole(q, k)
    eager = (q @ k.mT / 8).softmax(-1)
    assert_within_budget(out, exact @ v.double(), eager @ v)
    assert signal.dtype == torch.float32
    assert_within_budget(signal, exact[:, :, 0, 1:], (q.float() @ k.float().mT / 8).softmax(-1)[:, :, 0, 1:])


def test_fp64_stays_fp64():
    q, k, v = qkv("cpu", 2, 3, 65, 64, torch.float64)
    out, signal = ck.ops.attention(q, k, v, signal="cls")
    torch.testing.assert_close(out, whole(q, k) @ v, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(signal, whole(q, k)[:, :, 0, 1:], atol=1e-14, rtol=1e-14)
    with pytest.raises(ValueError, match="takes float32, float16 or bfloat16, got float64"):
        ck.ops.attention(q, k, v, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 65, pytest.param(130, marks=SLOW), pytest.param(257, marks=SLOW)])
def test_received_signal_is_the_column_mean(device, backend, tokens, dtype):
    q, k, v = qkv(device, 2, 2, tokens, 64, dtype)
    _, signal = ck.ops.attention(q, k, v, signal="received", prefix=0, backend=backend)
    exact = whole(q, k).mean((1, 2))
    assert signal.dtype == torch.float32
    assert_within_budget(signal, exact, (q.float() @ k.float().mT / 8).softmax(-1).mean((1, 2)))


def test_keys_signal_is_the_head_mean_of_the_keys_in_their_dtype(device, backend):
    q, k, v = qkv(device, 2, 3, 17, 64, torch.bfloat16)
    _, signal = ck.ops.attention(q, k, v, signal="keys", backend=backend)
    assert signal.dtype == torch.bfloat16
    assert_within_budget(signal, k.double().mean(1), k.mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_weighs_a_key_like_that_many_copies_of_it(device, backend, dtype):
    q, k, v = qkv(device, 2, 2, 9, 64, dtype)
    size = torch.tensor([1.0, 3, 1, 2, 1, 1, 5, 1, 1], device=device).expand(2, -1)
    out, signal = ck.ops.attention(q, k, v, size=size, signal="cls", backend=backend)
    copies = size[0].long()
    many_k, many_v = (x.repeat_interleave(copies, 2) for x in (k, v))
    exact = whole(q, many_k)
    assert_within_budget(out, exact @ many_v.double(), (q @ many_k.mT / 8).softmax(-1) @ many_v)
    groups = torch.arange(9, device=device).repeat_interleave(copies)
    summed = torch.zeros(2, 2, 9, dtype=torch.float64, device=device).index_add_(2, groups, exact[:, :, 0])
    torch.testing.assert_close(signal.double(), summed[..., 1:], atol=1e-6, rtol=1e-5)


def test_fewer_query_rows_give_the_leading_rows_of_the_whole(device, backend):
    q, k, v = qkv(device, 2, 3, 50, 64)
    size = torch.rand(2, 50, generator=torch.Generator().manual_seed(2)).to(device) + 0.5
    whole_out, whole_signal = ck.ops.attention(q, k, v, size, "cls", backend=backend)
    out, signal = ck.ops.attention(q[:, :, :1], k, v, size, "cls", backend=backend)
    torch.testing.assert_close(out, whole_out[:, :, :1])
    torch.testing.assert_close(signal, whole_signal)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_prefix_gets_no_score_but_takes_part_in_the_softmax(device, backend, prefix):
    q, k, v = qkv(device, 1, 2, 12, 64)
    _, signal = ck.ops.attention(q, k, v, signal="cls", prefix=prefix, backend=backend)
    torch.testing.assert_close(signal.double(), whole(q, k)[:, :, 0, prefix:], atol=1e-6, rtol=1e-5)


def test_packed_views_need_no_copy_to_be_right(device, backend):
    packed = torch.randn(2, 17, 3 * 2 * 64, generator=torch.Generator().manual_seed(1)).to(device)
    q, k, v = packed.unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
    assert not q.is_contiguous()
    came = ck.ops.attention(q, k, v, signal="cls", backend=backend)
    expected = ck.ops.attention(q.contiguous(), k.contiguous(), v.contiguous(), signal="cls", backend=backend)
    torch.testing.assert_close(came, expected)
    gaps = [strided(x) for x in (q, k, v)]
    torch.testing.assert_close(ck.ops.attention(*gaps, signal="cls", backend=backend), expected)


def test_an_empty_batch_gives_empty_results(device, backend):
    q, k, v = qkv(device, 0, 2, 5, 64)
    out, signal = ck.ops.attention(q, k, v, signal="cls", backend=backend)
    assert out.shape == (0, 2, 5, 64) and signal.shape == (0, 2, 4)


def test_signals_carry_no_gradient_and_the_output_does(device, backend):
    q, k, v = (x.requires_grad_() for x in qkv(device, 1, 2, 5, 64))
    for signal in ("cls", "received", "keys"):
        out, scores = ck.ops.attention(q, k, v, signal=signal, backend=backend)
        assert out.requires_grad and not scores.requires_grad
    assert not ck.ops.rank_tokens(q, k, backend=backend).requires_grad


def test_rank_tokens_is_the_signal_reduced(device, backend):
    q, k, v = qkv(device, 2, 3, 33, 64)
    _, cls = ck.ops.attention(q, k, v, signal="cls", backend=backend)
    _, received = ck.ops.attention(q, k, v, signal="received", backend=backend)
    torch.testing.assert_close(ck.ops.rank_tokens(q, k, backend=backend), cls.mean(1))
    torch.testing.assert_close(ck.ops.rank_tokens(q, k, query="all", backend=backend), received)
    beaten = (cls[..., :, None] > cls[..., None, :]).sum(-1)
    assert torch.equal(ck.ops.rank_tokens(q, k, heads="rank", backend=backend), beaten.sum(1) / 3)


def test_of_two_equal_scores_the_lower_index_ranks_higher(device, backend):
    q, k, _ = (x.round() for x in qkv(device, 1, 2, 1, 64))  # integers, whose products are exact in any order
    k = k.expand(1, 2, 5, 64)
    assert ck.ops.rank_tokens(q, k, heads="rank", backend=backend).tolist() == [[3, 2, 1, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(2, 3, 8)}, r"q must be \(B,H,M,D\)"),
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
def test_bad_arguments_are_named(change, message):
    q, k, v = qkv("cpu", 2, 3, 8, 64)
    with pytest.raises(ValueError, match=message):
        ck.ops.attention(**{"q": q, "k": k, "v": v, **change})


def test_rank_over_all_queries_has_no_per_head_ranks():
    q, k, _ = qkv("cpu", 1, 1, 4, 64)
    with pytest.raises(ValueError, match='query="all" is a mean over heads'):
        ck.ops.rank_tokens(q, k, heads="rank", query="all")


def test_received_and_ranks_take_size_and_prefix_into_account(device, backend):
    q, k, v = qkv(device, 2, 3, 21, 64)
    size = torch.rand(2, 21, generator=torch.Generator().manual_seed(1)).to(device) * 5 + 1
    exact = whole(q, k, size)
    _, received = ck.ops.attention(q, k, v, size, "received", prefix=3, backend=backend)
    torch.testing.assert_close(received.double(), exact.mean((1, 2))[:, 3:], atol=1e-6, rtol=1e-5)
    every = ck.ops.rank_tokens(q, k, query="all", size=size, prefix=3, backend=backend)
    torch.testing.assert_close(every.double(), exact.mean((1, 2))[:, 3:], atol=1e-6, rtol=1e-5)
    first = ck.ops.rank_tokens(q, k, size=size, prefix=3, backend=backend)
    torch.testing.assert_close(first.double(), exact[:, :, 0, 3:].mean(1), atol=1e-6, rtol=1e-5)


def test_autocast_does_not_narrow_the_scores():
    q, k, v = qkv("cpu", 2, 4, 65, 64)
    expected = ck.ops.attention(q, k, v, signal="cls")[1]
    with torch.autocast("cpu", torch.bfloat16):
        came = ck.ops.attention(q, k, v, signal="cls")[1]
    assert torch.equal(came, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *(pytest.param(dtype, marks=SLOW) for dtype in WIDER)])
@pytest.mark.parametrize("width", [16, 64, 72, 80, 88, 96, 104, 112, 128])
def test_every_head_width_of_clip_towers_is_served(device, triton, width, dtype):
    q, k, v = qkv(device, 1, 2, 66, width, dtype)
    size = torch.arange(1.0, 67, device=device)[None]
    exact = whole(q, k, size)
    eager = (q @ k.mT * width**-0.5 + size.log()[:, None, None].to(dtype)).softmax(-1)
    narrow = (q.float() @ k.float().mT * width**-0.5 + size.log()[:, None, None]).softmax(-1)
    out, cls = ck.ops.attention(q, k, v, size, "cls", backend=triton)
    assert_within_budget(out, exact @ v.double(), eager @ v)
    assert_within_budget(cls, exact[:, :, 0, 1:], narrow[:, :, 0, 1:])
    out, received = ck.ops.attention(q, k, v, size, "received", backend=triton)
    assert_within_budget(out, exact @ v.double(), eager @ v)
    assert_within_budget(received, exact.mean((1, 2))[:, 1:], narrow.mean((1, 2))[:, 1:])


def test_wider_heads_take_the_reference(device):
    q, k, v = qkv(device, 1, 1, 5, 144)
    torch.testing.assert_close(ck.ops.attention(q, k, v)[0].double(), whole(q, k) @ v.double(), atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="attention at head width 144 has no Triton kernel"):
        ck.ops.attention(q, k, v, backend="triton")


@pytest.mark.parametrize("signal", [None, "cls", "received"])
def test_an_image_alone_gives_the_bits_it_gives_in_a_batch(device, triton, signal):
    q, k, v = qkv(device, 3, 2, 70, 64)
    size = torch.arange(1.0, 71, device=device).expand(3, -1)
    some = (slice(3), slice(2, 3), slice(3))
    results = [ck.ops.attention(q[b], k[b], v[b], size[b], signal, backend=triton) for b in some]
    for all_rows, one, again in zip(*results, strict=True):
        if all_rows is not None:
            assert torch.equal(all_rows[2:], one) and torch.equal(all_rows, again)


@pytest.mark.parametrize("signal", ["cls", "received"])
def test_a_nan_key_spoils_every_score_of_its_image_and_no_other(device, triton, signal):
    q, k, v = qkv(device, 2, 2, 40, 64)
    k[0, 1, 7, 3] = float("nan")
    out, scores = ck.ops.attention(q, k, v, signal=signal, backend=triton)
    exact_out, exact = ck.ops.attention(q, k, v, signal=signal, backend="reference")
    assert torch.equal(scores.isnan(), exact.isnan()) and torch.equal(out.isnan(), exact_out.isnan())
    torch.testing.assert_close(scores[1], exact[1])
    ranked = ck.ops.rank_tokens(q, k, query="all" if signal == "received" else "cls", backend=triton)
    assert ranked[0].isnan().all() and ranked[1].isfinite().all()


def test_a_key_of_size_zero_is_not_there(device, backend):
    q, k, v = qkv(device, 1, 2, 80, 64)
    size = torch.ones(1, 80, device=device)
    size[:, :70] = 0
    out, signal = ck.ops.attention(q, k, v, size, "cls", backend=backend)
    exact = whole(q, k[:, :, 70:])
    torch.testing.assert_close(out.double(), exact @ v[:, :, 70:].double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(signal[:, :, 69:].double(), exact[:, :, 0], atol=1e-6, rtol=1e-5)
    assert (signal[:, :, :69] == 0).all()


def test_auto_and_the_kernel_agree_on_scores_to_the_last_bits(device, triton, monkeypatch):
    # SDPA with a score kernel, the way of `auto` without sizes, against one fused launch.
    q, k, v = qkv(device, 2, 2, 70, 64)
    monkeypatch.setattr(ck.ops.tokens._backend, "choose", lambda *_: "triton")
    for signal in ("cls", "received", "keys"):
        apart, together = (ck.ops.attention(q, k, v, signal=signal, backend=name) for name in ("auto", triton))
        torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-5)


def test_with_a_gradient_wanted_the_output_comes_from_sdpa(device, triton):
    q, k, v = (x.requires_grad_() for x in qkv(device, 1, 2, 20, 64))
    out, _ = ck.ops.attention(q, k, v, signal="cls", backend=triton)
    came = torch.autograd.grad(out.square().sum(), (q, k, v))
    exact = torch.autograd.grad((whole(q, k) @ v.double()).square().sum(), (q, k, v))
    for gradient, right in zip(came, exact, strict=True):
        torch.testing.assert_close(gradient, right.to(gradient.dtype), atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="clipkernels::attention has no backward"):
        torch.ops.clipkernels.attention(q, k, v, None, "", 1)[0].sum().backward()


@pytest.mark.parametrize("signal", ["", "cls", pytest.param("received", marks=SLOW)])
@pytest.mark.parametrize("sized", [True, pytest.param(False, marks=SLOW)])
def test_the_operators_pass_opcheck(device, sized, signal):
    pytest.importorskip("triton")
    packed = torch.randn(2, 9, 3 * 2 * 16, generator=torch.Generator().manual_seed(5)).to(device, torch.bfloat16)
    q, k, v = packed.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    size = torch.ones(2, 9, device=device) if sized else None
    torch.library.opcheck(torch.ops.clipkernels.attention.default, (q, k, v, size, signal, 1))
    if signal:
        torch.library.opcheck(torch.ops.clipkernels.attention.default, (q, k, None, size, signal, 1))
    torch.library.opcheck(torch.ops.clipkernels.cls_scores.default, (q, k, size, 1))
    for heads, query in (("mean", "cls"), ("rank", "cls"), ("mean", "all")):
        torch.library.opcheck(torch.ops.clipkernels.rank_tokens.default, (q, k, size, heads, query, 1))


@pytest.mark.parametrize("signal", [None, "cls", "received", "keys"])
def test_attention_compiles_into_one_graph(device, signal):
    pytest.importorskip("triton")
    q, k, v = qkv(device, 2, 2, 17, 64)

    def attend(q, k, v, backend="triton"):
        out, scores = ck.ops.attention(q, k, v, signal=signal, backend=backend)
        ranks = ck.ops.rank_tokens(q, k, heads="rank", backend=backend)
        return out * 2, ranks, scores

    came = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(came, attend(q, k, v, "reference"), atol=1e-5, rtol=1e-5)


def test_the_kernels_read_through_strides_beyond_32_bits(tmp_path, triton):
    if not interpreting():
        pytest.skip("the sparse file is CPU memory, which kernels read under the interpreter alone")
    # A sparse file: 8 GiB of addresses, a few pages of disk. In units of 8 the stride itself fits 32 bits.
    stride = 2**31 + 16
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + 48, dtype=torch.float16)
    far = memory.as_strided((3, 1, 1, 3, 16), (16, 3 * stride, 48, stride, 1))
    far.copy_(torch.randn(3, 1, 1, 3, 16, generator=torch.Generator().manual_seed(4)))
    for signal in ("cls", "received"):
        came = ck.ops.attention(*far, signal=signal, backend=triton)
        torch.testing.assert_close(came, ck.ops.attention(*far.clone(), signal=signal, backend=triton), atol=0, rtol=0)
    assert torch.equal(
        ck.ops.rank_tokens(*far[:2], backend=triton), ck.ops.rank_tokens(*far[:2].clone(), backend=triton)
    )
