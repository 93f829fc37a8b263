"""Advice for models that no adapter serves: the reason, and the model to take instead."""

from __future__ import annotations

import re

from torch import nn

_FROM_TIMM = 'load this ViT from timm instead, as timm.create_model("{}", pretrained=True)'
_NO_TOKENS = "a convolutional network has no tokens to reduce: choose a ViT, such as open_clip's ViT-B-16"
# By library and name of a class; the first that matches counts.
_ADVICE = (
    (
        r"open_clip\..*ModifiedResNet",
        "a ResNet has no tokens to reduce: choose a ViT such as ViT-B-16, or call ck.encode_image on the unpatched "
        "ResNet",
    ),
    (
        r"(timm|transformers|torchvision|clip)\..*(ResNet|RegNet|BiT|ConvNeXt|FastVit|MobileNet|EfficientNet)",
        _NO_TOKENS,
    ),
    (r"(timm|transformers|torchvision)\..*Swin", "its windows need every patch at its place: choose a ViT"),
    (r"(timm|transformers)\..*Beit", "its N×N position bias needs every patch at its place: choose a ViT without one"),
    (
        r"transformers\..*Owl(ViT|v2)",
        "its heads find an object at every patch, which must stay at its place: patch a CLIP, such as "
        "transformers.CLIPModel",
    ),
    (r"transformers\..*DINOv3ViT", _FROM_TIMM.format("vit_base_patch16_dinov3")),
    (r"transformers\..*Dinov2WithRegisters", _FROM_TIMM.format("vit_base_patch14_reg4_dinov2")),
    (r"transformers\..*Dinov2", _FROM_TIMM.format("vit_base_patch14_dinov2")),
    (r"transformers\..*DeiT", _FROM_TIMM.format("deit_base_distilled_patch16_224")),
    (r"transformers\..*\.ViT", _FROM_TIMM.format("vit_base_patch16_224")),
)


def describe(model: nn.Module) -> str:
    """The type of a model's image tower, or of the model itself if it has none, and advice; for messages."""
    visual = getattr(model, "visual", None) or getattr(model, "vision_model", None) or model
    trunk = getattr(visual, "trunk", None)
    name = _name_of(visual) if trunk is None else f"{type(visual).__name__} around {_name_of(trunk)}"
    for module in visual.modules():
        path = f"{type(module).__module__}.{type(module).__qualname__}"
        advice = next((text for pattern, text in _ADVICE if re.match(pattern, path)), None)
        if advice is not None:
            inside = "" if module in (visual, trunk) else f" with {_name_of(module)}"
            return f"{name}{inside}: {advice}"
    return name


def _name_of(module: nn.Module) -> str:
    """The name of a module's class, with its library if that is transformers or timm."""
    owner = {"timm": "timm's ", "transformers": "transformers' "}.get(type(module).__module__.split(".")[0], "")
    return f"{owner}{type(module).__name__}"
