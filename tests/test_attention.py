"""attention and rank_tokens against the whole N×N attention in fp64."""

import pytest
import torch

import clipkernels as ck
from clipkernels.testing import assert_within_budget, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ODD = [1, 2, 63, 65, 257, 577]  # below, at and above the tile sizes of every backend


def qkv(batch, heads, tokens, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, width, generator=generator).to(dtype) for _ in range(3)]


def whole(q, k, size=None):
    """The attention (B,H,N,N) in fp64."""
    logits = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    return torch.softmax(logits if size is None else logits + size.double().log()[:, None, None], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", ODD)
def test_output_and_cls_signal_match_the_whole_attention(tokens, dtype):
    q, k, v = qkv(2, 3, tokens, 64, dtype)
    out, signal = ck.ops.attention(q, k, v, signal="cls")
    exact = whole(q, k)
    eager = (q @ k.mT / 8).softmax(-1)
    assert_within_budget(out, exact @ v.double(), eager @ v)
    assert signal.dtype == torch.float32
    assert_within_budget(signal, exact[:, :, 0, 1:], (q.float() @ k.float().mT / 8).softmax(-1)[:, :, 0, 1:])


def test_fp64_stays_fp64():
    q, k, v = qkv(2, 3, 65, 64, torch.float64)
    out, signal = ck.ops.attention(q, k, v, signal="cls")
    torch.testing.assert_close(out, whole(q, k) @ v, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(signal, whole(q, k)[:, :, 0, 1:], atol=1e-14, rtol=1e-14)
    with pytest.raises(RuntimeError, match="attention has no Triton kernel"):
        ck.ops.attention(q, k, v, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 65, 130, 257])
def test_received_signal_is_the_column_mean(tokens, dtype):
    q, k, v = qkv(2, 2, tokens, 64, dtype)
    _, signal = ck.ops.attention(q, k, v, signal="received", prefix=0)
    exact = whole(q, k).mean((1, 2))
    assert signal.dtype == torch.float32
    assert_within_budget(signal, exact, (q.float() @ k.float().mT / 8).softmax(-1).mean((1, 2)))


def test_keys_signal_is_the_head_mean_of_the_keys_in_their_dtype():
    q, k, v = qkv(2, 3, 17, 64, torch.bfloat16)
    _, signal = ck.ops.attention(q, k, v, signal="keys")
    assert signal.dtype == torch.bfloat16
    assert_within_budget(signal, k.double().mean(1), k.mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_weighs_a_key_like_that_many_copies_of_it(dtype):
    q, k, v = qkv(2, 2, 9, 64, dtype)
    size = torch.tensor([1.0, 3, 1, 2, 1, 1, 5, 1, 1]).expand(2, -1)
    out, signal = ck.ops.attention(q, k, v, size=size, signal="cls")
    copies = size[0].long()
    many_k, many_v = (x.repeat_interleave(copies, 2) for x in (k, v))
    exact = whole(q, many_k)
    assert_within_budget(out, exact @ many_v.double(), (q @ many_k.mT / 8).softmax(-1) @ many_v)
    groups = torch.arange(9).repeat_interleave(copies)
    summed = torch.zeros(2, 2, 9, dtype=torch.float64).index_add_(2, groups, exact[:, :, 0])
    torch.testing.assert_close(signal.double(), summed[..., 1:], atol=1e-6, rtol=1e-5)


def test_fewer_query_rows_give_the_leading_rows_of_the_whole():
    q, k, v = qkv(2, 3, 50, 64)
    size = torch.rand(2, 50) + 0.5
    whole_out, whole_signal = ck.ops.attention(q, k, v, size, "cls")
    out, signal = ck.ops.attention(q[:, :, :1], k, v, size, "cls")
    torch.testing.assert_close(out, whole_out[:, :, :1])
    torch.testing.assert_close(signal, whole_signal)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_prefix_gets_no_score_but_takes_part_in_the_softmax(prefix):
    q, k, v = qkv(1, 2, 12, 64)
    _, signal = ck.ops.attention(q, k, v, signal="cls", prefix=prefix)
    torch.testing.assert_close(signal.double(), whole(q, k)[:, :, 0, prefix:], atol=1e-6, rtol=1e-5)


def test_packed_views_need_no_copy_to_be_right():
    packed = torch.randn(2, 17, 3 * 2 * 64, generator=torch.Generator().manual_seed(1))
    q, k, v = packed.unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
    assert not q.is_contiguous()
    came = ck.ops.attention(q, k, v, signal="cls")
    expected = ck.ops.attention(q.contiguous(), k.contiguous(), v.contiguous(), signal="cls")
    torch.testing.assert_close(came, expected)
    gaps = [strided(x) for x in (q, k, v)]
    torch.testing.assert_close(ck.ops.attention(*gaps, signal="cls"), expected)


def test_an_empty_batch_gives_empty_results():
    q, k, v = qkv(0, 2, 5, 64)
    out, signal = ck.ops.attention(q, k, v, signal="cls")
    assert out.shape == (0, 2, 5, 64) and signal.shape == (0, 2, 4)


def test_signals_carry_no_gradient_and_the_output_does():
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 5, 64))
    for signal in ("cls", "received", "keys"):
        out, scores = ck.ops.attention(q, k, v, signal=signal)
        assert out.requires_grad and not scores.requires_grad
    assert not ck.ops.rank_tokens(q, k).requires_grad


