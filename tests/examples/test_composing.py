"""Patched towers with other tools: a test for each row of docs/composing.md."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import clipkernels as ck
from clipkernels.testing import open_clip_tower, randomized, timm_tower, transformers_tower

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 8, "image_size": 64}
# The modules that LoRA adapts, and the number of their weights that it adds in three blocks.
ADAPTED = {
    "open_clip": (["c_fc", "c_proj"], 12),
    "transformers": (["q_proj", "v_proj", "fc1"], 18),
    "timm": (["qkv", "proj"], 12),
}
METHOD = ck.EViT(0.5)
TORCH_26 = torch.__version__.startswith("2.6.")
LIBRARIES = pytest.mark.parametrize("library", list(ADAPTED))
# Compiling takes seconds; `make test-all` runs the others.
COMPILED = pytest.mark.parametrize(
    "library", ["open_clip", *(pytest.param(name, marks=pytest.mark.slow) for name in ("transformers", "timm"))]
)
ORDERS = pytest.mark.parametrize("order", ["before", "after"])

# The other tools warn about themselves.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def build(library: str) -> nn.Module:
    """A randomised image tower of three blocks for images of 64 pixels, the same in every call."""
    torch.manual_seed(0)
    if library == "transformers":
        pytest.importorskip("transformers", reason="transformers is not installed")
        return randomized(transformers_tower("CLIPVisionModelWithProjection", 3, **SIZES))
    if library == "timm":
        pytest.importorskip("timm", reason="timm is not installed")
        options = {"embed_dim": 64, "num_heads": 2, "img_size": 64, "num_classes": 24}
        return randomized(timm_tower("vit_base_patch16_clip_224", 3, **options))
    return randomized(open_clip_tower("ViT-B-16", 3, width=64, head_width=32, image_size=64)).visual


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def run(model: nn.Module, images: Tensor) -> Tensor:
    """The embedding by a model's own forward."""
    output = model(images)
    return output if isinstance(output, Tensor) else output.image_embeds


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a model by parameter, whole where they are sharded."""
    whole = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            whole[name.removeprefix("module.")] = (
                gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            )
    return whole


def trained(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The embedding and the gradients of its mean square."""
    output = run(model, images)
    output.square().mean().backward()
    return output.detach(), gradients(model)


def assert_same_step(model: nn.Module, images: Tensor, library: str) -> None:
    """Fail unless the model's embedding and gradients are those of a tower that is only patched."""
    expected, expected_gradients = trained(ck.patch(build(library).train(), METHOD), images)
    actual, actual_gradients = trained(model, images)
    torch.testing.assert_close(actual, expected)
    assert actual_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        # Rounding is relative to the largest element, because each element is a sum of terms of that size.
        torch.testing.assert_close(actual_gradients[name], gradient, rtol=0, atol=2e-5 * float(gradient.abs().max()))


