"""facebookresearch/ToMe's own patch on timm's ViT-B/16, with the same weights as ours; `bench.towers --peer` runs it.

ToMe runs from a checkout that the user names; none of its code is part of this package.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType

import open_clip
import timm
import torch
from torch import nn

import clipkernels as ck
from clipkernels.measure.timing import Variant


def peer_tome(path: Path, dtype: torch.dtype, device: torch.device, r: int) -> tuple[nn.Module, dict[str, Variant]]:
    """Return an open_clip model, and with the same weights timm's ViT-B/16 without and with ToMe's own patch.

    Raises:
        AssertionError: the two dense towers differ by more than 32 epsilons of the dtype.
    """
    torch.manual_seed(0)
    theirs = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    ours = from_timm(theirs).to(device, dtype)
    theirs = theirs.to(device, dtype)
    for name in ("tome", "tome.patch"):  # their __init__ files import packages that timm's patch does not need
        package = ModuleType(name)
        package.__path__ = [str(path / name.replace(".", "/"))]
        sys.modules[name] = package
    from tome.patch.timm import apply_patch

    merging = copy.deepcopy(theirs, {id(tensor): tensor for tensor in [*theirs.parameters(), *theirs.buffers()]})
    apply_patch(merging)
    merging.r = r
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    with torch.inference_mode():
        expected = theirs(images).double()
        error = ((ours.encode_image(images).double() - expected).norm() / expected.norm()).item()
    allowed = 32 * torch.finfo(dtype).eps
    assert error <= allowed, (
        f"timm's weights in open_clip: expected a relative error up to {allowed:.1e}, got {error:.1e}"
    )
    return ours, {
        "timm (host)": Variant(theirs, ck.Dense(), exact=False),
        f"tome on timm (r={r})": Variant(merging, ck.ToMe(r), exact=False),
    }


def from_timm(theirs: nn.Module) -> nn.Module:
    """Return an open_clip model with the weights of timm's plain ViT-B/16 and the identity as projection."""
    width = 768
    vision = {
        "image_size": 224,
        "patch_size": 16,
        "width": width,
        "layers": 12,
        "no_ln_pre": True,
        "norm_kwargs": {"eps": theirs.norm.eps},
    }
    text = {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
    ours = open_clip.CLIP(width, vision, text).eval()
    names = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.qkv.weight": "attn.in_proj_weight",
        "attn.qkv.bias": "attn.in_proj_bias",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    state = theirs.state_dict()
    position = state["pos_embed"][0].clone()
    position[1:] += state["patch_embed.proj.bias"]  # open_clip's convolution has no bias
    mapped = {
        "conv1.weight": state["patch_embed.proj.weight"],
        "class_embedding": state["cls_token"][0, 0],
        "positional_embedding": position,
        "ln_post.weight": state["norm.weight"],
        "ln_post.bias": state["norm.bias"],
        "proj": torch.eye(width),
    }
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, index, inner = name.split(".", 2)
            for old, new in names.items():
                inner = inner.replace(old, new)
            mapped[f"transformer.resblocks.{index}.{inner}"] = tensor
    ours.visual.load_state_dict(mapped)
    return ours
