"""predict_scores: both backends against a predictor built of torch.nn modules, in fp64."""

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
from clipkernels.testing import assert_same, assert_within_budget, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Below, at and above a tile of tokens; multiples of 64 channels, none, and fewer.
SIZES = [(2, 128, 1), (2, 768, 0), (50, 100, 1), (65, 48, 0), (65, 128, 5), (50, 768, 1)]


def literal(x, mixer, prefix):
    """Scores in the dtype of the inputs, as one writes it with modules."""
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
    """Tokens and weights; every vector is random, so that none can be left out unnoticed."""
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
    came = ck.ops.predict_scores(x, mixer, prefix, backend=backend)
    assert came.dtype == torch.float32
    exact = literal(x.double(), double(mixer), prefix)
    assert_within_budget(came, exact, literal(x, mixer, prefix))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "prefix"), SIZES)
def test_scores_are_within_budget_of_fp64(device, backend, dtype, tokens, width, prefix):
    # A few scores of plain PyTorch may all be right by luck, which leaves no budget.
    check(*inputs(device, 16 if tokens < 5 else 1, tokens, width, dtype), prefix, backend)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "prefix"), [(197, 768, 1), (257, 1024, 1), (577, 1024, 1), (729, 1152, 0), (257, 1408, 1)]
)
def test_scores_are_within_budget_at_the_sizes_of_towers(device, backend, dtype, tokens, width, prefix):
    check(*inputs(device, 1, tokens, width, dtype), prefix, backend)


@pytest.mark.parametrize(("g", "ht", "hc"), [(16, 64, 128), (64, 16, 128), (32, 32, 256)])
def test_every_width_with_a_kernel_is_within_budget(device, backend, g, ht, hc):
    check(*inputs(device, 2, 33, 96, torch.bfloat16, g, ht, hc), 1, backend)


@pytest.mark.parametrize(("tokens", "width", "prefix"), [*SIZES, (197, 768, 1)])
def test_fp64_stays_fp64_and_the_kernel_refuses_it(tokens, width, prefix):
    x, mixer = inputs("cpu", 2, tokens, width, torch.float64)
    came = ck.ops.predict_scores(x, mixer, prefix)
    torch.testing.assert_close(came, literal(x, mixer, prefix), atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match=r"takes float32, float16 or bfloat16, got float64|triton is not installed"):
        ck.ops.predict_scores(x, mixer, prefix, backend="triton")


