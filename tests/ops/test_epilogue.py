"""bias_act and add_norm on both backends, compared with their formulas in fp64."""

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

import clipkernels as ck
from clipkernels.testing import assert_within_budget, with_gaps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTS = {
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "gelu": gelu,
    "gelu_tanh": lambda z: gelu(z, approximate="tanh"),
}


def normal(device, *shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 24), (2, 63, 40), (1, 2, 1100), (2, 257)])
@pytest.mark.parametrize("act", ACTS)
def test_bias_act_matches_the_formula(device, backend, act, shape, dtype):
    x, bias = 3 * normal(device, *shape, dtype=dtype), normal(device, shape[-1], seed=1, dtype=dtype)
    actual = ck.ops.bias_act(x, bias, act, backend=backend)
    assert actual.dtype == dtype
    assert_within_budget(actual, ACTS[act](x.double() + bias.double()), ACTS[act](x + bias))
    assert_within_budget(ck.ops.bias_act(x, None, act, backend=backend), ACTS[act](x.double()), ACTS[act](x))


@pytest.mark.parametrize("act", ACTS)
def test_activations_are_exact_far_from_zero(device, backend, act):
    x = torch.tensor([[-1e4, -60.0, 0.0, 60.0, 1e4, float("nan")]], device=device)
    actual = ck.ops.bias_act(x, None, act, backend=backend)[0]
    assert actual[:5].tolist() == [0, 0, 0, 60, 1e4]
    assert actual[5].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 24), (2, 63, 40), (1, 2, 1100), (2, 257)])
def test_add_norm_matches_the_formula(device, backend, shape, wide, dtype):
    x, y = normal(device, *shape, dtype=dtype), normal(device, *shape, seed=1, dtype=dtype)
    # open_clip's LayerNormFp32 has fp32 weights for half-precision tokens.
    bias, scale, weight, shift = normal(device, 4, shape[-1], seed=2, dtype=torch.float32 if wide else dtype)
    actual = ck.ops.add_norm(x, y, bias, scale, (weight, shift, 1e-5), backend=backend)
    exact = x.double() + scale.double() * (y.double() + bias.double())
    assert actual.tokens.dtype == actual.normed.dtype == dtype
    assert_within_budget(actual.tokens, exact, x + (scale * (y + bias)).to(dtype))
    stored = actual.tokens.double()
    exact = layer_norm(stored, shape[-1:], weight.double(), shift.double(), 1e-5)
    eager = layer_norm(actual.tokens, shape[-1:], weight.to(dtype), shift.to(dtype), 1e-5)
    assert_within_budget(actual.normed, exact, eager)


def test_optional_terms_may_be_omitted(device, backend):
    x, y = normal(device, 2, 9, 24), normal(device, 2, 9, 24, seed=1)
    added = ck.ops.add_norm(x, y, backend=backend)
    assert torch.equal(added.tokens, x + y) and added.normed is None
    zero, one = torch.zeros(24, device=device), torch.ones(24, device=device)
    assert torch.equal(ck.ops.add_norm(x, y, zero, one, backend=backend).tokens, x + y)


def test_a_sum_of_two_dtypes_has_the_wider_one(device, backend):
    x, y = normal(device, 2, 9, 24), normal(device, 2, 9, 24, seed=1, dtype=torch.bfloat16)
    weight, shift = normal(device, 2, 24, seed=2)
    for stream, branch in ((x, y), (y, x)):
        actual = ck.ops.add_norm(stream, branch, norm=(weight, shift, 1e-5), backend=backend)
        assert actual.tokens.dtype == actual.normed.dtype == torch.float32
        assert torch.equal(actual.tokens, x + y)


def test_a_single_row_has_a_gradient(device, backend):
    x, bias = normal(device, 24).requires_grad_(), normal(device, 24, seed=1).requires_grad_()
    added = ck.ops.add_norm(x, x, bias, None, (bias, bias, 1e-5), backend=backend)
    loss = added.normed.square().sum() + ck.ops.bias_act(x, bias, "gelu", backend=backend).sum()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (x, bias)))


