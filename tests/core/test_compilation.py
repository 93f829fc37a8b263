"""`ck.compile`: what is compiled, frozen and compiled again, and what runs as before.

Most tests stub the compiler: a forward is then the function itself, and the stub counts what it compiles and runs. The
others freeze towers of one block.
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
from threading import Thread
from typing import Any, Literal
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear
from torch.utils import _pytree

import clipkernels as ck
from clipkernels import compilation, cuda_graph, freezing
from clipkernels.data import scenes
from clipkernels.freezing import CompiledForward, Cost
from clipkernels.snapshot import COMPILATION
from clipkernels.testing import open_clip_tower, openai_tower, patch_ranking, randomized, timm_tower, transformers_tower

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
SMALL = {"embed_dim": 64, "num_heads": 2, "img_size": 32, "num_classes": 24}
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*lru_cache.*")]


class Counts:
    """The batch sizes compiled and those run since the last `take`, and the options of all that was compiled."""

    def __init__(self) -> None:
        self.compiled: list[int] = []
        self.runs: list[int] = []
        self.options: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def take(self) -> tuple[list[int], list[int]]:
        """Return both, and start them anew."""
        result = self.compiled, self.runs
        self.compiled, self.runs = [], []
        return result


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Counts of a stub that stands in for the compiler."""
    counts = Counts()

    class Forward:
        def __init__(self, function: Callable[[Tensor], Any], **options: Any) -> None:
            self.function, self.cost = function, None
            counts.options.append(options)

        @torch.no_grad()
        def __call__(self, images: Tensor) -> Any:
            if counts.error is not None:
                raise counts.error
            (counts.runs if self.cost else counts.compiled).append(len(images))
            self.cost = Cost(1.0, 2**20, 0)
            time.sleep(0)
            return self.function(images)

    monkeypatch.setattr(compilation, "CompiledForward", Forward)
    return counts


@pytest.fixture
def tower(tiny: nn.Module, counts: Counts) -> Any:
    """The bundled CLIP, compiled for 1 and 3 images, which are counted already."""
    ck.compile(tiny, batch_sizes=(3, 1, 3))
    assert counts.take() == ([1, 3], [])
    return tiny


def _open_clip(layers: int = 2) -> nn.Module:
    return open_clip_tower("ViT-B-32", layers, width=64, head_width=32, image_size=32, patch_size=8)


def _transformers(family: str) -> nn.Module:
    pytest.importorskip("transformers", reason="transformers is not installed")
    if torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 cannot trace the host's own forward in transformers 5")
    return transformers_tower(family, **SIZES)


def _timm(name: str) -> nn.Module:
    pytest.importorskip("timm", reason="timm is not installed")
    return timm_tower(name, **SMALL)


def _openai() -> nn.Module:
    pytest.importorskip("clip.model", reason="OpenAI's clip is not installed")
    return openai_tower(2, 32, 8, 64, 24)


HOSTS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Any]]] = {
    "open_clip": (_open_clip, lambda model, images: model.encode_image(images)),
    "transformers": (
        lambda: _transformers("CLIPModel"),
        lambda model, images: model.get_image_features(pixel_values=images),
    ),
    "transformers SigLIP": (lambda: _transformers("SiglipVisionModel"), lambda model, images: model(images)),
    "timm": (lambda: _timm("vit_base_patch8_224"), lambda model, images: model(images)),
    "timm Eva": (lambda: _timm("eva02_base_patch16_clip_224"), lambda model, images: model(images)),
    "OpenAI": (_openai, lambda model, images: model.encode_image(images)),
}


