"""Whether a tower's blocks are what their parts say: asked once, before a tower is patched."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from clipkernels import block
from clipkernels.adapters import Tower, UnsupportedTower
from clipkernels.adapters.modules import is_forward_replaced
from clipkernels.backend import choose, use_epilogue_kernels
from clipkernels.block import TokenState
from clipkernels.tower import refuse


def verify(tower: Tower) -> None:
    """Raises UnsupportedTower unless each kind of block gives through its parts what its own forward gives."""
    for module in tower.owner.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedTower(f"expected modules in Python, got the ScriptModule {type(module).__name__}")
    refuse_replaced(tower)
    kinds: dict[tuple[type, ...], tuple[int, nn.Module]] = {}
    for index, host in enumerate(tower.blocks):
        refuse(tower, host, index)
        kinds.setdefault(tuple(type(module) for module in host.modules()), (index, host))
    if tower.like.is_meta:
        warnings.warn("the model is on the meta device, its blocks could not be verified", stacklevel=3)
        return
    for index, host in kinds.values():
        _probe(tower, host, index)


def _probe(tower: Tower, host: nn.Module, index: int) -> None:
    """Compares what a block adds to its input with what its parts add, in fp32 on random input."""
    # Copied without hooks, so that nothing is left behind in the model, its hooks or its mode.
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    memo: dict[int, Any] = {id(vars(m)[name]): OrderedDict() for m in host.modules() for name in hooks}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, min(tower.num_tokens, 17), tower.width, generator=generator, device="cpu").to(tower.like.device)
    try:
        probe = copy.deepcopy(host, memo).float().eval()
        rope = tower.rope_like(host, x.shape[1] - tower.prefix)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            expected = tower.run_block(probe, x, rope) - x
            choose("auto", x.device, x.dtype, "attention")  # what was asked for may serve where the model goes later
    except Exception as error:  # whatever a module that cannot be copied or run in fp32 raises
        warnings.warn(f"block {index} could not be verified: {error}", stacklevel=4)
        return
    try:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            parts = tower.parts(probe)
            output = block.forward(parts, TokenState(x, rope=rope), None, tower.prefix, fused=use_epilogue_kernels(x))
            came = output.state.x - x
    except Exception as error:  # its parts are not what they seem
        raise UnsupportedTower(f"block {index}: its own forward runs, its parts do not: {error}") from error
    if not expected.isfinite().all():
        warnings.warn("the model's weights are not finite, its blocks could not be verified", stacklevel=4)
        return
    off, scale = (came - expected).abs().max(), expected.abs().max()
    # 2e-3 leaves room for TF32; what the block adds may be small beside x, whose rounding it then carries.
    if off > 2e-3 * scale + 8 * torch.finfo(x.dtype).eps * x.abs().max():
        raise UnsupportedTower(
            f"block {index}: expected a plain attention block, got {type(host).__name__}, which adds something that "
            f"differs by {off / scale:.1e} of it"
        )


def refuse_replaced(tower: Tower) -> None:
    """Raises UnsupportedTower where the owner's forward, which is about to be passed by, is not its class's."""
    if is_forward_replaced(tower.owner):
        raise UnsupportedTower(f"the forward of {type(tower.owner).__name__} was replaced: patch before that")
