"""targeted_l1 and its gradients, compared with their readings in fp64."""

import importlib
from contextlib import nullcontext
from functools import wraps

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import clipkernels as ck
from clipkernels.backend import interpreting
from clipkernels.testing import GuardedAllocations, assert_same, assert_within_budget, with_gaps
from clipkernels.testing.fp64 import REFERENCE_EPS
from tests import readings
from tests.readings import read

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUICK_DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
LAUNCHERS = ("targeted_l1", "student_gradient", "projection_gradient")


@pytest.fixture
def triton(triton, monkeypatch, set_kernels, request):
    """Poison what launchers allocate, and shrink the chunks of rows under the interpreter.

    A mode of the caller does not reach into operators, so each launcher is wrapped.
    """
    # The interpreter takes the same time for every chunk, full or not.
    kernels = importlib.import_module("clipkernels.kernels.targeted_l1")
    if interpreting() and not request.node.get_closest_marker("slow"):
        set_kernels(kernels, "CHUNK", 64)

    def poisoned(launch):
        @wraps(launch)
        def run(*arguments):
            with GuardedAllocations():
                return launch(*arguments)

        return run

    for name in LAUNCHERS:
        monkeypatch.setattr(kernels, name, poisoned(getattr(kernels, name)))
    return triton


def exact_results(arguments, grad_output):
    """Return distances (B,) and both gradients for `grad_output` (B,), read in fp64."""
    gradients = read(readings.targeted_l1_gradients, *arguments, grad_output)
    return read(readings.targeted_l1, *arguments), *gradients


def eager(student, teacher, projection, weights, mask):
    """Return distances (B,) by the formula of the docstring, in the dtype of the student."""
    difference = (student @ projection.T - teacher.to(student.dtype)).abs().mean(2)
    return (mask * weights.to(student.dtype) * difference).sum(1)


def inputs(device, batch=3, n=33, d=24, e=40, dtype=torch.float32, keep=0.4, seed=0):
    """Return random arguments that select about a share `keep` of the tokens.

    No difference of student and teacher is so small that rounding could change its sign.
    """
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(batch, n, d, generator=generator).to(dtype)
    projection = (torch.randn(e, d, generator=generator) / d**0.5).to(dtype)
    offset = torch.rand(batch, n, e, generator=generator) + 0.1
    offset *= torch.randint(0, 2, offset.shape, generator=generator) * 2 - 1
    teacher = (student.double() @ projection.double().T + offset).to(dtype)
    weights, mask = (torch.rand(batch, n, generator=generator) for _ in range(2))
    return [x.to(device) for x in (student, teacher, projection, weights, mask < keep)]


def differentiate(function, arguments, grad_output):
    """Return the distances and both gradients for `grad_output`."""
    student, teacher, projection, weights, mask = arguments
    student, projection = student.detach().requires_grad_(), projection.detach().requires_grad_()
    distances = function(student, teacher, projection, weights, mask)
    return distances.detach(), *torch.autograd.grad(distances, (student, projection), grad_output.to(distances.dtype))


def run_on(backend):
    return lambda *arguments: ck.ops.targeted_l1(*arguments, backend=backend)


def one_by_one(student, teacher, projection, weights, mask):
    """Return the reference of every instance by itself, mapped over the batch by torch.func."""

    def single(student, teacher, weights, mask):
        return ck.ops.targeted_l1(student[None], teacher[None], projection, weights[None], mask[None])[0]

    return torch.func.vmap(single)(student, teacher, weights, mask)


def check(arguments, backend):
    """Assert that distances and gradients are within their budgets, and return them."""
    grad_output = torch.randn(len(arguments[0]), generator=torch.Generator().manual_seed(9)).to(arguments[0].device)
    actual = differentiate(run_on(backend), arguments, grad_output)
    student, _, projection, _, mask = arguments
    assert actual[0].dtype == torch.float32 and actual[0].shape == (len(student),)
    assert [x.dtype for x in actual[1:]] == [student.dtype, projection.dtype]
    assert (actual[1][~mask] == 0).all()
    for result, exact, eager_result in zip(
        actual, exact_results(arguments, grad_output), differentiate(eager, arguments, grad_output), strict=True
    ):
        if backend == "reference":  # it sums chunk after chunk, and eager's product by tiles
            assert result.shape == exact.shape
            allowed = REFERENCE_EPS * torch.finfo(result.dtype).eps * exact.abs()
            assert not result.numel() or (result - exact).abs().max() <= allowed.max()
        else:
            assert_within_budget(result, exact, eager_result)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
