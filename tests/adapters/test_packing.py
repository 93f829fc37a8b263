"""Packed projections: one product while patched, every change of a weight is noticed, and unpatching undoes it."""

import copy
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import clipkernels as ck
from clipkernels.adapters.packing import pack, packed_weights, separate_qkv, unpack
from clipkernels.testing import randomized, timm_tower, transformers_tower

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 16, "image_size": 64}


def linears(bias=(True, True, True), width=8):
    """Three linear layers, each with or without a bias."""
    torch.manual_seed(0)
    return [nn.Linear(width, width, bias=with_bias) for with_bias in bias]


@pytest.fixture
def model():
    pytest.importorskip("transformers", reason="transformers is not installed")
    return randomized(transformers_tower("CLIPVisionModel", **SIZES)).requires_grad_(False)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def projections(model):
    """The separate projections of every block."""
    tower = ck.tower_of(model)
    return [tower.projections(host) for host in tower.blocks]


def is_packed(model):
    """True for each block whose projections are packed."""
    return [packed_weights(qkv) is not None for qkv in projections(model)]


@pytest.mark.parametrize("bias", [(True, True, True), (False, False, False), (True, False, True)])
@torch.no_grad()
def test_one_product_equals_three_projections(bias):
    projections, x = linears(bias), torch.randn(2, 5, 8)
    expected = torch.cat([projection(x) for projection in projections], -1)
    before = [p.clone() for projection in projections for p in projection.parameters()]
    identities = [id(p) for projection in projections for p in projection.parameters()]
    assert packed_weights(projections) is None
    pack(projections)
    weight, joined_bias = packed_weights(projections)
    assert weight.shape == (24, 8) and (joined_bias is None) == (not any(bias))
    torch.testing.assert_close(nn.functional.linear(x, weight, joined_bias), expected)
    after = [p for projection in projections for p in projection.parameters()]
    assert [id(p) for p in after] == identities
    assert all(p.untyped_storage().nbytes() == p.nbytes and p.storage_offset() == 0 for p in after)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    address = weight.data_ptr()
    pack(projections)
    assert packed_weights(projections)[0].data_ptr() == address
    unpack(projections)
    assert packed_weights(projections) is None
    assert len({p.data_ptr() for p in after}) == len(after)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@torch.no_grad()
def test_every_change_of_a_weights_storage_ends_packing():
    for change in (
        lambda q, k, v: setattr(k, "weight", nn.Parameter(k.weight.clone())),
        lambda q, k, v: setattr(k.weight, "data", k.weight.data.clone()),
        lambda q, k, v: setattr(v.bias, "data", v.bias.data.clone()),
        lambda q, k, v: q.half(),
        lambda q, k, v: setattr(k.weight, "data", q.weight.data),
        lambda q, k, v: k.register_forward_hook(lambda *_: None),
        lambda q, k, v: setattr(v, "forward", lambda x: x),
    ):
        projections = linears()
        pack(projections)
        assert packed_weights(projections) is not None
        change(*projections)
        assert packed_weights(projections) is None


def test_weights_that_need_gradients_are_multiplied_separately():
    projections = linears()
    pack(projections)
    assert packed_weights(projections) is None
    with torch.no_grad():
        assert packed_weights(projections) is not None
    for projection in projections:
        projection.requires_grad_(False)
    assert packed_weights(projections) is not None


def test_projections_that_cannot_be_packed_stay_unchanged():
    class Quantised(nn.Linear):
        pass

    unequal, mixed = [nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)], linears()
    mixed[1].half()
    with torch.inference_mode():
        inference = linears()
    for projections in (unequal, mixed, inference, [Quantised(8, 8)] * 3, [m.to("meta") for m in linears()], []):
        before = [p.data_ptr() for m in projections for p in m.parameters()]
        pack(projections)
        unpack(projections)
        assert [p.data_ptr() for m in projections for p in m.parameters()] == before


