"""cross_attention and calip_logits on both backends, compared with their readings in fp64."""

import importlib

import pytest
import torch
from torch.nn.functional import normalize
from torch.overrides import TorchFunctionMode

import clipkernels as ck
from clipkernels.backend import interpreting
from clipkernels.testing import assert_same, assert_within_budget, with_gaps
from tests import readings
from tests.readings import read

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# An import statement would find the function of the same name.
REFERENCE = importlib.import_module("clipkernels.reference.cross_attention")


def eager(visual, pooled, text, alpha=0.5):
    """Return attended patches (B,P,E), attended classes (B,K,E) and the terms (3,B,K), in the dtype of the inputs."""
    logits = visual @ text.T / alpha
    attended_visual, attended_text = logits.softmax(2) @ text, logits.softmax(1).mT @ visual
    summary = attended_visual.mean(1) + attended_visual.amax(1)
    terms = torch.stack([pooled @ text.T, (attended_text @ pooled[..., None])[..., 0], summary @ text.T])
    return attended_visual, attended_text, 100 * terms


def inputs(device, batch=2, patches=9, classes=5, width=24, dtype=torch.float32, seed=0):
    """Return patches, pooled images and classes of length one; classes have a common part, as in CLIP."""
    generator = torch.Generator().manual_seed(seed)
    visual = torch.randn(batch, patches, width, generator=generator)
    pooled = torch.randn(batch, width, generator=generator)
    text = torch.randn(classes, width, generator=generator) + torch.randn(width, generator=generator)
    return tuple(normalize(x, dim=-1).to(dtype).to(device) for x in (visual, pooled, text))


def read_terms(*arguments):
    """Return the terms (3,B,K) of the logits, read in fp64."""
    return read(readings.calip_logits, *arguments, terms=True)


def check(visual, pooled, text, alpha=0.5, backend="auto"):
    """Assert that all results of the two operations are within their budgets."""
    exact = *read(readings.cross_attention, visual, text, alpha), read_terms(visual, pooled, text, alpha)
    eager_result = eager(visual, pooled, text, alpha)
    attended = ck.ops.cross_attention(visual, text, alpha, backend=backend)
    assert attended.visual.dtype == attended.text.dtype == visual.dtype
    assert_within_budget(attended.visual, exact[0], eager_result[0])
    assert_within_budget(attended.text, exact[1], eager_result[1])
    terms = ck.ops.calip_logits(visual, pooled, text, alpha, terms=True, backend=backend)
    assert terms.dtype == torch.promote_types(visual.dtype, torch.float32)
    assert_within_budget(terms, exact[2], eager_result[2])


# Odd sizes below, at and above a tile. Widths are a power of two, a sum of two, or neither.
SIZES = [
    (2, 9, 5, 24),
    (1, 49, 10, 64),
    (2, 33, 67, 40),
    (2, 1, 2, 512),
    (1, 33, 1, 96),
    (2, 5, 3, 333),
    (1, 4, 3, 768),
]


