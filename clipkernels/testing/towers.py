"""Towers of every host library with random weights, and methods with weights of their own."""

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
    predictor = RankPredictor(tower.num_tokens, tower.prefix, block).to(tower.like)
    tokens = VisualTokens(learnt, min(2, len(tower.blocks)), tower.width).to(tower.like) if learnt else None
    if tokens is not None:
        nn.init.normal_(tokens.own)
    return PatchRanking(predictor, keep, tokens=tokens)


def patched_with(model: nn.Module, method: Method | partial[Method]) -> nn.Module:
    """The model patched with a method, or with what makes one for it."""
    return patch(model, method(model) if isinstance(method, partial) else method)


def method_id(method: Method | partial[Method]) -> str:
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