@pytest.mark.parametrize("method", [ck.Dense(), ck.EViT(0.5)])
@torch.no_grad()
def test_a_tower_is_packed_while_it_is_patched(model, images, method):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(pixel_values=images).pooler_output
    ck.patch(model, method)
    assert is_packed(model) == [True, True]
    assert len(model.state_dict()) == len(state)
    ck.unpatch(model)
    assert is_packed(model) == [False, False]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert torch.equal(model(pixel_values=images).pooler_output, before)


@torch.no_grad()
def test_rotary_towers_without_a_key_bias_are_packed():
    pytest.importorskip("timm", reason="timm is not installed")
    model = randomized(timm_tower("eva02_base_patch16_clip_224", embed_dim=64, num_heads=2, img_size=64)).eval()
    images = torch.randn(2, 3, 64, 64)
    before = model(images)
    ck.patch(model, ck.Dense())
    assert is_packed(model) == [True, True]
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)


def fresh(model, images, method):
    """The output of a newly built model with the same weights, patched."""
    other = transformers_tower("CLIPVisionModel", **SIZES).to(next(model.parameters()).dtype)
    other.load_state_dict(model.state_dict())
    return ck.patch(other, method)(pixel_values=images).pooler_output


@torch.no_grad()
def test_a_packed_tower_reads_loaded_weights(model, images):
    method = ck.EViT(0.5)
    ck.patch(model, method)
    for assign in (False, True):
        state = {name: tensor * 1.1 for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)
        torch.testing.assert_close(model(pixel_values=images).pooler_output, fresh(model, images, method))
    assert is_packed(model) == [False, False]  # new parameters have their own addresses: three products


def test_a_packed_tower_reads_the_weights_of_an_optimiser_step(model, images):
    method = ck.Dense()
    ck.patch(model.requires_grad_(True), method)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = model(pixel_values=images).pooler_output
    before.pow(2).sum().backward()
    optimiser.step()
    with torch.no_grad():
        after = model(pixel_values=images).pooler_output
        assert is_packed(model) == [True, True] and not torch.allclose(after, before)
        torch.testing.assert_close(after, fresh(model, images, method))


@torch.no_grad()
def test_a_tower_in_another_dtype_is_packed_again(model, images):
    method = ck.EViT(0.5)
    ck.patch(model, method)
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype)
        assert is_packed(model) == [True, True]
        assert torch.equal(model(pixel_values=images.to(dtype)).pooler_output, fresh(model, images.to(dtype), method))
    model.to("meta")
    assert model(pixel_values=images.to("meta", torch.float64)).pooler_output.shape == (2, 64)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_a_copy_has_its_own_weights(model, images, copier):
    expected = ck.patch(model, ck.Dense())(pixel_values=images).pooler_output
    other = copier(model)
    torch.testing.assert_close(other(pixel_values=images).pooler_output, expected)
    for parameter in other.parameters():
        parameter.zero_()
    assert torch.equal(model(pixel_values=images).pooler_output, expected)
    assert (other(pixel_values=images).pooler_output == 0).all()