def normal(batch: int, seed: int = 0) -> Tensor:
    """Random images for a small tower."""
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def assert_near(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Assert that two outputs have the same structure and nearly equal tensors."""
    assert type(actual) is type(expected)
    assert _pytree.tree_structure(actual) == _pytree.tree_structure(expected)
    for pair in zip(_pytree.tree_leaves(actual), _pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)


@contextmanager
def quietly(action: Literal["ignore", "error"]) -> Iterator[None]:
    """A context whose warnings are ignored, or errors."""
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        yield


def is_freezing() -> bool:
    """The setting of Inductor in this thread."""
    import torch._inductor.config as config

    return bool(config.freezing)


def frozen_block(model: Any, batch: int = 2) -> Tensor:
    """The embedding of a compiled model, which `ck.encode_image` confirms."""
    with torch.no_grad():
        actual = model.encode_image(normal(batch))
        torch.testing.assert_close(actual, ck.encode_image(model, normal(batch)).embedding, rtol=1e-4, atol=1e-4)
    return actual


def test_a_frozen_tower_sees_a_weight_that_changes_in_place() -> None:
    model = ck.compile(randomized(_open_clip(1)))
    before = frozen_block(model)
    assert not is_freezing()
    with torch.inference_mode():
        assert torch.equal(model.encode_image(normal(2)), before)
    model.visual.proj.data.mul_(2)  # a write that nothing counts shows that weights are constants
    with torch.no_grad():
        assert torch.equal(model.encode_image(normal(2)), before)
        model.visual.proj.mul_(2)
    with pytest.warns(UserWarning, match="a frozen weight has changed in place: the tower is compiled again"):
        after = frozen_block(model)
    assert not torch.allclose(after, before)
    costs = ck.compilation_of(model).costs  # type: ignore[union-attr]
    assert list(costs) == [2] and costs[2].seconds > 0.1
    assert f"clipkernels: frozen for batch sizes 2 ({costs[2].seconds:.1f} s" in repr(model.visual)


def test_nothing_else_is_frozen_while_a_tower_is() -> None:
    observed: dict[str, bool] = {}
    weight = nn.Parameter(torch.ones(4, 4))

    def function(images: Tensor) -> Tensor:
        return linear(images.mean((1, 2)), weight)

    def compile_other() -> None:
        other = torch.compile(lambda x: linear(x, weight), fullgraph=True)
        with torch.no_grad():
            other(torch.ones(2, 4))
            weight.add_(1)
            observed["frozen"] = not torch.equal(other(torch.ones(2, 4)), torch.full((2, 4), 8.0))

    forward = CompiledForward(function, freeze=True)
    compiling = freezing._exclusive_compilation(True)
    with compiling:
        assert is_freezing()
        thread = Thread(target=compile_other)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and not observed  # it waits for the lock
    thread.join()
    assert observed == {"frozen": False} and not is_freezing()
    assert forward(torch.ones(2, 3, 5, 4)).shape == (2, 4)


def test_the_setting_is_put_back_after_an_error() -> None:
    def function(images: Tensor) -> Tensor:
        if images.sum() > 0:  # no graph can hold this
            return images
        return -images

    forward = CompiledForward(function, freeze=True)
    with pytest.raises(Exception, match=r"[Dd]ata-dependent|Dynamic control flow"):
        forward(torch.ones(1, 3, 4, 4))
    assert not is_freezing() and forward.cost is None


def test_a_forward_that_dynamo_forgets_is_frozen_again() -> None:
    weight = torch.ones(3, 4)
    forward = CompiledForward(lambda images: images.mean((2, 3)) @ weight, freeze=True)
    images, frozen = torch.ones(1, 3, 2, 2), []
    for _ in range(2):
        torch.testing.assert_close(forward(images), torch.full((1, 4), 3.0))
        frozen.append(forward.cost)
        torch._dynamo.reset()
    assert frozen[0] is not frozen[1]
    assert torch.equal(forward(images), forward(images)) and not is_freezing()


def test_a_forward_takes_images_of_any_layout_and_mode() -> None:
    weight = torch.randn(3, 4)
    forward = CompiledForward(lambda images: {"pooled": images.mean((2, 3)) @ weight}, freeze=True, dynamic=True)
    images = torch.randn(5, 3, 6, 6)
    strided, last = torch.randn(5, 6, 3, 6).transpose(1, 2), images.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        inference = images.clone()
    for batch in (images, strided, last, inference, images[:2], images.clone().requires_grad_()):
        actual = forward(batch)["pooled"]
        torch.testing.assert_close(actual, (batch.mean((2, 3)) @ weight).detach())
        assert not actual.is_inference() and not actual.requires_grad


METHODS = (None, ck.EViT(0.5), ck.ToMe(2), ck.TCA(0.2))
# The four patches of the small Eva are too few to condense.
CASES = [(host, method) for host in HOSTS for method in METHODS if (host, method) != ("timm Eva", METHODS[-1])]


@pytest.mark.slow
@pytest.mark.parametrize(("host", "method"), CASES, ids=str)
@torch.no_grad()
def test_a_frozen_tower_gives_the_hosts_output(host: str, method: Any) -> None:
    make, call = HOSTS[host]
    model = randomized(make())
    if method is not None:
        ck.patch(model, method)
    images, keys = normal(3), list(model.state_dict())
    expected = call(model, images)
    assert ck.compile(model, batch_sizes=[3]) is model
    assert_near(call(model, images), expected)
    compiled = ck.compilation_of(model)
    assert compiled is not None and list(compiled.costs) == [3]
    assert list(model.state_dict()) == keys and ck.method_of(model) == method
    assert_near(call(ck.uncompile(model), images), expected, 0)


@pytest.mark.slow
@pytest.mark.parametrize("method", [ck.EViT(0.5), ck.ToMe(2)], ids=str)
@torch.no_grad()
def test_a_dynamic_tower_compiles_twice(method: Any) -> None:
    model = ck.patch(randomized(_open_clip()), method)
    ck.compile(model, dynamic=True)
    for batch in (3, 2, 1, 5, 7, 1):
        frozen_block(model, batch)
    compiled = ck.compilation_of(model)
    assert compiled is not None and list(compiled.costs) == [0, 1]
    assert "frozen for batch sizes any,1 (" in repr(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
@torch.no_grad()
def test_a_mode_of_torch_without_freezing_reads_new_weights(mode: Any) -> None:
    model = ck.compile(randomized(_open_clip(1)), freeze=False, mode=mode, batch_sizes=[2])
    before = frozen_block(model)
    model.visual.proj.mul_(2)
    with quietly("error"):
        assert not torch.allclose(frozen_block(model), before)


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, ck.EViT(0.7), ck.ToMe(4)], ids=str)
@torch.no_grad()
def test_frozen_bf16_is_as_near_to_fp32_as_eager_bf16(tiny: nn.Module, method: Any) -> None:
    model: Any = tiny if method is None else ck.patch(tiny, method)
    _, preprocess, _ = ck.bundled()
    from PIL import Image

    images = torch.stack([preprocess(Image.fromarray(image)) for image in scenes.draw(64, 7).images])
    expected = model.encode_image(images)
    low = copy.deepcopy(model).to(torch.bfloat16)
    eager = cosine_similarity(low.encode_image(images.bfloat16()).float(), expected)
    ck.compile(low, batch_sizes=[64])
    frozen = cosine_similarity(low.encode_image(images.bfloat16()).float(), expected)
    assert frozen.mean() >= eager.mean() - 1e-5
    assert frozen.quantile(0.05) >= eager.quantile(0.05) - 1e-4


@pytest.mark.slow
def test_graphs_that_are_out_of_date_are_freed() -> None:
    model = ck.compile(randomized(_open_clip(1)))
    frozen_block(model)
    compiled = ck.compilation_of(model)
    assert compiled is not None and compiled.state is not None
    forward = weakref.ref(compiled.state.forwards[2])
    with torch.no_grad(), quietly("ignore"):
        model.visual.proj.mul_(2)
    frozen_block(model)
    gc.collect()
    assert forward() is None


@torch.no_grad()
def test_each_batch_size_is_compiled_once_up_to_a_number(tiny: Any, counts: Counts) -> None:
    ck.compile(tiny, max_sizes=2)
    assert counts.take() == ([], [])
    for batch in (4, 4, 2, 3, 1, 5):
        torch.testing.assert_close(
            tiny.encode_image(normal(batch)), ck.encode_image(tiny, normal(batch)).embedding, rtol=1e-5, atol=1e-5
        )
    # 3 is filled up to 4 and 1 to 2; 5 is larger than both.
    assert counts.take() == ([4, 2], [4, 4, 2])
    assert counts.options[0] == {"freeze": True, "mode": "default", "dynamic": False}


@pytest.mark.parametrize(("batch", "pad", "runs"), [(2, True, [3]), (2, False, []), (3, False, [3]), (4, True, [])])
@torch.no_grad()
def test_batch_sizes_that_are_given_are_the_only_ones(
    tiny: Any, counts: Counts, batch: int, pad: bool, runs: list[int]
) -> None:
    ck.compile(tiny, batch_sizes=[3, 1], pad=pad)
    assert counts.take() == ([1, 3], [])
    assert tiny.encode_image(normal(batch)).shape == (batch, 128)
    assert counts.take() == ([], runs)


@torch.no_grad()
def test_a_dynamic_tower_has_a_forward_of_one_image_and_of_more(tiny: Any, counts: Counts) -> None:
    ck.compile(tiny, dynamic=True)
    for batch in (5, 1, 3, 1, 0):
        with pytest.raises(RuntimeError) if not batch else nullcontext():  # the host refuses an empty batch
            tiny.encode_image(normal(batch))
    assert counts.take() == ([5, 1], [3, 1])
    assert [options["dynamic"] for options in counts.options] == [True, False]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda model: model.visual.proj.mul_(2),
    "in inference mode": torch.inference_mode()(lambda model: model.visual.proj.mul_(2)),
    "load": lambda model: model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}),
    "assign": lambda model: model.load_state_dict(
        {name: value.clone() for name, value in model.state_dict().items()}, assign=True
    ),
    "patch": lambda model: ck.patch(model, ck.EViT(0.5)),
    "move and return": lambda model: model.double().float(),
    "move blocks": lambda model: model.visual.transformer.double().float(),
    "new data": lambda model: setattr(model.visual.proj, "data", model.visual.proj.data * 2),
    "another eps": lambda model: setattr(model.visual.ln_post, "eps", 0.5),
    "new module": lambda model: setattr(model.visual, "ln_post", copy.deepcopy(model.visual.ln_post)),
    "threads": lambda model: torch.set_num_threads(2),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_tower_is_compiled_again(tower: Any, images: Tensor, counts: Counts, change: str) -> None:
    tower.encode_image(images)
    assert counts.take() == ([], [3])
    CHANGES[change](tower)
    try:
        with quietly("ignore"):
            actual = tower.encode_image(images)
        assert counts.take() == ([3], [])
        tower.encode_image(images)
        assert counts.take() == ([], [3])
    finally:
        torch.set_num_threads(1)
    assert torch.equal(ck.uncompile(tower).encode_image(images), actual)


def test_an_optimisers_step_is_seen(tower: Any, images: Tensor, counts: Counts) -> None:
    optimiser = torch.optim.SGD(tower.visual.parameters(), lr=0.1)
    tower.encode_image(images).square().mean().backward()
    assert counts.take() == ([], [])
    optimiser.step()
    with torch.no_grad(), pytest.warns(UserWarning, match="a frozen weight has changed in place"):
        actual = tower.encode_image(images)
        assert counts.take() == ([3], [])
        assert torch.equal(ck.uncompile(tower).encode_image(images), actual)


@torch.no_grad()
def test_a_predictors_weight_is_a_frozen_weight(tiny: Any, images: Tensor, counts: Counts) -> None:
    method = patch_ranking(tiny)
    ck.compile(ck.patch(tiny, method), batch_sizes=[3])
    predictor: Any = method.predictor
    next(predictor.parameters()).add_(1)
    counts.take()
    with pytest.warns(UserWarning, match="a frozen weight has changed in place"):
        tiny.encode_image(images)
    assert counts.take() == ([3], [])


@torch.no_grad()
def test_weights_that_are_not_frozen_may_change_in_place(tiny: Any, images: Tensor, counts: Counts) -> None:
    ck.compile(tiny, freeze=False, batch_sizes=[3])
    tiny.visual.proj.mul_(2)
    tiny.encode_image(images)
    assert counts.take() == ([3], [3])
    assert counts.options[0]["freeze"] is False
    assert repr(ck.compilation_of(tiny)) == "compiled for batch sizes 3 (1.0 s, 1 MiB)"


EAGER: dict[str, Callable[[Any, Tensor], Any]] = {
    "training": lambda model, images: model.train().encode_image(images),
    "a gradient": torch.enable_grad()(lambda model, images: model.encode_image(images)),
    "autocast": lambda model, images: torch.autocast("cpu", torch.bfloat16)(model.encode_image)(images),
    "vmap": lambda model, images: torch.vmap(lambda image: model.encode_image(image[None]))(images),
    "trace": lambda model, images: torch.jit.trace(model.visual, images, check_trace=False),
    "export": lambda model, images: torch.export.export(model.visual, (images,), strict=False),
    "compile": lambda model, images: torch.compile(model.encode_image, backend="eager", fullgraph=True)(images),
    "encode_image": lambda model, images: ck.encode_image(model, images),
    "other size": lambda model, images: model.encode_image(images[:, :, :, :16]),
    "other dtype": lambda model, images: model.encode_image(images.double()),
}


@pytest.mark.parametrize("situation", EAGER)
@torch.no_grad()
def test_a_call_that_cannot_be_served_runs_as_before(
    tower: Any, images: Tensor, counts: Counts, situation: str
) -> None:
    torch._dynamo.reset()
    refused = situation.startswith("other")  # by the host itself
    with pytest.raises(RuntimeError) if refused else nullcontext():
        EAGER[situation](tower, images)
    assert counts.take() == ([], [])
    tower.eval().encode_image(images)
    assert counts.take() == ([], [3])


@torch.no_grad()
def test_a_hook_fires_because_its_tower_runs_as_before(tower: Any, images: Tensor, counts: Counts) -> None:
    calls: list[nn.Module] = []
    handle = tower.visual.ln_post.register_forward_hook(lambda module, *_: calls.append(module))
    tower.encode_image(images)
    assert calls == [tower.visual.ln_post] and counts.take() == ([], [])
    handle.remove()
    tower.encode_image(images)
    assert counts.take() == ([], [3])


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_patching_and_compiling_are_undone_in_any_order(host: str, counts: Counts) -> None:
    make, call = HOSTS[host]
    model = randomized(make())
    tower = ck.tower_of(model)
    classes, images = (type(tower.root), type(tower.owner)), normal(4)
    before = call(model, images)
    for first, second in ((ck.unpatch, ck.uncompile), (ck.uncompile, ck.unpatch)):
        ck.patch(ck.compile(model, batch_sizes=[4]), ck.ToMe(1))
        merged = call(model, images)
        assert counts.take() == ([4, 4], [])
        assert_near(call(model, images), merged, 0)
        assert counts.take() == ([], [4])
        first(model)
        call(model, images)
        second(model)
        assert (type(tower.root), type(tower.owner)) == classes
        assert COMPILATION not in vars(tower.root)
        assert_near(call(model, images), before, 0)
        counts.take()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_a_copy_is_compiled_at_its_own_calls(tower: Any, images: Tensor, counts: Counts, copier: Any) -> None:
    other = copier(tower)
    assert repr(ck.compilation_of(other)) == "frozen for batch sizes none yet"
    for parameter in other.parameters():
        parameter.zero_()
    assert other.encode_image(images).eq(0).all()
    assert counts.take() == ([3], [])
    assert not tower.encode_image(images).eq(0).any()
    assert counts.take() == ([], [3])
    ck.uncompile(other)
    assert ck.compilation_of(other) is None and ck.compilation_of(tower) is not None


@torch.no_grad()
def test_threads_compile_each_size_once(tiny: Any, counts: Counts) -> None:
    ck.compile(tiny)
    batches = [normal(batch) for batch in (1, 2, 3) * 8]
    expected = [ck.encode_image(tiny, batch).embedding for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(torch.no_grad()(tiny.encode_image), batches))
    compiled, runs = counts.take()
    assert sorted(compiled) == [1, 2, 3] and len(runs) == 21
    for pair in zip(actual, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_compilation_that_fails_leaves_the_model_unchanged(tiny: Any, images: Tensor, counts: Counts) -> None:
    cls, expected = type(tiny.visual), tiny.encode_image(images)
    counts.error = RuntimeError("no compiler\nanywhere")
    with pytest.raises(RuntimeError, match=r"torch\.compile cannot compile the tower: no compiler anywhere"):
        ck.compile(tiny, batch_sizes=[3])
    assert type(tiny.visual) is cls and COMPILATION not in vars(tiny.visual)
    counts.error = None
    ck.compile(tiny, batch_sizes=[3])
    counts.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        ck.compile(tiny, batch_sizes=[4])
    counts.error = None
    counts.take()
    assert torch.equal(tiny.encode_image(images), expected)
    assert counts.take() == ([], [3])


@torch.no_grad()
def test_a_later_compilation_that_fails_is_one_warning(tower: Any, images: Tensor, counts: Counts) -> None:
    counts.error = RuntimeError("no compiler")
    ck.patch(tower, ck.EViT(0.5))
    with pytest.warns(UserWarning, match="the tower runs without its compilation: no compiler"):
        actual = tower.encode_image(images)
    with quietly("error"):
        assert torch.equal(tower.encode_image(images), actual)
    assert counts.take() == ([], [])
    counts.error = None
    ck.patch(tower, ck.EViT(0.7)).encode_image(images)
    assert counts.take() == ([3], [])


def test_weights_whose_changes_nothing_counts_are_refused(images: Tensor, counts: Counts) -> None:
    with torch.inference_mode():
        model = _open_clip(1)
    with pytest.raises(ValueError, match=r"must count their changes, got weights made under torch\.inference_mode"):
        ck.compile(model)
    assert ck.compilation_of(model) is None
    ck.compile(model, freeze=False, batch_sizes=[3])
    with torch.inference_mode():
        model.encode_image(images)
    assert counts.take() == ([3], [3])


@torch.no_grad()
def test_weights_that_come_to_be_uncounted_are_one_warning(tower: Any, images: Tensor, counts: Counts) -> None:
    with torch.inference_mode():
        tower.visual.proj = nn.Parameter(tower.visual.proj.clone())
        with pytest.warns(UserWarning, match="runs without its compilation: frozen weights must count their changes"):
            tower.encode_image(images)
        with quietly("error"):
            tower.encode_image(images)
    assert counts.take() == ([], [])


def test_a_model_in_training_waits_for_its_eval_mode(tiny: Any, images: Tensor, counts: Counts) -> None:
    ck.compile(tiny.train(), batch_sizes=[3])
    assert counts.take() == ([], [])
    with torch.no_grad():
        tiny.eval().encode_image(images)
    assert counts.take() == ([3], [])


@pytest.mark.parametrize(
    ("arguments", "graphs"),
    [({}, (1, 8, 32)), ({"batch_sizes": [2]}, (2,)), ({"freeze": True}, None), ({"mode": "max-autotune"}, None)],
)
def test_a_gpu_takes_graphs_unless_told_otherwise(
    tiny: Any,
    counts: Counts,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    graphs: tuple[int, ...] | None,
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cuda_graph, "is_available", lambda device: True)
    monkeypatch.setattr(compilation, "graphed", lambda *arguments: calls.append(arguments))
    ungraphed = Mock(side_effect=lambda model: model)
    monkeypatch.setattr(compilation, "ungraphed", ungraphed)
    assert ck.compile(tiny, **arguments) is tiny
    assert calls == ([] if graphs is None else [(tiny, graphs, True)])
    ungraphed.assert_called_with(tiny) if graphs is None else ungraphed.assert_not_called()
    compiled = ck.compilation_of(tiny)
    assert (compiled is None) == (graphs is not None)
    if compiled is not None:
        assert (compiled.freeze, compiled.mode) == (True, arguments.get("mode", "default"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fast"}, 'mode must be None, "default", "reduce-overhead"'),
        ({"batch_sizes": [0]}, r"batch_sizes must be positive ints such as \(1, 8, 32\), got \(0\)"),
        ({"batch_sizes": [2], "dynamic": True}, r"batch_sizes must be None with dynamic=True, got \(2\)"),
        ({"max_sizes": 0}, "max_sizes must be an int of at least 1, got 0"),
        ({"freeze": "yes"}, "freeze must be True or False, got 'yes'"),
    ],
)
def test_a_bad_argument_is_one_line(tiny: nn.Module, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ck.compile(tiny, **arguments)
    assert ck.compilation_of(tiny) is None
