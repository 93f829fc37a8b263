"""The bookkeeping of CUDA graphs, with the capture stubbed: what is replayed, what runs eagerly, what captures again.

A stub's replay runs the forward anew. Replays whose output is returned are counted; one that had started before the
tower was seen to have changed is not. tests/core/test_gpu.py captures real graphs.
"""

from __future__ import annotations

import copy
import gc
import pickle
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree
from torch.utils.flop_counter import FlopCounterMode

import clipkernels as ck
from clipkernels import compilation, cuda_graph, graphs
from clipkernels.layered_class import unserved
from clipkernels.testing import (
    open_clip_tower,
    openai_tower,
    patch_ranking,
    randomized,
    timm_tower,
    transformers_tower,
)

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
SMALL = {"embed_dim": 64, "num_heads": 2, "img_size": 32, "num_classes": 24}
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*lru_cache.*")]


class Counts:
    """The batch sizes captured, and the number of replays whose output was returned, since the last `take`."""

    def __init__(self) -> None:
        self.captures: list[int] = []
        self.replays = self.recorders = 0
        self.capturing = False
        self.error: Exception | None = None

    def take(self) -> tuple[list[int], int]:
        """Return both counts, and start them anew."""
        result = self.captures, self.replays
        self.captures, self.replays = [], 0
        return result


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Counts of a stub that stands in for the device's graphs."""
    counts = Counts()

    class Recorder:
        def __init__(self, device: torch.device) -> None:
            counts.recorders += 1
            self.busy = False

        @torch.inference_mode(False)
        @torch.no_grad()
        def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            if counts.error is not None:
                raise counts.error
            output = run()
            static = _pytree.tree_leaves(output)
            counts.captures.append(len(static[0]))

            @torch.inference_mode(False)
            @torch.no_grad()
            def replay() -> None:
                new = _pytree.tree_leaves(run())
                if [tensor.shape for tensor in new] == [tensor.shape for tensor in static]:
                    for old, tensor in zip(static, new, strict=True):
                        old.copy_(tensor)

            return replay, output

        @contextmanager
        def in_turn(self) -> Iterator[None]:
            assert not self.busy
            self.busy = True
            time.sleep(0)
            yield
            self.busy = False

        def wait(self) -> None:
            pass

    def output(capture: graphs.Capture, batch: int) -> Any:
        counts.replays += 1
        return returned(capture, batch)

    returned = graphs.Capture.output
    monkeypatch.setattr(graphs.Capture, "output", output)
    monkeypatch.setattr(cuda_graph, "Recorder", Recorder)
    monkeypatch.setattr(cuda_graph, "is_available", lambda device: device.type == "cpu")
    monkeypatch.setattr(cuda_graph, "is_capturing", lambda: counts.capturing)
    return counts


def _transformers(family: str) -> nn.Module:
    pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers_tower(family, **SIZES)


def _timm(name: str) -> nn.Module:
    pytest.importorskip("timm", reason="timm is not installed")
    return timm_tower(name, **SMALL)


def _openai() -> nn.Module:
    pytest.importorskip("clip.model", reason="OpenAI's clip is not installed")
    return openai_tower(2, 32, 8, 64, 24)


HOSTS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Any]]] = {
    "open_clip": (
        lambda: open_clip_tower("ViT-B-32", width=64, head_width=32, image_size=32, patch_size=8),
        lambda model, images: model.encode_image(images),
    ),
    "open_clip, tokens": (
        lambda: open_clip_tower("coca_base", width=64, head_width=32, image_size=32, patch_size=8),
        lambda model, images: model.visual(images),
    ),
    "transformers": (
        lambda: _transformers("CLIPModel"),
        lambda model, images: model.get_image_features(pixel_values=images),
    ),
    "transformers SigLIP": (
        lambda: _transformers("SiglipVisionModel"),
        lambda model, images: model(images),
    ),
    "transformers with projection": (
        lambda: _transformers("CLIPVisionModelWithProjection"),
        lambda model, images: model(pixel_values=images, output_hidden_states=False),
    ),
    "timm": (lambda: _timm("vit_base_patch8_224"), lambda model, images: model(images)),
    "timm Eva": (lambda: _timm("eva02_base_patch16_clip_224"), lambda model, images: model(images)),
    "OpenAI": (_openai, lambda model, images: model.encode_image(images)),
}