def _sweep():
    """Yield every size in every dtype; the quick tests run fp32 to width 333 and one size in the other dtypes."""
    for sizes in SIZES:
        for dtype in DTYPES:
            quick = sizes[-1] <= 333 if dtype == torch.float32 else sizes == SIZES[0]
            yield pytest.param(*sizes, dtype, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(("batch", "patches", "classes", "width", "dtype"), list(_sweep()))
def test_results_match_the_readings(device, backend, batch, patches, classes, width, dtype):
    check(*inputs(device, batch, patches, classes, width, dtype), backend=backend)


@pytest.mark.parametrize(
    ("patches", "classes", "width"), [(49, 1000, 512), (196, 100, 768), (256, 2, 1024), (576, 1000, 512), (196, 1, 512)]
)
def test_the_reference_is_within_budget_at_tower_sizes(patches, classes, width):
    check(*inputs("cpu", 2, patches, classes, width))
    check(*inputs("cpu", 1, patches, classes, width, torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [512, 768, 1024])
@pytest.mark.parametrize("classes", [1, 2, 10, 100, 1000])
@pytest.mark.parametrize("patches", [49, 196, 256, 576])
def test_the_reference_is_within_budget_at_every_size(patches, classes, width, dtype):
    check(*inputs("cpu", 2, patches, classes, width, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patches", "classes", "width", "dtype"),
    [
        (49, 1000, 512, torch.bfloat16),
        (196, 100, 512, torch.bfloat16),
        (196, 1, 768, torch.float16),
        (256, 10, 1024, torch.bfloat16),
        (576, 2, 768, torch.bfloat16),
        (49, 100, 1152, torch.float16),
        (16, 10, 1664, torch.bfloat16),
        (49, 100, 512, torch.float32),
        (65, 10, 1024, torch.float32),
    ],
)
def test_the_kernels_are_within_budget_at_tower_sizes(device, triton, patches, classes, width, dtype):
    check(*inputs(device, 1, patches, classes, width, dtype), backend=triton)


@pytest.mark.parametrize("width", [40, pytest.param(768, marks=pytest.mark.slow)])
def test_programs_split_the_width_if_shared_memory_is_small(device, triton, width, monkeypatch):
    kernels = importlib.import_module("clipkernels.kernels.cross_attention")
    assert not kernels.config(66, width, torch.bfloat16, 4096)["WHOLE"]
    monkeypatch.setattr(kernels, "shared_memory", lambda device: 4096)
    check(*inputs(device, 1, 5, 66, width, torch.bfloat16), backend=triton)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("alpha", [0.5, 2, 0.01])
def test_small_alphas_and_rows_of_any_length_work(device, backend, alpha, dtype):
    visual, pooled, text = inputs(device, 2, 11, 34, 32, dtype=dtype)
    check(visual, pooled, text, alpha, backend)
    # Logits are in the hundreds and, for a few rows, near 0.
    scale = torch.linspace(0.01, 20, 11, device=device, dtype=dtype)
    check(visual * scale[:, None], pooled * 3, text * 5, alpha, backend)


def test_large_logits_do_not_overflow(device, backend):
    visual, pooled, text = inputs(device, 1, 6, 4, 16)
    terms = ck.ops.calip_logits(visual * 100, pooled, text * 100, 0.1, terms=True, backend=backend)
    exact = read_terms(visual * 100, pooled, text * 100, 0.1)
    torch.testing.assert_close(terms.double(), exact, atol=1e-1, rtol=1e-4)
    attended_text = ck.ops.cross_attention(visual * 100, text * 100, 0.1, backend=backend).text
    nearest = (visual[0] @ text.T).argmax(0)
    torch.testing.assert_close(attended_text[0], 100 * visual[0][nearest])


@pytest.mark.parametrize("backend", ["reference"])
def test_fp64_stays_fp64_and_the_kernels_raise(backend):
    visual, pooled, text = inputs("cpu", 3, 17, 7, 16, torch.float64)
    expected_visual, expected_text = read(readings.cross_attention, visual, text)
    attended = ck.ops.cross_attention(visual, text, backend=backend)
    torch.testing.assert_close(attended.visual, expected_visual, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(attended.text, expected_text, atol=1e-14, rtol=1e-14)
    actual_terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    torch.testing.assert_close(actual_terms, read_terms(visual, pooled, text), atol=1e-12, rtol=1e-14)
    with pytest.raises(ValueError, match="takes float32, float16 or bfloat16, got float64"):
        ck.ops.cross_attention(visual, text, backend="triton")
    with pytest.raises(ValueError, match="takes float32, float16 or bfloat16, got float64"):
        ck.ops.calip_logits(visual, pooled, text, backend="triton")


def test_logits_are_the_weighted_sum_of_the_terms(device, backend):
    visual, pooled, text = inputs(device)
    terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    torch.testing.assert_close(
        ck.ops.calip_logits(visual, pooled, text, backend=backend), terms[0] + 1.12 * terms[1] + 0.02 * terms[2]
    )
    torch.testing.assert_close(
        ck.ops.calip_logits(visual, pooled, text, 0.5, 5, 0.18, backend=backend),
        terms[0] + 5 * terms[1] + 0.18 * terms[2],
    )


def test_terms_follow_from_the_attended_features(device, backend):
    visual, pooled, text = inputs(device, 2, 40, 20, 32)
    attended = ck.ops.cross_attention(visual, text, backend=backend)
    terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    torch.testing.assert_close(terms[0], 100 * pooled @ text.T, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(terms[1], 100 * (attended.text @ pooled[..., None])[..., 0], atol=1e-4, rtol=1e-5)
    summary = attended.visual.mean(1) + attended.visual.amax(1)
    torch.testing.assert_close(terms[2], 100 * summary @ text.T, atol=1e-4, rtol=1e-5)


def test_the_mean_in_the_third_term_weighs_the_gram_matrix():
    visual, _, text = inputs("cpu", 2, 40, 20, 32, torch.float64)
    attended = ck.ops.cross_attention(visual, text).visual
    weights = (visual @ text.T / 0.5).softmax(2).mean(1)
    torch.testing.assert_close(attended.mean(1) @ text.T, weights @ (text @ text.T), atol=1e-14, rtol=1e-13)


def test_attention_to_a_single_row_returns_that_row(device, backend):
    visual, pooled, text = inputs(device, 2, 40, 1, 32)
    attended = ck.ops.cross_attention(visual, text, backend=backend)
    assert torch.equal(attended.visual, text.expand(2, 40, 32))
    terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    torch.testing.assert_close(terms[2], 200 * (text @ text.T).expand(2, 1))
    visual, pooled, text = inputs(device, 2, 1, 40, 32)
    attended = ck.ops.cross_attention(visual, text, backend=backend)
    assert torch.equal(attended.text, visual.expand(2, 40, 32))


def test_equal_classes_have_equal_results(device, backend):
    visual, pooled, text = inputs(device, 2, 9, 4, 24)
    text = text[[0, 1, 2, 3, 1]]
    terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    torch.testing.assert_close(terms[:, :, 1], terms[:, :, 4])
    attended = ck.ops.cross_attention(visual, text, backend=backend)
    torch.testing.assert_close(attended.text[:, 1], attended.text[:, 4])


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_any_batch_size_works(device, backend, batch):
    visual, pooled, text = inputs(device, batch, 5, 3, 16)
    attended = ck.ops.cross_attention(visual, text, backend=backend)
    assert attended.visual.shape == (batch, 5, 16) and attended.text.shape == (batch, 3, 16)
    terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    assert terms.shape == (3, batch, 3)
    if batch:
        check(visual, pooled, text, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_any_strides_give_the_same_result(device, backend, dtype):
    visual, pooled, text = inputs(device, 2, 9, 5, 32, dtype)
    with_cls = torch.cat([torch.full_like(visual[:, :1], float("nan")), visual], 1)  # a view of patches after a CLS row
    views = [(with_gaps(visual), with_gaps(pooled), with_gaps(text)), (with_cls[:, 1:], pooled.T.contiguous().T, text)]
    attended = ck.ops.cross_attention(visual, text, backend=backend)
    terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    for arguments in views:
        actual = ck.ops.cross_attention(arguments[0], arguments[2], backend=backend)
        torch.testing.assert_close(actual, attended)
        torch.testing.assert_close(ck.ops.calip_logits(*arguments, terms=True, backend=backend), terms)
    expanded = ck.ops.calip_logits(visual[:1].expand(3, -1, -1), pooled[:1].expand(3, -1), text, backend=backend)
    assert_same(expanded, expanded[:1].expand_as(expanded), backend)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_an_image_has_the_same_bits_alone_and_in_a_batch(device, triton, dtype):
    # First more patches and classes than one program of the first launch takes, then more images than one program of
    # the second launch.
    for sizes, parts in (((3, 37, 35, 24), (slice(1, 2), slice(3))), ((18, 3, 4, 16), (slice(15, 18),))):
        visual, pooled, text = inputs(device, *sizes, dtype)
        terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=triton)
        for part in parts:
            actual = ck.ops.calip_logits(visual[part], pooled[part], text, terms=True, backend=triton)
            assert torch.equal(actual, terms[:, part])
    attended = ck.ops.cross_attention(visual, text, backend=triton)
    actual = ck.ops.cross_attention(visual[15:], text, backend=triton)
    assert torch.equal(actual.visual, attended.visual[15:]) and torch.equal(actual.text, attended.text[15:])


def test_a_nan_in_one_image_changes_no_other(device, backend):
    visual, pooled, text = inputs(device, 3, 37, 5, 16)
    clean = ck.ops.cross_attention(visual, text, backend=backend)
    terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    visual[1, 36, 3] = float("nan")
    actual = ck.ops.cross_attention(visual, text, backend=backend)
    assert actual.visual[1, 36].isnan().all() and actual.text[1].isnan().all()
    assert torch.equal(actual.visual[1, :36], clean.visual[1, :36])
    actual_terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    assert actual_terms[1:, 1].isnan().all() and torch.equal(actual_terms[0], terms[0])
    for image in (0, 2):
        assert torch.equal(actual_terms[:, image], terms[:, image])
        assert torch.equal(actual.visual[image], clean.visual[image])
        assert torch.equal(actual.text[image], clean.text[image])


def test_a_nan_class_spoils_its_own_logits_and_the_third_term(device, backend):
    visual, pooled, text = inputs(device, 2, 37, 5, 16)
    clean = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    text[4, 0] = float("nan")
    actual = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    assert actual[:, :, 4].isnan().all() and actual[2].isnan().all()
    assert torch.equal(actual[:2, :, :4], clean[:2, :, :4])


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_of_images_give_the_results_of_the_batch(monkeypatch, chunk):
    visual, pooled, text = inputs("cpu", 5, 7, 3, 4)
    expected = ck.ops.calip_logits(visual, pooled, text, terms=True), *ck.ops.cross_attention(visual, text)
    monkeypatch.setattr(REFERENCE, "CPU_CHUNK_ELEMENTS", chunk * 7 * 4)
    actual = ck.ops.calip_logits(visual, pooled, text, terms=True), *ck.ops.cross_attention(visual, text)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_similarities_are_never_entirely_in_memory():
    class LargestTensor(TorchFunctionMode):
        size = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.size = max(self.size, result.numel())
            return result

    visual, pooled, text = inputs("cpu", 12, 196, 1000, 32)
    with LargestTensor() as largest:
        ck.ops.calip_logits(visual, pooled, text)
    assert largest.size <= REFERENCE.CPU_CHUNK_ELEMENTS < 12 * 196 * 1000
    with LargestTensor() as largest:
        ck.ops.cross_attention(visual, text)
    assert largest.size <= REFERENCE.CPU_CHUNK_ELEMENTS


def test_autocast_does_not_narrow_the_similarities():
    visual, pooled, text = inputs("cpu")
    expected = ck.ops.calip_logits(visual, pooled, text), *ck.ops.cross_attention(visual, text)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ck.ops.calip_logits(visual, pooled, text), *ck.ops.cross_attention(visual, text)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_the_reference_has_the_gradients_of_the_formula(monkeypatch):
    monkeypatch.setattr(REFERENCE, "CPU_CHUNK_ELEMENTS", 1)  # chunks would break the backward
    arguments = [x.requires_grad_() for x in inputs("cpu", 2, 4, 3, 5, torch.float64)]

    def terms(visual, pooled, text):
        return ck.ops.calip_logits(visual, pooled, text, beta2=0.7, beta3=0.3)

    def attended(visual, pooled, text):
        return tuple(ck.ops.cross_attention(visual, text))

    assert torch.autograd.gradcheck(terms, arguments) and torch.autograd.gradcheck(attended, arguments)
    exact = eager(*arguments)
    actual = (*ck.ops.cross_attention(arguments[0], arguments[2]), ck.ops.calip_logits(*arguments, terms=True))
    grad_outputs = [torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1)) for x in exact]
    grads = [
        torch.autograd.grad(sum((x * p).sum() for x, p in zip(xs, grad_outputs, strict=True)), arguments)
        for xs in (exact, actual)
    ]
    torch.testing.assert_close(*grads)


def test_the_reference_supports_torch_func(monkeypatch):
    monkeypatch.setattr(REFERENCE, "CPU_CHUNK_ELEMENTS", 1)
    visual, pooled, text = inputs("cpu", 3, 4, 3, 5, torch.float64)
    shifts = torch.randn(2, *visual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    batched = torch.func.vmap(lambda shift: ck.ops.calip_logits(visual + shift, pooled, text))(shifts)
    expected = torch.stack([ck.ops.calip_logits(visual + shift, pooled, text) for shift in shifts])
    torch.testing.assert_close(batched, expected)
    _, tangent = torch.func.jvp(lambda x: ck.ops.calip_logits(x, pooled, text), (visual,), (shifts[0],))
    step = [ck.ops.calip_logits(visual + offset * shifts[0], pooled, text) for offset in (1e-6, -1e-6)]
    torch.testing.assert_close(tangent, (step[0] - step[1]) / 2e-6, atol=1e-6, rtol=1e-6)


def test_the_kernels_raise_for_a_gradient(device, triton):
    visual, pooled, text = inputs(device)
    visual.requires_grad_()
    with pytest.raises(RuntimeError, match="clipkernels::calip_terms has no backward: detach its inputs"):
        ck.ops.calip_logits(visual, pooled, text, backend=triton).sum().backward()
    with pytest.raises(RuntimeError, match="clipkernels::cross_attention has no backward: detach its inputs"):
        ck.ops.cross_attention(visual, text, backend=triton).text.sum().backward()
    with torch.no_grad():
        ck.ops.calip_logits(visual, pooled, text, backend=triton)


def test_the_operators_pass_opcheck(device):
    pytest.importorskip("triton", reason="triton is not installed: it exists only on Linux")
    visual, pooled, text = inputs(device, 2, 5, 3, 16, torch.bfloat16)
    torch.library.opcheck(torch.ops.clipkernels.cross_attention.default, (visual, text, 0.5))
    torch.library.opcheck(torch.ops.clipkernels.cross_attention.default, (text, visual, 0.5))
    torch.library.opcheck(torch.ops.clipkernels.calip_terms.default, (visual, pooled, text, 0.5))


def test_both_operations_compile_into_one_graph(device, backend):
    visual, pooled, text = inputs(device, 3)

    def run(visual, pooled, text):
        attended = ck.ops.cross_attention(visual, text, backend=backend)
        return ck.ops.calip_logits(visual, pooled, text, backend=backend) * 2, attended.visual, attended.text + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch in (3, 2):
            arguments = (visual[:batch], pooled[:batch], text)
            torch.testing.assert_close(compiled(*arguments), run(*arguments))


def test_an_exported_reference_takes_any_batch():
    class Head(torch.nn.Module):
        def forward(self, visual, pooled, text):
            return ck.ops.calip_logits(visual, pooled, text), *ck.ops.cross_attention(visual, text)

    visual, pooled, text = inputs("cpu", 3)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}  # torch 2.6 takes no range without an end
    shapes = {"visual": batch, "pooled": batch, "text": None}
    program = torch.export.export(Head(), (visual[:2], pooled[:2], text), dynamic_shapes=shapes)
    actual = program.module()(visual, pooled, text)
    for exported, eager in zip(actual, Head()(visual, pooled, text), strict=True):
        torch.testing.assert_close(exported, eager)


def test_the_kernels_support_strides_beyond_32_bits(tmp_path, triton):
    if not interpreting():
        pytest.skip("the sparse file is CPU memory, which only interpreted kernels can read")
    # A sparse file: 4 GiB of addresses, a few pages of disk.
    stride = 2**31 + 16
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=stride + 64, dtype=torch.float16)
    visual, pooled, text = inputs("cpu", 2, 4, 3, 16, torch.float16)
    strided = memory.as_strided((2, 4, 16), (stride, 16, 1))
    strided.copy_(visual)
    terms = ck.ops.calip_logits(strided, pooled, text, terms=True, backend=triton)
    assert torch.equal(terms, ck.ops.calip_logits(visual, pooled, text, terms=True, backend=triton))
    for actual, expected in zip(
        ck.ops.cross_attention(strided, text, backend=triton),
        ck.ops.cross_attention(visual, text, backend=triton),
        strict=True,
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual": torch.randn(9, 24)}, r"visual must be \(B,P,E\) with at least one patch, got \(9,24\)"),
        ({"visual": torch.randn(2, 0, 24)}, r"visual must be \(B,P,E\) with at least one patch, got \(2,0,24\)"),
        ({"visual": torch.ones(2, 9, 24, dtype=torch.int64)}, "visual must be float32, float16, bfloat16 or float64"),
        ({"text": torch.randn(5, 23)}, r"text must be \(K,E\) with K ≥ 1 and E = 24, got \(5,23\)"),
        ({"text": torch.randn(0, 24)}, r"text must be \(K,E\) with K ≥ 1 and E = 24, got \(0,24\)"),
        ({"text": torch.randn(5, 24).half()}, "text must be torch.float32 on cpu, got torch.float16 on cpu"),
        ({"alpha": 0}, "alpha must be a positive number, got 0"),
        ({"alpha": float("inf")}, "alpha must be a positive number, got inf"),
        ({"alpha": float("nan")}, "alpha must be a positive number, got nan"),
        ({"pooled": torch.randn(2, 23)}, r"pooled must be \(B,E\) = \(2,24\), got \(2,23\)"),
        ({"pooled": torch.randn(2, 24).double()}, "pooled must be torch.float32 on cpu, got torch.float64 on cpu"),
    ],
)
def test_errors_name_the_bad_argument_on_every_backend(backend, change, message):
    visual, pooled, text = inputs("cpu")
    arguments = {"visual": visual, "pooled": pooled, "text": text, **change}
    with pytest.raises(ValueError, match=message):
        ck.ops.calip_logits(**arguments, backend=backend)
    del arguments["pooled"]
    if "pooled" not in change:
        with pytest.raises(ValueError, match=message):
            ck.ops.cross_attention(**arguments, backend=backend)
