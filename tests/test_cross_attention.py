"""cross_attention and calip_logits: both backends against a literal reading, one image at a time, in fp64."""

import importlib

import pytest
import torch
from torch.nn.functional import normalize
from torch.overrides import TorchFunctionMode

import clipkernels as ck
from clipkernels.backend import interpreting
from clipkernels.testing import assert_same, assert_within_budget, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The package has a function of the module's name.
REFERENCE = importlib.import_module("clipkernels.reference.cross_attention")


def literal(visual, pooled, text, alpha=0.5):
    """Seen (B,P,E), found (B,K,E) and the three terms (3,B,K), in the dtype of the inputs."""
    seen, found, terms = [], [], []
    for image, whole in zip(visual, pooled, strict=True):
        similar = image @ text.T / alpha
        seen.append(similar.softmax(1) @ text)
        found.append(similar.softmax(0).T @ image)
        both = seen[-1].mean(0) + seen[-1].max(0).values
        terms.append(torch.stack([100 * text @ whole, 100 * found[-1] @ whole, 100 * text @ both]))
    return torch.stack(seen), torch.stack(found), torch.stack(terms, 1)


def eager(visual, pooled, text, alpha):
    """The same as one writes it for a batch."""
    similar = visual @ text.T / alpha
    seen, found = similar.softmax(2) @ text, similar.softmax(1).mT @ visual
    both = seen.mean(1) + seen.amax(1)
    terms = torch.stack([pooled @ text.T, (found @ pooled[..., None])[..., 0], both @ text.T])
    return seen, found, 100 * terms


def inputs(device, batch=2, patches=9, classes=5, width=24, dtype=torch.float32, seed=0):
    """Patches, whole images and classes, at length one; `text` has a common part, as the classes of CLIP do."""
    generator = torch.Generator().manual_seed(seed)
    visual = torch.randn(batch, patches, width, generator=generator)
    pooled = torch.randn(batch, width, generator=generator)
    text = torch.randn(classes, width, generator=generator) + torch.randn(width, generator=generator)
    return tuple(normalize(x, dim=-1).to(dtype).to(device) for x in (visual, pooled, text))


def check(visual, pooled, text, alpha=0.5, backend="auto"):
    """Fails unless all that the two operations return is within budget."""
    exact = literal(visual.double(), pooled.double(), text.double(), alpha)
    plain = eager(visual, pooled, text, alpha)
    attended = ck.ops.cross_attention(visual, text, alpha, backend=backend)
    assert attended.visual.dtype == attended.text.dtype == visual.dtype
    assert_within_budget(attended.visual, exact[0], plain[0])
    assert_within_budget(attended.text, exact[1], plain[1])
    terms = ck.ops.calip_logits(visual, pooled, text, alpha, terms=True, backend=backend)
    assert terms.dtype == torch.promote_types(visual.dtype, torch.float32)
    assert_within_budget(terms, exact[2], plain[2])