@pytest.fixture
def tower(tiny: nn.Module, counts: Counts) -> Any:
    """The bundled CLIP with graphs of 3 images and of 1, whose captures are counted already."""
    ck.graphed(tiny, batch_sizes=(1, 3, 3))
    assert counts.take() == ([3, 1], 0)
    return tiny


def leaves(output: Any) -> list[Tensor]:
    """The tensors of a host's output."""
    return _pytree.tree_leaves(output)


def assert_equal(actual: Any, expected: Any) -> None:
    """Assert that two outputs have the same structure and equal tensors."""
    assert type(actual) is type(expected)
    assert _pytree.tree_structure(actual) == _pytree.tree_structure(expected)
    assert all(torch.equal(one, other) for one, other in zip(leaves(actual), leaves(expected), strict=True))


@pytest.mark.parametrize("method", [None, ck.EViT(0.5)], ids=str)
@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_a_graphed_tower_gives_the_hosts_output(host, method, counts):
    make, call = HOSTS[host]
    model = randomized(make())
    if method is not None:
        ck.patch(model, method)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected, keys = call(model, images), list(model.state_dict())
    assert ck.graphed(model, batch_sizes=[4]) is model
    assert counts.take() == ([4], 0)
    for _ in range(2):
        assert_equal(call(model, images), expected)
    assert counts.take() == ([], 2)
    assert list(model.state_dict()) == keys and ck.method_of(model) == method
    ck.ungraphed(model)
    assert_equal(call(model, images), expected)
    assert counts.take() == ([], 0)


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_patching_and_graphs_are_undone_in_any_order(host, counts):
    make, call = HOSTS[host]
    model = randomized(make())
    tower = ck.tower_of(model)
    classes, images = (type(tower.root), type(tower.owner)), torch.randn(4, 3, 32, 32)
    before = call(model, images)
    for first, second in ((ck.unpatch, ck.ungraphed), (ck.ungraphed, ck.unpatch)):
        ck.patch(ck.graphed(model, batch_sizes=[4]), ck.ToMe(1))
        counts.take()
        merged = call(model, images)
        assert counts.take() == ([4], 1)
        with ck.patched(model, ck.Dense()):
            call(model, images)
        assert_equal(call(model, images), merged)
        assert counts.take() == ([4, 4], 2)
        first(model)
        call(model, images)
        second(model)
        assert (type(tower.root), type(tower.owner)) == classes
        assert graphs.GRAPHS not in vars(tower.root)
        assert_equal(call(model, images), before)


@pytest.mark.parametrize(
    ("batch", "pad", "captured"),
    [(1, True, True), (2, True, True), (4, True, True), (2, False, False), (5, True, False)],
)
@torch.no_grad()
def test_other_batch_sizes_are_padded_or_run_eagerly(tiny, counts, batch, pad, captured):
    images = torch.randn(batch, 3, 32, 32)
    expected = tiny.encode_image(images)
    ck.graphed(tiny, batch_sizes=(1, 4), pad=pad)
    counts.take()
    tiny.encode_image(torch.full((4, 3, 32, 32), float("nan")))  # rows that later calls do not fill
    actual = tiny.encode_image(images)
    assert counts.take() == ([], 1 + captured)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_output_is_a_copy(tower, images):
    first = tower.encode_image(images)
    kept = first.clone()
    tower.encode_image(images + 1)
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(tower.encode_image(images), kept)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "patch": lambda model: ck.patch(model, ck.EViT(0.5)),
    "assign": lambda model: model.load_state_dict(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True
    ),
    "move and return": lambda model: model.double().float(),
    "move blocks": lambda model: model.visual.transformer.double().float(),
    "new data": lambda model: setattr(model.visual.proj, "data", model.visual.proj.data.clone()),
    "new module": lambda model: setattr(
        model.visual.transformer.resblocks[1], "mlp", copy.deepcopy(model.visual.transformer.resblocks[0].mlp)
    ),
    "fewer blocks": lambda model: model.visual.transformer.resblocks.__delitem__(3),
    "new parameter": lambda model: model.visual.ln_post.register_parameter("extra", nn.Parameter(torch.zeros(1))),
    "new pool": lambda model: setattr(model.visual, "pool_type", "avg"),
    "another eps": lambda model: setattr(model.visual.ln_post, "eps", 0.5),
    "another attribute": lambda model: setattr(model.visual.transformer.resblocks[1].mlp, "is_switched_off", True),
    "another class": lambda model: setattr(model.visual.transformer.resblocks[1].mlp.gelu, "__class__", nn.Identity),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_tower_is_captured_again(tower, images, counts, change):
    tower.encode_image(images)
    before = counts.recorders
    CHANGES[change](tower)
    counts.take()
    actual = tower.encode_image(images)
    assert counts.take() == ([3], 1) and counts.recorders == before + 1
    assert torch.equal(tower.encode_image(images), actual)
    assert counts.take() == ([], 1)
    assert torch.equal(ck.ungraphed(tower).encode_image(images), actual)