def test_torch_func_raises_on_kernels_and_runs_on_the_reference(device, triton):
    x = normal(device, 3, 24)
    with pytest.raises(RuntimeError, match=r"no forward-mode gradients and no torch\.func transforms"):
        torch.func.jvp(lambda x: ck.ops.bias_act(x, None, "gelu", backend=triton), (x,), (torch.ones_like(x),))
    _, tangent = torch.func.jvp(lambda x: ck.ops.bias_act(x, None, "gelu"), (x,), (torch.ones_like(x),))
    exact = torch.func.grad(lambda x: gelu(x).sum())(x)
    torch.testing.assert_close(tangent, exact)


def test_a_constant_row_normalises_to_the_shift(device, backend):
    x = torch.full((1, 2, 33), 5.0, device=device)
    weight, shift = normal(device, 2, 33)
    normed = ck.ops.add_norm(x, torch.zeros_like(x), norm=(weight, shift, 1e-5), backend=backend).normed
    torch.testing.assert_close(normed, shift.expand_as(x), atol=1e-5, rtol=1e-5)


def test_any_strides_and_empty_inputs_work(device, backend):
    x, y = normal(device, 2, 9, 24), normal(device, 2, 9, 24, seed=1)
    bias = normal(device, 24, 2)[:, 0]
    norm = (normal(device, 24, 2, seed=3)[:, 1], bias, 1e-5)
    expected = ck.ops.add_norm(x, y, bias.clone(), None, norm, backend=backend)
    actual = ck.ops.add_norm(with_gaps(x), with_gaps(y), bias, None, norm, backend=backend)
    assert torch.equal(actual.tokens, expected.tokens) and torch.equal(actual.normed, expected.normed)
    activated = ck.ops.bias_act(with_gaps(x), bias, "quick_gelu", backend=backend)
    assert torch.equal(activated, ck.ops.bias_act(x, bias.clone(), "quick_gelu", backend=backend))
    empty = ck.ops.add_norm(x[:0], y[:0], norm=norm, backend=backend)
    assert empty.tokens.shape == empty.normed.shape == (0, 9, 24)
    assert ck.ops.bias_act(x[:, :0], bias, "gelu", backend=backend).shape == (2, 0, 24)


def test_a_row_has_the_same_bits_alone_and_in_a_batch(device, triton):
    x, y = normal(device, 13, 48), normal(device, 13, 48, seed=1)
    norm = (x[0], y[0], 1e-5)
    batch_result, rerun_result = (ck.ops.add_norm(x, y, norm=norm, backend=triton) for _ in range(2))
    row_result = ck.ops.add_norm(x[5:6], y[5:6], norm=norm, backend=triton)
    for rows, row, rerun in zip(batch_result, row_result, rerun_result, strict=True):
        assert torch.equal(rows[5:6], row) and torch.equal(rows, rerun)
    activated = ck.ops.bias_act(x, y[0], "gelu", backend=triton)
    assert torch.equal(activated[5:6], ck.ops.bias_act(x[5:6], y[0], "gelu", backend=triton))