def test_targeted_l1_matches_the_reading(device, backend, dtype):
    arguments = inputs(device, n=65, dtype=dtype)
    distances, _, _ = check(arguments, backend)
    torch.testing.assert_close(ck.ops.targeted_l1(*arguments, backend=backend), distances, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", QUICK_DTYPES)
@pytest.mark.parametrize(("n", "d", "e"), [(1, 7, 1), (63, 16, 33), (65, 129, 16), (197, 1, 24), (129, 24, 131)])
def test_any_number_of_tokens_and_elements_works(device, backend, n, d, e, dtype):
    check(inputs(device, 2, n, d, e, dtype, seed=1), backend)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "e"), [(50, 768, 512), (197, 1024, 768)])
def test_tower_sizes_work(device, backend, n, d, e, dtype):
    check(inputs(device, 1, n, d, e, dtype), backend)


@pytest.mark.parametrize(("batch", "n"), [(0, 5), (1, 5), (3, 0), (0, 0)])
def test_any_batch_size_works_and_no_tokens_give_zeros(device, backend, batch, n):
    distances, _, to_projection = check(inputs(device, batch, n), backend)
    if batch * n == 0:
        assert (distances == 0).all() and (to_projection == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selection", ["none", "one", "all", "none of the second"])
def test_any_selection_works(device, backend, selection, dtype):
    arguments = inputs(device, n=65, dtype=dtype)
    mask = arguments[4]
    if selection == "none of the second":
        mask[1] = False
    else:
        mask.fill_(selection == "all")
        mask[2, 64] |= selection == "one"
    distances, _, to_projection = check(arguments, backend)
    assert (distances[~mask.any(1)] == 0).all() and (distances[mask.any(1)] > 0).all()
    assert mask.any() or (to_projection == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_projection_gradient_adds_every_chunk_of_every_group(device, dtype, triton, set_kernels):
    kernels = importlib.import_module("clipkernels.kernels.targeted_l1")
    set_kernels(kernels, "CHUNK", 32)
    set_kernels(kernels, "GROUPS", 2)
    check(inputs(device, n=65, dtype=dtype, keep=0.6), triton)  # four chunks, the last of which is not full


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_chunks_and_groups_of_full_size_work(device, backend, keep):
    check(inputs(device, 21, 257, keep=keep, dtype=torch.bfloat16), backend)


def test_any_nonzero_byte_of_the_mask_selects(device, backend):
    arguments, grad_output = inputs(device), torch.ones(3, device=device)
    expected = differentiate(run_on(backend), arguments, grad_output)
    value = torch.arange(150, 249, dtype=torch.uint8, device=device).view(3, 33)
    arguments[4] = (value * arguments[4]).view(torch.bool)
    for result, reference in zip(differentiate(run_on(backend), arguments, grad_output), expected, strict=True):
        assert torch.equal(result, reference)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy warns under the interpreter
@pytest.mark.parametrize("dtype", QUICK_DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_unselected_tokens_may_be_inf_or_nan(device, backend, value, dtype):
    arguments = inputs(device, dtype=dtype)
    grad_output = torch.tensor([1.0, -2.0, 0.5], device=device)
    expected = differentiate(run_on(backend), arguments, grad_output)
    student, teacher, _, weights, mask = arguments
    for tensor in (student, teacher, weights):
        tensor[~mask] = value
    for result, reference in zip(differentiate(run_on(backend), arguments, grad_output), expected, strict=True):
        assert torch.equal(result, reference)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", QUICK_DTYPES)
@pytest.mark.parametrize("position", [0, 1])
def test_a_selected_nan_spoils_only_its_instance(device, backend, position, dtype):
    arguments = inputs(device, dtype=dtype)
    grad_output = torch.tensor([1.0, -2.0, 0.5], device=device)
    expected = differentiate(run_on(backend), arguments, grad_output)
    token = arguments[4][1].nonzero()[0, 0]
    arguments[position][1, token, 3] = float("nan")
    distances, to_student, to_projection = differentiate(run_on(backend), arguments, grad_output)
    assert distances.isnan().tolist() == [False, True, False] and torch.equal(distances[::2], expected[0][::2])
    assert to_projection[:, 3].isnan().all() if position == 0 else to_projection.isfinite().all()  # sign(NaN) is 0
    to_student[1, token] = expected[1][1, token]
    assert torch.equal(to_student, expected[1])


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_nan_in_the_projection_leaves_unselected_gradients_zero(device, backend):
    arguments = inputs(device)
    arguments[2][5, 2] = float("nan")
    distances, to_student, _ = differentiate(run_on(backend), arguments, torch.ones(3, device=device))
    assert distances.isnan().all() and to_student[arguments[4]].isnan().all(0)[2]
    assert (to_student[~arguments[4]] == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("form", ["reference", "triton", "compiled", "torch.func"])
def test_no_selection_gives_zeros_even_if_p_is_not_finite(device, form, request):
    arguments, grad_output = inputs(device, n=9), torch.tensor([1.0, -2.0, 0.5], device=device)
    arguments[2][5, 2], arguments[2][9, 3], arguments[4][1] = float("inf"), float("nan"), False
    if form == "triton":
        request.getfixturevalue("triton")
    forms = {"triton": run_on("triton"), "torch.func": one_by_one}
    if form == "compiled":
        torch._dynamo.reset()
        forms[form] = torch.compile(run_on("reference"), fullgraph=True, backend="aot_eager")
    run = forms.get(form, run_on("reference"))
    distances, to_student, to_projection = differentiate(run, arguments, grad_output)
    assert distances[1] == 0 and not distances[::2].isfinite().any()
    assert (to_student[~arguments[4]] == 0).all() and to_projection.isfinite().all()
    arguments[4][:] = False
    assert all((result == 0).all() for result in differentiate(run, arguments, grad_output))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_student_and_teacher_give_no_gradient(device, backend, dtype):
    generator = torch.Generator().manual_seed(5)
    student = torch.randint(-3, 4, (2, 9, 8), generator=generator).to(device, dtype)
    projection = torch.randint(-2, 3, (17, 8), generator=generator).to(device, dtype)
    teacher, weights = student @ projection.T, torch.ones(2, 9, device=device)
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    grad_output = torch.tensor([17.0, 34.0], device=device)
    for result in differentiate(run_on(backend), (student, teacher, projection, weights, mask), grad_output):
        assert (result == 0).all()
    teacher[0, 2, 4] -= 1
    distances, to_student, to_projection = differentiate(
        run_on(backend), (student, teacher, projection, weights, mask), grad_output
    )
    assert distances.tolist() == [pytest.approx(1 / 17), 0]
    assert torch.equal(to_student[0, 2], projection[4]) and torch.equal(to_projection[4], student[0, 2])
    to_student[0, 2], to_projection[4] = 0, 0
    assert (to_student == 0).all() and (to_projection == 0).all()


@pytest.mark.parametrize(
    ("dtype", "other_dtype"),
    [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
)
def test_teacher_and_weights_may_have_another_dtype(device, backend, dtype, other_dtype):
    student, teacher, projection, weights, mask = inputs(device, dtype=dtype)
    weights -= 0.5
    weights[:, ::3] = 0
    check([student, teacher.to(other_dtype), projection, weights.to(other_dtype), mask], backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grad_output", "size"), [(3e-6, 1e3), (1e7, 1e-3)])
def test_factors_beyond_fp16_range_reach_the_projection_gradient(device, backend, grad_output, size, dtype):
    student, *arguments = inputs(device, dtype=dtype)
    teacher, projection, weights, mask = arguments
    student, grad_output = student * size, torch.full((3,), grad_output, device=device)
    _, exact = read(readings.targeted_l1_gradients, student, *arguments, grad_output)
    projection.requires_grad_()
    distances = ck.ops.targeted_l1(student, teacher, projection, weights, mask, backend=backend)
    (actual,) = torch.autograd.grad(distances, projection, grad_output)
    units = 4 if dtype == torch.float32 else 1
    assert (actual - exact).abs().max() <= units * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", QUICK_DTYPES)
def test_any_strides_give_the_same_result(device, backend, dtype):
    student, teacher, projection, weights, mask = arguments = inputs(device, dtype=dtype)
    grad_output = torch.tensor([1.0, -2.0, 0.5], device=device)
    expected = differentiate(run_on(backend), arguments, grad_output)
    gaps = [with_gaps(x) for x in (student, teacher, projection, weights)]
    strided_mask = mask.repeat_interleave(2, 1)[:, ::2]
    transposed = [x.mT.contiguous().mT for x in (student, teacher, projection, weights, mask)]
    for views in ([*gaps, strided_mask], transposed):
        for result, reference in zip(differentiate(run_on(backend), views, grad_output), expected, strict=True):
            assert_same(result, reference, backend)
    shared_teacher = [
        student,
        teacher[:1].expand(3, -1, -1),
        projection,
        weights[:1].expand(3, -1),
        mask[:, :1].expand(3, 33),
    ]
    check(shared_teacher, backend)
    shared_student = [x[:1].expand(3, *x.shape[1:]) for x in (student, teacher)]
    actual = ck.ops.targeted_l1(*shared_student, projection, weights, mask[:1].expand(3, -1), backend=backend)
    copied = ck.ops.targeted_l1(
        student[:1].repeat(3, 1, 1),
        teacher[:1].repeat(3, 1, 1),
        projection,
        weights,
        mask[:1].repeat(3, 1),
        backend=backend,
    )
    assert_same(actual, copied, backend)


@pytest.mark.parametrize("dtype", QUICK_DTYPES)
def test_an_instance_has_the_same_bits_alone_and_in_a_batch(device, dtype, triton):
    student, teacher, projection, weights, mask = arguments = inputs(device, 5, 70, dtype=dtype)
    teacher[3, 5], mask[3, 5] = float("nan"), True  # an instance that is not finite must not change others either
    grad_output = torch.randn(5, generator=torch.Generator().manual_seed(2)).to(device)
    expected = differentiate(run_on(triton), arguments, grad_output)
    rerun = differentiate(run_on(triton), arguments, grad_output)
    assert all(
        torch.equal(first.nan_to_num(), second.nan_to_num()) for first, second in zip(expected, rerun, strict=True)
    )
    for rows in (slice(1, 3), slice(4, 5)):
        part = (student[rows], teacher[rows], projection, weights[rows], mask[rows])
        distances, to_student, _ = differentiate(run_on(triton), part, grad_output[rows])
        assert torch.equal(distances, expected[0][rows]) and torch.equal(to_student, expected[1][rows])


@pytest.mark.parametrize("leaf", ["student", "projection"])
def test_only_tensors_that_require_a_gradient_get_one(device, backend, leaf):
    arguments = dict(zip(("student", "teacher", "projection", "weights", "mask"), inputs(device), strict=True))
    _, to_student, to_projection = differentiate(
        run_on(backend), list(arguments.values()), torch.ones(3, device=device)
    )
    arguments[leaf].requires_grad_()
    ck.ops.targeted_l1(**arguments, backend=backend).sum().backward()
    assert torch.equal(arguments[leaf].grad, to_student if leaf == "student" else to_projection)
    assert all(arguments[name].grad is None for name in arguments if name != leaf)
    with torch.no_grad():
        assert not ck.ops.targeted_l1(**arguments, backend=backend).requires_grad


class LargestAllocation(TorchDispatchMode):
    """Records the largest number of elements of a new floating tensor whose shape is not `allowed`."""

    def __init__(self, allowed):
        super().__init__()
        self.allowed, self.elements = allowed, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._base is None and result.is_floating_point():
            self.elements = max(self.elements, result.numel() if result.shape != self.allowed else 0)
        return result


def test_the_reference_never_holds_all_projected_tokens(device, monkeypatch):
    module = importlib.import_module("clipkernels.reference.targeted_l1")
    monkeypatch.setattr(module, "CPU_CHUNK_ELEMENTS", 8 * 40)
    monkeypatch.setattr(module, "DEVICE_CHUNK_ELEMENTS", 8 * 40)
    arguments = inputs(device, keep=1.0)
    with LargestAllocation(arguments[0].shape) as largest:
        actual = differentiate(run_on("reference"), arguments, torch.ones(3, device=device))
    assert 0 < largest.elements <= 40 * 24  # the projection's gradient
    for result, exact in zip(actual, exact_results(arguments, torch.ones(3)), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "limit"), [("CPU_CHUNK_ELEMENTS", 2**17), ("DEVICE_CHUNK_ELEMENTS", 2**21)])
def test_the_reference_holds_at_most_one_chunk(device, monkeypatch, name, limit):
    module = importlib.import_module("clipkernels.reference.targeted_l1")
    for constant in ("CPU_CHUNK_ELEMENTS", "DEVICE_CHUNK_ELEMENTS"):
        monkeypatch.setattr(module, constant, getattr(module, name))
    arguments = inputs(device, 3, limit // 1024, 8, 512, keep=1.0)  # one and a half chunks
    assert arguments[1].numel() == 3 * limit // 2
    with LargestAllocation(arguments[0].shape) as largest:
        differentiate(run_on("reference"), arguments, torch.ones(3, device=device))
    assert limit // 2 < largest.elements <= limit


def test_the_kernels_never_store_the_projected_tokens(device, triton, monkeypatch):
    kernels, sizes = importlib.import_module("clipkernels.kernels.targeted_l1"), []

    def recorded(launch):
        def run(*arguments):
            with GuardedAllocations() as guarded:
                actual = launch(*arguments)
            sizes.extend(size for _, size in guarded.buffers)
            return actual

        return run

    for name in LAUNCHERS:
        monkeypatch.setattr(kernels, name, recorded(getattr(kernels, name)))
    differentiate(run_on(triton), inputs(device, d=8, e=256, keep=1.0), torch.ones(3, device=device))
    assert 3 * 33 * 256 // 16 in sizes  # the signs, in words of 16
    assert max(sizes) <= 2 * 256 * 8  # the parts of two groups of rows in the projection's gradient


def test_the_reference_keeps_fp64_and_passes_gradcheck():
    arguments = inputs("cpu", 2, 5, 3, 4, torch.float64)
    arguments[3] = arguments[3].double()
    actual = differentiate(run_on("reference"), arguments, torch.ones(2))
    assert [x.dtype for x in actual] == [torch.float64] * 3
    torch.testing.assert_close(actual, exact_results(arguments, torch.ones(2)))
    student, teacher, projection, weights, mask = arguments
    leaves = (student.requires_grad_(), projection.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, p: run_on("reference")(h, teacher, p, weights, mask), leaves)


def test_the_reference_supports_torch_func():
    arguments = inputs("cpu", n=9, dtype=torch.float64)
    student, expected = arguments[0], differentiate(run_on("reference"), arguments, torch.ones(3))

    def single(student, teacher, projection, weights, mask):
        return ck.ops.targeted_l1(student[None], teacher[None], projection, weights[None], mask[None])[0]

    axes = (0, 0, None, 0, 0)
    torch.testing.assert_close(torch.func.vmap(single, axes)(*arguments), expected[0])
    to_student, to_projection = torch.func.vmap(torch.func.grad(single, (0, 2)), axes)(*arguments)
    torch.testing.assert_close(to_student, expected[1])
    torch.testing.assert_close(to_projection.sum(0), expected[2])
    _, change = torch.func.jvp(lambda h: run_on("reference")(h, *arguments[1:]), (student,), (student,))
    torch.testing.assert_close(change, (expected[1] * student).sum((1, 2)))


def test_only_a_second_derivative_raises(device, backend):
    arguments, other = inputs(device), torch.tensor([2.0], device=device, requires_grad=True)
    expected = differentiate(run_on(backend), arguments, torch.ones(3, device=device))
    student, teacher, projection, weights, mask = arguments
    leaves = (student.requires_grad_(), projection.requires_grad_(), other)
    distances = ck.ops.targeted_l1(student, teacher, projection, weights, mask, backend=backend)
    *gradients, cubed = torch.autograd.grad(distances.sum() + other**3, leaves, create_graph=True)
    assert all(torch.equal(result, reference) for result, reference in zip(gradients, expected[1:], strict=True))
    assert torch.autograd.grad(cubed, other)[0] == 12
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="targeted_l1 is differentiable once"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch loops over the operator
def test_batched_gradients_work(device, backend):
    student, teacher, projection, weights, mask = arguments = inputs(device, n=9)
    grad_outputs = torch.tensor([[1.0, 0, 0], [0.5, -2, 1]], device=device)
    expected = [differentiate(run_on(backend), arguments, grad_output)[1:] for grad_output in grad_outputs]
    leaves = (student.requires_grad_(), projection.requires_grad_())
    for places in ((0, 1), (1,)):
        distances = run_on(backend)(student, teacher, projection, weights, mask)
        actual = torch.autograd.grad(
            distances, [leaves[place] for place in places], grad_outputs, is_grads_batched=True
        )
        assert_as_eager(
            backend, actual, [torch.stack([gradients[place] for gradients in expected]) for place in places]
        )


@pytest.mark.parametrize("name", ["teacher", "weights"])
def test_a_teacher_or_weights_with_a_gradient_raise(device, backend, name):
    arguments = dict(zip(("student", "teacher", "projection", "weights", "mask"), inputs(device), strict=True))
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} must not require a gradient, because it gets none: detach it"):
        ck.ops.targeted_l1(**arguments, backend=backend)
    with torch.no_grad():
        assert ck.ops.targeted_l1(**arguments, backend=backend).isfinite().all()


def test_autocast_narrows_only_student_and_projection(device, backend):
    student, teacher, projection, weights, mask = arguments = inputs(device)
    grad_output = torch.ones(3, device=device)
    bf16_arguments = (student.bfloat16(), teacher, projection.bfloat16(), weights, mask)
    expected = differentiate(run_on(backend), bf16_arguments, grad_output)
    with torch.autocast(device.type, torch.bfloat16):
        actual = differentiate(run_on(backend), arguments, grad_output)
        mixed = differentiate(run_on(backend), (student.bfloat16(), *arguments[1:]), grad_output)
    assert [x.dtype for x in actual] == [torch.float32] * 3 and mixed[1].dtype == torch.bfloat16
    for fp32_result, mixed_result, reference in zip(actual, mixed, expected, strict=True):
        assert torch.equal(fp32_result, reference.float()) and torch.equal(mixed_result.float(), reference.float())


def test_autocast_does_not_change_fp64():
    arguments = inputs("cpu", dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ck.ops.targeted_l1(*arguments), ck.ops.targeted_l1(*arguments))
        assert ck.ops.targeted_l1(*arguments).dtype == torch.float64


def test_the_kernels_support_strides_beyond_32_bits(tmp_path, triton):
    if not interpreting():
        pytest.skip("the sparse file is CPU memory, which only interpreted kernels can read")
    # A sparse file: 8 GiB of addresses, a few pages of disk.
    stride = 2**30 + 16
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + 64, dtype=torch.float16)
    student, teacher, projection, weights, mask = arguments = inputs("cpu", 2, 3, 16, 16, torch.float16, 1.0)
    expected = differentiate(run_on(triton), arguments, torch.ones(2))
    for strided in (memory.as_strided((2, 3, 16), (16, stride, 1)), memory.as_strided((2, 3, 16), (stride, 16, 1))):
        for place in (0, 1):
            strided.copy_(arguments[place])
            views = [strided if place == at else x for at, x in enumerate(arguments)]
            distances = ck.ops.targeted_l1(*views, backend=triton)
            assert torch.equal(distances, expected[0])
        projection.requires_grad_()
        strided.copy_(student)
        ck.ops.targeted_l1(strided, teacher, projection, weights, mask, backend=triton).sum().backward()
        assert torch.equal(projection.grad, expected[2])
        projection.grad = None


def test_the_operators_pass_opcheck(device):
    pytest.importorskip("triton", reason="triton is not installed: it exists only on Linux")
    operators = torch.ops.clipkernels
    arguments = inputs(device, 2, 5, 7, 17, keep=1.0)  # all selected, because other signs are not written
    _, signs, order = operators.targeted_l1(*arguments, True)
    arguments[0].requires_grad_()
    arguments[2].requires_grad_()
    torch.library.opcheck(operators.targeted_l1.default, (*arguments, True))
    scale = torch.rand(2, 5, device=device)
    student, projection = arguments[0].detach(), arguments[2].detach()
    torch.library.opcheck(operators.targeted_l1_student.default, (projection, scale, signs, order))
    torch.library.opcheck(operators.targeted_l1_projection.default, (student, scale, signs, order, 17))


def test_an_operator_called_without_learns_raises_in_backward(device, triton):
    arguments = inputs(device)
    arguments[0].requires_grad_()
    distances, _, _ = torch.ops.clipkernels.targeted_l1(*arguments, False)
    with pytest.raises(RuntimeError, match="called with learns=False, which saves nothing for a backward"):
        distances.sum().backward()


def assert_as_eager(backend, actual, expected, **tolerance):
    """Assert equal bits for kernels; the reference is only close, because a compiler reorders its sums."""
    tolerance = {"rtol": 0, "atol": 0} if backend == "triton" else tolerance
    for result, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, reference, **tolerance)


def test_one_graph_of_forward_and_backward_takes_any_batch(device, backend):
    student, teacher, projection, weights, mask = inputs(device, 7, 9)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run_on(backend), fullgraph=True, dynamic=True, backend=counter)
    for batch in (7, 2):
        # Cloned, because the base of a view has a batch size too.
        parts = [x[:batch].clone() for x in (student, teacher, weights, mask)]
        arguments = (*parts[:2], projection, *parts[2:])
        grad_output = torch.ones(batch, device=device)
        expected = differentiate(run_on(backend), arguments, grad_output)
        assert_as_eager(backend, differentiate(compiled, arguments, grad_output), expected)
    assert counter.frame_count == 1
    with torch.no_grad():
        assert_as_eager(backend, [compiled(*arguments)], expected[:1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_forward_and_backward_do_not_synchronise(device):
    arguments, grad_output = inputs(device, dtype=torch.bfloat16), torch.ones(3, device=device)
    differentiate(run_on("triton"), arguments, grad_output)
    torch.cuda.set_sync_debug_mode("error")
    try:
        differentiate(run_on("triton"), arguments, grad_output)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_inductor_gives_the_results_of_eager(device, backend):
    arguments = inputs(device, n=9)
    torch._dynamo.reset()
    compiled = torch.compile(run_on(backend), fullgraph=True)
    expected = differentiate(run_on(backend), arguments, torch.ones(3, device=device))
    assert_as_eager(backend, differentiate(compiled, arguments, torch.ones(3, device=device)), expected)


def test_compiling_under_autocast_gives_the_results_of_eager(device, backend):
    arguments = inputs(device, n=9)
    torch._dynamo.reset()
    compiled = torch.compile(run_on(backend), fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, torch.bfloat16):
        expected = differentiate(run_on(backend), arguments, torch.ones(3, device=device))
        actual = differentiate(compiled, arguments, torch.ones(3, device=device))
    assert_as_eager(backend, actual, expected, rtol=2**-7, atol=2**-9)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_compiled_reference_ignores_unselected_tokens():
    arguments = inputs("cpu", n=9)
    torch._dynamo.reset()
    compiled = torch.compile(run_on("reference"), fullgraph=True, backend="aot_eager")
    expected = differentiate(compiled, arguments, torch.ones(3))
    for tensor in (arguments[0], arguments[1], arguments[3]):
        tensor[~arguments[4]] = float("nan")
    for result, reference in zip(differentiate(compiled, arguments, torch.ones(3)), expected, strict=True):
        assert torch.equal(result, reference)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_graph_traced_with_one_mask_works_with_another(device, backend, mode, monkeypatch):
    module = importlib.import_module("clipkernels.reference.targeted_l1")
    monkeypatch.setattr(module, "CPU_CHUNK_ELEMENTS", 8 * 40)
    monkeypatch.setattr(module, "DEVICE_CHUNK_ELEMENTS", 8 * 40)
    *others, mask = inputs(device, n=9)
    grad_output = torch.tensor([1.0, -2.0, 0.5], device=device)

    def run(grad_output, *arguments):
        return differentiate(run_on(backend), arguments, grad_output)

    graph = make_fx(run, tracing_mode=mode)(grad_output, *others, mask < 0)
    assert_as_eager(backend, graph(grad_output, *others, mask), run(grad_output, *others, mask))


@pytest.mark.parametrize(
    ("backend", "kind"), [("auto", "meta"), ("reference", "meta"), ("reference", "fake"), ("triton", "fake")]
)
def test_meta_and_fake_tensors_work(device, backend, kind):
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed: it exists only on Linux")
    with FakeTensorMode() if kind == "fake" else nullcontext() as mode:
        arguments = [mode.from_tensor(x) if mode else x.to("meta") for x in inputs(device, n=9)]
        actual = differentiate(run_on(backend), arguments, arguments[3][:, 0])
    assert [(x.shape, x.dtype) for x in actual] == [(x, torch.float32) for x in ((3,), (3, 9, 24), (40, 24))]


def test_an_exported_reference_takes_any_batch():
    arguments = inputs("cpu", 3, 9)

    class Distance(nn.Module):
        def forward(self, student, teacher, projection, weights, mask):
            return ck.ops.targeted_l1(student, teacher, projection, weights, mask)

    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    example = tuple(x if place == 2 else x[:2] for place, x in enumerate(arguments))
    program = torch.export.export(Distance(), example, dynamic_shapes=(batch, batch, None, batch, batch), strict=False)
    torch.testing.assert_close(program.module()(*arguments), ck.ops.targeted_l1(*arguments))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("student", lambda x: x[0], r"student must be \(B,n,d\) with d ≥ 1, got \(9,24\)"),
        ("student", lambda x: x[..., :0], r"student must be \(B,n,d\) with d ≥ 1, got \(3,9,0\)"),
        ("student", lambda x: x.long(), "student must be float32, float16, bfloat16 or float64, got torch.int64"),
        ("teacher", lambda x: x[0], r"teacher must be \(B,n,E\) = \(3,9,E\) with E ≥ 1, got \(9,40\)"),
        ("teacher", lambda x: x[:, :8], r"teacher must be \(B,n,E\) = \(3,9,E\) with E ≥ 1, got \(3,8,40\)"),
        ("teacher", lambda x: x[..., :0], r"with E ≥ 1, got \(3,9,0\)"),
        ("teacher", lambda x: x.long(), "teacher must be float32, float16, bfloat16 or float64, got torch.int64"),
        ("teacher", lambda x: x.to("meta"), "teacher must be on cpu like student, got meta"),
        ("projection", lambda x: x.T, r"projection must be \(E,d\) = \(40,24\), got \(24,40\)"),
        ("projection", lambda x: x.half(), "projection must be torch.float32 on cpu, got torch.float16 on cpu"),
        ("projection", lambda x: x.to("meta"), "projection must be torch.float32 on cpu, got torch.float32 on meta"),
        ("weights", lambda x: x[0], r"weights must be \(B,n\) = \(3,9\), got \(9\)"),
        ("weights", lambda x: x.long(), "weights must be float32, float16, bfloat16 or float64, got torch.int64"),
        ("weights", lambda x: x.to("meta"), "weights must be on cpu like student, got meta"),
        ("mask", lambda x: x[:2], r"mask must be \(B,n\) = \(3,9\), got \(2,9\)"),
        ("mask", lambda x: x.float(), "mask must be torch.bool, got torch.float32"),
        ("mask", lambda x: x.to("meta"), "mask must be on cpu like student, got meta"),
    ],
)
def test_errors_name_the_bad_argument_on_every_backend(backend, name, change, message):
    arguments = dict(zip(("student", "teacher", "projection", "weights", "mask"), inputs("cpu", n=9), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        ck.ops.targeted_l1(**arguments, backend=backend)


def test_the_kernels_raise_for_fp64(device, triton):
    with pytest.raises(ValueError, match="the triton backend of targeted_l1 takes float32, float16 or bfloat16"):
        ck.ops.targeted_l1(*inputs(device, dtype=torch.float64), backend=triton)
