"""Error budgets and input factories, shared by the tests, the benchmarks and whoever writes an op of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clipkernels.backend import interpreting
from clipkernels.learn.patch_ranking import RankPredictor, VisualTokens
from clipkernels.methods import Method, PatchRanking
from clipkernels.patch import patch, tower_of


def budget(came: Tensor, exact: Tensor, eager: Tensor) -> float:
    """The error that a result may have: 2‖eager - exact‖∞ + eps·‖exact‖∞.

    Args:
        came: what is tested, in its own dtype.
        exact: the same in fp64.
        eager: what plain PyTorch makes of the same inputs in the tested dtype.
    """
    # The interpreter's bf16 store truncates instead of rounding.
    steps = 2 if came.dtype == torch.bfloat16 and interpreting() else 1
    if not exact.numel():
        return 0.0
    return float(2 * (eager.double() - exact).abs().max() + steps * torch.finfo(came.dtype).eps * exact.abs().max())


def assert_within_budget(came: Tensor, exact: Tensor, eager: Tensor) -> None:
    """Fails unless ‖came - exact‖∞ is within the `budget` of the same arguments.

    Raises:
        AssertionError: with the error and the budget.
    """
    assert came.shape == exact.shape, f"expected shape {tuple(exact.shape)}, got {tuple(came.shape)}"
    if not came.numel():
        return
    allowed = budget(came, exact, eager)
    error = (came.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3e} is above the budget {allowed:.3e}"


def assert_same(came: Tensor, expected: Tensor, backend: str) -> None:
    """Fails unless two results are the same: of the triton backend bit for bit, of the reference to rounding, because
    a GEMM library may round by the batch and by where a row stands, and index_add_ on a GPU adds in any order.

    Raises:
        AssertionError: with the greatest difference.
    """
    tolerance = 0.0 if backend == "triton" else None
    torch.testing.assert_close(came, expected, atol=tolerance, rtol=tolerance)


class guarded(TorchFunctionMode):
    """Inside this context new uninitialised tensors hold NaN (or a large integer), between guards.

    Leaving it checks the guards, so that a row left unwritten shows as NaN and a store out of bounds as an error.

    Raises:
        AssertionError: something was stored outside of its tensor.
    """

    GUARD = 64

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, int]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in (torch.empty, torch.empty_like, Tensor.new_empty) or not made.is_contiguous():
            return made
        size = made.numel()
        poison = float("nan") if made.is_floating_point() else torch.iinfo(made.dtype).max
        buffer = torch.full((size + 2 * self.GUARD,), poison, dtype=made.dtype, device=made.device)
        self.buffers.append((buffer, size))
        return buffer[self.GUARD : self.GUARD + size].view(made.shape)

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for buffer, size in self.buffers:
            around = torch.cat([buffer[: self.GUARD], buffer[self.GUARD + size :]])
            whole = around.isnan() if around.is_floating_point() else around == torch.iinfo(around.dtype).max
            assert whole.all(), f"a kernel stored outside of its output of {size} {buffer.dtype}"


@contextmanager
def placeless() -> Iterator[None]:
    """Inside this context the interpreter sums products in fp64: NumPy's fp32 ones round by CPU, and on some a row
    otherwise where it stands elsewhere in a block, which no GPU does."""
    if not interpreting():
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    def dot(_: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        total = a.data.astype("float64") @ b.data.astype("float64") + acc.data
        return type(acc)(total.astype(acc.data.dtype), acc.dtype.scalar)

    with mock.patch.object(InterpreterBuilder, "create_dot", dot):
        yield


def strided(x: Tensor) -> Tensor:
    """The same values as x with gaps of NaN between the rows of its last two axes: a non-contiguous view."""
    shape = (*x.shape[:-2], 2 * x.shape[-2], x.shape[-1] + 3)
    wide = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    view = wide[..., ::2, 1:-2]
    view.copy_(x)
    return view


def open_clip_tower(name: str, layers: int | None = 2, **vision: Any) -> nn.Module:
    """An open_clip model named `name` with random weights, its image tower at real width but few blocks, or all.

    Beside it stands a text tower of one layer: some named ones load their configuration over a network.
    """
    import open_clip

    config = open_clip.get_model_config(name)
    text = {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
    vision_cfg = {**config["vision_cfg"], **vision}
    quick = config.get("quick_gelu", False)
    if "timm_model_name" in vision_cfg:
        import timm

        vision_cfg["timm_model_pretrained"] = False
        with mock.patch.object(timm, "create_model", partial(_create, timm.create_model, layers)):
            return open_clip.CLIP(config["embed_dim"], vision_cfg, text, quick_gelu=quick).eval()
    if layers is not None:
        vision_cfg["layers"] = layers
    if "multimodal_cfg" in config:
        text |= {"embed_cls": True, "output_tokens": True}
        multimodal = {"width": 64, "heads": 1, "layers": 1, "context_length": 16}
        return open_clip.CoCa(config["embed_dim"], multimodal, text, vision_cfg, quick_gelu=quick).eval()
    return open_clip.CLIP(config["embed_dim"], vision_cfg, text, quick_gelu=quick).eval()


def timm_tower(name: str, layers: int | None = 2, **options: Any) -> nn.Module:
    """A timm model named `name` with random weights, at real width but few blocks, or all."""
    import timm

    return _create(timm.create_model, layers, name, **options).eval()


def _create(create: Callable[..., Any], layers: int | None, name: str, **options: Any) -> Any:
    """A timm model cut to its first blocks; ViTamin's makers take no depth."""
    if layers is None:
        return create(name, **options)
    if not name.startswith("vitamin"):
        return create(name, **options, depth=layers)
    model = create(name, **options)
    model.blocks = model.blocks[:layers]
    return model


