"""targeted_l1 and its gradients against the definition read one token at a time."""

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
from clipkernels.testing import GuardedAllocations, assert_within_budget, with_gaps
from clipkernels.testing.fp64 import REFERENCE_EPS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FEW = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
LAUNCHERS = ("targeted_l1", "student_gradient", "projection_gradient")


@pytest.fixture
def triton(triton, monkeypatch, request):
    """What launchers allocate is poisoned inside of operators, too, where the modes of the caller do not reach.

    The interpreter gets chunks of few rows: it takes its time for a chunk, full or not.
    """
    kernels = importlib.import_module("clipkernels.kernels.targeted_l1")
    if interpreting() and not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(kernels, "CHUNK", 64)

    def poisoned(launch):
        @wraps(launch)
        def run(*arguments):
            with GuardedAllocations():
                return launch(*arguments)

        return run

    for name in LAUNCHERS:
        monkeypatch.setattr(kernels, name, poisoned(getattr(kernels, name)))
    return triton


def literal(student, teacher, projection, weights, mask, pull):
    """Token by token, in fp64: the distances (B,) and, of their sum times a pull (B,), both gradients."""
    student, teacher, projection, weights, pull = (
        x.detach().cpu().double() for x in (student, teacher, projection, weights, pull)
    )
    distances, to_student, to_projection = pull.new_zeros(len(pull)), student * 0, projection * 0
    for image, token in mask.cpu().nonzero().tolist():
        far = projection @ student[image, token] - teacher[image, token]
        weight = weights[image, token] / len(projection)
        distances[image] += weight * far.abs().sum()
        to_student[image, token] = pull[image] * weight * far.sign() @ projection
        to_projection += pull[image] * weight * torch.outer(far.sign(), student[image, token])
    return distances, to_student, to_projection


def plain(student, teacher, projection, weights, mask):
    """The definition as it stands in the docstring, in the dtype given."""
    far = (student @ projection.T - teacher.to(student.dtype)).abs().mean(2)
    return (mask * weights.to(student.dtype) * far).sum(1)