@pytest.mark.parametrize("act", ACTS)
def test_the_activation_kernel_has_the_gradients_of_the_reference(device, triton, act):
    x, bias = (3 * normal(device, 2, 9, 24)).requires_grad_(), normal(device, 24, seed=1).requires_grad_()
    weights = torch.linspace(-1, 1, 24, device=device)
    reference, kernel = (
        torch.autograd.grad((ck.ops.bias_act(x, bias, act, backend=name) * weights).sum(), (x, bias))
        for name in ("reference", triton)
    )
    torch.testing.assert_close(kernel, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_the_sum_kernel_has_the_gradients_of_the_reference(device, triton, normed, vectors):
    x, y = (normal(device, 2, 9, 24, seed=seed).requires_grad_() for seed in (0, 1))
    bias, scale, weight, shift = (v.requires_grad_() for v in normal(device, 4, 24, seed=2).unbind())
    grads = []
    for name in ("reference", triton):
        pair = (bias, scale) if vectors else (None, None)
        added = ck.ops.add_norm(x, y, *pair, (weight, shift, 1e-5) if normed else None, backend=name)
        loss = (added.tokens * torch.linspace(-1, 1, 24, device=device)).sum()
        if normed:
            loss = loss + (added.normed * torch.linspace(2, -1, 24, device=device)).sum()
        inputs = (x, y, bias, scale, weight, shift)
        grads.append(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
    for reference, kernel in zip(*grads, strict=True):
        torch.testing.assert_close(kernel, reference, atol=1e-4, rtol=1e-4)


def test_the_references_pass_gradcheck_in_double():
    x, y = (normal("cpu", 2, 3, 5, seed=seed, dtype=torch.float64).requires_grad_() for seed in (0, 1))
    vectors = [v.requires_grad_() for v in normal("cpu", 4, 5, seed=2, dtype=torch.float64).unbind()]
    assert torch.autograd.gradcheck(
        lambda x, y, b, s, w, h: tuple(ck.ops.add_norm(x, y, b, s, (w, h, 1e-5))), (x, y, *vectors)
    )
    for act in ACTS:
        assert torch.autograd.gradcheck(lambda x, b, act=act: ck.ops.bias_act(x, b, act), (x, vectors[0]))


@pytest.mark.parametrize("vectors", [False, True])
def test_the_operators_pass_opcheck(device, vectors):
    pytest.importorskip("triton")
    x, y = (normal(device, 2, 9, 16, seed=seed).requires_grad_() for seed in (0, 1))
    vector = normal(device, 16, seed=2).requires_grad_() if vectors else None
    torch.library.opcheck(torch.ops.clipkernels.bias_act.default, (x, vector, "gelu"))
    torch.library.opcheck(torch.ops.clipkernels.add_norm.default, (x, y, vector, vector, vector, vector, 1e-5))


def test_epilogues_compile_into_one_graph(device):
    pytest.importorskip("triton")
    x, y = normal(device, 2, 9, 24), normal(device, 2, 9, 24, seed=1)

    def run(x, y, backend="triton"):
        added = ck.ops.add_norm(x, y, norm=(x[0, 0], x[0, 1], 1e-5), backend=backend)
        return ck.ops.bias_act(added.normed, x[0, 2], "quick_gelu", backend=backend) * 2

    actual = torch.compile(run, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close(actual, run(x, y, "reference"), atol=1e-5, rtol=1e-5)


def test_half_precision_norms_use_fp32_statistics(device, triton):
    # Half-precision sums of squares would lose a small spread around a large mean.
    x = (1000 + normal(device, 1, 4, 768)).to(torch.float16)
    zero = torch.zeros_like(x)
    weight, shift = torch.ones(768, device=device), torch.zeros(768, device=device)
    normed = ck.ops.add_norm(x, zero, norm=(weight, shift, 1e-5), backend=triton).normed
    exact = layer_norm(x.double(), (768,), eps=1e-5)
    assert_within_budget(normed, exact, layer_norm(x.float(), (768,), eps=1e-5).half())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.randn(2, 8, 24)}, r"y must be \(2,9,24\) like x, got \(2,8,24\)"),
        ({"y": torch.ones(2, 9, 24, dtype=torch.int64)}, "y must be float32, float16, bfloat16 or float64"),
        ({"bias": torch.randn(23)}, r"bias must be \(C,\) = \(24\) on cpu, got \(23\) on cpu"),
        ({"scale": torch.ones(24, dtype=torch.int32)}, "scale must be float32, float16, bfloat16 or float64"),
        ({"norm": (torch.ones(24), torch.ones(23), 1e-5)}, r"norm's bias must be \(C,\) = \(24\) on cpu"),
        ({"x": torch.tensor(1.0)}, r"x must be \(…,C\), got \(\)"),
    ],
)
def test_errors_name_the_bad_argument(backend, change, message):
    x, y = normal("cpu", 2, 9, 24), normal("cpu", 2, 9, 24)
    with pytest.raises(ValueError, match=message):
        ck.ops.add_norm(**{"x": x, "y": y, **change}, backend=backend)


def test_an_error_names_an_unknown_activation(backend):
    with pytest.raises(ValueError, match='act must be "quick_gelu", "gelu" or "gelu_tanh", got \'relu\''):
        ck.ops.bias_act(normal("cpu", 2, 3), None, "relu", backend=backend)
