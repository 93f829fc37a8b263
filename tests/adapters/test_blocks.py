"""A patched tower reads its blocks once, and again when anything that their parts depend on has changed."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

pytest.importorskip("open_clip", reason="open_clip is not installed, which defines the towers")

import clipkernels as ck
from clipkernels.adapters.blocks import Blocks
from clipkernels.adapters.modules import linear_of, norm_of
from clipkernels.slot import SLOT
from clipkernels.testing import open_clip_tower, randomized, timm_tower, transformers_tower

SMALL = {"width": 64, "image_size": 32, "patch_size": 16}
EVA = {"embed_dim": 64, "num_heads": 2, "img_size": 32, "num_classes": 24, "init_values": 0.5}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return ck.patch(open_clip_tower("ViT-B-32", 2, **SMALL, ls_init_value=0.5), ck.Dense())


def read(model: nn.Module) -> Blocks:
    """The blocks of a patched model, as its next forward reads them."""
    tower = ck.tower_of(model)
    blocks: Blocks = tower.owner.__dict__[SLOT].cache.read(tower, list(tower.blocks))
    return blocks


def facts(model: nn.Module, index: int = 1) -> tuple[Any, ...]:
    """The norms, the projection and the MLP that a block's parts read; None for one that must be called."""
    parts = read(model).parts[index]
    return parts.norm1, parts.norm2, parts._plain_projection, parts._plain_mlp


def block_of(model: nn.Module) -> Any:
    return ck.tower_of(model).blocks[1]


