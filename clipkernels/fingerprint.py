"""What tells a tower from any other, so that what was made with one is not used with another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipkernels.adapters import Tower

SAMPLE, GLANCE = 4096, 32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IMAGE = ("visual.", "vision_model.", "visual_projection.", "trunk.")
NEITHER = ("logit_", "text_decoder.")
PROBE_ATOL = 0.1
"""How far embeddings of one tower may be apart, of their length: bfloat16 moves them by 0.03, other heads by 0.2."""


def fingerprint(model: nn.Module, half: Literal["image", "text"] = "image") -> dict[str, str]:
    """What tells a tower from any other: a SHA-256 for its own precision, and for both half ones if that is single:
    {"float32": …, "float16": …, "bfloat16": …}. A float16 tower and a bfloat16 one cannot be compared: each has lost
    what the other keeps.

    Each is over the names, the shapes and up to 4,096 values of the image tower's floating-point weights, in that
    precision, and over its activations, which distinguish a QuickGELU from a GELU with the same weights. A patched
    tower has the fingerprint of the unpatched one, and so on every device. The text tower's is over all that is neither
    the image tower's nor a scale, a bias of logits or a caption's decoder.
    """
    states = {
        name.replace("_orig_mod.", ""): tensor
        for name, tensor in sorted(model.state_dict().items())
        if tensor.is_floating_point()
    }
    alone = not any(name.startswith(IMAGE) for name in states)

    def within(name: str) -> bool:
        if half == "text":
            return not name.startswith((*IMAGE, *NEITHER))
        return alone or name.startswith(IMAGE)

    states = {name: tensor for name, tensor in states.items() if within(name)}
    samples = [_sample(tensor) for tensor in states.values()]
    lowest = max((DTYPES.index(t.dtype) for t in states.values() if t.dtype in DTYPES), default=0)
    modules = ((name.replace("_orig_mod.", ""), module) for name, module in model.named_modules())
    acts = sorted({repr(module) for name, module in modules if within(name) and _acts(module)})
    found = {}
    for dtype in DTYPES if lowest == 0 else DTYPES[lowest : lowest + 1]:
        digest = sha256(json.dumps([acts, [(name, list(t.shape)) for name, t in states.items()]]).encode())
        for sample in samples:
            digest.update(sample.to(dtype).view(torch.uint8).numpy().tobytes())
        found[str(dtype).removeprefix("torch.")] = digest.hexdigest()
    return found


def same_tower(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two fingerprints are of one tower, compared in the lower of their precisions; never of one in float16 and
    one in bfloat16."""
    common = [name for name in one if name in other]
    return bool(common) and one[common[0]] == other[common[0]]


def output_probe(embeddings: Tensor) -> list[list[float]]:
    """A few values of embeddings (n,E), each row of length one: what a tower makes of known inputs tells what its
    weights do not, such as how many heads it has, which row it pools and whether it looks ahead."""
    some = embeddings[:, :: max(1, embeddings.shape[1] // GLANCE)][:, :GLANCE].cpu().float()
    rows: list[list[float]] = normalize(some, dim=1).tolist()
    return [[round(value, 4) for value in row] for row in rows]


def same_probe(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> bool:
    """Whether two glances are of one tower, in whatever precision and on whatever device."""
    first, second = torch.tensor(one), torch.tensor(other)
    return first.shape == second.shape and bool(((first - second).norm(dim=-1) <= PROBE_ATOL).all())


def weights_version(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """What is another one once weights were written in place, replaced or moved; cheap, and for this process alone.

    What is written by way of `.data` goes unnoticed.
    """
    tensors = (*model.parameters(), *model.buffers())
    return tuple((each.data_ptr(), 0 if each.is_inference() else each._version) for each in tensors)


def short_fingerprint(tower: Mapping[str, str]) -> str:
    """A fingerprint as it is shown."""
    return ", ".join(f"{dtype} {digest[:8]}" for dtype, digest in tower.items())


def fingerprinted_module(tower: Tower) -> nn.Module:
    """What a tower is known by, by whichever door it came: all of it but what a library keeps outside of it, such as
    the head of open_clip's TimmModel and the projection of transformers' CLIPModel."""
    found: nn.Module = getattr(tower.root, "trunk", tower.root)
    return found


def digest_of(module: nn.Module) -> str:
    """Eight characters that tell a small module's weights from others."""
    digest = sha256()
    for name, weight in module.state_dict().items():
        digest.update(name.encode() + weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def check_fingerprint(tower: Mapping[str, str], model: nn.Module, where: object, about: Mapping[str, Any]) -> None:
    """Raises ValueError unless a model's tower is the one that something on disk was made with."""
    own = fingerprint(model)
    if not same_tower(tower, own):
        named = f"{about.get('model') or 'unnamed'}, {about.get('pretrained') or 'no tag'}"
        if tower and not set(tower) & set(own):
            raise ValueError(
                f"expected the tower of {where} ({named}) in float32 or {next(iter(tower))}, got {next(iter(own))}: "
                "the two cannot be compared"
            )
        expected, actual = short_fingerprint(tower), short_fingerprint(own)
        raise ValueError(f"expected the tower of {where} ({named}; {expected}), got another one ({actual})")


def _sample(tensor: Tensor) -> Tensor:
    """Up to 4,096 values at equal distances, fp32 on the CPU; none of a tensor without data."""
    if tensor.is_meta:
        return torch.empty(0)
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].cpu().float().contiguous()


def _acts(module: nn.Module) -> bool:
    """Whether a module is an activation: it has no weights and no parts, and is no identity and no dropout."""
    bare = not any(True for _ in module.children()) and not module.state_dict()
    return bare and not isinstance(module, nn.Identity) and "Drop" not in type(module).__name__