class Counter(nn.Module):
    """A module that counts its calls, as a user's may."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


@torch.no_grad()
def test_an_attribute_that_a_capture_changes_is_part_of_it(tower, counts):
    counter = Counter().eval()
    tower.visual.transformer.resblocks[0].mlp.append(counter)
    ck.graphed(tower, batch_sizes=[1, 3])
    assert counts.take() == ([3, 1], 0) and counter.calls == 2
    # A stub's replay would count too.
    assert vars(tower.visual)[graphs.GRAPHS].snapshot.is_current(tower.visual)


class Adapted(nn.Module):
    """A projection with a term that can be switched off or scaled, as PEFT's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.term = base, nn.Linear(base.in_features, base.out_features)
        self.scaling, self.merged = {"default": 1.0}, list[str]()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else self.base(x) + self.scaling["default"] * self.term(x)


ADAPTER_CHANGES: dict[str, Callable[[Any], object]] = {
    "scaled": lambda adapted: adapted.scaling.update(default=2.0),
    "merged": lambda adapted: adapted.merged.append("default"),
}


@pytest.mark.parametrize("change", ADAPTER_CHANGES)
@torch.no_grad()
def test_an_adapter_that_changes_is_captured_again(tower, images, counts, change):
    mlp = tower.visual.transformer.resblocks[1].mlp
    mlp.c_fc = Adapted(mlp.c_fc).eval()
    before = tower.encode_image(images)
    counts.take()
    ADAPTER_CHANGES[change](mlp.c_fc)
    actual = tower.encode_image(images)
    assert counts.take() == ([3], 1)
    assert not torch.equal(actual, before)
    assert torch.equal(ck.ungraphed(tower).encode_image(images), actual)


@torch.no_grad()
def test_graphs_of_a_class_that_others_derived_are_captured_once(tower, images, counts):
    expected = tower.encode_image(images)
    parametrize.register_parametrization(tower.visual, "proj", nn.Identity())
    counts.take()
    ck.graphed(tower.eval(), batch_sizes=[3])  # below the parametrized class too
    assert counts.take() == ([3], 0)
    assert torch.equal(ck.ungraphed(tower).encode_image(images), expected)


@torch.no_grad()
def test_a_request_for_another_backend_is_captured_again(tower, images, counts, monkeypatch):
    monkeypatch.setenv("CLIPKERNELS_BACKEND", "reference")
    tower.encode_image(images)
    assert counts.take() == ([3], 1)


@torch.no_grad()
def test_weights_that_change_in_place_need_no_new_capture(tower, images, counts):
    other = {name: tensor + 0.01 for name, tensor in tower.state_dict().items()}
    tower.load_state_dict(other)
    actual = tower.encode_image(images)
    assert counts.take() == ([], 1)
    assert torch.equal(actual, ck.ungraphed(tower).encode_image(images))


@torch.no_grad()
def test_a_predictor_in_place_of_another_is_captured_again(tiny, images, counts):
    method = patch_ranking(tiny, learnt=2)
    expected = ck.patch(tiny, method).encode_image(images)
    ck.graphed(tiny, batch_sizes=[3])
    assert torch.equal(tiny.encode_image(images), expected)
    assert counts.take() == ([3], 1)
    predictor: Any = method.predictor
    for parameter in predictor.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(tiny.encode_image(images), expected)
    assert counts.take() == ([3], 1)
    handle = predictor.register_forward_hook(lambda *_: None)
    tiny.encode_image(images)
    assert counts.take() == ([], 0)
    handle.remove()


def _count_flops(model: Any, images: Tensor) -> None:
    with FlopCounterMode(display=False) as counter:
        model.encode_image(images)
    assert counter.get_total_flops() > 0