def inputs(device, batch=3, n=33, d=24, e=40, dtype=torch.float32, keep=0.4, seed=0):
    """Random arguments, of which about `keep` are selected; no sign is so near 0 that rounding could change it."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(batch, n, d, generator=generator).to(dtype)
    projection = (torch.randn(e, d, generator=generator) / d**0.5).to(dtype)
    away = torch.rand(batch, n, e, generator=generator) + 0.1
    away *= torch.randint(0, 2, away.shape, generator=generator) * 2 - 1
    teacher = (student.double() @ projection.double().T + away).to(dtype)
    weights, mask = (torch.rand(batch, n, generator=generator) for _ in range(2))
    return [x.to(device) for x in (student, teacher, projection, weights, mask < keep)]


def differentiate(form, given, pull):
    """Distances and both gradients."""
    student, teacher, projection, weights, mask = given
    student, projection = student.detach().requires_grad_(), projection.detach().requires_grad_()
    distances = form(student, teacher, projection, weights, mask)
    return distances.detach(), *torch.autograd.grad(distances, (student, projection), pull.to(distances.dtype))


def fused(backend):
    return lambda *given: ck.ops.targeted_l1(*given, backend=backend)


def one_by_one(student, teacher, projection, weights, mask):
    """The reference of every instance by itself, transformed by torch.func."""

    def alone(student, teacher, weights, mask):
        return ck.ops.targeted_l1(student[None], teacher[None], projection, weights[None], mask[None])[0]

    return torch.func.vmap(alone)(student, teacher, weights, mask)


def check(given, backend):
    """All three within their budgets; returns what came."""
    pull = torch.randn(len(given[0]), generator=torch.Generator().manual_seed(9)).to(given[0].device)
    came = differentiate(fused(backend), given, pull)
    student, _, projection, _, mask = given
    assert came[0].dtype == torch.float32 and came[0].shape == (len(student),)
    assert [x.dtype for x in came[1:]] == [student.dtype, projection.dtype]
    assert (came[1][~mask] == 0).all()
    for one, exact, eager in zip(came, literal(*given, pull), differentiate(plain, given, pull), strict=True):
        if backend == "reference":  # it adds chunk after chunk, and a product by tiles
            assert one.shape == exact.shape
            allowed = REFERENCE_EPS * torch.finfo(one.dtype).eps * exact.abs()
            assert not one.numel() or (one.cpu() - exact).abs().max() <= allowed.max()
        else:
            assert_within_budget(one.cpu(), exact, eager.cpu())
    return came


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_weighted_distance_of_the_selected_tokens(device, backend, dtype):
    given = inputs(device, n=65, dtype=dtype)
    distances, _, _ = check(given, backend)
    torch.testing.assert_close(ck.ops.targeted_l1(*given, backend=backend), distances, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", FEW)
@pytest.mark.parametrize(("n", "d", "e"), [(1, 7, 1), (63, 16, 33), (65, 129, 16), (197, 1, 24), (129, 24, 131)])
def test_any_number_of_tokens_and_elements_will_do(device, backend, n, d, e, dtype):
    check(inputs(device, 2, n, d, e, dtype, seed=1), backend)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "e"), [(50, 768, 512), (197, 1024, 768)])
def test_the_sizes_of_towers_will_do(device, backend, n, d, e, dtype):
    check(inputs(device, 1, n, d, e, dtype), backend)


@pytest.mark.parametrize(("batch", "n"), [(0, 5), (1, 5), (3, 0), (0, 0)])
def test_any_batch_will_do_and_without_tokens_it_is_zero(device, backend, batch, n):
    distances, _, to_projection = check(inputs(device, batch, n), backend)
    if batch * n == 0:
        assert (distances == 0).all() and (to_projection == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", ["none", "one", "all", "none of the second"])
def test_any_selection_will_do(device, backend, chosen, dtype):
    given = inputs(device, n=65, dtype=dtype)
    mask = given[4]
    if chosen == "none of the second":
        mask[1] = False
    else:
        mask.fill_(chosen == "all")
        mask[2, 64] |= chosen == "one"
    distances, _, to_projection = check(given, backend)
    assert (distances[~mask.any(1)] == 0).all() and (distances[mask.any(1)] > 0).all()
    assert mask.any() or (to_projection == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_chunk_of_every_group_is_added_to_the_gradient_of_the_projection(device, dtype, triton, monkeypatch):
    kernels = importlib.import_module("clipkernels.kernels.targeted_l1")
    monkeypatch.setattr(kernels, "CHUNK", 32)
    monkeypatch.setattr(kernels, "GROUPS", 2)
    check(inputs(device, n=65, dtype=dtype, keep=0.6), triton)  # four chunks, the last one not full


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_chunks_and_groups_as_large_as_they_are_will_do(device, backend, keep):
    check(inputs(device, 21, 257, keep=keep, dtype=torch.bfloat16), backend)


def test_any_byte_but_zero_selects(device, backend):
    given, pull = inputs(device), torch.ones(3, device=device)
    expected = differentiate(fused(backend), given, pull)
    value = torch.arange(150, 249, dtype=torch.uint8, device=device).view(3, 33)
    given[4] = (value * given[4]).view(torch.bool)
    for one, right in zip(differentiate(fused(backend), given, pull), expected, strict=True):
        assert torch.equal(one, right)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of numpy, which the interpreter multiplies with
@pytest.mark.parametrize("dtype", FEW)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_selected_may_hold_anything(device, backend, value, dtype):
    given = inputs(device, dtype=dtype)
    pull = torch.tensor([1.0, -2.0, 0.5], device=device)
    expected = differentiate(fused(backend), given, pull)
    student, teacher, _, weights, mask = given
    for tensor in (student, teacher, weights):
        tensor[~mask] = value
    for one, other in zip(differentiate(fused(backend), given, pull), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", FEW)
@pytest.mark.parametrize("place", [0, 1])
def test_nan_in_what_is_selected_spoils_its_instance_alone(device, backend, place, dtype):
    given = inputs(device, dtype=dtype)
    pull = torch.tensor([1.0, -2.0, 0.5], device=device)
    expected = differentiate(fused(backend), given, pull)
    token = given[4][1].nonzero()[0, 0]
    given[place][1, token, 3] = float("nan")
    distances, to_student, to_projection = differentiate(fused(backend), given, pull)
    assert distances.isnan().tolist() == [False, True, False] and torch.equal(distances[::2], expected[0][::2])
    assert to_projection[:, 3].isnan().all() if place == 0 else to_projection.isfinite().all()  # sign(NaN) is 0
    to_student[1, token] = expected[1][1, token]
    assert torch.equal(to_student, expected[1])


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_nan_in_the_projection_is_none_of_the_others_business(device, backend):
    given = inputs(device)
    given[2][5, 2] = float("nan")
    distances, to_student, _ = differentiate(fused(backend), given, torch.ones(3, device=device))
    assert distances.isnan().all() and to_student[given[4]].isnan().all(0)[2]
    assert (to_student[~given[4]] == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("form", ["reference", "triton", "compiled", "torch.func"])
def test_an_instance_of_which_nothing_is_selected_gets_nothing_whatever_the_projection_holds(device, form, request):
    given, pull = inputs(device, n=9), torch.tensor([1.0, -2.0, 0.5], device=device)
    given[2][5, 2], given[2][9, 3], given[4][1] = float("inf"), float("nan"), False
    if form == "triton":
        request.getfixturevalue("triton")
    forms = {"triton": fused("triton"), "torch.func": one_by_one}
    if form == "compiled":
        torch._dynamo.reset()
        forms[form] = torch.compile(fused("reference"), fullgraph=True, backend="aot_eager")
    run = forms.get(form, fused("reference"))
    distances, to_student, to_projection = differentiate(run, given, pull)
    assert distances[1] == 0 and not distances[::2].isfinite().any()
    assert (to_student[~given[4]] == 0).all() and to_projection.isfinite().all()
    given[4][:] = False
    assert all((one == 0).all() for one in differentiate(run, given, pull))


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_student_and_teacher_agree_there_is_no_gradient(device, backend, dtype):
    generator = torch.Generator().manual_seed(5)
    student = torch.randint(-3, 4, (2, 9, 8), generator=generator).to(device, dtype)
    projection = torch.randint(-2, 3, (17, 8), generator=generator).to(device, dtype)
    teacher, weights = student @ projection.T, torch.ones(2, 9, device=device)
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    pull = torch.tensor([17.0, 34.0], device=device)
    for one in differentiate(fused(backend), (student, teacher, projection, weights, mask), pull):
        assert (one == 0).all()
    teacher[0, 2, 4] -= 1
    distances, to_student, to_projection = differentiate(
        fused(backend), (student, teacher, projection, weights, mask), pull
    )
    assert distances.tolist() == [pytest.approx(1 / 17), 0]
    assert torch.equal(to_student[0, 2], projection[4]) and torch.equal(to_projection[4], student[0, 2])
    to_student[0, 2], to_projection[4] = 0, 0
    assert (to_student == 0).all() and (to_projection == 0).all()


@pytest.mark.parametrize(
    ("dtype", "told"),
    [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
)
def test_teacher_and_weights_may_be_of_another_dtype(device, backend, dtype, told):
    student, teacher, projection, weights, mask = inputs(device, dtype=dtype)
    weights -= 0.5
    weights[:, ::3] = 0
    check([student, teacher.to(told), projection, weights.to(told), mask], backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pull", "size"), [(3e-6, 1e3), (1e7, 1e-3)])
def test_factors_out_of_a_halfs_range_reach_the_gradient_of_the_projection(device, backend, pull, size, dtype):
    student, *given = inputs(device, dtype=dtype)
    teacher, projection, weights, mask = given
    student, pull = student * size, torch.full((3,), pull, device=device)
    exact = literal(student, *given, pull)[2]
    projection.requires_grad_()
    distances = ck.ops.targeted_l1(student, teacher, projection, weights, mask, backend=backend)
    (came,) = torch.autograd.grad(distances, projection, pull)
    units = 4 if dtype == torch.float32 else 1
    assert (came.cpu() - exact).abs().max() <= units * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", FEW)
def test_any_strides_give_the_same_result(device, backend, dtype):
    student, teacher, projection, weights, mask = given = inputs(device, dtype=dtype)
    pull = torch.tensor([1.0, -2.0, 0.5], device=device)
    expected = differentiate(fused(backend), given, pull)
    gaps = [with_gaps(x) for x in (student, teacher, projection, weights)]
    apart = mask.repeat_interleave(2, 1)[:, ::2]
    turned = [x.mT.contiguous().mT for x in (student, teacher, projection, weights, mask)]
    for other in ([*gaps, apart], turned):
        for one, right in zip(differentiate(fused(backend), other, pull), expected, strict=True):
            assert torch.equal(one, right)
    one_teacher = [
        student,
        teacher[:1].expand(3, -1, -1),
        projection,
        weights[:1].expand(3, -1),
        mask[:, :1].expand(3, 33),
    ]
    check(one_teacher, backend)
    one_student = [x[:1].expand(3, *x.shape[1:]) for x in (student, teacher)]
    came = ck.ops.targeted_l1(*one_student, projection, weights, mask[:1].expand(3, -1), backend=backend)
    shared = ck.ops.targeted_l1(
        student[:1].repeat(3, 1, 1),
        teacher[:1].repeat(3, 1, 1),
        projection,
        weights,
        mask[:1].repeat(3, 1),
        backend=backend,
    )
    assert torch.equal(came, shared)


@pytest.mark.parametrize("dtype", FEW)
def test_an_instance_alone_gives_the_bits_it_gives_in_a_batch(device, dtype, triton):
    student, teacher, projection, weights, mask = given = inputs(device, 5, 70, dtype=dtype)
    teacher[3, 5], mask[3, 5] = float("nan"), True  # a neighbour that is not finite changes nothing either
    pull = torch.randn(5, generator=torch.Generator().manual_seed(2)).to(device)
    whole = differentiate(fused(triton), given, pull)
    again = differentiate(fused(triton), given, pull)
    assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(whole, again, strict=True))
    for rows in (slice(1, 3), slice(4, 5)):
        some = (student[rows], teacher[rows], projection, weights[rows], mask[rows])
        distances, to_student, _ = differentiate(fused(triton), some, pull[rows])
        assert torch.equal(distances, whole[0][rows]) and torch.equal(to_student, whole[1][rows])


@pytest.mark.parametrize("learns", ["student", "projection"])
def test_only_what_learns_gets_a_gradient(device, backend, learns):
    given = dict(zip(("student", "teacher", "projection", "weights", "mask"), inputs(device), strict=True))
    _, to_student, to_projection = differentiate(fused(backend), list(given.values()), torch.ones(3, device=device))
    given[learns].requires_grad_()
    ck.ops.targeted_l1(**given, backend=backend).sum().backward()
    assert torch.equal(given[learns].grad, to_student if learns == "student" else to_projection)
    assert all(given[name].grad is None for name in given if name != learns)
    with torch.no_grad():
        assert not ck.ops.targeted_l1(**given, backend=backend).requires_grad


class Largest(TorchDispatchMode):
    """The most elements of a new floating tensor, but for those of one shape."""

    def __init__(self, allowed):
        super().__init__()
        self.allowed, self.elements = allowed, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made._base is None and made.is_floating_point():
            self.elements = max(self.elements, made.numel() if made.shape != self.allowed else 0)
        return made


def test_the_reference_never_has_the_projected_tokens_in_memory(device, monkeypatch):
    module = importlib.import_module("clipkernels.reference.targeted_l1")
    monkeypatch.setattr(module, "CPU_CHUNK_ELEMENTS", 8 * 40)
    monkeypatch.setattr(module, "DEVICE_CHUNK_ELEMENTS", 8 * 40)
    given = inputs(device, keep=1.0)
    with Largest(given[0].shape) as largest:
        came = differentiate(fused("reference"), given, torch.ones(3, device=device))
    assert 0 < largest.elements <= 40 * 24  # the projection's gradient
    for one, exact in zip(came, literal(*given, torch.ones(3)), strict=True):
        torch.testing.assert_close(one.cpu().double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "most"), [("CPU_CHUNK_ELEMENTS", 2**17), ("DEVICE_CHUNK_ELEMENTS", 2**21)])
def test_the_reference_holds_as_few_numbers_as_it_says(device, monkeypatch, name, most):
    module = importlib.import_module("clipkernels.reference.targeted_l1")
    for own in ("CPU_CHUNK_ELEMENTS", "DEVICE_CHUNK_ELEMENTS"):
        monkeypatch.setattr(module, own, getattr(module, name))
    given = inputs(device, 3, most // 1024, 8, 512, keep=1.0)  # half as much again
    assert given[1].numel() == 3 * most // 2
    with Largest(given[0].shape) as largest:
        differentiate(fused("reference"), given, torch.ones(3, device=device))
    assert most // 2 < largest.elements <= most


def test_the_kernels_never_have_the_projected_tokens_in_memory(device, triton, monkeypatch):
    kernels, sizes = importlib.import_module("clipkernels.kernels.targeted_l1"), []

    def noted(launch):
        def run(*arguments):
            with GuardedAllocations() as seen:
                came = launch(*arguments)
            sizes.extend(size for _, size in seen.buffers)
            return came

        return run

    for name in LAUNCHERS:
        monkeypatch.setattr(kernels, name, noted(getattr(kernels, name)))
    differentiate(fused(triton), inputs(device, d=8, e=256, keep=1.0), torch.ones(3, device=device))
    assert 3 * 33 * 256 // 16 in sizes  # the signs, in words of 16
    assert max(sizes) <= 2 * 256 * 8  # what two groups of rows add to the projection's gradient


def test_the_reference_keeps_fp64_and_its_gradients_are_right():
    given = inputs("cpu", 2, 5, 3, 4, torch.float64)
    given[3] = given[3].double()
    came = differentiate(fused("reference"), given, torch.ones(2))
    assert [x.dtype for x in came] == [torch.float64] * 3
    torch.testing.assert_close(came, literal(*given, torch.ones(2)))
    student, teacher, projection, weights, mask = given
    learnt = (student.requires_grad_(), projection.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, p: fused("reference")(h, teacher, p, weights, mask), learnt)


def test_the_reference_serves_transforms_of_torch_func():
    given = inputs("cpu", n=9, dtype=torch.float64)
    student, expected = given[0], differentiate(fused("reference"), given, torch.ones(3))

    def alone(student, teacher, projection, weights, mask):
        return ck.ops.targeted_l1(student[None], teacher[None], projection, weights[None], mask[None])[0]

    axes = (0, 0, None, 0, 0)
    torch.testing.assert_close(torch.func.vmap(alone, axes)(*given), expected[0])
    to_student, to_projection = torch.func.vmap(torch.func.grad(alone, (0, 2)), axes)(*given)
    torch.testing.assert_close(to_student, expected[1])
    torch.testing.assert_close(to_projection.sum(0), expected[2])
    _, change = torch.func.jvp(lambda h: fused("reference")(h, *given[1:]), (student,), (student,))
    torch.testing.assert_close(change, (expected[1] * student).sum((1, 2)))


def test_a_gradient_of_the_gradient_is_refused_and_nothing_before(device, backend):
    given, other = inputs(device), torch.tensor([2.0], device=device, requires_grad=True)
    expected = differentiate(fused(backend), given, torch.ones(3, device=device))
    student, teacher, projection, weights, mask = given
    learnt = (student.requires_grad_(), projection.requires_grad_(), other)
    distances = ck.ops.targeted_l1(student, teacher, projection, weights, mask, backend=backend)
    *once, cubed = torch.autograd.grad(distances.sum() + other**3, learnt, create_graph=True)
    assert all(torch.equal(one, right) for one, right in zip(once, expected[1:], strict=True))
    assert torch.autograd.grad(cubed, other)[0] == 12
    for gradient in once:
        with pytest.raises(RuntimeError, match="targeted_l1 is differentiable once"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of a loop over the operator
def test_several_gradients_may_be_asked_for_at_once(device, backend):
    student, teacher, projection, weights, mask = given = inputs(device, n=9)
    pulls = torch.tensor([[1.0, 0, 0], [0.5, -2, 1]], device=device)
    expected = [differentiate(fused(backend), given, pull)[1:] for pull in pulls]
    learnt = (student.requires_grad_(), projection.requires_grad_())
    for chosen in ((0, 1), (1,)):
        distances = fused(backend)(student, teacher, projection, weights, mask)
        came = torch.autograd.grad(distances, [learnt[place] for place in chosen], pulls, is_grads_batched=True)
        assert_as_eager(backend, came, [torch.stack([each[place] for each in expected]) for place in chosen])


@pytest.mark.parametrize("name", ["teacher", "weights"])
def test_the_teacher_does_not_learn(device, backend, name):
    given = dict(zip(("student", "teacher", "projection", "weights", "mask"), inputs(device), strict=True))
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} must not require a gradient, because it gets none: detach it"):
        ck.ops.targeted_l1(**given, backend=backend)
    with torch.no_grad():
        assert ck.ops.targeted_l1(**given, backend=backend).isfinite().all()


def test_under_autocast_student_and_projection_are_narrowed_and_nothing_else(device, backend):
    student, teacher, projection, weights, mask = given = inputs(device)
    pull = torch.ones(3, device=device)
    narrow = (student.bfloat16(), teacher, projection.bfloat16(), weights, mask)
    expected = differentiate(fused(backend), narrow, pull)
    with torch.autocast(device.type, torch.bfloat16):
        came = differentiate(fused(backend), given, pull)
        mixed = differentiate(fused(backend), (student.bfloat16(), *given[1:]), pull)
    assert [x.dtype for x in came] == [torch.float32] * 3 and mixed[1].dtype == torch.bfloat16
    for one, other, right in zip(came, mixed, expected, strict=True):
        assert torch.equal(one, right.float()) and torch.equal(other.float(), right.float())


def test_autocast_leaves_fp64_alone():
    given = inputs("cpu", dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ck.ops.targeted_l1(*given), ck.ops.targeted_l1(*given))
        assert ck.ops.targeted_l1(*given).dtype == torch.float64


def test_the_kernels_read_through_strides_beyond_32_bits(tmp_path, triton):
    if not interpreting():
        pytest.skip("the sparse file is CPU memory, which kernels read under the interpreter alone")
    # A sparse file: 8 GiB of addresses, a few pages of disk.
    stride = 2**30 + 16
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + 64, dtype=torch.float16)
    student, teacher, projection, weights, mask = given = inputs("cpu", 2, 3, 16, 16, torch.float16, 1.0)
    expected = differentiate(fused(triton), given, torch.ones(2))
    for far in (memory.as_strided((2, 3, 16), (16, stride, 1)), memory.as_strided((2, 3, 16), (stride, 16, 1))):
        for place in (0, 1):
            far.copy_(given[place])
            other = [far if place == at else x for at, x in enumerate(given)]
            distances = ck.ops.targeted_l1(*other, backend=triton)
            assert torch.equal(distances, expected[0])
        projection.requires_grad_()
        far.copy_(student)
        ck.ops.targeted_l1(far, teacher, projection, weights, mask, backend=triton).sum().backward()
        assert torch.equal(projection.grad, expected[2])
        projection.grad = None


def test_the_operators_pass_opcheck(device):
    pytest.importorskip("triton", reason="triton is not installed: it is on Linux alone")
    operators = torch.ops.clipkernels
    given = inputs(device, 2, 5, 7, 17, keep=1.0)  # signs of what is not selected are not written
    _, signs, order = operators.targeted_l1(*given, True)
    given[0].requires_grad_()
    given[2].requires_grad_()
    torch.library.opcheck(operators.targeted_l1.default, (*given, True))
    scale = torch.rand(2, 5, device=device)
    student, projection = given[0].detach(), given[2].detach()
    torch.library.opcheck(operators.targeted_l1_student.default, (projection, scale, signs, order))
    torch.library.opcheck(operators.targeted_l1_projection.default, (student, scale, signs, order, 17))


def test_the_operator_that_kept_nothing_refuses_a_gradient(device, triton):
    given = inputs(device)
    given[0].requires_grad_()
    distances, _, _ = torch.ops.clipkernels.targeted_l1(*given, False)
    with pytest.raises(RuntimeError, match="called with learns=False, which saves nothing for a backward"):
        distances.sum().backward()


def assert_as_eager(backend, came, expected, **within):
    """Kernels give the same bits; of the reference a compiler makes another order of sums."""
    within = {"rtol": 0, "atol": 0} if backend == "triton" else within
    for one, right in zip(came, expected, strict=True):
        torch.testing.assert_close(one, right, **within)


def test_forward_and_backward_compile_into_one_graph_that_serves_any_batch(device, backend):
    student, teacher, projection, weights, mask = inputs(device, 7, 9)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused(backend), fullgraph=True, dynamic=True, backend=counter)
    for some in (7, 2):
        own = [x[:some].clone() for x in (student, teacher, weights, mask)]  # a view's base has a size as well
        given = (*own[:2], projection, *own[2:])
        pull = torch.ones(some, device=device)
        expected = differentiate(fused(backend), given, pull)
        assert_as_eager(backend, differentiate(compiled, given, pull), expected)
    assert counter.frame_count == 1
    with torch.no_grad():
        assert_as_eager(backend, [compiled(*given)], expected[:1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_neither_forward_nor_backward_waits_for_the_gpu(device):
    given, pull = inputs(device, dtype=torch.bfloat16), torch.ones(3, device=device)
    differentiate(fused("triton"), given, pull)
    torch.cuda.set_sync_debug_mode("error")
    try:
        differentiate(fused("triton"), given, pull)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_inductor_gives_what_eager_gives(device, backend):
    given = inputs(device, n=9)
    torch._dynamo.reset()
    compiled = torch.compile(fused(backend), fullgraph=True)
    expected = differentiate(fused(backend), given, torch.ones(3, device=device))
    assert_as_eager(backend, differentiate(compiled, given, torch.ones(3, device=device)), expected)


def test_compiling_under_autocast_narrows_alike(device, backend):
    given = inputs(device, n=9)
    torch._dynamo.reset()
    compiled = torch.compile(fused(backend), fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, torch.bfloat16):
        expected = differentiate(fused(backend), given, torch.ones(3, device=device))
        came = differentiate(compiled, given, torch.ones(3, device=device))
    assert_as_eager(backend, came, expected, rtol=2**-7, atol=2**-9)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_graph_of_the_reference_leaves_out_what_is_not_selected_as_well():
    given = inputs("cpu", n=9)
    torch._dynamo.reset()
    compiled = torch.compile(fused("reference"), fullgraph=True, backend="aot_eager")
    expected = differentiate(compiled, given, torch.ones(3))
    for tensor in (given[0], given[1], given[3]):
        tensor[~given[4]] = float("nan")
    for one, right in zip(differentiate(compiled, given, torch.ones(3)), expected, strict=True):
        assert torch.equal(one, right)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_graph_traced_of_one_selection_serves_others(device, backend, mode, monkeypatch):
    module = importlib.import_module("clipkernels.reference.targeted_l1")
    monkeypatch.setattr(module, "CPU_CHUNK_ELEMENTS", 8 * 40)
    monkeypatch.setattr(module, "DEVICE_CHUNK_ELEMENTS", 8 * 40)
    *few, mask = inputs(device, n=9)
    pull = torch.tensor([1.0, -2.0, 0.5], device=device)

    def run(pull, *given):
        return differentiate(fused(backend), given, pull)

    graph = make_fx(run, tracing_mode=mode)(pull, *few, mask < 0)
    assert_as_eager(backend, graph(pull, *few, mask), run(pull, *few, mask))


@pytest.mark.parametrize(
    ("backend", "kind"), [("auto", "meta"), ("reference", "meta"), ("reference", "fake"), ("triton", "fake")]
)
def test_shapes_alone_will_do(device, backend, kind):
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed: it is on Linux alone")
    with FakeTensorMode() if kind == "fake" else nullcontext() as mode:
        given = [mode.from_tensor(x) if mode else x.to("meta") for x in inputs(device, n=9)]
        came = differentiate(fused(backend), given, given[3][:, 0])
    assert [(x.shape, x.dtype) for x in came] == [(x, torch.float32) for x in ((3,), (3, 9, 24), (40, 24))]


def test_an_exported_reference_takes_any_batch():
    given = inputs("cpu", 3, 9)

    class Distance(nn.Module):
        def forward(self, student, teacher, projection, weights, mask):
            return ck.ops.targeted_l1(student, teacher, projection, weights, mask)

    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    few = tuple(x if place == 2 else x[:2] for place, x in enumerate(given))
    program = torch.export.export(Distance(), few, dynamic_shapes=(batch, batch, None, batch, batch), strict=False)
    torch.testing.assert_close(program.module()(*given), ck.ops.targeted_l1(*given))


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
def test_bad_arguments_are_named_on_every_backend(backend, name, change, message):
    given = dict(zip(("student", "teacher", "projection", "weights", "mask"), inputs("cpu", n=9), strict=True))
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=message):
        ck.ops.targeted_l1(**given, backend=backend)


def test_the_kernels_refuse_fp64(device, triton):
    with pytest.raises(ValueError, match="the triton backend of targeted_l1 takes float32, float16 or bfloat16"):
        ck.ops.targeted_l1(*inputs(device, dtype=torch.float64), backend=triton)
