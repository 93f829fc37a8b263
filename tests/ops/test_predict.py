"""predict_scores on both backends, compared with a predictor of torch.nn modules in fp64."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool1d, gelu
from torch.utils.flop_counter import FlopCounterMode

import clipkernels as ck
from clipkernels import reference
from clipkernels.backend import interpreting
from clipkernels.ops import Mixer
from clipkernels.testing import assert_same, assert_within_budget, with_gaps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Tokens below, at and above a tile. Channel counts: a multiple of 64, not a multiple, below 64.
SIZES = [(2, 128, 1), (2, 768, 0), (50, 100, 1), (65, 48, 0), (65, 128, 5), (50, 768, 1)]


def naive(x, mixer, prefix):
    """Return scores by torch.nn modules, in the dtype of the inputs."""
    g, (ht, n), hc = len(mixer.norm1_weight), mixer.token_in_weight.shape, len(mixer.channel_in_bias)
    parts = {"norm1": nn.LayerNorm(g, mixer.eps), "token_in": nn.Linear(n, ht), "token_out": nn.Linear(ht, n)}
    parts |= {"norm2": nn.LayerNorm(g, mixer.eps), "channel_in": nn.Linear(g, hc), "channel_out": nn.Linear(hc, g)}
    net = nn.ModuleDict({**parts, "score": nn.Linear(g, 1)}).to(x.device, x.dtype)
    weights = {name.replace("_weight", ".weight").replace("_bias", ".bias"): w for name, w in mixer._asdict().items()}
    del weights["eps"]
    net.load_state_dict({**weights, "score.weight": mixer.score_weight[None]})
    with torch.no_grad():
        p = adaptive_avg_pool1d(x, g)
        p = p + net["token_out"](gelu(net["token_in"](net["norm1"](p).mT))).mT
        p = p + net["channel_out"](gelu(net["channel_in"](net["norm2"](p))))
        return net["score"](p[:, prefix:])[..., 0]


def inputs(device, batch=2, tokens=17, width=128, dtype=torch.float32, g=64, ht=32, hc=256, seed=0):
    """Return tokens and weights. Every vector is random, which reveals an implementation that leaves one out."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def linear(rows, columns):
        return normal(rows, columns) * columns**-0.5, normal(rows)

    x = normal(batch, tokens, width)
    mlps = (*linear(ht, tokens), *linear(tokens, ht)), (*linear(hc, g), *linear(g, hc))
    norms = [(1 + 0.3 * normal(g), normal(g)) for _ in range(2)]
    weights = (*norms[0], *mlps[0], *norms[1], *mlps[1], normal(g), normal(1))
    return x.to(device, dtype), Mixer(*(weight.to(device, dtype) for weight in weights))


def double(mixer):
    return Mixer(*(weight.double() for weight in mixer[:-1]), mixer.eps)


def check(x, mixer, prefix, backend):
    actual = ck.ops.predict_scores(x, mixer, prefix, backend=backend)
    assert actual.dtype == torch.float32
    exact = naive(x.double(), double(mixer), prefix)
    assert_within_budget(actual, exact, naive(x, mixer, prefix))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "prefix"), SIZES)
def test_scores_are_within_budget_of_fp64(device, backend, dtype, tokens, width, prefix):
    # With few scores plain PyTorch may happen to be exact, and the budget would be zero.
    check(*inputs(device, 16 if tokens < 5 else 1, tokens, width, dtype), prefix, backend)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "prefix"), [(197, 768, 1), (257, 1024, 1), (577, 1024, 1), (729, 1152, 0), (257, 1408, 1)]
)
def test_scores_are_within_budget_at_tower_sizes(device, backend, dtype, tokens, width, prefix):
    check(*inputs(device, 1, tokens, width, dtype), prefix, backend)


@pytest.mark.parametrize(("g", "ht", "hc"), [(16, 64, 128), (64, 16, 128), (32, 32, 256)])
def test_every_width_with_a_kernel_is_within_budget(device, backend, g, ht, hc):
    check(*inputs(device, 2, 33, 96, torch.bfloat16, g, ht, hc), 1, backend)


@pytest.mark.parametrize(("tokens", "width", "prefix"), [*SIZES, (197, 768, 1)])
def test_fp64_stays_fp64_and_the_kernel_raises(tokens, width, prefix):
    x, mixer = inputs("cpu", 2, tokens, width, torch.float64)
    actual = ck.ops.predict_scores(x, mixer, prefix)
    torch.testing.assert_close(actual, naive(x, mixer, prefix), atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match=r"takes float32, float16 or bfloat16, got float64|triton is not installed"):
        ck.ops.predict_scores(x, mixer, prefix, backend="triton")