@torch.no_grad()
def test_packed_weights_can_be_saved_and_loaded(model, images, tmp_path):
    expected = ck.patch(model, ck.Dense())(pixel_values=images).pooler_output
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    model.save_pretrained(tmp_path / "folder")
    saved = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    loaded = type(model).from_pretrained(tmp_path / "folder").eval()
    torch.testing.assert_close(loaded(pixel_values=images).pooler_output, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tools_that_drop_tied_weights_keep_packed_weights(model, images, tmp_path):
    from safetensors.torch import save_model

    expected = ck.patch(model, ck.Dense())(pixel_values=images).pooler_output
    save_model(model, tmp_path / "whole.safetensors")
    assert set(load_file(tmp_path / "whole.safetensors")) == set(model.state_dict())
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(model, tmp_path / "accelerate")
    assert set(load_file(tmp_path / "accelerate" / "model.safetensors")) == set(model.state_dict())
    prepared = accelerator.prepare(model)
    accelerator.save_state(tmp_path / "state")
    for parameter in model.parameters():
        parameter.zero_()
    accelerator.load_state(tmp_path / "state")
    torch.testing.assert_close(prepared(pixel_values=images).pooler_output, expected)


def test_weights_patched_under_inference_mode_can_be_trained(model, images):
    with torch.inference_mode(), ck.patched(model, ck.EViT(0.5)):
        model(pixel_values=images)
        assert is_packed(model) == [True, True]
        model.to("cpu")
    assert not any(p.is_inference() for p in model.parameters())
    model.requires_grad_(True)(pixel_values=images).pooler_output.sum().backward()
    assert model.get_submodule(layers_of(model))[0].self_attn.k_proj.weight.grad is not None


def layers_of(model):
    return "encoder.layers" if hasattr(model, "encoder") else "vision_model.encoder.layers"


def test_jvp_and_vmap_reach_every_packed_projection():
    projections, x = linears(), torch.randn(2, 5, 8)
    pack(projections)
    for projection in projections:
        projection.requires_grad_(False)

    def product(weight):
        with nn.utils.stateless._reparametrize_module(projections[1], {"weight": weight}):
            return separate_qkv(projections, x, 2, None)[1].sum()

    weight, direction = projections[1].weight.detach().clone(), torch.randn(8, 8)
    _, tangent = torch.func.jvp(product, (weight,), (direction,))
    torch.testing.assert_close(tangent, nn.functional.linear(x, direction).sum())
    batched = torch.func.vmap(product)(torch.stack([weight, direction]))
    torch.testing.assert_close(batched, torch.stack([product(weight), product(direction)]))


@torch.no_grad()
def test_running_out_of_memory_while_packing_leaves_the_model_unchanged(model, images, monkeypatch):
    before = model(pixel_values=images).pooler_output
    calls = []

    def fails(projections):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        pack(projections)

    monkeypatch.setattr(sys.modules["clipkernels.patching"], "pack", fails)
    with pytest.raises(MemoryError):
        ck.patch(model, ck.EViT(0.5))
    assert ck.method_of(model) is None and is_packed(model) == [False, False]
    assert torch.equal(model(pixel_values=images).pooler_output, before)


@torch.no_grad()
def test_a_pack_that_lost_a_weight_is_undone(model):
    ck.patch(model, ck.Dense())
    qkv = projections(model)[0]
    qkv[1].weight = nn.Parameter(qkv[1].weight.clone())
    addresses = [projection.weight.data_ptr() for projection in qkv]
    ck.unpatch(model)
    same = [projection.weight.data_ptr() == address for projection, address in zip(qkv, addresses, strict=True)]
    assert same == [False, True, False]


@torch.no_grad()
def test_an_adapter_on_a_projection_is_called(model, images):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.5 * x

    layer = ck.tower_of(model).blocks[0].self_attn
    layer.k_proj.__class__ = Adapted
    host = model(pixel_values=images).pooler_output
    ck.patch(model, ck.Dense())
    assert is_packed(model) == [False, True]
    torch.testing.assert_close(model(pixel_values=images).pooler_output, host, rtol=1e-4, atol=1e-4)


@pytest.fixture
def swapping():
    """Torch swaps parameters in conversions, which allows no weak reference to one."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@torch.no_grad()
def test_a_packed_tower_is_converted_by_swapping_its_parameters(model, images, swapping):
    expected = fresh(copy.deepcopy(model).double(), images.double(), ck.EViT(0.5))
    ck.patch(model, ck.EViT(0.5))
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(is_packed(model))
    torch.testing.assert_close(model(pixel_values=images.double()).pooler_output, expected)


@torch.no_grad()
def test_a_packed_tower_loads_weights_by_swapping_its_parameters(model, images, swapping):
    other = {name: tensor + 0.01 for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    ck.patch(model, ck.EViT(0.5))
    model.load_state_dict(other, strict=False)
    assert all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items() if name in other)
    actual = model(pixel_values=images).pooler_output
    ck.unpatch(model)
    torch.testing.assert_close(actual, fresh(model, images, ck.EViT(0.5)), rtol=1e-5, atol=1e-5)
