"""Fingerprints of towers: refuse artefacts (predictors, features) made with a different tower."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipkernels.adapters import Tower, find_exported
from clipkernels.arguments import check_model

WEIGHT_VALUES, PROBE_VALUES = 4096, 32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IMAGE_PREFIXES = ("visual.", "vision_model.", "visual_projection.", "trunk.")
OTHER_PREFIXES = ("logit_", "text_decoder.")
PROBE_ATOL = 0.1
"""Largest distance between two probes of one tower, in units of their length.

bfloat16 moves a probe by 0.03; another number of heads moves it by 0.2.
"""


def fingerprint(model: nn.Module, half: Literal["image", "text"] = "image") -> dict[str, str]:
    """The fingerprint of a tower: SHA-256 digests by precision.

    A float32 tower has three, {"float32": …, "float16": …, "bfloat16": …}; a tower in half precision has the one of its
    own precision. A float16 and a bfloat16 tower cannot be compared, because each has lost bits that the other keeps.

    Each digest covers the names, the shapes and up to 4,096 values of each of the tower's floating-point weights, in
    that precision, and the tower's activation modules, which tell a QuickGELU from a GELU with the same weights. The
    fingerprint does not depend on the device, nor on a patch. The text half is everything outside the image tower
    except logit scales, logit biases and a caption decoder. An exported model has the fingerprints of the towers that
    it was exported from.
    """
    check_model(model)
    exported = find_exported(model)
    if exported is not None:
        return dict((exported.tower if half == "image" else exported.text_tower) or {})
    states = {
        name.replace("_orig_mod.", ""): tensor
        for name, tensor in sorted(model.state_dict().items())
        if tensor.is_floating_point()
    }
    is_image_tower = not any(name.startswith(IMAGE_PREFIXES) for name in states)

    def in_half(name: str) -> bool:
        if half == "text":
            return not name.startswith((*IMAGE_PREFIXES, *OTHER_PREFIXES))
        return is_image_tower or name.startswith(IMAGE_PREFIXES)

    states = {name: tensor for name, tensor in states.items() if in_half(name)}
    samples = [_sample(tensor) for tensor in states.values()]
    lowest = max((DTYPES.index(t.dtype) for t in states.values() if t.dtype in DTYPES), default=0)
    modules = ((name.replace("_orig_mod.", ""), module) for name, module in model.named_modules())
    acts = sorted({repr(module) for name, module in modules if in_half(name) and _is_activation(module)})
    digests = {}
    for dtype in DTYPES if lowest == 0 else DTYPES[lowest : lowest + 1]:
        digest = sha256(json.dumps([acts, [(name, list(t.shape)) for name, t in states.items()]]).encode())
        for sample in samples:
            digest.update(sample.to(dtype).view(torch.uint8).numpy().tobytes())
        digests[str(dtype).removeprefix("torch.")] = digest.hexdigest()
    return digests


def same_tower(first: Mapping[str, str], second: Mapping[str, str]) -> bool:
    """Return true if two fingerprints are of one tower, compared in the lower of their precisions.

    A float16 and a bfloat16 fingerprint never match.
    """
    common = [name for name in first if name in second]
    return bool(common) and first[common[0]] == second[common[0]]


def output_probe(embeddings: Tensor) -> list[list[float]]:
    """Up to 32 values of each of the embeddings (n,E) of known inputs, rows L2-normalised, to 4 decimals.

    A tower's outputs reveal properties that its weights do not: the number of heads, the row that it pools, a causal
    mask.
    """
    columns = embeddings[:, :: max(1, embeddings.shape[1] // PROBE_VALUES)][:, :PROBE_VALUES].cpu().float()
    rows: list[list[float]] = normalize(columns, dim=1).tolist()
    return [[round(value, 4) for value in row] for row in rows]


def same_probe(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> bool:
    """Return true if two probes come from the same tower, in any precision and on any device."""
    a, b = torch.tensor(first), torch.tensor(second)
    return a.shape == b.shape and bool(((a - b).norm(dim=-1) <= PROBE_ATOL).all())


def weights_version(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """A cheap version stamp that changes when a weight is modified in place, replaced or moved.

    It is valid within this process. A write through `.data` goes unnoticed.
    """
    tensors = (*model.parameters(), *model.buffers())
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


def short_fingerprint(tower: Mapping[str, str]) -> str:
    """A fingerprint as messages show it: the first 8 characters of each digest."""
    return ", ".join(f"{dtype} {digest[:8]}" for dtype, digest in tower.items())


def fingerprinted_module(tower: Tower) -> nn.Module:
    """The module to fingerprint, regardless of how the tower was passed in.

    It excludes projections that a library keeps outside the tower, such as the head of open_clip's TimmModel and the
    projection of transformers' CLIPModel.
    """
    module: nn.Module = getattr(tower.root, "trunk", tower.root)
    return module


def digest_of(module: nn.Module) -> str:
    """The first 8 characters of a SHA-256 of a small module's weights."""
    digest = sha256()
    for name, weight in module.state_dict().items():
        digest.update(name.encode() + weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def check_fingerprint(tower: Mapping[str, str], model: nn.Module, source: object, about: Mapping[str, Any]) -> None:
    """Raise ValueError unless a model has the tower that an artefact was made with.

    Args:
        tower: the fingerprint of the artefact's tower.
        model: the model.
        source: the artefact's file or name, for messages.
        about: the artefact's metadata; "model" and "pretrained" name its tower in messages.
    """
    current = fingerprint(model)
    if not same_tower(tower, current):
        name = f"{about.get('model') or 'unnamed'}, {about.get('pretrained') or 'no tag'}"
        if tower and not set(tower) & set(current):
            raise ValueError(
                f"expected the tower of {source} ({name}) in float32 or {next(iter(tower))}, "
                f"got {next(iter(current))}: the two cannot be compared"
            )
        expected, actual = short_fingerprint(tower), short_fingerprint(current)
        raise ValueError(f"expected the tower of {source} ({name}; {expected}), got another tower ({actual})")


def _sample(tensor: Tensor) -> Tensor:
    """Up to 4,096 evenly spaced values, fp32 on the CPU; empty for a meta tensor."""
    if tensor.is_meta:
        return torch.empty(0)
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // WEIGHT_VALUES)][:WEIGHT_VALUES].cpu().float().contiguous()


def _is_activation(module: nn.Module) -> bool:
    """Return true if a module has no weights and no children, and is neither an identity nor a dropout."""
    bare = not any(True for _ in module.children()) and not module.state_dict()
    return bare and not isinstance(module, nn.Identity) and "Drop" not in type(module).__name__