def with_lora(model: nn.Module, library: str) -> nn.Module:
    """A model with random LoRA weights in its blocks."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(1)
    # Only blocks: timm names its patch embedding's convolution proj.
    names = rf".*(blocks|layers)\.\d+\..*({'|'.join(ADAPTED[library][0])})"
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)).eval()


def lora_model(library: str, order: str) -> nn.Module:
    if order == "before":
        return ck.patch(with_lora(build(library), library), METHOD)
    return with_lora(ck.patch(build(library), METHOD), library)


@COMPILED
@torch.no_grad()
def test_torch_compile_gives_one_graph(library, images):
    model = ck.patch(build(library), METHOD)
    tower = ck.tower_of(model)
    compiled = torch.compile(tower.encode, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), run(model, images))


@LIBRARIES
@ORDERS
def test_lora_gives_what_its_merged_weights_give(library, order, images):
    model = lora_model(library, order)
    output = run(model, images)
    output.square().mean().backward()
    adapters = [name for name in gradients(model) if "lora_" in name]
    assert len(adapters) == ADAPTED[library][1]
    assert all(gradients(model)[name].abs().sum() > 0 for name in adapters)
    merged = ck.patch(with_lora(build(library), library).merge_and_unload(), METHOD)
    torch.testing.assert_close(run(merged, images), output, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(run(ck.patch(build(library), METHOD), images), output, rtol=1e-2, atol=1e-2)


@LIBRARIES
@ORDERS
@torch.no_grad()
def test_merging_lora_leaves_the_method_in_place(library, order, images):
    model = lora_model(library, order)
    output = run(model, images)
    merged = model.merge_and_unload()
    assert ck.method_of(merged) == METHOD
    torch.testing.assert_close(run(merged, images), output, rtol=1e-4, atol=1e-5)


@COMPILED
@torch.no_grad()
def test_torch_compile_gives_one_graph_with_lora(library, images):
    if TORCH_26:
        pytest.skip("torch 2.6 cannot trace peft's own forward")
    model = lora_model(library, "before")
    compiled = torch.compile(ck.tower_of(model).encode, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), run(model, images))


def test_lora_around_open_clips_attention_is_refused(images):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, target_modules=["attn"], init_lora_weights=False)
    model = peft.get_peft_model(build("open_clip"), config).eval()
    with pytest.raises(
        ck.UnsupportedTower, match=r"block 0 \(and 1, 2\): .*peft's MultiheadAttention.*c_fc and c_proj"
    ):
        ck.patch(model, METHOD)
    with torch.no_grad():
        expected = run(model, images)
        merged = ck.patch(model.merge_and_unload(), ck.Dense())
        torch.testing.assert_close(run(merged, images), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_lora_on_open_clips_out_proj_has_no_effect_patched_or_not(images):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, config = build("open_clip"), peft.LoraConfig(r=4, target_modules=["out_proj"], init_lora_weights=False)
    before = run(model, images)
    adapted = peft.get_peft_model(model, config).eval()
    assert torch.equal(run(adapted, images), before)
    torch.testing.assert_close(run(ck.patch(adapted, ck.Dense()), images), before, rtol=1e-4, atol=1e-5)


@LIBRARIES
@ORDERS
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@torch.no_grad()
def test_quantized_weights_give_the_output_of_the_host(library, order, kind, images):
    pytest.importorskip("torchao", reason="torchao is not installed")
    quantization = pytest.importorskip("torchao.quantization", reason="torchao does not serve this torch")
    config = getattr(quantization, kind)()
    expected_model, model = build(library), build(library)
    quantization.quantize_(expected_model, config)
    expected = run(expected_model, images)
    assert not torch.equal(expected, run(model, images))
    if order == "after":
        ck.patch(model, ck.Dense())
    quantization.quantize_(model, config)
    ck.patch(model, ck.Dense())
    torch.testing.assert_close(run(model, images), expected, rtol=1e-4, atol=1e-5)
    ck.unpatch(model)
    assert torch.equal(run(model, images), expected)


@LIBRARIES
@ORDERS
@torch.no_grad()
def test_dynamic_quantization_gives_the_output_of_the_host(library, order, images):
    def quantize(model: nn.Module) -> nn.Module:
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    model = build(library)
    exact, expected = run(model, images), run(quantize(model), images)
    model = ck.patch(quantize(model), ck.Dense()) if order == "before" else quantize(ck.patch(model, ck.Dense()))
    # Activations are quantized by their range, which depends on the rows that a patched tower computes.
    assert (run(model, images) - expected).norm() < (expected - exact).norm()
    assert run(ck.patch(model, METHOD), images).isfinite().all()
    assert torch.equal(run(ck.unpatch(model), images), expected)


@LIBRARIES
@ORDERS
def test_checkpointing_gives_the_same_gradients(library, order, images):
    model = build(library).train()
    if order == "after":
        ck.patch(model, METHOD)
    if library == "transformers":
        model.gradient_checkpointing_enable()
    else:
        model.set_grad_checkpointing()
    ck.patch(model, METHOD)
    assert ck.tower_of(model).checkpointing
    assert_same_step(model, images, library)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of only this process."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch.distributed has no gloo here")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def wrapped(library: str, order: str, wrap) -> nn.Module:
    model = build(library).train()
    if order == "before":
        return ck.patch(wrap(model), METHOD)
    return wrap(ck.patch(model, METHOD))


@LIBRARIES
@ORDERS
def test_ddp_gives_the_gradients_of_one_process(library, order, images, one_process):
    model = wrapped(library, order, nn.parallel.DistributedDataParallel)
    assert_same_step(model, images, library)


def sharded(model: nn.Module) -> nn.Module:
    """A model whose root is sharded over one process, this one, on the CPU."""
    if TORCH_26:
        pytest.skip("torch 2.6 cannot run fully_shard on the CPU")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fsdp.fully_shard(model, mesh=mesh)
    return model


@LIBRARIES
def test_fully_shard_of_the_root_gives_the_same_gradients(library, images, one_process):
    assert_same_step(wrapped(library, "after", sharded), images, library)


@LIBRARIES
@ORDERS
def test_fsdp_of_the_root_gives_the_same_output(library, order, images, one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel

    if TORCH_26 and order == "before" and library == "transformers":
        pytest.skip("torch 2.6 takes packed projections for parameters of another shape")

    def wrap(model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)

    expected = run(ck.patch(build(library).train(), METHOD), images)
    output = run(wrapped(library, order, wrap), images)
    torch.testing.assert_close(output, expected)
    output.square().mean().backward()


def test_a_root_sharded_before_patching_is_refused(one_process):
    with pytest.raises(ck.UnsupportedTower, match="has sharded parameters"):
        ck.patch(sharded(build("open_clip")), METHOD)


@LIBRARIES
def test_a_sharded_block_is_refused(library, images, one_process):
    model = ck.patch(build(library), METHOD)
    sharded(ck.tower_of(model).blocks[0])
    with pytest.raises(
        ck.UnsupportedTower, match=r"block 0: its FSDP\w+ is sharded by itself: call fully_shard on the whole"
    ):
        run(model, images)


@LIBRARIES
def test_a_compiled_block_is_refused(library):
    model = build(library)
    ck.tower_of(model).blocks[0].compile(backend="eager")
    with pytest.raises(ck.UnsupportedTower, match="compile the whole tower"):
        ck.patch(model, METHOD)


@LIBRARIES
def test_accelerate_trains_the_patched_model(library, images):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model = ck.patch(build(library).train(), METHOD)
    before = copy.deepcopy(model.state_dict())
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    accelerator.backward(run(prepared, images).square().mean())
    optimizer.step()
    assert ck.method_of(accelerator.unwrap_model(prepared)) == METHOD
    assert any(not torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_every_row_of_the_table_has_a_test():
    text = (ROOT / "docs" / "composing.md").read_text(encoding="utf-8")
    tools = [row.split("|")[1].strip() for row in re.findall(r"^\|.*\|$", text, flags=re.M)][2:]
    tests = {
        "`torch.compile`": test_torch_compile_gives_one_graph,
        "peft LoRA": test_lora_gives_what_its_merged_weights_give,
        "peft LoRA, merged by `merge_and_unload`": test_merging_lora_leaves_the_method_in_place,
        "`torch.compile` of peft LoRA": test_torch_compile_gives_one_graph_with_lora,
        "torchao int8 weight-only": test_quantized_weights_give_the_output_of_the_host,
        "torchao float8 weight-only": test_quantized_weights_give_the_output_of_the_host,
        "torch's `quantize_dynamic`": test_dynamic_quantization_gives_the_output_of_the_host,
        "gradient checkpointing": test_checkpointing_gives_the_same_gradients,
        "DistributedDataParallel": test_ddp_gives_the_gradients_of_one_process,
        "FSDP: `fully_shard` of the root": test_fully_shard_of_the_root_gives_the_same_gradients,
        "FSDP: `FullyShardedDataParallel` of the root": test_fsdp_of_the_root_gives_the_same_output,
        "accelerate: `Accelerator.prepare`": test_accelerate_trains_the_patched_model,
    }
    assert tools == list(tests)