def test_rank_tokens_is_the_signal_reduced():
    q, k, v = qkv(2, 3, 33, 64)
    _, cls = ck.ops.attention(q, k, v, signal="cls")
    _, received = ck.ops.attention(q, k, v, signal="received")
    torch.testing.assert_close(ck.ops.rank_tokens(q, k), cls.mean(1))
    torch.testing.assert_close(ck.ops.rank_tokens(q, k, query="all"), received)
    beaten = (cls[..., :, None] > cls[..., None, :]).sum(-1)
    assert torch.equal(ck.ops.rank_tokens(q, k, heads="rank"), beaten.sum(1) / 3)


def test_of_two_equal_scores_the_lower_index_ranks_higher():
    q, k, _ = qkv(1, 2, 1, 64)
    k = k.expand(1, 2, 5, 64)
    assert ck.ops.rank_tokens(q, k, heads="rank").tolist() == [[3, 2, 1, 0]]


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
    q, k, v = qkv(2, 3, 8, 64)
    with pytest.raises(ValueError, match=message):
        ck.ops.attention(**{"q": q, "k": k, "v": v, **change})


def test_rank_over_all_queries_has_no_per_head_ranks():
    q, k, _ = qkv(1, 1, 4, 64)
    with pytest.raises(ValueError, match='query="all" is a mean over heads'):
        ck.ops.rank_tokens(q, k, heads="rank", query="all")


def test_received_and_ranks_take_size_and_prefix_into_account():
    q, k, v = qkv(2, 3, 21, 64)
    size = torch.rand(2, 21, generator=torch.Generator().manual_seed(1)) * 5 + 1
    exact = whole(q, k, size)
    _, received = ck.ops.attention(q, k, v, size, "received", prefix=3)
    torch.testing.assert_close(received.double(), exact.mean((1, 2))[:, 3:], atol=1e-6, rtol=1e-5)
    every = ck.ops.rank_tokens(q, k, query="all", size=size, prefix=3)
    torch.testing.assert_close(every.double(), exact.mean((1, 2))[:, 3:], atol=1e-6, rtol=1e-5)
    first = ck.ops.rank_tokens(q, k, size=size, prefix=3)
    torch.testing.assert_close(first.double(), exact[:, :, 0, 3:].mean(1), atol=1e-6, rtol=1e-5)


def test_autocast_does_not_narrow_the_scores():
    q, k, v = qkv(2, 4, 65, 64)
    expected = ck.ops.attention(q, k, v, signal="cls")[1]
    with torch.autocast("cpu", torch.bfloat16):
        came = ck.ops.attention(q, k, v, signal="cls")[1]
    assert torch.equal(came, expected)