EAGER: dict[str, Callable[[Any, Tensor], Any]] = {
    "training": lambda model, images: model.train().encode_image(images),
    "a block trains": lambda model, images: (model.visual.transformer.resblocks[1].train(), model.encode_image(images)),
    "autocast": lambda model, images: torch.autocast("cpu", torch.bfloat16)(model.encode_image)(images),
    "vmap": lambda model, images: torch.vmap(lambda image: model.encode_image(image[None]))(images),
    "trace": lambda model, images: torch.jit.trace(model.visual, images, check_trace=False),
    "export": lambda model, images: torch.export.export(model.visual, (images,), strict=False),
    "compile": lambda model, images: torch.compile(model.encode_image, backend="eager", fullgraph=True)(images),
    "dispatch mode": lambda model, images: _count_flops(model, images),
    "empty batch": lambda model, images: model.encode_image(images[:0]),
    "other size": lambda model, images: model.encode_image(images[:, :, :, :16]),
    "other dtype": lambda model, images: model.encode_image(images.double()),
}


@pytest.mark.parametrize("situation", EAGER)
@torch.no_grad()
def test_a_call_that_a_graph_cannot_serve_runs_eagerly(tower, images, counts, situation):
    torch._dynamo.reset()
    # The host itself refuses some images.
    refused = situation.startswith(("empty", "other"))
    with pytest.raises(RuntimeError) if refused else nullcontext():
        EAGER[situation](tower, images)
    assert counts.take() == ([], 0)
    tower.eval()
    tower.encode_image(images)
    assert counts.take() == ([], 1)  # nothing was captured again


def test_gradients_are_those_without_graphs(tower, images, counts):
    def gradients(model: Any) -> list[Tensor]:
        inputs = images.clone().requires_grad_()
        model.zero_grad()
        model.encode_image(inputs).square().sum().backward()
        return [inputs.grad, *(p.grad.clone() for p in model.visual.parameters())]  # type: ignore[list-item]

    actual = gradients(tower)
    assert counts.take() == ([], 0)
    tower.visual.requires_grad_(False)
    frozen = tower.encode_image(images)
    assert counts.take() == ([], 1) and not frozen.requires_grad
    tower.encode_image(images.clone().requires_grad_())
    assert counts.take() == ([], 0)
    tower.visual.requires_grad_(True)
    assert all(torch.equal(*pair) for pair in zip(actual, gradients(ck.ungraphed(tower)), strict=True))


@torch.no_grad()
def test_a_capture_of_the_callers_runs_the_forward_itself(tower, images, counts):
    counts.capturing = True
    tower.encode_image(images)
    assert counts.take() == ([], 0)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("name", ["", "ln_post", "transformer.resblocks.1"])
@torch.no_grad()
def test_a_hook_fires_because_its_tower_runs_eagerly(tower, images, counts, register, name):
    calls: list[str] = []
    handle = getattr(tower.visual.get_submodule(name), register)(lambda *_: calls.append(name))
    tower.encode_image(images)
    assert calls == [name] and counts.take() == ([], 0)
    handle.remove()
    tower.encode_image(images)
    assert counts.take() == ([], 1)


@torch.no_grad()
def test_a_hook_of_all_modules_fires(tower, images, counts):
    calls: list[nn.Module] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        tower.encode_image(images)
    finally:
        handle.remove()
    assert tower.visual in calls and counts.take() == ([], 0)


@torch.no_grad()
def test_a_replaced_forward_is_called(tower, images, counts):
    norm = tower.visual.ln_post
    norm.forward = lambda x: torch.zeros_like(x)
    assert tower.encode_image(images).eq(0).all()
    assert counts.take() == ([], 0)
    del norm.forward


@torch.no_grad()
def test_hidden_states_of_transformers_run_eagerly(counts):
    model = _transformers("CLIPVisionModel")
    ck.graphed(model, batch_sizes=[2])
    images = torch.randn(2, 3, 32, 32)
    counts.take()
    model(images)
    model(images, output_hidden_states=None)
    assert counts.take() == ([], 2)
    assert len(model(images, output_hidden_states=True).hidden_states) == 3
    assert model(images, interpolate_pos_encoding=False).pooler_output.shape == (2, 64)
    captures, replays = counts.take()
    assert not captures and replays == (not _leaves_forwards(model))
    model.config.output_hidden_states = True
    assert len(model(images).hidden_states) == 3


