"""Towers of every library exported by torch.export and to ONNX, and run in onnxruntime at other batch sizes."""

from functools import partial

import pytest
import torch
from torch import nn

import clipkernels as ck
from clipkernels.testing import (
    open_clip_tower,
    openai_tower,
    patch_ranking,
    patched_with,
    randomized,
    timm_tower,
    transformers_tower,
)

# One step each, in the first block, so that the second block runs on its result.
METHODS = {
    "Dense": ck.Dense(),
    "EViT": ck.EViT(0.5, blocks=(0,)),
    "ToMe": ck.ToMe([4]),
    "TCA": ck.TCA(0.1, blocks=(0,)),
    "PatchRanking": partial(patch_ranking, learnt=2),
}
SMALL = {"embed_dim": 64, "num_heads": 2, "img_size": 64, "num_classes": 24}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "image_size": 64}
BATCH = torch.export.Dim("batch", min=1, max=64)
pytestmark = pytest.mark.filterwarnings("ignore:.*lru_cache.*", "ignore:.*axis name.*")


def _need(module):
    """The module, or skip the test if it is not installed."""
    return pytest.importorskip(module, reason=f"{module} is not installed")


def _transformers():
    _need("transformers")
    if torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 cannot trace the host's own forward in transformers 5")
    return transformers_tower("CLIPModel", **SIZES)


def _openai():
    _need("clip.model")
    return openai_tower(2, 64, 16, 64, 32)


def _timm(name):
    _need("timm")
    return timm_tower(name, 2, **SMALL)


TOWERS = {
    "open_clip": lambda: open_clip_tower("ViT-B-16", width=64, head_width=32, image_size=64),
    "transformers": _transformers,
    "timm": lambda: _timm("vit_base_patch16_siglip_224"),
    "OpenAI": _openai,
    "timm EVA02": lambda: _timm("eva02_base_patch16_clip_224"),
    "timm PE-Core": lambda: _timm("vit_pe_core_base_patch16_224"),
}
PAIRS = [(name, method) for name in TOWERS for method in METHODS]
# SigLIP has no CLS, so merged tokens are copied back to the positions of their patches for the pool.
IN_ONNX = [("open_clip", "EViT"), ("timm", "ToMe")]
IN_TORCHSCRIPT = [
    *(("open_clip", method) for method in METHODS),
    ("transformers", "ToMe"),
    ("timm", "TCA"),
    ("OpenAI", "ToMe"),
    ("timm EVA02", "PatchRanking"),
]
TRACED = [("open_clip", "ToMe"), ("transformers", "ToMe"), ("timm", "ToMe"), ("timm EVA02", "EViT")]


def _marked(quick):
    """Every tower with every method; a pair that is not in `quick` is slow."""
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in PAIRS]


class Embedding(nn.Module):
    """A module that returns only the embedding."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return ck.encode_image(self.model, images).embedding


class Call(nn.Module):
    """A module that calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def build(name, method):
    """The module that a user exports, and images for the trace and for two other batch sizes."""
    model = patched_with(randomized(TOWERS[name]()), METHODS[method])
    module = Embedding(model) if name == "transformers" else getattr(model, "visual", model)
    generator = torch.Generator().manual_seed(0)
    return module, [torch.randn(n, 3, 64, 64, generator=generator) for n in (2, 1, 5)]


def in_onnxruntime(module, inputs, opset=18):
    """The ONNX model of a module whose inputs share a batch size, and a function that runs it."""
    runtime = _need("onnxruntime")
    _need("onnx"), _need("onnxscript")
    shapes = tuple({0: BATCH} for _ in inputs)
    if isinstance(module, Call):  # *inputs is one argument
        shapes = (shapes,)
    program = torch.onnx.export(
        module.eval(), inputs, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
    )
    model = program.model_proto
    if torch.__version__.startswith("2.6."):
        # It holds the batch size of the trace, which onnxruntime takes for the only one.
        del model.graph.value_info[:]
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def encode(*inputs):
        names = [tensor.name for tensor in session.get_inputs()]
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(actual) for actual in session.run(None, feed)]

    return model, encode


def kinds(nodes):
    """The operators of an ONNX graph and of those inside its nodes."""
    operators = {node.op_type for node in nodes}
    for node in nodes:
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                operators |= kinds(graph.node)
    return operators


def assert_slim(model, opset=18):
    """Assert that an ONNX model has this opset or a later one, a free batch size, and no scatter, loop or branch."""
    assert {entry.domain: entry.version for entry in model.opset_import}[""] >= opset
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    operators = kinds([*model.graph.node, *(node for function in model.functions for node in function.node)])
    slow = {kind for kind in operators if "Scatter" in kind or kind in ("Loop", "Scan", "If", "NonZero", "Unique")}
    assert not slow