# Odd sizes below, at and above the tiles; widths of one power of two, of two, and of none.
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
    """Every size in one dtype and one size in every dtype; `make test-all` runs every size in each."""
    for sizes in SIZES:
        for dtype in DTYPES:
            quick = dtype == torch.float32 or sizes == SIZES[0]
            yield pytest.param(*sizes, dtype, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(("batch", "patches", "classes", "width", "dtype"), list(_sweep()))
def test_results_are_those_of_a_literal_reading(device, backend, batch, patches, classes, width, dtype):
    check(*inputs(device, batch, patches, classes, width, dtype), backend=backend)


@pytest.mark.parametrize(
    ("patches", "classes", "width"), [(49, 1000, 512), (196, 100, 768), (256, 2, 1024), (576, 1000, 512), (196, 1, 512)]
)
def test_the_reference_is_right_at_the_sizes_of_towers(patches, classes, width):
    check(*inputs("cpu", 2, patches, classes, width))
    check(*inputs("cpu", 1, patches, classes, width, torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [512, 768, 1024])
@pytest.mark.parametrize("classes", [1, 2, 10, 100, 1000])
@pytest.mark.parametrize("patches", [49, 196, 256, 576])
def test_the_reference_is_right_at_every_size(patches, classes, width, dtype):
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
def test_the_kernels_are_right_at_the_sizes_of_towers(device, triton, patches, classes, width, dtype):
    check(*inputs(device, 1, patches, classes, width, dtype), backend=triton)


@pytest.mark.parametrize("width", [40, pytest.param(768, marks=pytest.mark.slow)])
def test_with_little_shared_memory_programs_share_the_width(device, triton, width, monkeypatch):
    kernels = importlib.import_module("clipkernels.kernels.cross_attention")
    assert not kernels.config(66, width, torch.bfloat16, 4096)["WHOLE"]
    monkeypatch.setattr(kernels, "shared_memory", lambda device: 4096)
    check(*inputs(device, 1, 5, 66, width, torch.bfloat16), backend=triton)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("alpha", [0.5, 2, 0.01])
def test_alpha_may_be_small_and_rows_of_any_length(device, backend, alpha, dtype):
    visual, pooled, text = inputs(device, 2, 11, 34, 32, dtype=dtype)
    check(visual, pooled, text, alpha, backend)
    # Logits in the hundreds and, of some rows, near 0.
    scale = torch.linspace(0.01, 20, 11, device=device, dtype=dtype)
    check(visual * scale[:, None], pooled * 3, text * 5, alpha, backend)


def test_logits_that_would_overflow_an_exponential_do_not(device, backend):
    visual, pooled, text = inputs(device, 1, 6, 4, 16)
    terms = ck.ops.calip_logits(visual * 100, pooled, text * 100, 0.1, terms=True, backend=backend)
    exact = literal(visual.double() * 100, pooled.double(), text.double() * 100, 0.1)[2]
    torch.testing.assert_close(terms.double(), exact, atol=1e-1, rtol=1e-4)
    found = ck.ops.cross_attention(visual * 100, text * 100, 0.1, backend=backend).text
    nearest = (visual[0] @ text.T).argmax(0)
    torch.testing.assert_close(found[0], 100 * visual[0][nearest])


@pytest.mark.parametrize("backend", ["reference"])
def test_fp64_stays_fp64_and_the_kernels_refuse_it(backend):
    visual, pooled, text = inputs("cpu", 3, 17, 7, 16, torch.float64)
    seen, found, terms = literal(visual, pooled, text)
    attended = ck.ops.cross_attention(visual, text, backend=backend)
    torch.testing.assert_close(attended.visual, seen, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(attended.text, found, atol=1e-14, rtol=1e-14)
    came = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    torch.testing.assert_close(came, terms, atol=1e-12, rtol=1e-14)
    with pytest.raises(ValueError, match="takes float32, float16 or bfloat16, got float64"):
        ck.ops.cross_attention(visual, text, backend="triton")
    with pytest.raises(ValueError, match="takes float32, float16 or bfloat16, got float64"):
        ck.ops.calip_logits(visual, pooled, text, backend="triton")


def test_the_logits_are_the_terms_weighted(device, backend):
    visual, pooled, text = inputs(device)
    terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    torch.testing.assert_close(
        ck.ops.calip_logits(visual, pooled, text, backend=backend), terms[0] + 1.12 * terms[1] + 0.02 * terms[2]
    )
    torch.testing.assert_close(
        ck.ops.calip_logits(visual, pooled, text, 0.5, 5, 0.18, backend=backend),
        terms[0] + 5 * terms[1] + 0.18 * terms[2],
    )


def test_the_terms_are_those_of_the_attended_features(device, backend):
    visual, pooled, text = inputs(device, 2, 40, 20, 32)
    attended = ck.ops.cross_attention(visual, text, backend=backend)
    terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    torch.testing.assert_close(terms[0], 100 * pooled @ text.T, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(terms[1], 100 * (attended.text @ pooled[..., None])[..., 0], atol=1e-4, rtol=1e-5)
    both = attended.visual.mean(1) + attended.visual.amax(1)
    torch.testing.assert_close(terms[2], 100 * both @ text.T, atol=1e-4, rtol=1e-5)


def test_the_mean_half_of_the_third_term_is_the_gram_matrix_weighted():
    visual, _, text = inputs("cpu", 2, 40, 20, 32, torch.float64)
    seen = ck.ops.cross_attention(visual, text).visual
    weights = (visual @ text.T / 0.5).softmax(2).mean(1)
    torch.testing.assert_close(seen.mean(1) @ text.T, weights @ (text @ text.T), atol=1e-14, rtol=1e-13)


def test_one_class_is_all_that_patches_see_and_one_patch_all_that_classes_find(device, backend):
    visual, pooled, text = inputs(device, 2, 40, 1, 32)
    attended = ck.ops.cross_attention(visual, text, backend=backend)
    assert torch.equal(attended.visual, text.expand(2, 40, 32))
    terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    torch.testing.assert_close(terms[2], 200 * (text @ text.T).expand(2, 1))
    visual, pooled, text = inputs(device, 2, 1, 40, 32)
    attended = ck.ops.cross_attention(visual, text, backend=backend)
    assert torch.equal(attended.text, visual.expand(2, 40, 32))


def test_equal_classes_are_seen_alike(device, backend):
    visual, pooled, text = inputs(device, 2, 9, 4, 24)
    text = text[[0, 1, 2, 3, 1]]
    terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    torch.testing.assert_close(terms[:, :, 1], terms[:, :, 4])
    attended = ck.ops.cross_attention(visual, text, backend=backend)
    torch.testing.assert_close(attended.text[:, 1], attended.text[:, 4])


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_every_batch_is_served(device, backend, batch):
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
    whole = torch.cat([torch.full_like(visual[:, :1], float("nan")), visual], 1)  # patches behind a CLS row
    views = [(strided(visual), strided(pooled), strided(text)), (whole[:, 1:], pooled.T.contiguous().T, text)]
    attended = ck.ops.cross_attention(visual, text, backend=backend)
    terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    for given in views:
        came = ck.ops.cross_attention(given[0], given[2], backend=backend)
        torch.testing.assert_close(came, attended)
        torch.testing.assert_close(ck.ops.calip_logits(*given, terms=True, backend=backend), terms)
    same = ck.ops.calip_logits(visual[:1].expand(3, -1, -1), pooled[:1].expand(3, -1), text, backend=backend)
    assert_same(same, same[:1].expand_as(same), backend)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_an_image_alone_gives_the_bits_it_gives_in_a_batch(device, triton, dtype):
    # More patches and classes than a program of the first launch takes; then more images than one of the second.
    for sizes, some in (((3, 37, 35, 24), (slice(1, 2), slice(3))), ((18, 3, 4, 16), (slice(15, 18),))):
        visual, pooled, text = inputs(device, *sizes, dtype)
        terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=triton)
        for part in some:
            again = ck.ops.calip_logits(visual[part], pooled[part], text, terms=True, backend=triton)
            assert torch.equal(again, terms[:, part])
    attended = ck.ops.cross_attention(visual, text, backend=triton)
    again = ck.ops.cross_attention(visual[15:], text, backend=triton)
    assert torch.equal(again.visual, attended.visual[15:]) and torch.equal(again.text, attended.text[15:])


def test_a_nan_in_one_image_touches_no_other(device, backend):
    visual, pooled, text = inputs(device, 3, 37, 5, 16)
    clean = ck.ops.cross_attention(visual, text, backend=backend)
    terms = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    visual[1, 36, 3] = float("nan")
    came = ck.ops.cross_attention(visual, text, backend=backend)
    assert came.visual[1, 36].isnan().all() and came.text[1].isnan().all()
    assert torch.equal(came.visual[1, :36], clean.visual[1, :36])
    spoilt = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    assert spoilt[1:, 1].isnan().all() and torch.equal(spoilt[0], terms[0])
    for image in (0, 2):
        assert torch.equal(spoilt[:, image], terms[:, image])
        assert torch.equal(came.visual[image], clean.visual[image])
        assert torch.equal(came.text[image], clean.text[image])


def test_a_nan_class_is_lost_to_all_and_spoils_what_patches_see(device, backend):
    visual, pooled, text = inputs(device, 2, 37, 5, 16)
    clean = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    text[4, 0] = float("nan")
    came = ck.ops.calip_logits(visual, pooled, text, terms=True, backend=backend)
    assert came[:, :, 4].isnan().all() and came[2].isnan().all()
    assert torch.equal(came[:2, :, :4], clean[:2, :, :4])


@pytest.mark.parametrize("few", [1, 2, 3])
def test_images_in_pieces_are_the_images_at_once(monkeypatch, few):
    visual, pooled, text = inputs("cpu", 5, 7, 3, 4)
    expected = ck.ops.calip_logits(visual, pooled, text, terms=True), *ck.ops.cross_attention(visual, text)
    monkeypatch.setattr(REFERENCE, "CACHED", few * 7 * 4)
    came = ck.ops.calip_logits(visual, pooled, text, terms=True), *ck.ops.cross_attention(visual, text)
    for piece, whole in zip(came, expected, strict=True):
        torch.testing.assert_close(piece, whole)


def test_the_similarities_of_a_batch_are_never_whole():
    class Largest(TorchFunctionMode):
        size = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                self.size = max(self.size, made.numel())
            return made

    visual, pooled, text = inputs("cpu", 12, 196, 1000, 32)
    with Largest() as largest:
        ck.ops.calip_logits(visual, pooled, text)
    assert largest.size <= REFERENCE.CACHED < 12 * 196 * 1000
    with Largest() as largest:
        ck.ops.cross_attention(visual, text)
    assert largest.size <= REFERENCE.CACHED


def test_autocast_does_not_narrow_the_similarities():
    visual, pooled, text = inputs("cpu")
    expected = ck.ops.calip_logits(visual, pooled, text), *ck.ops.cross_attention(visual, text)
    with torch.autocast("cpu", torch.bfloat16):
        came = ck.ops.calip_logits(visual, pooled, text), *ck.ops.cross_attention(visual, text)
    assert all(torch.equal(*pair) for pair in zip(came, expected, strict=True))


def test_the_reference_has_the_gradients_of_the_formula(monkeypatch):
    monkeypatch.setattr(REFERENCE, "CACHED", 1)  # no piece would be kept for the backward
    given = [x.requires_grad_() for x in inputs("cpu", 2, 4, 3, 5, torch.float64)]

    def terms(visual, pooled, text):
        return ck.ops.calip_logits(visual, pooled, text, beta2=0.7, beta3=0.3)

    def attended(visual, pooled, text):
        return tuple(ck.ops.cross_attention(visual, text))

    assert torch.autograd.gradcheck(terms, given) and torch.autograd.gradcheck(attended, given)
    exact = literal(*given)
    came = (*ck.ops.cross_attention(given[0], given[2]), ck.ops.calip_logits(*given, terms=True))
    pulls = [torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1)) for x in exact]
    grads = [
        torch.autograd.grad(sum((x * p).sum() for x, p in zip(xs, pulls, strict=True)), given) for xs in (exact, came)
    ]
    torch.testing.assert_close(*grads)


def test_the_reference_takes_part_in_transforms(monkeypatch):
    monkeypatch.setattr(REFERENCE, "CACHED", 1)
    visual, pooled, text = inputs("cpu", 3, 4, 3, 5, torch.float64)
    shifts = torch.randn(2, *visual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    many = torch.func.vmap(lambda shift: ck.ops.calip_logits(visual + shift, pooled, text))(shifts)
    apart = torch.stack([ck.ops.calip_logits(visual + shift, pooled, text) for shift in shifts])
    torch.testing.assert_close(many, apart)
    _, along = torch.func.jvp(lambda x: ck.ops.calip_logits(x, pooled, text), (visual,), (shifts[0],))
    step = [ck.ops.calip_logits(visual + side * shifts[0], pooled, text) for side in (1e-6, -1e-6)]
    torch.testing.assert_close(along, (step[0] - step[1]) / 2e-6, atol=1e-6, rtol=1e-6)


def test_a_gradient_through_the_kernels_is_refused(device, triton):
    visual, pooled, text = inputs(device)
    visual.requires_grad_()
    with pytest.raises(RuntimeError, match="clipkernels::calip_terms has no backward: detach its inputs"):
        ck.ops.calip_logits(visual, pooled, text, backend=triton).sum().backward()
    with pytest.raises(RuntimeError, match="clipkernels::cross_attention has no backward: detach its inputs"):
        ck.ops.cross_attention(visual, text, backend=triton).text.sum().backward()
    with torch.no_grad():
        ck.ops.calip_logits(visual, pooled, text, backend=triton)


def test_the_operators_pass_opcheck(device):
    pytest.importorskip("triton", reason="triton is not installed: it is on Linux alone")
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
        for some in (3, 2):
            given = (visual[:some], pooled[:some], text)
            torch.testing.assert_close(compiled(*given), run(*given))


def test_an_exported_reference_takes_any_batch():
    class Head(torch.nn.Module):
        def forward(self, visual, pooled, text):
            return ck.ops.calip_logits(visual, pooled, text), *ck.ops.cross_attention(visual, text)

    visual, pooled, text = inputs("cpu", 3)
    batch = {0: torch.export.Dim("batch", min=1)}
    shapes = {"visual": batch, "pooled": batch, "text": None}
    program = torch.export.export(Head(), (visual[:2], pooled[:2], text), dynamic_shapes=shapes)
    came = program.module()(visual, pooled, text)
    for exported, eager in zip(came, Head()(visual, pooled, text), strict=True):
        torch.testing.assert_close(exported, eager)


def test_the_kernels_read_through_strides_beyond_32_bits(tmp_path, triton):
    if not interpreting():
        pytest.skip("the sparse file is CPU memory, which kernels read under the interpreter alone")
    # A sparse file: 4 GiB of addresses, a few pages of disk.
    stride = 2**31 + 16
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=stride + 64, dtype=torch.float16)
    visual, pooled, text = inputs("cpu", 2, 4, 3, 16, torch.float16)
    far = memory.as_strided((2, 4, 16), (stride, 16, 1))
    far.copy_(visual)
    terms = ck.ops.calip_logits(far, pooled, text, terms=True, backend=triton)
    assert torch.equal(terms, ck.ops.calip_logits(visual, pooled, text, terms=True, backend=triton))
    for came, right in zip(
        ck.ops.cross_attention(far, text, backend=triton),
        ck.ops.cross_attention(visual, text, backend=triton),
        strict=True,
    ):
        assert torch.equal(came, right)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual": torch.randn(9, 24)}, r"visual must be \(B,P,E\) with at least one patch, got \(9,24\)"),
        ({"visual": torch.randn(2, 0, 24)}, r"visual must be \(B,P,E\) with at least one patch, got \(2,0,24\)"),
        ({"visual": torch.ones(2, 9, 24, dtype=torch.int64)}, "visual must be float32, float16, bfloat16 or float64"),
        ({"text": torch.randn(5, 23)}, r"text must be \(K,E\) with K ≥ 1 and E = 24, got \(5,23\)"),
        ({"text": torch.randn(0, 24)}, r"text must be \(K,E\) with K ≥ 1 and E = 24, got \(0,24\)"),
        ({"text": torch.randn(5, 24).half()}, "text must be torch.float32 on cpu, got torch.float16 on cpu"),
        ({"alpha": 0}, "alpha must be positive, got 0"),
        ({"alpha": float("inf")}, "alpha must be positive, got inf"),
        ({"alpha": float("nan")}, "alpha must be positive, got nan"),
        ({"pooled": torch.randn(2, 23)}, r"pooled must be \(B,E\) = \(2,24\), got \(2,23\)"),
        ({"pooled": torch.randn(2, 24).double()}, "pooled must be torch.float32 on cpu, got torch.float64 on cpu"),
    ],
)
def test_bad_arguments_are_named_on_every_backend(backend, change, message):
    visual, pooled, text = inputs("cpu")
    given = {"visual": visual, "pooled": pooled, "text": text, **change}
    with pytest.raises(ValueError, match=message):
        ck.ops.calip_logits(**given, backend=backend)
    del given["pooled"]
    if "pooled" not in change:
        with pytest.raises(ValueError, match=message):
            ck.ops.cross_attention(**given, backend=backend)