def _leaves_forwards(model: nn.Module) -> bool:
    """True for transformers 4, which leaves instances with a forward after collecting their states."""
    return any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_inference_mode_and_no_grad_share_the_graphs(tower, images, counts):
    expected = tower.encode_image(images)
    with torch.inference_mode():
        actual = tower.encode_image(images)
        assert actual.is_inference() and torch.equal(actual, expected)
    assert not tower.encode_image(images).is_inference()
    assert counts.take() == ([], 3)


@torch.no_grad()
def test_threads_replay_one_after_the_other(tower, counts):
    batches = [torch.randn(n, 3, 32, 32) for n in (1, 2, 3, 2) * 8]
    expected = [ck.encode_image(tower, batch).embedding for batch in batches]

    def encode(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return tower.encode_image(batch)

    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(encode, batches))
    assert counts.take() == ([], 32)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("host", ["open_clip", "transformers", "timm"])
@torch.no_grad()
def test_a_copy_captures_graphs_of_its_own(host, counts, copier):
    make, call = HOSTS[host]
    model = ck.graphed(ck.patch(randomized(make()), ck.ToMe(1)), batch_sizes=[2])
    images = torch.randn(2, 3, 32, 32)
    expected = call(model, images)
    assert counts.take() == ([2], 1)
    other = copier(model)
    assert_equal(call(other, images), expected)
    assert counts.take() == ([2], 1)
    for parameter in other.parameters():
        parameter.zero_()
    assert_equal(call(model, images), expected)
    assert counts.take() == ([], 1)
    ck.unpatch(ck.ungraphed(other))
    assert ck.method_of(model) == ck.ToMe(1)


@torch.no_grad()
def test_a_shallow_copy_runs_eagerly(tower, images, counts):
    replica = copy.copy(tower.visual)  # as DataParallel copies it: with the graphs of the original
    replica(images)
    assert counts.take() == ([], 0)


@torch.no_grad()
def test_a_classifier_replays_and_encode_image_does_not(tiny, images, counts):
    _, _, tokenizer = ck.bundled()
    classifier = ck.Classifier(tiny, tokenizer, ("cat", "dog"), method=ck.EViT(0.5))
    expected = classifier(images)
    ck.graphed(tiny, batch_sizes=[3])
    counts.take()
    assert torch.equal(classifier(images), expected)
    assert counts.take() == ([], 1)
    assert torch.equal(ck.encode_image(tiny, images).embedding, tiny.encode_image(images))
    assert counts.take() == ([], 1)


@torch.no_grad()
def test_graphs_of_a_model_in_training_wait_for_its_eval_mode(tiny, images, counts):
    ck.graphed(tiny.train(), batch_sizes=[3])
    assert counts.take() == ([], 0)
    tiny.eval().encode_image(images)
    assert counts.take() == ([3], 1)


@torch.no_grad()
def test_new_graphs_replace_the_old_ones(tower, images, counts):
    ck.graphed(tower, batch_sizes=[3])
    assert counts.take() == ([3], 0)
    tower.encode_image(images)
    assert counts.take() == ([], 1)
    ck.ungraphed(tower)
    assert not any(graphs.GRAPHS in vars(module) for module in tower.modules())


@torch.no_grad()
def test_graphs_replace_a_compilation_and_are_replaced_by_one(tiny, images, counts, monkeypatch):
    class Forward:
        cost = None

        def __init__(self, function: Callable[[Tensor], Any], **options: Any) -> None:
            self.function = function

        def __call__(self, batch: Tensor) -> Any:
            return self.function(batch) + 1

    monkeypatch.setattr(compilation, "CompiledForward", Forward)
    cls, expected = type(tiny.visual), tiny.encode_image(images)
    assert torch.equal(ck.compile(tiny, freeze=True).encode_image(images), expected + 1)
    counts.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        ck.graphed(tiny, batch_sizes=[3])
    assert torch.equal(tiny.encode_image(images), expected + 1)
    counts.error = None
    ck.graphed(tiny, batch_sizes=[3])
    assert ck.compilation_of(tiny) is None and torch.equal(tiny.encode_image(images), expected)
    assert counts.take() == ([3], 1)
    ck.compile(tiny, freeze=True)
    assert torch.equal(tiny.encode_image(images), expected + 1)
    assert counts.take() == ([], 0)
    assert type(ck.uncompile(tiny).visual) is cls


