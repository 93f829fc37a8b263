"""affinity, compared with the reading in fp64."""

import pytest
import torch
from torch.nn.functional import normalize, one_hot
from torch.utils._python_dispatch import TorchDispatchMode

import clipkernels as ck
from clipkernels import reference
from clipkernels.backend import interpreting
from clipkernels.reference.affinity import ROWS
from clipkernels.testing import assert_same, assert_within_budget, with_gaps
from clipkernels.testing.fp64 import REFERENCE_EPS
from tests import readings
from tests.readings import read

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(queries, support, labels, classes, beta, weights=None):
    """Return affinities (t,K) by Tip-Adapter's two products, in the dtype of the inputs."""
    inside = (labels >= 0) & (labels < classes)
    affinities = (-beta * (1 - queries @ support.T)).exp()
    affinities = affinities if weights is None else affinities * weights.to(affinities.dtype)
    return affinities @ (one_hot(labels * inside, classes) * inside[:, None]).to(affinities.dtype)


def inputs(device, t=16, n=65, width=24, classes=10, dtype=torch.float32, seed=0):
    """Return unit queries (t,E), each near one of the unit rows (n,E), the rows, and labels (n,) in random order."""
    generator = torch.Generator().manual_seed(seed)
    support = normalize(torch.randn(n, width, generator=generator), dim=1)
    queries = torch.randn(t, width, generator=generator)
    if n:
        queries = queries / width**0.5 + support[torch.randint(n, (t,), generator=generator)]
    labels = torch.randint(classes, (n,), generator=generator)
    return normalize(queries, dim=1).to(device, dtype), support.to(device, dtype), labels.to(device)


def check(queries, support, labels, classes, beta=5.5, weights=None, *, backend):
    """Assert that the result is within the budget, without offsets, and return it."""
    actual = ck.ops.affinity(queries, support, labels, classes, beta, weights, backend=backend)
    assert actual.dtype == torch.float32 and actual.shape == (len(queries), classes) and actual.is_contiguous()
    arguments = (queries, support, labels, classes, beta, weights)
    exact = read(readings.affinity, *arguments)
    error = (actual - exact).abs().max()
    if backend == "reference" and error <= REFERENCE_EPS * torch.finfo(actual.dtype).eps * exact.abs().max():
        return actual  # it sums row after row, eager's product by tiles
    assert_within_budget(actual, exact, eager(*arguments))
    return actual


SUPPORTS = {
    "balanced": ([0] * 7 + [1] * 7 + [2] * 7, 3),
    "unbalanced": ([0] + [1] * 90 + [2, 2] + [3] * 40 + [4], 5),
    "classes without support": ([1] * 3 + [4] * 70 + [17] * 2, 40),
    "one shot": (list(range(33)), 33),
    "one class": ([0] * 70, 1),
    "labels outside": ([-5] * 3 + [-1] * 70 + [0] * 4 + [1] * 9 + [2] * 5 + [99], 2),
    "labels outside alone": ([-1] * 3 + [2] * 3, 2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SUPPORTS)
def test_affinity_sums_over_the_rows_of_each_class(device, backend, kind, dtype):
    labels, classes = SUPPORTS[kind]
    queries, support, _ = inputs(device, n=len(labels), dtype=dtype)
    shuffled = torch.tensor(labels)[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    actual = check(queries, support, shuffled.to(device), classes, backend=backend)
    absent = torch.tensor([label not in labels for label in range(classes)])
    assert (actual[:, absent] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "n", "width"), [(1, 1, 7), (3, 63, 16), (65, 65, 33), (2, 257, 129), (129, 2, 24)])
def test_any_number_of_queries_rows_and_elements_works(device, backend, t, n, width, dtype):
    queries, support, labels = inputs(device, t, n, width, dtype=dtype)
    check(queries, support, labels, 10, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0, 1, 5.5, 200])
def test_any_sharpness_works(device, backend, beta, dtype):
    queries, support, labels = inputs(device, dtype=dtype)
    actual = check(queries, support, labels, 10, beta, backend=backend)
    if beta == 0:
        assert torch.equal(actual, labels.bincount(minlength=10).expand(16, -1).float())


