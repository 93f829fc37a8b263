"""Hugging Face's CLIP, SigLIP, SigLIP2, ChineseCLIP, AltCLIP and MetaCLIP2 image towers, transformers 4.48 to 5.

All have `embeddings`, `encoder.layers` and `post_layernorm`. The CLIPs pool CLS, the SigLIPs pool by a learned query.
Differences between versions (a layer's arguments and result, the place of the tower in a model) are found by attribute,
never by version.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from clipkernels.adapters.advice import describe
from clipkernels.adapters.modules import (
    PlainLinear,
    PlainMLP,
    bypass_reason,
    is_modified,
    linear_of,
    mlp_of,
    norm_of,
    ratio_of,
)
from clipkernels.adapters.packing import separate_qkv
from clipkernels.adapters.protocols import UnsupportedTower
from clipkernels.block import Branch
from clipkernels.reference import Norm

CAPTURE = "transformers.utils.output_capturing"


def find(model: Any) -> TransformersTower | None:
    """The tower of a model with an image half, or of that half; None for anything else.

    Raises:
        UnsupportedTower: the tower has a class embedding but is not a CLIP.
    """
    vision, projection = model, None
    while hasattr(vision, "vision_model"):
        projection = getattr(vision, "visual_projection", projection)
        vision = vision.vision_model
    # A wrapper forwards attributes to the model inside it, which is the tower.
    if not all(part in getattr(vision, "_modules", ()) for part in ("embeddings", "encoder", "post_layernorm")):
        return None
    if not hasattr(vision.encoder, "layers") or not hasattr(vision.embeddings, "position_embedding"):
        return None
    # Towers without CLIP's norm before the blocks have a pooling head, or no pool.
    if not hasattr(vision, "pre_layrnorm") and hasattr(vision.embeddings, "class_embedding"):
        raise UnsupportedTower(f"expected a CLIP or a SigLIP, got {describe(vision)}")
    return TransformersTower(vision, projection=projection)


class TransformersTower:
    """The adapter of a vision transformer.

    Args:
        vision: the module with embeddings, encoder and post_layernorm.
        owner: the encoder that runs, or None for that of `vision`; DataParallel runs replicas.
        projection: the linear layer that follows the pool, or None.
    """

    pools_with_queries = False
    returns_tokens = True

    def __init__(self, vision: Any, owner: Any = None, projection: Any = None) -> None:
        self.root = self.vision = vision
        self.owner = vision.encoder if owner is None else owner
        self.projection = projection

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.owner.layers

    @property
    def prefix(self) -> int:
        return int(self.has_cls)

    @property
    def num_tokens(self) -> int:
        return int(self.vision.embeddings.position_embedding.weight.shape[0])  # torch.jit.trace makes sizes tensors

    @property
    def image_size(self) -> tuple[int, int]:
        side = self.patch * round((self.num_tokens - self.prefix) ** 0.5)
        return side, side

    @property
    def width(self) -> int:
        return self.vision.embeddings.embed_dim

    @property
    def patch(self) -> int:
        return self.vision.embeddings.patch_size

    @property
    def out(self) -> int:
        return self.width if self.projection is None else self.projection.out_features

    @property
    def mlp_ratio(self) -> float:
        return ratio_of(self.owner.layers[0].mlp, self.width)

    @property
    def like(self) -> Tensor:
        return self.owner.layers[0].layer_norm1.weight

    @property
    def has_cls(self) -> bool:
        return self.vision is not None and hasattr(self.vision.embeddings, "class_embedding")

    @property
    def pools_cls(self) -> bool:
        return self.has_cls

    @property
    def attention(self) -> str | None:
        return getattr(self.owner.config, "_attn_implementation", None)

    @property
    def checkpointing(self) -> bool:
        encoder = self.owner
        enabled = encoder.gradient_checkpointing or getattr(encoder.layers[0], "gradient_checkpointing", False)
        return enabled and encoder.training

    def parts(self, host: nn.Module) -> TransformersBlock:
        return TransformersBlock(host)

    def projections(self, host: Any) -> Sequence[nn.Module]:
        return _projections(host.self_attn)

    def run_block(self, host: Any, x: Tensor, rope: Tensor | None) -> Tensor:
        # In some versions every mask is a required argument; all versions take None.
        masks = [name for name in inspect.signature(type(host).forward).parameters if name.endswith("mask")]
        out = host(x, **dict.fromkeys(masks))
        return out[0] if isinstance(out, tuple) else out

    def layout(self, x: Tensor) -> Tensor:
        return x

    def returns_tuple(self, host: nn.Module) -> bool:
        # Layers that can also return their attention maps are those of older versions.
        return "output_attentions" in inspect.signature(type(host).forward).parameters

    def ignores_hook(self, hook: Any) -> bool:
        return _is_capture_hook(hook)

    def rope_like(self, host: nn.Module, patches: int) -> Tensor | None:
        return None

    def unsupported_reason(self, host: Any) -> str | None:
        if not all(part in host._modules for part in ("layer_norm1", "self_attn", "layer_norm2", "mlp")):
            found = f"got {type(host).__name__}: wrap the whole model, not its blocks"
            return f"expected layer_norm1, self_attn, layer_norm2 and mlp, {found}"
        attn = host.self_attn
        # transformers 5 leaves hooks behind that collect states. The patched `forward` below calls them.
        reason = bypass_reason(host, attn, harmless=_has_only_capture_hooks)
        if reason is not None:
            return reason
        if not all(part in attn._modules for part in ("q_proj", "k_proj", "v_proj", "out_proj")):
            return f"expected q_proj, k_proj, v_proj and out_proj, got {type(attn).__name__}"
        if attn.scale != attn.head_dim**-0.5:
            return f"expected attention scaled by {attn.head_dim}**-0.5, got {attn.scale}"
        return f"expected attention without dropout, got p = {attn.dropout}" if attn.dropout else None

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.vision.embeddings(**self._inputs(images))
        return self.vision.pre_layrnorm(x) if self.pools_cls else x, None

    def pool(self, x: Tensor) -> Tensor:
        if self.pools_cls:
            return self.project(x[:, :1])[:, 0]
        return self._project(self._head(self.vision.post_layernorm(x)))

    def project(self, x: Tensor) -> Tensor:
        x = self.vision.post_layernorm(x)
        if not self.pools_cls:  # the head gets one token at a time
            x = self._head(x.flatten(0, 1)[:, None]).unflatten(0, x.shape[:2])
        return self._project(x)

    def encode(self, images: Tensor) -> Tensor:
        pixels, *grid = self._inputs(images).values()
        # SigLIP2 takes a mask between the two, whose name differs between versions.
        mask = [pixels.new_ones(pixels.shape[:2]).int()] if grid else []
        return self._project(self.vision(pixels, *mask, *grid).pooler_output)

    def _inputs(self, images: Tensor) -> dict[str, Tensor]:
        """The arguments of the embeddings: images, or for SigLIP2 their patches in row order and the grid's size."""
        embeddings = self.vision.embeddings
        if hasattr(embeddings, "num_patches_per_side"):  # Idefics and SmolVLM position patches by a mask
            raise UnsupportedTower(f"expected embeddings that take images alone, got {type(embeddings).__name__}")
        if not isinstance(embeddings.patch_embedding, nn.Linear):
            return {"pixel_values": images}
        side = self.patch
        patches = images.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)
        grid = torch.tensor(patches.shape[1:3], device=images.device).expand(images.shape[0], 2)
        return {"pixel_values": patches.flatten(3).flatten(1, 2), "spatial_shapes": grid}

    def _head(self, x: Tensor) -> Tensor:
        if not getattr(self.vision, "use_head", False):
            raise UnsupportedTower(f"expected a pooling head, got {type(self.vision).__name__} without one")
        return self.vision.head(x)

    def _project(self, x: Tensor) -> Tensor:
        return x if self.projection is None else self.projection(x)

    @staticmethod
    def overrides(run: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        def forward(
            self: Any,
            inputs_embeds: Tensor,
            attention_mask: Tensor | None = None,
            causal_attention_mask: Tensor | None = None,
            output_attentions: bool | None = None,
            output_hidden_states: bool | None = None,
            return_dict: bool | None = None,
            **kwargs: Any,
        ) -> Any:
            if causal_attention_mask is not None or kwargs.get("is_causal"):
                raise ValueError("a patched tower takes no causal mask")
            if _is_requested(self, "output_attentions", output_attentions):
                raise ValueError("a patched tower has no attention maps to return: unpatch it for output_attentions")
            _refuse_collectors(self)
            collect = _is_requested(self, "output_hidden_states", output_hidden_states)
            take_indices = range(len(self.layers)) if collect else ()
            x, intermediates = run(
                self,
                inputs_embeds,
                visible=_visible_keys(attention_mask),
                take_indices=take_indices,
                rankings=kwargs.get("ranking"),
            )
            states = (inputs_embeds, *intermediates) if collect else None
            if states is not None:
                for layer, entering, leaving in zip(self.layers, states, states[1:]):  # noqa: B905  # old dynamo
                    for hook in filter(_is_capture_hook, layer._forward_hooks.values()):
                        hook(layer, (entering,), leaving)
            if return_dict is False:
                return (x,) if states is None else (x, states)
            return BaseModelOutput(last_hidden_state=x, hidden_states=states)

        return {"forward": forward}


def _is_requested(encoder: Any, name: str, argument: Any) -> bool:
    """Return true if an optional output is requested, by argument or by configuration.

    A selection of hidden states counts as a request for all.
    """
    return (getattr(encoder.config, name, False) if argument is None else argument) not in (False, None)


def _refuse_collectors(encoder: Any) -> None:
    """Raise ValueError if transformers 4.5x has replaced the forward of its layers to collect their outputs."""
    replaced = (layer for layer in encoder.layers if "forward" in layer.__dict__)
    closures = [layer for layer in replaced if layer.forward.__globals__["__name__"] == "transformers.utils.generic"]
    if closures:
        for layer in closures:  # after an error transformers does not restore them itself
            del layer.forward
        raise ValueError(
            "a patched tower returns no hidden states with this version of transformers: unpatch it for "
            "output_hidden_states"
        )


def _visible_keys(mask: Tensor | None) -> Tensor | None:
    """A padding mask as (B,N) fp32, 1 for a visible key and 0 for a hidden one, or None if there is no mask.

    Every query must see the same keys.
    """
    if mask is None:
        return None
    keys = mask if mask.ndim == 2 else mask[:, 0, 0]
    # An additive mask is 0 for a visible key.
    return (keys == 0 if mask.is_floating_point() and mask.ndim > 2 else keys != 0).float()


def _is_capture_hook(hook: Any) -> bool:
    """Return true if transformers collects outputs by this hook."""
    return getattr(hook, "__module__", None) == CAPTURE


def _has_only_capture_hooks(module: Any) -> bool:
    """Return true if a module has hooks, all of them those by which transformers collects outputs."""
    hooks = list(module._forward_hooks.values())
    other_hooks = (module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return bool(hooks) and all(map(_is_capture_hook, hooks)) and not any(other_hooks)


def _projections(attn: Any) -> Sequence[nn.Module]:
    """The query, key and value projections of an attention."""
    return attn.q_proj, attn.k_proj, attn.v_proj


class TransformersBlock:
    """The parts of one encoder layer."""

    def __init__(self, host: Any) -> None:
        self.host = host

    @cached_property
    def norm1(self) -> Norm | None:
        return norm_of(self.host.layer_norm1)

    @cached_property
    def norm2(self) -> Norm | None:
        return norm_of(self.host.layer_norm2)

    @cached_property
    def _plain_projection(self) -> PlainLinear | None:
        """The attention branch, or None if a module of it must be called."""
        return linear_of(self.host.self_attn.out_proj)

    @cached_property
    def _plain_mlp(self) -> PlainMLP | None:
        """The MLP branch, or None if a module of it must be called."""
        mlp = self.host.mlp
        if is_modified(mlp) or not all(part in mlp._modules for part in ("fc1", "activation_fn", "fc2")):
            return None
        return mlp_of(mlp.fc1, mlp.activation_fn, mlp.fc2, None)

    def qkv(
        self, x: Tensor, normed: Tensor | None, rows: int | None, rope: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.host.self_attn
        x = self.host.layer_norm1(x) if normed is None else normed
        return separate_qkv(_projections(attn), x, attn.num_heads, rows)

    def project(self, out: Tensor, fused: bool) -> Branch:
        x = out.transpose(1, 2).flatten(2)
        if fused and self._plain_projection is not None:
            return self._plain_projection.branch(x)
        return Branch(self.host.self_attn.out_proj(x))

    def mlp(self, x: Tensor, normed: Tensor | None, fused: bool) -> Branch:
        x = self.host.layer_norm2(x) if normed is None else normed
        if fused and self._plain_mlp is not None:
            return self._plain_mlp.branch(x)
        return Branch(self.host.mlp(x))