@torch.no_grad()
def test_calls_are_not_served_within_a_context_that_says_so(tower, images, counts):
    with pytest.raises(KeyError), unserved(tower):
        tower.encode_image(images)
        raise KeyError
    assert counts.take() == ([], 0)
    tower.encode_image(images)
    assert counts.take() == ([], 1)


@torch.no_grad()
def test_a_failed_capture_leaves_the_model_unchanged(tiny, images, counts):
    cls, expected = type(tiny.visual), tiny.encode_image(images)
    counts.error = RuntimeError("operation not permitted")
    with pytest.raises(RuntimeError, match="a CUDA graph cannot capture the tower: operation not permitted"):
        ck.graphed(tiny)
    assert type(tiny.visual) is cls and graphs.GRAPHS not in vars(tiny.visual)
    counts.error = None
    ck.graphed(tiny, batch_sizes=[3])
    counts.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        ck.graphed(tiny, batch_sizes=[4])
    counts.take()
    assert torch.equal(tiny.encode_image(images), expected)
    assert counts.take() == ([], 1)


@torch.no_grad()
def test_a_later_capture_that_fails_is_one_warning(tower, images, counts):
    counts.error = RuntimeError("out of memory")
    ck.patch(tower, ck.EViT(0.5))
    with pytest.warns(UserWarning, match="without CUDA graphs, because out of memory"):
        actual = tower.encode_image(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(tower.encode_image(images), actual)
    assert counts.take() == ([], 0)
    counts.error = None
    ck.unpatch(tower).encode_image(images)
    assert counts.take() == ([3], 1)


@pytest.mark.parametrize(
    ("sizes", "actual"),
    [((), "()"), (8, "8"), ((0,), "(0)"), ([1, 2.0], "(1, 2.0)"), ({True}, "(True)"), ("8", "'8'"), ({1: 2}, "dict")],
)
def test_batch_sizes_must_be_positive_ints(tiny, counts, sizes, actual):
    with pytest.raises(ValueError, match=r"batch_sizes must be positive ints such as \(1, 8, 32\), got ") as error:
        ck.graphed(tiny, batch_sizes=sizes)
    assert str(error.value).endswith(f"got {actual}")


@pytest.mark.parametrize(
    "sizes", [[2, 1, 2], {1, 2}, frozenset({1, 2}), range(1, 3), iter((1, 2)), {1: 0, 2: 0}.keys()]
)
def test_batch_sizes_may_be_any_iterable(tiny, counts, sizes):
    ck.graphed(tiny, batch_sizes=sizes)
    assert counts.take() == ([2, 1], 0)


def test_a_tower_that_is_not_supported_is_refused(resnet, counts):
    import open_clip

    with pytest.raises(ck.UnsupportedTower):
        ck.graphed(open_clip.create_model(resnet))


@torch.no_grad()
def test_a_device_without_graphs_is_one_warning(tiny, images):
    cls, expected = type(tiny.visual), tiny.encode_image(images)
    with pytest.warns(UserWarning, match="need a model on a CUDA or ROCm device, got cpu") as record:
        assert ck.graphed(tiny) is tiny
    assert len(record) == 1 and type(tiny.visual) is cls
    assert torch.equal(tiny.encode_image(images), expected)


def test_a_graphed_model_prints_its_batch_sizes(tower):
    assert "(visual): VisionTransformer(\n    clipkernels: CUDA graphs of batch sizes 1,3\n" in repr(tower)
    ck.graphed(tower, batch_sizes=[2], pad=False)
    assert "CUDA graphs of batch sizes 2, without padding" in repr(tower)
    assert "CUDA graphs" not in repr(ck.ungraphed(tower))


def test_a_graphed_model_is_freed_without_the_garbage_collector(counts):
    model = ck.graphed(ck.patch(ck.bundled()[0], ck.EViT(0.5)))
    reference = weakref.ref(model.visual)
    gc.collect()
    gc.disable()
    try:
        # The stub's replay refers to the forward; a graph refers to nothing.
        vars(model.visual)[graphs.GRAPHS].captures.clear()
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_a_replay_that_raises_is_waited_for(monkeypatch):
    events: list[str] = []

    class Event:
        def record(self, stream: str) -> None:
            events.append(f"record on {stream}")

    class Stream(str):
        def wait_event(self, event: Event) -> None:
            events.append(f"wait on {self}")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("one"))
    recorder = cuda_graph.Recorder(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="out of memory"), recorder.in_turn():
        raise RuntimeError("out of memory")
    assert events == ["wait on one", "record on one"]
