"""Hooks of a host's modules: call those of a block, find those of a module that a patched tower bypasses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import BackwardHook

from clipkernels import block
from clipkernels.adapters.protocols import Tower
from clipkernels.block import TokenState
from clipkernels.plan import Step

KINDS = ("forward", "forward_pre", "backward", "backward_pre")


def has_hooks(module: nn.Module) -> bool:
    """Return true if a module has hooks of its own."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def fires_hooks(tower: Tower, host: nn.Module) -> bool:
    """Return true if a block has hooks that its tower calls."""
    forward = any(not tower.ignores_hook(hook) for hook in host._forward_hooks.values())
    return forward or bool(host._forward_pre_hooks or host._backward_hooks or host._backward_pre_hooks)


def has_global_hooks() -> bool:
    """Return true if torch calls hooks of all modules."""
    return any(getattr(nn.modules.module, f"_global_{kind}_hooks") for kind in KINDS)


def hook_attributes(module: nn.Module) -> list[str]:
    """The attributes of a module that hold hooks, such as `_forward_hooks`."""
    return [name for name in (f"_{kind}_hooks" for kind in KINDS) if getattr(module, name)]


def forward_with_hooks(
    tower: Tower, index: int, parts: block.Parts, state: TokenState, step: Step | None, prefix: int, **options: Any
) -> block.BlockOutput:
    """Run a block with its own hooks around it, which see the tokens in the host's layout and may replace them."""
    host = tower.blocks[index]
    outputs: list[block.BlockOutput] = []

    def forward(x: Tensor) -> Any:
        entering = TokenState(_tokens_from_hook(tower, index, x, state.x), None, state.size, state.rope)
        outputs.append(block.forward(parts, entering, step, prefix, **options))
        y = tower.layout(outputs[0].state.x)
        return (y,) if tower.returns_tuple(host) else y

    returned = _call_with_hooks(host, forward, tower.layout(state.x), tower.ignores_hook)
    leaving = outputs[0].state
    x = _tokens_from_hook(tower, index, returned, leaving.x)
    # Field by field, because torch.compile of torch 2.6 takes neither _replace nor a starred argument.
    _, destination, origin, ranking = outputs[0]
    return block.BlockOutput(TokenState(x, None, leaving.size, leaving.rope), destination, origin, ranking)


def _tokens_from_hook(tower: Tower, index: int, returned: Any, like: Tensor) -> Tensor:
    """Tokens (B,N,C) from a value that passed through a block's hooks.

    Raises:
        ValueError: a hook returned anything but as many tokens as it was given.
    """
    x = returned[0] if isinstance(returned, tuple) and returned else returned
    if not isinstance(x, Tensor) or x.ndim != 3 or tower.layout(x).shape != like.shape:
        shape = tuple(tower.layout(like).shape)
        actual = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"a hook on block {index} must return tokens of shape {shape}, got {actual}")
    return tower.layout(x)


def _call_with_hooks(
    module: Any, forward: Callable[[Tensor], Any], x: Tensor, is_ignored: Callable[[Any], bool]
) -> Any:
    """The output of `forward` on x with a module's hooks around it, in the order of `nn.Module.__call__`.

    Args:
        module: the module whose hooks are called. Full backward hooks are among them, hooks for all modules are not.
            After an error those that were registered with `always_call=True` are called too, if they were not yet.
        forward: runs in place of the module's own forward.
        x: the only argument; hooks that take keyword arguments get none.
        is_ignored: returns true for a hook that is not called.
    Raises:
        ValueError: a hook before the forward returns anything but one tensor.
    """
    args: tuple[Any, ...] = (x,)
    output: Any = None
    called: set[int] = set()

    def call() -> Any:
        nonlocal args, output
        for key in module._forward_pre_hooks:
            args = _call_pre_hook(module, key, args)
        backward = None
        if module._backward_hooks or module._backward_pre_hooks:
            after, before = list(module._backward_hooks.values()), list(module._backward_pre_hooks.values())
            backward = BackwardHook(module, after, before)
            args = backward.setup_input_hook(args)
        output = forward(*args)
        for key, hook in module._forward_hooks.items():
            if not is_ignored(hook):
                called.add(key)
                output = _call_forward_hook(module, key, args, output)
        return output if backward is None else backward.setup_output_hook(output)

    if torch.compiler.is_compiling():
        return call()
    try:
        return call()
    except Exception:
        for key, hook in module._forward_hooks.items():
            if key in module._forward_hooks_always_called and key not in called and not is_ignored(hook):
                try:
                    output = _call_forward_hook(module, key, args, output)
                except Exception as error:  # as torch does, because the first error is the one to report
                    name = type(module).__name__
                    warnings.warn(
                        f"a hook with always_call=True on {name} raised after an error: {error}", stacklevel=2
                    )
        raise


def _call_pre_hook(module: Any, key: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The argument after one of a module's hooks before the forward, which may replace it."""
    hook, with_kwargs = module._forward_pre_hooks[key], key in module._forward_pre_hooks_with_kwargs
    returned = hook(module, args, {}) if with_kwargs else hook(module, args)
    if returned is None:
        return args
    args, kwargs = returned if with_kwargs else (returned, {})
    args = args if isinstance(args, tuple) else (args,)
    if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
        name = type(module).__name__
        raise ValueError(f"a hook before {name} may replace its tokens alone, got {len(args)} arguments")
    return args


def _call_forward_hook(module: Any, key: int, args: tuple[Any, ...], output: Any) -> Any:
    """The output after one of a module's forward hooks, which may replace it."""
    hook = module._forward_hooks[key]
    with_kwargs = key in module._forward_hooks_with_kwargs
    returned = hook(module, args, {}, output) if with_kwargs else hook(module, args, output)
    return output if returned is None else returned