def transformers_tower(family: str, layers: int = 2, **vision: Any) -> nn.Module:
    """A model of transformers with random weights and a text half of one layer; a ViT-B/16 at 224 unless told.

    Args:
        family: the model's class, such as "CLIPModel" or "SiglipVisionModel".
        layers: blocks of the image tower.
        vision: entries of its configuration.
    """
    import transformers

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 16}
    vision = {**sizes, "num_hidden_layers": layers, **({"num_patches": 196} if "Siglip2" in family else {}), **vision}
    if "Siglip2" not in family:
        vision.setdefault("image_size", 224)
    maker = getattr(transformers, family)
    if "Vision" in family:
        return maker(maker.config_class(**vision)).eval()
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 1}
    if "Siglip" in family:
        text["projection_size"] = vision["hidden_size"]
    if "AltCLIP" in family:
        text["project_dim"] = 64
    return maker(maker.config_class(vision_config=vision, text_config=text)).eval()


def openai_tower(layers: int = 2, size: int = 224, patch: int = 16, width: int = 768, out: int = 512) -> nn.Module:
    """A CLIP of OpenAI's package, or of clip-anytorch, with random weights and a text half of one layer."""
    from clip.model import CLIP

    return CLIP(out, size, layers, width, patch, 16, 64, 64, 1, 1).eval()


def patch_ranking(model: nn.Module, keep: float = 0.5, block: int = 1, learnt: int = 0) -> PatchRanking:
    """The method with random weights for a model's tower, and with so many learnt tokens in its first two blocks."""
    tower = tower_of(model)
    torch.manual_seed(0)
    predictor = RankPredictor(tower.tokens, tower.prefix, block).to(tower.like)
    tokens = VisualTokens(learnt, min(2, len(tower.blocks)), tower.width).to(tower.like) if learnt else None
    if tokens is not None:
        nn.init.normal_(tokens.own)
    return PatchRanking(predictor, keep, tokens=tokens)


def given_to(model: nn.Module, method: Method | partial[Method]) -> nn.Module:
    """The model patched with a method, or with what makes one for it."""
    return patch(model, method(model) if isinstance(method, partial) else method)


def named(method: Method | partial[Method]) -> str:
    """The name of a method, or of what makes one, that is the same in every process."""
    return method.func.__name__ if isinstance(method, partial) else str(method)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random vectors (biases, layer scales, norms), so that none can be left out unnoticed, and with
    sharper attention than fresh weights have, so that it matters who is attended to and where they stand."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1, 0.5)
            elif parameter.ndim == 2:
                sharp = any(part in name for part in ("qkv", "q_proj", "k_proj", "in_proj"))
                parameter.normal_(0, (2 if sharp else 1) * parameter.shape[1] ** -0.5)
    return model