def assert_near(actual, expected):
    """Assert that two tensors differ by 1e-5 of the largest value at most."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("name", "method"), _marked(TRACED))
@torch.no_grad()
def test_torch_export_serves_every_batch_without_scatters(name, method):
    module, (images, *batches) = build(name, method)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: BATCH},), strict=False)
    assert not [node.target for node in program.graph.nodes if "scatter" in str(node.target)]
    for other in batches:
        assert_near(program.module()(other), module(other))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(("name", "method"), _marked(IN_TORCHSCRIPT))
@torch.no_grad()
def test_a_trace_serves_every_batch(name, method):
    module, (images, *batches) = build(name, method)
    traced = torch.jit.trace(module, images, check_trace=False)
    for other in (images, *batches):
        assert_near(traced(other), module(other))


@torch.no_grad()
def test_a_transformers_vision_model_exports_with_every_token():
    model = ck.patch(randomized(_transformers()), METHODS["ToMe"])
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(model.vision_model, (images,), dynamic_shapes=({0: BATCH},), strict=False)
    actual, expected = program.module()(images[:1]), model.vision_model(images[:1])
    assert actual.last_hidden_state.shape == (1, 17, 64)
    assert_near(actual.last_hidden_state, expected.last_hidden_state)
    assert_near(actual.pooler_output, expected.pooler_output)


@pytest.mark.parametrize(("name", "method"), _marked(IN_ONNX))
@torch.no_grad()
def test_onnxruntime_gives_the_embedding_at_every_batch_size(name, method):
    module, (images, *batches) = build(name, method)
    model, encode = in_onnxruntime(module, (images,))
    assert_slim(model)
    for other in batches:
        (actual,) = encode(other)
        assert_near(actual, module(other))


def scores_with_ties():
    """Scores (4,9): all equal; equal in pairs; with NaN and -inf; with infinities and a NaN."""
    nan, inf = float("nan"), float("inf")
    pairs = [0.3, 0.1, 0.3, 0.2, 0.1, 0.2, 0.0, -0.0, 0.3]
    absent = [nan, 0.1, -inf, nan, 0.2, 0.1, -inf, nan, 0.2]
    return torch.tensor([[0.5] * 9, pairs, absent, [inf, 0.1, inf, -inf, nan, inf, 0.1, -inf, 0.2]])


@pytest.mark.parametrize("keep", [4, pytest.param(9, marks=pytest.mark.slow)])
@torch.no_grad()
def test_pruning_in_onnxruntime_breaks_ties_by_index(keep):
    scores, x = scores_with_ties(), torch.randn(4, 10, 8, generator=torch.Generator().manual_seed(0))
    module = Call(lambda x, scores: ck.ops.prune_tokens(x, scores, keep)[:2])
    model, encode = in_onnxruntime(module, (x[:2], scores[:2]))
    assert_slim(model)
    tokens, index = encode(x, scores)
    expected = module(x, scores)
    assert torch.equal(index, expected[1]) and torch.equal(tokens, expected[0])
    assert index[0].tolist() == list(range(keep))


@pytest.mark.slow
@torch.no_grad()
def test_ranking_per_head_in_onnxruntime_breaks_ties_by_index():
    scores, x = scores_with_ties(), torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(0))
    module = Call(lambda x, scores: ck.ops.prune_tokens(x, scores, 5, heads="rank")[1])
    model, encode = in_onnxruntime(module, (x, scores.view(2, 2, 9)))
    assert_slim(model)
    assert torch.equal(encode(x, scores.view(2, 2, 9))[0], module(x, scores.view(2, 2, 9)))


@pytest.mark.parametrize("prefix", [pytest.param(0, marks=pytest.mark.slow), 1])
@torch.no_grad()
def test_matching_in_onnxruntime_breaks_ties_by_index(prefix):
    # Products of unit vectors along the axes are exactly 0 or 1, those of zero vectors 0; NaN ranks last.
    metric = torch.zeros(4, 9, 4)
    metric[0, :, 0] = 1
    metric[1] = metric[3] = torch.eye(4).repeat(3, 1)[:9]
    metric[3, ::3, 0] = float("nan")
    module = Call(lambda metric: ck.ops.match_tokens(metric, 3, prefix))
    model, encode = in_onnxruntime(module, (metric[:2],))
    assert_slim(model)
    for actual, expected in zip(encode(metric), module(metric), strict=True):
        assert torch.equal(actual, expected)


@torch.no_grad()
def test_attention_with_sizes_is_one_operator_of_opset_23():
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.randn(2, 3, 2, 9, 16, generator=generator), torch.rand(2, 9, generator=generator) + 1)
    module = Call(lambda qkv, size: ck.ops.attention(*qkv.unbind(1), size)[0])
    model, encode = in_onnxruntime(module, inputs, opset=23)
    assert_slim(model, 23)
    assert_near(encode(*inputs)[0], module(*inputs))