@pytest.mark.parametrize("classes", [1, 2, 10, 100, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_number_of_classes_works(device, backend, classes):
    queries, support, labels = inputs(device, n=257, classes=classes)
    check(queries, support, labels, classes, backend=backend)


def test_the_reference_handles_a_thousand_classes(device):
    queries, support, labels = inputs(device, n=2001, classes=1000)
    check(queries, support, labels, 1000, backend="reference")


@pytest.mark.parametrize(
    ("dtype", "weights_dtype"), [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32)]
)
def test_rows_count_by_their_weights(device, backend, dtype, weights_dtype):
    queries, support, labels = inputs(device, dtype=dtype)
    weights = torch.randn(65, generator=torch.Generator().manual_seed(2))
    weights[::3] = 0
    check(queries, support, labels, 10, weights=weights.to(device, weights_dtype), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_queries_may_have_any_length(device, backend, dtype):
    queries, support, labels = inputs(device, dtype=dtype)
    lengths = torch.linspace(0, 3, 65, device=device, dtype=dtype)
    check(queries * 2, support * lengths[:, None], labels, 10, 3, backend=backend)


@pytest.mark.parametrize(("t", "n"), [(0, 5), (3, 0), (0, 0)])
def test_no_queries_give_an_empty_result_and_no_support_zeros(device, backend, t, n):
    queries, support, labels = inputs(device, t, n)
    actual = ck.ops.affinity(queries, support, labels, 10, 5.5, backend=backend)
    assert torch.equal(actual, torch.zeros(t, 10, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sorted_support_with_offsets_gives_the_same(device, backend, dtype):
    queries, support, labels = inputs(device, n=257, dtype=dtype)
    labels -= 1  # label -1 is of no class, and class 9 has no support
    weights = torch.rand(257, generator=torch.Generator().manual_seed(3)).to(device)
    expected = ck.ops.affinity(queries, support, labels, 10, 5.5, weights, backend=backend)
    order, offsets = reference.sort_by_class(labels, 10)
    assert labels[order].tolist() == sorted(labels.tolist())
    assert offsets.tolist() == [sum(label < c for label in labels.tolist()) for c in range(11)]
    sorted_arguments = (queries, support[order], labels[order], 10, 5.5, weights[order])
    assert_same(ck.ops.affinity(*sorted_arguments, offsets=offsets, backend=backend), expected, backend)
    assert_same(ck.ops.affinity(*sorted_arguments, backend=backend), expected, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_class_of_many_rows_works_beside_classes_of_one(device, backend, rows, dtype):
    queries, support, _ = inputs(device, n=rows + 6, dtype=dtype)
    labels = torch.tensor([0, 1] + [2] * rows + [3, 5, 6, 6], device=device)
    check(queries, support, labels, 7, backend=backend)


@pytest.mark.slow
def test_the_kernel_handles_twenty_thousand_rows(device, triton):
    queries, support, labels = inputs(device, n=20_000, classes=40, dtype=torch.float16)
    check(queries, support, labels, 40, backend="triton")


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy warns under the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_spoils_only_its_class(device, backend, value, dtype):
    queries, support, labels = inputs(device, dtype=dtype)
    queries[:, 0] = queries[:, 0].abs().clamp(min=0.25)  # without this ∞ could become an affinity of 0
    expected = ck.ops.affinity(queries, support, labels, 10, 5.5, backend=backend)
    support[7, 0], bad_class = value, int(labels[7])
    actual = ck.ops.affinity(queries, support, labels, 10, 5.5, backend=backend)
    others = [c for c in range(10) if c != bad_class]
    torch.testing.assert_close(actual[:, others], expected[:, others])
    assert not actual[:, bad_class].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_give_the_same_result(device, backend, dtype):
    queries, support, labels = inputs(device, dtype=dtype)
    weights = torch.rand(65, generator=torch.Generator().manual_seed(3)).to(device)
    expected = ck.ops.affinity(queries, support, labels, 10, 5.5, weights, backend=backend)
    gaps = (with_gaps(queries), with_gaps(support), with_gaps(labels[:, None].expand(-1, 2).float())[:, 0].long())
    strided_weights = weights.repeat_interleave(2)[::2]
    assert_same(ck.ops.affinity(*gaps, 10, 5.5, strided_weights, backend=backend), expected, backend)
    transposed = queries.T.contiguous().T, support.T.contiguous().T
    torch.testing.assert_close(ck.ops.affinity(*transposed, labels, 10, 5.5, weights, backend=backend), expected)
    expanded = ck.ops.affinity(queries[:1].expand(4, -1), support, labels, 10, 5.5, weights, backend=backend)
    torch.testing.assert_close(expanded, expected[:1].expand(4, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_has_the_same_bits_alone_and_in_a_batch(device, dtype, triton):
    queries, support, labels = inputs(device, t=130, n=140, classes=3, dtype=dtype)
    queries[5] = float("nan")  # a query that is not finite must not change others either
    arguments = (support, labels, 3, 5.5)
    expected = ck.ops.affinity(queries, *arguments, backend="triton")
    rerun = ck.ops.affinity(queries, *arguments, backend="triton")
    assert expected[5].isnan().all() and torch.equal(expected.nan_to_num(), rerun.nan_to_num())
    for rows in (slice(0, 1), slice(6, 9), slice(64, 130)):
        assert torch.equal(expected[rows], ck.ops.affinity(queries[rows], *arguments, backend="triton"))


def test_the_affinities_are_never_entirely_in_memory(device):
    queries, support, labels = inputs(device, n=20 * ROWS)

    class LargestAllocation(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None and result.dtype == torch.float32:
                self.elements = max(self.elements, result.numel())
            return result

    order, _ = reference.sort_by_class(labels, 10)
    support, labels = support[order], labels[order]
    with LargestAllocation() as largest:
        reference.affinity(queries, support, labels, 10, 5.5, None)
    assert 0 < largest.elements <= ROWS * 24


def test_the_reference_keeps_fp64(device):
    queries, support, labels = inputs(device, dtype=torch.float64)
    actual = ck.ops.affinity(queries, support, labels, 10, 5.5)
    torch.testing.assert_close(actual, read(readings.affinity, queries, support, labels, 10, 5.5))


def test_the_reference_is_differentiable_in_queries_rows_and_weights():
    queries, support, labels = inputs("cpu", t=2, n=9, width=3, classes=4, dtype=torch.float64)
    labels[0] = -1
    weights = torch.rand(9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (queries, support, weights)]

    def votes(queries, support, weights):
        return ck.ops.affinity(queries, support, labels, 4, 2.5, weights, backend="reference")

    assert torch.autograd.gradcheck(votes, leaves)


def test_gradients_are_right_across_chunks_of_rows():
    queries, support, labels = inputs("cpu", n=2 * ROWS + 1, dtype=torch.float64)
    queries, support = queries.requires_grad_(), support.requires_grad_()
    grad_output = torch.randn(16, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    actual = ck.ops.affinity(queries, support, labels, 10, 5.5, backend="reference")
    eager_result = (-5.5 * (1 - queries @ support.T)).exp() @ one_hot(labels, 10).double()
    torch.testing.assert_close(actual, eager_result)
    expected = torch.autograd.grad((eager_result * grad_output).sum(), (queries, support))
    for actual_grad, expected_grad in zip(
        torch.autograd.grad((actual * grad_output).sum(), (queries, support)), expected, strict=True
    ):
        torch.testing.assert_close(actual_grad, expected_grad)


@pytest.mark.parametrize("leaf", ["queries", "support", "weights"])
def test_the_kernel_raises_for_a_gradient(device, leaf, triton):
    queries, support, labels = inputs(device)
    arguments = {"queries": queries, "support": support, "weights": torch.ones(65, device=device)}
    arguments[leaf].requires_grad_()
    actual = ck.ops.affinity(**arguments, labels=labels, classes=10, beta=5.5, backend="triton")
    with pytest.raises(RuntimeError, match="clipkernels::affinity has no backward: detach its inputs"):
        actual.sum().backward()
    with torch.no_grad():
        assert not ck.ops.affinity(**arguments, labels=labels, classes=10, beta=5.5, backend="triton").requires_grad


def test_autocast_changes_nothing(device, backend):
    queries, support, labels = inputs(device)
    expected = ck.ops.affinity(queries, support, labels, 10, 5.5, backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        assert_same(ck.ops.affinity(queries, support, labels, 10, 5.5, backend=backend), expected, backend)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_operator_passes_opcheck(device, weighted):
    pytest.importorskip("triton", reason="triton is not installed: it exists only on Linux")
    queries, support, labels = inputs(device, n=17)
    order, offsets = reference.sort_by_class(labels, 10)
    weights = torch.rand(17, device=device) if weighted else None
    tensors = (queries, support[order], offsets, 5.5, weights)
    torch.library.opcheck(torch.ops.clipkernels.affinity.default, tensors)


def test_one_graph_takes_any_number_of_queries(device, backend):
    queries, support, labels = inputs(device, t=9)
    graphs = []

    def count(graph, examples):
        graphs.append(graph)
        return graph.forward

    def doubled(queries, support, labels):
        return ck.ops.affinity(queries, support, labels, 10, 5.5, backend=backend) * 2

    compiled = torch.compile(doubled, fullgraph=True, dynamic=True, backend=count)
    for t in (9, 2, 5):
        expected = doubled(queries[:t], support, labels)
        torch.testing.assert_close(compiled(queries[:t].clone(), support, labels), expected)
    assert len(graphs) == 1
    compiled_once = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled_once(queries, support, labels), doubled(queries, support, labels))


def test_an_exported_program_takes_any_number_of_queries(device, backend):
    queries, support, labels = inputs(device, t=9)

    class Head(torch.nn.Module):
        def forward(self, queries, support, labels):
            return ck.ops.affinity(queries, support, labels, 10, 5.5, backend=backend)

    shapes = ({0: torch.export.Dim("t")}, None, None)
    program = torch.export.export(Head(), (queries, support, labels), dynamic_shapes=shapes).module()
    for t in (9, 3):
        torch.testing.assert_close(program(queries[:t], support, labels), Head()(queries[:t], support, labels))


def test_the_kernel_supports_strides_beyond_32_bits(tmp_path, triton):
    if not interpreting():
        pytest.skip("the sparse file is CPU memory, which only interpreted kernels can read")
    # A sparse file: 6 GiB of addresses, a few pages of disk.
    stride = 2**30 + 8
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + 8, dtype=torch.float16)
    strided = memory.as_strided((4, 8), (stride, 1))
    queries, support, labels = inputs("cpu", t=4, n=4, width=8, classes=2, dtype=torch.float16)
    order, offsets = reference.sort_by_class(labels, 2)
    support, labels = support[order], labels[order]
    expected = ck.ops.affinity(queries, support, labels, 2, 5.5, offsets=offsets, backend="triton")
    strided.copy_(support)
    assert torch.equal(ck.ops.affinity(queries, strided, labels, 2, 5.5, offsets=offsets, backend="triton"), expected)
    strided.copy_(queries)
    assert torch.equal(ck.ops.affinity(strided, support, labels, 2, 5.5, offsets=offsets, backend="triton"), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.ones(3, 24, 1)}, r"queries must be \(t,E\) with E ≥ 1, got \(3,24,1\)"),
        ({"queries": torch.ones(3, 0), "support": torch.ones(65, 0)}, r"E ≥ 1, got \(3,0\)"),
        ({"queries": torch.ones(3, 24).long()}, "queries must be float32, float16, bfloat16 or float64, got"),
        ({"support": torch.ones(65, 23)}, r"support must be \(n,E\) with E = 24, got \(65,23\)"),
        ({"support": torch.ones(65, 24).half()}, "support must be torch.float32 on cpu, got torch.float16"),
        ({"labels": torch.zeros(64).long()}, r"labels must be \(65\) torch.int64 on cpu, got \(64\)"),
        ({"labels": torch.zeros(65).int()}, r"labels must be .* got \(65\) torch.int32 on cpu"),
        ({"beta": "1"}, "beta must be a finite number, got '1'"),
        ({"beta": float("inf")}, "beta must be a finite number, got inf"),
        ({"classes": 0}, "classes must be an int from 1 to 2³¹ - 1 = 2147483647, got 0"),
        ({"classes": True}, "classes must be an int from 1 to 2³¹ - 1 = 2147483647, got True"),
        ({"weights": torch.ones(64)}, r"weights must be \(n\) = \(65\) on cpu, got \(64\)"),
        ({"weights": torch.ones(65).long()}, "weights must be float32"),
        ({"offsets": torch.zeros(10).long()}, r"offsets must be \(11\) torch.int64 on cpu, got \(10\)"),
    ],
)
def test_errors_name_the_bad_argument_on_every_backend(backend, change, message):
    queries, support, labels = inputs("cpu")
    arguments = {"queries": queries, "support": support, "labels": labels, "classes": 10, "beta": 5.5, **change}
    with pytest.raises(ValueError, match=message):
        ck.ops.affinity(**arguments, backend=backend)