class Louder(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Shifted(nn.LayerNorm):
    pass


def test_an_unchanged_tower_is_read_once(model: nn.Module) -> None:
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model.encode_image(images)
        first = read(model)
        assert torch.equal(model.encode_image(images), before)
        ck.encode_image(model, images)
    assert read(model) is first
    assert all(fact is not None for fact in facts(model))


def replace_forward(block: Any) -> None:
    block.mlp.gelu.forward = block.mlp.gelu.forward.__get__(block.mlp.gelu)
    block.mlp.gelu.forward = lambda x: x


CHANGES: dict[str, tuple[Callable[[Any], object], int]] = {
    "hook on a norm": (lambda block: block.ln_1.register_forward_hook(lambda *_: None), 0),
    "hook before a norm": (lambda block: block.ln_2.register_forward_pre_hook(lambda *_: None), 1),
    "backward hook": (lambda block: block.ln_2.register_full_backward_hook(lambda *_: None), 1),
    "hook on a layer scale": (lambda block: block.ls_1.register_forward_hook(lambda *_: None), 2),
    "hook on the MLP": (lambda block: block.mlp.register_forward_hook(lambda *_: None), 3),
    "hook on a projection": (lambda block: block.mlp.c_fc.register_forward_hook(lambda *_: None), 3),
    "forward of an activation": (replace_forward, 3),
    "class of a norm": (lambda block: setattr(block.ln_1, "__class__", Shifted), 0),
    "class of an activation": (lambda block: setattr(block.mlp, "gelu", Louder()), 3),
    "class of a projection": (lambda block: setattr(block.mlp, "c_proj", nn.Identity()), 3),
    "longer MLP": (lambda block: block.mlp.append(nn.Dropout()), 3),
    "norm without bias": (lambda block: setattr(block.ln_2, "bias", None), 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_module_that_must_be_called_is_noticed(model: nn.Module, name: str) -> None:
    change, place = CHANGES[name]
    assert None not in facts(model)
    change(block_of(model))
    assert [at for at, fact in enumerate(facts(model)) if fact is None] == [place]
    assert None not in facts(model, 0)


def test_a_hook_that_is_removed_is_noticed(model: nn.Module) -> None:
    handle = block_of(model).ln_1.register_forward_hook(lambda *_: None)
    assert facts(model)[0] is None
    handle.remove()
    assert None not in facts(model)
    assert read(model) is read(model)


def test_a_hook_of_all_modules_is_noticed(model: nn.Module) -> None:
    assert None not in facts(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert facts(model)[0] is None
    finally:
        handle.remove()
    assert None not in facts(model)


def test_a_hook_on_a_block_is_noticed(model: nn.Module) -> None:
    assert read(model).hooked == [False, False]
    block_of(model).register_forward_hook(lambda *_: None)
    assert read(model).hooked == [False, True]


VALUES: dict[str, tuple[Callable[[Any], object], Callable[[tuple[Any, ...]], object], object]] = {
    "eps": (lambda block: setattr(block.ln_1, "eps", 0.5), lambda facts: facts[0][2], 0.5),
    "approximate": (
        lambda block: setattr(block.mlp.gelu, "approximate", "tanh"), lambda facts: facts[3].act, "gelu_tanh"
    ),
    "activation": (lambda block: setattr(block.mlp, "gelu", nn.GELU("tanh")), lambda facts: facts[3].act, "gelu_tanh"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_a_changed_attribute_is_noticed(model: nn.Module, name: str) -> None:
    change, value_of, expected = VALUES[name]
    assert value_of(facts(model)) != expected
    change(block_of(model))
    assert value_of(facts(model)) == expected


PARAMETERS: dict[str, Callable[[Any], Any]] = {
    "ln_1.weight": lambda parts: parts.norm1[0],
    "ln_2.bias": lambda parts: parts.norm2[1],
    "attn.in_proj_weight": lambda parts: parts.packed[0],
    "attn.in_proj_bias": lambda parts: parts.packed[1],
    "attn.out_proj.weight": lambda parts: parts._plain_projection.weight,
    "attn.out_proj.bias": lambda parts: parts._plain_projection.bias,
    "ls_1.gamma": lambda parts: parts._plain_projection.scale,
    "mlp.c_fc.weight": lambda parts: parts._plain_mlp.weight,
    "mlp.c_fc.bias": lambda parts: parts._plain_mlp.bias,
    "mlp.c_proj.weight": lambda parts: parts._plain_mlp.contract.weight,
    "ls_2.gamma": lambda parts: parts._plain_mlp.contract.scale,
}


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("way", ["set", "load_state_dict"])
def test_a_replaced_parameter_is_noticed(model: nn.Module, name: str, way: str) -> None:
    block = block_of(model)
    module, _, attribute = name.rpartition(".")
    assert PARAMETERS[name](read(model).parts[1]) is block.get_parameter(name)
    renewed = nn.Parameter(torch.randn_like(block.get_parameter(name)))
    if way == "set":
        setattr(block.get_submodule(module), attribute, renewed)
    else:
        block.load_state_dict({**block.state_dict(), name: renewed}, assign=True)
    assert PARAMETERS[name](read(model).parts[1]) is block.get_parameter(name)
    assert torch.equal(block.get_parameter(name), renewed)


REFUSED: dict[str, Callable[[Any], object]] = {
    "a hook on attention": lambda block: block.attn.register_forward_hook(lambda *_: None),
    "dropout in attention": lambda block: setattr(block.attn, "dropout", 0.1),
    "another forward of the block": lambda block: setattr(block, "forward", lambda x: x),
    "a compiled block": lambda block: block.compile(backend="eager"),
    "a subclass of attention": lambda block: setattr(
        block.attn, "__class__", type("Other", (nn.MultiheadAttention,), {"forward": lambda self, *_: None})
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_block_that_became_unsupported_is_refused(model: nn.Module, name: str) -> None:
    images = torch.randn(2, 3, 32, 32)
    model.encode_image(images)
    REFUSED[name](block_of(model))
    with pytest.raises(ck.UnsupportedTower, match="block 1"):
        model.encode_image(images)


def test_another_forward_of_a_class_is_noticed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(model)
    forward = nn.MultiheadAttention.forward
    monkeypatch.setattr(nn.MultiheadAttention, "forward", lambda *args, **options: forward(*args, **options))
    assert read(model) is not first


def test_dropout_follows_the_mode_and_its_probability() -> None:
    model = ck.patch(timm_tower("vit_tiny_patch16_224", proj_drop_rate=0.5), ck.Dense())
    assert None not in facts(model)
    assert facts(model.train())[2:] == (None, None)
    assert None not in facts(model.eval())
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert None not in facts(model)


def test_a_replaced_activation_of_transformers_is_noticed() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    model = ck.patch(transformers_tower("CLIPVisionModel", **sizes), ck.Dense())
    assert facts(model)[3].act == "quick_gelu"
    block_of(model).mlp.activation_fn = nn.GELU()
    assert facts(model)[3].act == "gelu"


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch, triton: str) -> Iterator[None]:
    monkeypatch.setenv("CLIPKERNELS_BACKEND", "triton")
    yield


@torch.no_grad()
def test_a_change_between_forwards_changes_the_output(model: nn.Module, device: Any, on_triton: None) -> None:
    images = torch.randn(2, 3, 32, 32, device=device)
    model.to(device)
    block = block_of(model)
    block.mlp.gelu = torch.nn.GELU()
    before = model.encode_image(images)
    block.mlp.gelu = Louder()
    block.ln_2.eps = 0.1
    block.attn.out_proj.weight = nn.Parameter(2 * block.attn.out_proj.weight)
    after = model.encode_image(images)
    expected = ck.unpatch(model).encode_image(images)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-4)


def test_copies_and_pickles_read_their_own_blocks(model: nn.Module) -> None:
    read(model)
    for twin in (copy.deepcopy(model.visual), pickle.loads(pickle.dumps(model.visual.transformer))):
        owner = getattr(twin, "transformer", twin)
        assert owner.__dict__[SLOT].cache._last is None
    twin = copy.deepcopy(model)
    assert read(twin).hosts == list(ck.tower_of(twin).blocks)
    assert read(twin).parts[0].norm1[0] is ck.tower_of(twin).blocks[0].ln_1.weight


@pytest.mark.parametrize("release", ["to", "load_state_dict"])
def test_a_moved_or_loaded_tower_keeps_no_old_parameters(model: nn.Module, release: str) -> None:
    read(model)
    model.to(torch.float64) if release == "to" else model.load_state_dict(model.state_dict(), assign=True)
    assert ck.tower_of(model).owner.__dict__[SLOT].cache._last is None
    assert read(model).parts[0].norm1[0].dtype == (torch.float64 if release == "to" else torch.float32)


def test_a_replica_of_data_parallel_is_not_kept(model: nn.Module) -> None:
    owner = ck.tower_of(model).owner
    first = read(model)
    owner.__dict__["_is_replica"] = True
    assert read(model) is not first
    assert owner.__dict__[SLOT].cache._last[0] is first


def test_weights_of_another_size_are_left_to_their_module() -> None:
    norm, projection = nn.LayerNorm(8), nn.Linear(4, 8)
    assert norm_of(norm) is not None and linear_of(projection, torch.ones(8)) is not None
    assert linear_of(projection, torch.ones(1)) is None
    projection.bias = nn.Parameter(torch.ones(1))
    norm.weight = nn.Parameter(torch.ones(1))
    assert norm_of(norm) is None and linear_of(projection) is None
    assert norm_of(nn.LayerNorm((2, 4))) is None


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


PARAMETRIZED = {
    "attn.in_proj_weight": "open_clip",
    "attn.out_proj.weight": "open_clip",
    "ls_2.gamma": "open_clip",
    "gamma_1": "timm",
    "mlp.fc2.bias": "timm",
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_a_parametrized_weight_is_computed_anew(name: str, when: str, device: Any, on_triton: None) -> None:
    if PARAMETRIZED[name] == "timm":
        model: Any = timm_tower("eva02_base_patch16_clip_224", **EVA)
    else:
        model = open_clip_tower("ViT-B-32", 2, **SMALL, ls_init_value=0.5).visual
    images = torch.randn(2, 3, 32, 32, device=device)
    model = randomized(model).to(device)
    path, _, attribute = name.rpartition(".")
    owner = ck.tower_of(model).blocks[1].get_submodule(path)
    if when == "after":
        ck.patch(model, ck.Dense())(images)
    register_parametrization(owner, attribute, Double())
    if when == "before":
        ck.patch(model, ck.Dense())
    for _ in range(2):
        model(images).sum().backward()
        with torch.no_grad():
            owner.parametrizations[attribute].original.mul_(1.5)  # type: ignore[index, union-attr, operator]
    with torch.no_grad():
        actual = model(images)
        expected = ck.unpatch(model)(images)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_norm_of_another_width_is_refused(model: nn.Module, device: Any, on_triton: None) -> None:
    images = torch.randn(2, 3, 32, 32, device=device)
    model.to(device).encode_image(images)
    block_of(model).ln_2 = nn.LayerNorm(32, device=device)
    with pytest.raises(ck.UnsupportedTower, match="block 1: expected norms of width 64, got 32"):
        model.encode_image(images)
