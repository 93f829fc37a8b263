"""The weights that a recovery trains: those that an image's embedding depends on, or LoRA adapters of the blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clipkernels import adapters
from clipkernels.adapters import Tower
from clipkernels.learn.checkpoints import seeded

DTYPES = (torch.float32, torch.float64)
ADAPTER = "recovery"
PACKAGE = "pip install 'clipkernels[recover]'"


@contextmanager
def original_flags(model: nn.Module) -> Iterator[None]:
    """Restore at the end which weights of a model need a gradient, and the gradients that they have."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def image_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of a model that the embedding of an image has a gradient for; no other weight needs one afterwards.

    Raises:
        ValueError: none, or weights of another dtype than float32 or float64, or of two.
    """
    tower = adapters.find_tower(model)
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    for parameter in floating:
        parameter.requires_grad_(True)
    noise = torch.randn(1, 3, *tower.image_size, generator=torch.Generator().manual_seed(0))
    embedding = tower.encode(noise.to(tower.like))
    gradients: Sequence[Tensor | None] = [None] * len(floating)
    if embedding.requires_grad:
        gradients = torch.autograd.grad(embedding.float().sum(), floating, allow_unused=True)
    trained = [parameter for parameter, gradient in zip(floating, gradients, strict=True) if gradient is not None]
    dtypes = {parameter.dtype for parameter in trained}
    if len(dtypes) != 1 or not dtypes <= {*DTYPES}:
        actual = ", ".join(sorted(str(dtype) for dtype in dtypes)) or "none that can be trained"
        raise ValueError(f"expected a model with an image tower in float32, got {actual}: call model.float() first")
    for parameter in floating:
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


class Adapters:
    """LoRA adapters, of peft, on the plain linear layers of a tower's blocks.

    Those are the two of an MLP, and q, k, v and out where the library has linear layers for them; the attention of
    open_clip and OpenAI's clip is one module, which gets none. They begin as no change.

    Args:
        tower: the tower.
        rank: rank of the two matrices of each adapter, which are scaled by 1.
        seed: seed of the first matrix.
    Raises:
        ImportError: peft is not installed.
        ValueError: a block without plain linear layers.
    """

    def __init__(self, tower: Tower, rank: int, seed: int) -> None:
        try:
            from peft import LoraConfig, LoraModel
        except ImportError as error:
            raise ImportError(f"lora needs peft: {PACKAGE}, or pass lora=None to train all weights") from error
        inside = {id(module) for block in tower.blocks for module in block.modules() if type(module) is nn.Linear}
        names = [name for name, module in tower.root.named_modules() if id(module) in inside]
        if not names:
            raise ValueError(
                f"expected blocks with plain linear layers for lora, got {type(tower.blocks[0]).__name__} without any: "
                "pass lora=None to train all weights"
            )
        self.root: Any = tower.root
        self.had_config = hasattr(self.root, "peft_config")
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        with seeded(seed):
            self.model: Any = LoraModel(self.root, config, ADAPTER)
        self.model.eval()
        self.weights = [weight for name, weight in self.root.named_parameters() if "lora_" in name]

    def merge(self) -> None:
        """Add the adapters to the weights of their layers, and remove them."""
        self._close("merge_and_unload")

    def remove(self) -> None:
        """Remove the adapters, unless that has been done; the layers are as they were."""
        self._close("unload")

    def _close(self, how: str) -> None:
        if self.model is None:
            return
        getattr(self.model, how)()
        self.model = None
        if not self.had_config and hasattr(self.root, "peft_config"):
            del self.root.peft_config