@pytest.mark.parametrize("width", [768, 128, 64, 100, 63, 48, 1])
def test_a_bin_is_the_mean_of_the_channels_that_it_covers(width):
    x = torch.randn(2, 3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bins = [x[..., g * width // 64 : math.ceil((g + 1) * width / 64)].mean(-1) for g in range(64)]
    torch.testing.assert_close(reference.pool_channels(x, 64), torch.stack(bins, -1), atol=1e-15, rtol=1e-15)


def test_the_predictor_of_a_b16_has_46246_parameters_and_7_million_products():
    x, mixer = inputs("cpu", 1, 197, 768)
    assert sum(weight.numel() for weight in mixer[:-1]) == 46_246
    with FlopCounterMode(display=False) as counter:
        ck.ops.predict_scores(x, mixer)
    products = 2 * 197 * 64 * 32 + 2 * 197 * 64 * 256
    assert counter.get_total_flops() in (2 * products, 2 * (products + 196 * 64))  # whether it counts the last one
    assert round((products + 196 * 64) / 1e6, 2) == 7.27


def test_without_mlps_the_scores_are_linear_in_the_means(device, backend):
    x, mixer = inputs(device, 2, 5, 128)
    zero = {name: torch.zeros_like(getattr(mixer, name)) for name in ("token_out_weight", "channel_out_weight")}
    biased = mixer._replace(**zero)
    p = x.unflatten(-1, (64, 2)).mean(-1) + mixer.token_out_bias[:, None] + mixer.channel_out_bias
    exact = (p * mixer.score_weight).sum(-1) + mixer.score_bias
    torch.testing.assert_close(ck.ops.predict_scores(x, biased, 0, backend=backend), exact, atol=1e-4, rtol=1e-5)


def test_the_prefix_is_mixed_in_but_gets_no_score(device, backend):
    x, mixer = inputs(device, 2, 9)
    every = ck.ops.predict_scores(x, mixer, 0, backend=backend)
    for prefix in (1, 5, 9):
        came = ck.ops.predict_scores(x, mixer, prefix, backend=backend)
        assert came.shape == (2, 9 - prefix)
        torch.testing.assert_close(came, every[:, prefix:])
    x[:, 0] += torch.linspace(-1, 1, 128, device=device)
    assert not torch.isclose(ck.ops.predict_scores(x, mixer, 1, backend=backend), every[:, 1:]).any()


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_an_image_alone_gives_the_bits_it_gives_in_a_batch(device, batch, triton):
    x, mixer = inputs(device, 3, 70, 96, torch.bfloat16)
    whole = ck.ops.predict_scores(x, mixer, backend=triton)
    part = ck.ops.predict_scores(x[3 - batch :], mixer, backend=triton)
    assert part.shape == (batch, 69) and torch.equal(part, whole[3 - batch :])
    assert torch.equal(ck.ops.predict_scores(x, mixer, backend=triton), whole)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_the_reference_serves_every_batch(batch):
    x, mixer = inputs("cpu", 3, 9, 100)
    came = ck.ops.predict_scores(x[:batch], mixer)
    assert came.shape == (batch, 8)
    torch.testing.assert_close(came, ck.ops.predict_scores(x, mixer)[:batch])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_give_the_same_result(device, backend, dtype):
    x, mixer = inputs(device, 2, 9, 128, dtype)
    expected = ck.ops.predict_scores(x, mixer, backend=backend)
    packed = torch.cat([x, torch.full_like(x, float("nan"))], 2)[..., :128]
    gaps = Mixer(*(torch.stack([w, w.roll(1, 0)], -1)[..., 0] for w in mixer[:-1]), mixer.eps)
    for given in (strided(x), packed, x.mT.contiguous().mT):
        torch.testing.assert_close(ck.ops.predict_scores(given, mixer, backend=backend), expected)
    torch.testing.assert_close(ck.ops.predict_scores(x, gaps, backend=backend), expected)
    same = ck.ops.predict_scores(x[:1].expand(3, -1, -1), mixer, backend=backend)
    assert_same(same, same[:1].expand(3, -1), backend)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_image_and_no_other(device, backend, wrong):
    x, mixer = inputs(device, 3, 70)
    clean = ck.ops.predict_scores(x, mixer, backend=backend)
    x[1, 69, 3] = wrong
    came = ck.ops.predict_scores(x, mixer, backend=backend)
    assert came[1].isnan().all()
    assert torch.equal(came[0], clean[0]) and torch.equal(came[2], clean[2])


def test_scores_that_are_no_numbers_still_prune_to_exactly_keep(device, backend):
    x, mixer = inputs(device)
    scores = ck.ops.predict_scores(x.fill_(float("nan")), mixer, backend=backend)
    assert ck.ops.prune_tokens(x, scores, 5, backend=backend).index.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_equal_patches_score_alike_where_the_tokens_are_not_told_apart(device, backend):
    x, mixer = inputs(device, 1, 40)
    x[:, 35] = x[:, 3]
    weight, bias = mixer.token_out_weight.clone(), mixer.token_out_bias.clone()
    weight[35], bias[35] = weight[3], bias[3]
    scores = ck.ops.predict_scores(x, mixer._replace(token_out_weight=weight, token_out_bias=bias), backend=backend)
    torch.testing.assert_close(scores[:, 34], scores[:, 2])
    assert scores.unique().numel() >= 38


def test_scores_are_detached_and_a_forward_for_training_runs(device, backend):
    x, mixer = inputs(device)
    expected = ck.ops.predict_scores(x, mixer, backend=backend)
    x.requires_grad_()
    learnt = Mixer(*(nn.Parameter(weight) for weight in mixer[:-1]), mixer.eps)
    scores = ck.ops.predict_scores(x * 1, learnt, backend=backend)
    assert not scores.requires_grad and torch.equal(scores, expected)
    kept = ck.ops.prune_tokens(x * 1, scores, 5, backend=backend)
    kept.tokens.sum().backward()
    assert x.grad.sum() == 2 * 6 * 128 and learnt.norm1_weight.grad is None


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
def test_widths_without_a_kernel_take_the_reference(device, widths):
    x, mixer = inputs(device, 2, 9, 128, torch.bfloat16, *widths)
    check(x, mixer, 1, "auto")
    named = f"predict_scores of widths {widths[0]}, {widths[1]} and {widths[2]} has no Triton kernel"
    with pytest.raises(RuntimeError, match=named):
        ck.ops.predict_scores(x, mixer, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_takes_the_kernel_for_halves_alone(dtype, monkeypatch):
    asked = []

    def choose(backend, device, dtype, op, kernel):
        asked.append(kernel)
        return "reference"

    monkeypatch.delenv("CLIPKERNELS_BACKEND", raising=False)
    monkeypatch.setattr(ck.ops.tokens._backend, "choose", choose)
    ck.ops.predict_scores(*inputs("cpu", dtype=dtype))
    ck.ops.predict_scores(*inputs("cpu", dtype=dtype), backend="triton")
    assert asked == [dtype != torch.float32, True]


def test_the_kernel_reads_through_strides_beyond_32_bits(tmp_path, triton):
    if not interpreting():
        pytest.skip("the sparse file is CPU memory, which kernels read under the interpreter alone")
    # A sparse file: 8 GiB of addresses, a few pages of disk.
    stride = 2**30 + 16
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + 64, dtype=torch.float16)
    x, mixer = inputs("cpu", 2, 3, 16, torch.float16)
    far = memory.as_strided((2, 3, 16), (16, stride, 1))
    far.copy_(x)
    assert torch.equal(
        ck.ops.predict_scores(far, mixer, backend=triton), ck.ops.predict_scores(x, mixer, backend=triton)
    )


def test_the_operator_passes_opcheck(device):
    pytest.importorskip("triton", reason="triton is not installed: it is on Linux alone")
    x, mixer = inputs(device, 2, 5, 32, torch.bfloat16)
    torch.library.opcheck(torch.ops.clipkernels.predict_scores.default, (x, list(mixer[:-1]), 1e-5, 1))


def test_the_operator_refuses_a_gradient(device, triton):
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
    for some in (3, 2):
        torch.testing.assert_close(compiled(x[:some]), run(x[:some]))


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
        ({"x": torch.randn(2, 17, 0)}, r"x must be \(B,N,C\) with N and C of at least 1, got \(2,17,0\)"),
        ({"x": torch.randn(2, 0, 128)}, r"with N and C of at least 1, got \(2,0,128\)"),
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
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
    ],
)
def test_bad_arguments_are_named_on_every_backend(backend, change, message):
    x, mixer = inputs("cpu")
    weights = {name: value for name, value in change.items() if name in Mixer._fields}
    given = {name: value for name, value in change.items() if name not in weights}
    with pytest.raises(ValueError, match=message):
        ck.ops.predict_scores(**{"x": x, "mixer": mixer._replace(**weights), **given}, backend=backend)
