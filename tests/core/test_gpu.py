"""Tests that need a GPU: CUDA graphs, Inductor's code around the operators, and no host synchronisation."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import clipkernels as ck
from bench import runners
from clipkernels.graphs import GRAPHS
from clipkernels.measure.timing import Variant, vary
from clipkernels.testing import (
    method_id,
    open_clip_tower,
    patch_ranking,
    patched_with,
    randomized,
    timm_tower,
    transformers_tower,
)
from clipkernels.testing.cases import CASES
from clipkernels.testing.fp64 import flat
from clipkernels.testing.inputs import SHAPES, InputFactory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
CUDA = torch.device("cuda")
METHODS = [ck.Dense(), ck.EViT(0.5), ck.ToMe(8), ck.TCA(0.1), partial(patch_ranking, learnt=2)]


@pytest.mark.parametrize("op", CASES)
@torch.inference_mode()
def test_an_operation_replays_from_a_cuda_graph(op):
    case, source = CASES[op], InputFactory(SHAPES["B-16"], 2, torch.bfloat16, CUDA)
    inputs, new_inputs = case.inputs(source), case.inputs(source)
    expected = flat(case.call(source, "triton", *new_inputs))
    case.call(source, "triton", *inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = flat(case.call(source, "triton", *inputs))
    for tensor, other in zip(inputs, new_inputs, strict=True):
        tensor.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("op", CASES)
@torch.inference_mode()
def test_a_later_launch_computes_what_a_first_one_does(op):
    from clipkernels.kernels.launch import forget_launches

    case, source = CASES[op], InputFactory(SHAPES["B-16"], 2, torch.bfloat16, CUDA)
    inputs, new_inputs = case.inputs(source), case.inputs(source)
    case.call(source, "triton", *inputs)
    later = flat(case.call(source, "triton", *new_inputs))
    forget_launches()
    first = flat(case.call(source, "triton", *new_inputs))
    assert all(torch.equal(one, other) for one, other in zip(later, first, strict=True))


@pytest.mark.parametrize("op", CASES)
@torch.inference_mode()
def test_no_operation_synchronises_with_the_gpu(op):
    case, source = CASES[op], InputFactory(SHAPES["B-32"], 2, torch.bfloat16, CUDA)
    inputs = case.inputs(source)
    case.call(source, "triton", *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.call(source, "triton", *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", CASES)
@torch.inference_mode()
def test_an_operation_compiles_with_inductor(op):
    torch._dynamo.reset()
    case, source = CASES[op], InputFactory(SHAPES["B-32"], 2, torch.bfloat16, CUDA)
    inputs = case.inputs(source)
    compiled = torch.compile(lambda *inputs: case.call(source, "triton", *inputs), fullgraph=True)
    expected = flat(case.call(source, "triton", *inputs))
    assert all(torch.equal(one, other) for one, other in zip(flat(compiled(*inputs)), expected, strict=True))


def tower(name, method):
    """The bf16 tower of one library, patched, and two batches of images for it."""
    library, _, kind = name.partition(" ")
    pytest.importorskip(library, reason=f"{library} is not installed")
    make = {"open_clip": open_clip_tower, "timm": timm_tower, "transformers": transformers_tower}[library]
    model = patched_with(randomized(make(kind)).to(CUDA, torch.bfloat16), method)
    adapter = ck.tower_of(model)
    return adapter, torch.randn(2, 4, 3, *adapter.image_size, device=CUDA, dtype=torch.bfloat16)


TOWERS = (
    "open_clip ViT-B-32",
    "timm vit_base_patch16_siglip_224",
    "timm eva02_base_patch16_clip_224",
    "transformers CLIPModel",
)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("method", METHODS, ids=method_id)
@pytest.mark.parametrize("name", TOWERS)
@torch.inference_mode()
def test_a_compiled_tower_gives_the_eager_embedding(name, method, mode):
    if mode != "default" and not name.startswith("open_clip") and method != METHODS[1]:
        pytest.skip("each compiles for minutes: one method in every mode is enough for the other libraries")
    torch._dynamo.reset()
    adapter, (images, _) = tower(name, method)
    expected = adapter.encode(images).float()
    actual = torch.compile(adapter.encode, fullgraph=True, mode=mode)(images).float()
    assert torch.nn.functional.cosine_similarity(actual, expected).min() > 0.99


@pytest.mark.parametrize("method", METHODS, ids=method_id)
@pytest.mark.parametrize("name", TOWERS)
@torch.inference_mode()
def test_a_tower_replays_from_a_cuda_graph(name, method):
    adapter, images = tower(name, method)
    expected = adapter.encode(images[1])
    actual = runners.in_cuda_graph(Variant(adapter.encode, method, exact=False), images[0]).encode(images[1])
    torch.cuda.synchronize()
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)


def assert_alike(actual, expected):
    """Assert that two batches of bf16 embeddings differ by no more than rounding."""
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.02, error


@pytest.mark.parametrize("method", [ck.Dense(), ck.EViT(0.5), partial(patch_ranking, learnt=2)], ids=method_id)
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_graphed_tower_gives_the_eager_embedding(name, method):
    (eager, _), (adapter, (images, others)) = tower(name, method), tower(name, method)
    eager.root.load_state_dict(adapter.root.state_dict())
    ck.graphed(adapter.root, batch_sizes=(1, 4))
    graphs = vars(adapter.root)[GRAPHS]

    def captured_after(change):
        for root in (eager.root, adapter.root):
            change(root)
        first, kept = adapter.encode(images), adapter.encode(images).clone()
        expected = eager.encode(others)  # rounding depends on the batch size, and choices on rounding
        for actual in (adapter.encode(others), adapter.encode(others[:3])):  # the second is padded
            assert_alike(actual, expected[: len(actual)])
        assert_alike(adapter.encode(images[:1]), eager.encode(images[:1]))
        assert torch.equal(first, kept) and graphs.captures.keys() == {1, 4} and not graphs.failed
        return [capture.replay for capture in graphs.captures.values()]

    def scale(root):
        for parameter in root.parameters():
            parameter.mul_(0.9)

    def move(root):
        for parameter in root.parameters():
            parameter.data = parameter.data * 1.1

    once = captured_after(lambda root: None)
    assert captured_after(scale) == once
    assert captured_after(move) != once
    captured_after(ck.unpatch)


@torch.no_grad()
def test_threads_and_streams_share_the_graphs_of_a_tower():
    adapter, images = tower("open_clip ViT-B-32", ck.EViT(0.5))
    batches = [images.flatten(0, 1)[start : start + size] for start in range(4) for size in (1, 4)]
    expected = [adapter.encode(batch) for batch in batches]
    ck.graphed(adapter.root, batch_sizes=(1, 4))

    def encode(batch):
        stream = torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(stream):
            results = [adapter.encode(batch) for _ in range(20)]
        stream.synchronize()
        return results

    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        for results, other in zip(pool.map(encode, batches), expected, strict=True):
            for one in results:
                assert_alike(one, other)


def test_a_graphed_tower_trains_and_moves():
    adapter, (images, _) = tower("open_clip ViT-B-32", ck.ToMe(4))
    ck.graphed(adapter.root, batch_sizes=(4,))
    adapter.encode(images).float().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.owner.parameters())
    graphs = vars(adapter.root)[GRAPHS]
    with torch.no_grad():
        expected = adapter.encode(images)
        adapter.root.to("cpu")
        assert not graphs.captures
        assert adapter.encode(images.cpu()).isfinite().all()
        adapter.root.to(CUDA)
        assert_alike(adapter.encode(images), expected)
        assert graphs.captures.keys() == {4}
        graph = torch.cuda.CUDAGraph()  # of the caller's, which holds the forward itself
        with torch.cuda.graph(graph):
            outer = adapter.encode(images)
        graph.replay()
        assert_alike(outer, expected)


@pytest.mark.parametrize("head", [ck.Reservoir, ck.TDA])
@torch.inference_mode()
def test_the_caches_of_a_file_move_to_the_models_device(head, tmp_path):
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    model, _, tokenizer = ck.bundled()
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    on_cpu = ck.Classifier(model, tokenizer, ("cat", "dog"), method=ck.TCA(0.1), head=head)
    for batch in images.split(8):
        on_cpu(batch)
    on_cpu.head.save(tmp_path / "caches.safetensors")
    model.to(CUDA)
    classifier = ck.Classifier(model, tokenizer, ("cat", "dog"), method=ck.TCA(0.1), head=head)
    classifier.head.load(tmp_path / "caches.safetensors")
    assert classifier(images[:8].to(CUDA)).isfinite().all() and classifier.head.seen == 32


@pytest.mark.parametrize("name", ["open_clip ViT-B-32", "timm vit_base_patch16_siglip_224"])
@torch.inference_mode()
def test_the_runners_of_the_benchmarks_give_the_embedding(name):
    """Run the host's own forward, and a method on kernels and in plain PyTorch, eagerly and from a graph."""
    adapter, images = tower(name, ck.EViT(0.5))
    model = adapter.root
    variants = vary(ck.unpatch(model), {"host": None, "EViT": ck.EViT(0.5)})
    variants["plain"] = runners.plain(variants["EViT"])
    for label, variant in variants.items():
        graph = runners.in_cuda_graph(variant, images[0])
        for batch in images:
            torch.testing.assert_close(graph.encode(batch), variant.encode(batch), rtol=0.02, atol=0.02)
        assert 10 < runners.launches(partial(variant.encode, images[0])) < 200, label
    assert runners.matmul_rate(torch.bfloat16, CUDA) > 1
