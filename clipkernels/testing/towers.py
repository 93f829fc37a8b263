"""Towers of every host library with random weights, and a method with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from clipkernels.learn.patch_ranking import RankPredictor, VisualTokens
from clipkernels.methods import Method, PatchRanking
from clipkernels.patching import patch, tower_of


def open_clip_tower(name: str, layers: int | None = 2, **vision: Any) -> nn.Module:
    """Return the open_clip model `name` with random weights and an image tower of real width.

    Args:
        name: an open_clip model.
        layers: blocks of the image tower; None is all.
        vision: entries of the vision configuration to override.
    """
    # The text tower is a small one of our own, because some configurations load one over a network.
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
    """Return the timm model `name` with random weights, at real width and with `layers` blocks; None is all."""
    import timm

    return _create(timm.create_model, layers, name, **options).eval()


def _create(create: Callable[..., Any], layers: int | None, name: str, **options: Any) -> Any:
    """Return a timm model with its first `layers` blocks."""
    if layers is None:
        return create(name, **options)
    if not name.startswith("vitamin"):  # the constructors of ViTamin take no depth
        return create(name, **options, depth=layers)
    model = create(name, **options)
    model.blocks = model.blocks[:layers]
    return model


def transformers_tower(family: str, layers: int = 2, **vision: Any) -> nn.Module:
    """Return a transformers model with random weights, a ViT-B/16 at 224 pixels by default.

    Args:
        family: the model's class, such as "CLIPModel" or "SiglipVisionModel"; one with text has a text tower of one
            layer.
        layers: blocks of the image tower.
        vision: entries of the vision configuration to override.
    """
    import transformers

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 16}
    vision = {**sizes, "num_hidden_layers": layers, **({"num_patches": 196} if "Siglip2" in family else {}), **vision}
    if "Siglip2" not in family:
        vision.setdefault("image_size", 224)
    model_class = getattr(transformers, family)
    if "Vision" in family:
        return model_class(model_class.config_class(**vision)).eval()
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 1}
    if "Siglip" in family:
        text["projection_size"] = vision["hidden_size"]
    if "AltCLIP" in family:
        text["project_dim"] = 64
    return model_class(model_class.config_class(vision_config=vision, text_config=text)).eval()


def openai_tower(layers: int = 2, size: int = 224, patch: int = 16, width: int = 768, out: int = 512) -> nn.Module:
    """Return a CLIP of OpenAI's package, or of clip-anytorch, with random weights and a text tower of one layer."""
    from clip.model import CLIP

    return CLIP(out, size, layers, width, patch, 16, 64, 64, 1, 1).eval()


def patch_ranking(model: nn.Module, keep: float = 0.5, block: int = 1, learnt: int = 0) -> PatchRanking:
    """Return the method with random weights for a model's tower, with `learnt` tokens in its first two blocks."""
    tower = tower_of(model)
    torch.manual_seed(0)
    predictor = RankPredictor(tower.num_tokens, tower.prefix, block).to(tower.like)
    tokens = VisualTokens(learnt, min(2, len(tower.blocks)), tower.width).to(tower.like) if learnt else None
    if tokens is not None:
        nn.init.normal_(tokens.own)
    return PatchRanking(predictor, keep, tokens=tokens)


def patched_with(model: nn.Module, method: Method | partial[Method]) -> nn.Module:
    """Return the model, patched with a method or with the result of a partial that takes the model."""
    return patch(model, method(model) if isinstance(method, partial) else method)


def method_id(method: Method | partial[Method]) -> str:
    """Return a test id, the same in every process, for a method or for a partial that creates one."""
    return method.func.__name__ if isinstance(method, partial) else str(method)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return the model with random weights, biases, layer scales and norms.

    Random vectors reveal an implementation that leaves one out. Attention is sharper than with fresh weights, which
    reveals one that attends to a wrong token or position.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1, 0.5)
            elif parameter.ndim == 2:
                sharp = any(part in name for part in ("qkv", "q_proj", "k_proj", "in_proj"))
                parameter.normal_(0, (2 if sharp else 1) * parameter.shape[1] ** -0.5)
    return model