@pytest.mark.parametrize("width", [768, 128, 64, 100, 63, 48, 1])
def test_a_bin_is_the_mean_of_its_channels(width):
    x = torch.randn(2, 3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bins = [x[..., g * width // 64 : math.ceil((g + 1) * width / 64)].mean(-1) for g in range(64)]
    torch.testing.assert_close(reference.pool_channels(x, 64), torch.stack(bins, -1), atol=1e-15, rtol=1e-15)


def test_a_b16_predictor_has_46246_weights_and_7m_products():
    x, mixer = inputs("cpu", 1, 197, 768)
    assert sum(weight.numel() for weight in mixer[:-1]) == 46_246
    with FlopCounterMode(display=False) as counter:
        ck.ops.predict_scores(x, mixer)
    products = 2 * 197 * 64 * 32 + 2 * 197 * 64 * 256
    # Some versions of torch count the last product.
    assert counter.get_total_flops() in (2 * products, 2 * (products + 196 * 64))
    assert round((products + 196 * 64) / 1e6, 2) == 7.27


def test_scores_without_mlps_are_linear_in_the_means(device, backend):
    x, mixer = inputs(device, 2, 5, 128)
    zero = {name: torch.zeros_like(getattr(mixer, name)) for name in ("token_out_weight", "channel_out_weight")}
    biased = mixer._replace(**zero)
    p = x.unflatten(-1, (64, 2)).mean(-1) + mixer.token_out_bias[:, None] + mixer.channel_out_bias
    exact = (p * mixer.score_weight).sum(-1) + mixer.score_bias
    torch.testing.assert_close(ck.ops.predict_scores(x, biased, 0, backend=backend), exact, atol=1e-4, rtol=1e-5)


def test_the_prefix_is_mixed_but_has_no_score(device, backend):
    x, mixer = inputs(device, 2, 9)
    all_scores = ck.ops.predict_scores(x, mixer, 0, backend=backend)
    for prefix in (1, 5, 9):
        actual = ck.ops.predict_scores(x, mixer, prefix, backend=backend)
        assert actual.shape == (2, 9 - prefix)
        torch.testing.assert_close(actual, all_scores[:, prefix:])
    x[:, 0] += torch.linspace(-1, 1, 128, device=device)
    assert not torch.isclose(ck.ops.predict_scores(x, mixer, 1, backend=backend), all_scores[:, 1:]).any()


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_an_image_has_the_same_bits_alone_and_in_a_batch(device, batch, triton):
    x, mixer = inputs(device, 3, 70, 96, torch.bfloat16)
    expected = ck.ops.predict_scores(x, mixer, backend=triton)
    part = ck.ops.predict_scores(x[3 - batch :], mixer, backend=triton)
    assert part.shape == (batch, 69) and torch.equal(part, expected[3 - batch :])
    assert torch.equal(ck.ops.predict_scores(x, mixer, backend=triton), expected)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_the_reference_takes_any_batch_size(batch):
    x, mixer = inputs("cpu", 3, 9, 100)
    actual = ck.ops.predict_scores(x[:batch], mixer)
    assert actual.shape == (batch, 8)
    torch.testing.assert_close(actual, ck.ops.predict_scores(x, mixer)[:batch])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_give_the_same_result(device, backend, dtype):
    x, mixer = inputs(device, 2, 9, 128, dtype)
    expected = ck.ops.predict_scores(x, mixer, backend=backend)
    packed = torch.cat([x, torch.full_like(x, float("nan"))], 2)[..., :128]
    strided_mixer = Mixer(*(torch.stack([w, w.roll(1, 0)], -1)[..., 0] for w in mixer[:-1]), mixer.eps)
    for view in (with_gaps(x), packed, x.mT.contiguous().mT):
        torch.testing.assert_close(ck.ops.predict_scores(view, mixer, backend=backend), expected)
    torch.testing.assert_close(ck.ops.predict_scores(x, strided_mixer, backend=backend), expected)
    same = ck.ops.predict_scores(x[:1].expand(3, -1, -1), mixer, backend=backend)
    assert_same(same, same[:1].expand(3, -1), backend)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_spoils_only_its_image(device, backend, value):
    x, mixer = inputs(device, 3, 70)
    clean = ck.ops.predict_scores(x, mixer, backend=backend)
    x[1, 69, 3] = value
    actual = ck.ops.predict_scores(x, mixer, backend=backend)
    assert actual[1].isnan().all()
    assert torch.equal(actual[0], clean[0]) and torch.equal(actual[2], clean[2])


def test_nan_scores_still_keep_the_exact_count(device, backend):
    x, mixer = inputs(device)
    scores = ck.ops.predict_scores(x.fill_(float("nan")), mixer, backend=backend)
    assert ck.ops.prune_tokens(x, scores, 5, backend=backend).index.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_equal_patches_with_equal_weights_have_equal_scores(device, backend):
    x, mixer = inputs(device, 1, 40)
    x[:, 35] = x[:, 3]
    weight, bias = mixer.token_out_weight.clone(), mixer.token_out_bias.clone()
    weight[35], bias[35] = weight[3], bias[3]
    scores = ck.ops.predict_scores(x, mixer._replace(token_out_weight=weight, token_out_bias=bias), backend=backend)
    torch.testing.assert_close(scores[:, 34], scores[:, 2])
    assert scores.unique().numel() >= 38


def test_scores_are_detached_and_training_through_tokens_works(device, backend):
    x, mixer = inputs(device)
    expected = ck.ops.predict_scores(x, mixer, backend=backend)
    x.requires_grad_()
    trainable = Mixer(*(nn.Parameter(weight) for weight in mixer[:-1]), mixer.eps)
    scores = ck.ops.predict_scores(x * 1, trainable, backend=backend)
    assert not scores.requires_grad and torch.equal(scores, expected)
    pruned = ck.ops.prune_tokens(x * 1, scores, 5, backend=backend)
    pruned.tokens.sum().backward()
    assert x.grad.sum() == 2 * 6 * 128 and trainable.norm1_weight.grad is None


def test_mix_has_the_gradients_of_the_formula():
    x, mixer = inputs("cpu", 2, 4, 12, torch.float64, 3, 2, 5)
    pooled = reference.pool_channels(x, 3).requires_grad_()
    weights = [weight.requires_grad_() for weight in mixer[:-1]]
    assert torch.autograd.gradcheck(lambda pooled, *w: reference.mix(pooled, Mixer(*w), 1), (pooled, *weights))
    torch.testing.assert_close(reference.mix(pooled, mixer, 1).detach(), ck.ops.predict_scores(x, mixer))


def test_autocast_does_not_narrow_the_scores():
    x, mixer = inputs("cpu")
    expected = ck.ops.predict_scores(x, mixer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ck.ops.predict_scores(x, mixer), expected)


@pytest.mark.parametrize("widths", [(8, 32, 64), (64, 128, 64), (48, 32, 64), (64, 32, 96), (64, 32, 8)])
def test_widths_without_a_kernel_run_on_the_reference(device, widths):
    x, mixer = inputs(device, 2, 9, 128, torch.bfloat16, *widths)
    check(x, mixer, 1, "auto")
    message = f"a larger power of two, got {widths[0]}, {widths[1]} and {widths[2]}: use auto or reference"
    with pytest.raises(RuntimeError, match=message):
        ck.ops.predict_scores(x, mixer, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_uses_the_kernel_in_half_precision_only(dtype, monkeypatch):
    kernel_allowed = []

    def choose(backend, device, dtype, op, refusal):
        kernel_allowed.append(refusal is None)
        return "reference"

    monkeypatch.delenv("CLIPKERNELS_BACKEND", raising=False)
    monkeypatch.setattr(ck.backend, "choose", choose)
    ck.ops.predict_scores(*inputs("cpu", dtype=dtype))
    ck.ops.predict_scores(*inputs("cpu", dtype=dtype), backend="triton")
    assert kernel_allowed == [dtype != torch.float32, True]


def test_the_kernel_supports_strides_beyond_32_bits(tmp_path, triton):
    if not interpreting():
        pytest.skip("the sparse file is CPU memory, which only interpreted kernels can read")
    # A sparse file: 8 GiB of addresses, a few pages of disk.
    stride = 2**30 + 16
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + 64, dtype=torch.float16)
    x, mixer = inputs("cpu", 2, 3, 16, torch.float16)
    strided = memory.as_strided((2, 3, 16), (16, stride, 1))
    strided.copy_(x)
    assert torch.equal(
        ck.ops.predict_scores(strided, mixer, backend=triton), ck.ops.predict_scores(x, mixer, backend=triton)
    )


def test_the_operator_passes_opcheck(device):
    pytest.importorskip("triton", reason="triton is not installed: it exists only on Linux")
    x, mixer = inputs(device, 2, 5, 32, torch.bfloat16)
    torch.library.opcheck(torch.ops.clipkernels.predict_scores.default, (x, list(mixer[:-1]), 1e-5, 1))


def test_the_operator_raises_for_a_gradient(device, triton):
    x, mixer = inputs(device, 2, 5, 32)
    with pytest.raises(RuntimeError, match="clipkernels::predict_scores has no backward: detach its inputs"):
        torch.ops.clipkernels.predict_scores(x.requires_grad_(), list(mixer[:-1]), 1e-5, 1).sum().backward()


@pytest.mark.parametrize("grad", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_scoring_and_pruning_compile_into_one_graph(device, backend, grad):
    x, mixer = inputs(device, 3, 9, 64, torch.bfloat16)
    x.requires_grad_(grad)

    def run(x):
        scores = ck.ops.predict_scores(x, mixer, backend=backend)
        return scores * 2, ck.ops.prune_tokens(x, scores, 3, backend=backend).tokens

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 2):
        torch.testing.assert_close(compiled(x[:batch]), run(x[:batch]))


def test_an_exported_reference_takes_any_batch():
    x, mixer = inputs("cpu", 3, 9, 128)

    class Score(nn.Module):
        def forward(self, x):
            return ck.ops.predict_scores(x, mixer)

    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(Score(), (x[:2],), dynamic_shapes=shapes, strict=False)
    torch.testing.assert_close(program.module()(x), ck.ops.predict_scores(x, mixer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(17, 128)}, r"x must be \(B,N,C\), got \(17,128\)"),
        ({"x": torch.randn(2, 17, 0)}, r"x must be \(B,N,C\) with C of at least 1, got \(2,17,0\)"),
        ({"x": torch.randn(2, 0, 128)}, r"with N of at least 1, got \(2,0,128\)"),
        ({"x": torch.ones(2, 17, 128, dtype=torch.int64)}, "x must be float32, float16, bfloat16 or float64"),
        ({"x": torch.randn(2, 50, 128)}, r"token_in_weight must be \(Ht,N\) = \(32,50\), got \(32,17\)"),
        ({"x": torch.randn(2, 17, 128).half()}, "norm1_weight must be torch.float16 on cpu, got torch.float32 on cpu"),
        ({"prefix": 18}, "prefix must be an int from 0 to N = 17, got 18"),
        ({"prefix": True}, "prefix must be an int from 0 to N = 17, got True"),
        ({"norm1_weight": torch.ones(1, 64)}, r"norm1_weight must be \(G,\) with G of at least 1, got \(1,64\)"),
        ({"norm1_weight": torch.ones(0)}, r"norm1_weight must be \(G,\) with G of at least 1, got \(0\)"),
        ({"norm1_bias": torch.ones(63)}, r"norm1_bias must be \(G,\) = \(64\), got \(63\)"),
        ({"token_in_weight": torch.ones(32, 50)}, r"token_in_weight must be \(Ht,N\) = \(32,17\), got \(32,50\)"),
        ({"token_in_bias": torch.ones(0)}, r"token_in_bias must be \(Ht,\) with Ht of at least 1, got \(0\)"),
        ({"token_out_weight": torch.ones(32, 17)}, r"token_out_weight must be \(N,Ht\) = \(17,32\), got \(32,17\)"),
        ({"token_out_bias": torch.ones(16)}, r"token_out_bias must be \(N,\) = \(17\), got \(16\)"),
        ({"norm2_weight": torch.ones(32)}, r"norm2_weight must be \(G,\) = \(64\), got \(32\)"),
        ({"norm2_bias": torch.ones(64).half()}, "norm2_bias must be torch.float32 on cpu, got torch.float16 on cpu"),
        (
            {"channel_in_weight": torch.ones(64, 256)},
            r"channel_in_weight must be \(Hc,G\) = \(256,64\), got \(64,256\)",
        ),
        ({"channel_in_bias": torch.ones(2, 2)}, r"channel_in_bias must be \(Hc,\) with Hc of at least 1, got \(2,2\)"),
        ({"channel_out_weight": torch.ones(64, 8)}, r"channel_out_weight must be \(G,Hc\) = \(64,256\), got \(64,8\)"),
        ({"channel_out_bias": torch.ones(256)}, r"channel_out_bias must be \(G,\) = \(64\), got \(256\)"),
        ({"score_weight": torch.ones(1, 64)}, r"score_weight must be \(G,\) = \(64\), got \(1,64\)"),
        ({"score_bias": torch.tensor(0.5)}, r"score_bias must be \(1,\) = \(1\), got \(\)"),
        ({"eps": 0.0}, "eps must be a positive number, got 0.0"),
    ],
)
def test_errors_name_the_bad_argument_on_every_backend(backend, change, message):
    x, mixer = inputs("cpu")
    weights = {name: value for name, value in change.items() if name in Mixer._fields}
    others = {name: value for name, value in change.items() if name not in weights}
    with pytest.raises(ValueError, match=message):
        ck.ops.predict_scores(**{"x": x, "mixer": mixer._replace(**weights), **others}, backend=backend)
