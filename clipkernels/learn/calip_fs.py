"""CALIP-FS: CALIP with eight linear maps around its cross-attention, trained on a few labelled images of each class.

    q, k, v of the classes and of the patches, softmax(q_t k_sᵀ/α) v_s and softmax(q_s k_tᵀ/α) v_t, each mapped again

All maps start as identities, so the untrained head equals CALIP. Built from the paper's description, because no code
of this variant was released. The maps of the patches are folded into their other factor, so no patch is ever mapped
and a step costs little more than CALIP itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from clipkernels.arguments import check_numbers, check_positive
from clipkernels.formats import FLOATS, Format, TensorSpec
from clipkernels.heads.arguments import check_labels, check_not_empty, normalize_as
from clipkernels.heads.calip import patches_of
from clipkernels.heads.zero_shot import ZeroShot
from clipkernels.learn.checkpoints import check_training, weight_specs
from clipkernels.state_files import read_state, write_state

if TYPE_CHECKING:
    from clipkernels.encode import Encoded

MAPS = tuple(f"{part}_{side}" for side in ("text", "image") for part in ("query", "key", "value", "out"))


class Numbers(msgspec.Struct, forbid_unknown_fields=True):
    """The header of a head's file: its arguments."""

    alpha: Annotated[float, msgspec.Meta(gt=0)]
    beta2: float
    beta3: float
    scale: float


def _tensors(header: Numbers) -> dict[str, TensorSpec]:
    shapes = {f"maps.{name}.weight": "width width" for name in MAPS} | {f"maps.{name}.bias": "width" for name in MAPS}
    return {"text": TensorSpec(FLOATS, "classes width", -1.01, 1.01), **weight_specs(shapes)}


FORMAT = Format("clipkernels.calip_fs.2", "the weights of a FewShotCALIP", Numbers, _tensors)


class FewShotCALIP(nn.Module):
    """A head to train on cached features of frozen towers. It is a module: move it with `.to()`.

    Args:
        text: class embeddings (K,E), any floating dtype; need not be normalised.
        alpha: temperature, the divisor of the similarities before the softmax.
        beta2: weight of the classes after they attended to the patches.
        beta3: weight of the patches after they attended to the classes.
        scale: factor of the cosines.
    Raises:
        ValueError: text that is not (K,E), an alpha that is not positive, numbers that are not finite.
    Source: CALIP-FS, arXiv 2209.14169, section 3.3.
    """

    needs: tuple[str, ...] = ("tokens",)
    text: Tensor

    def __init__(
        self, text: Tensor, alpha: float = 0.5, beta2: float = 1.12, beta3: float = 0.02, *, scale: float = 100.0
    ) -> None:
        super().__init__()
        check_positive(alpha=alpha)
        check_numbers(beta2=beta2, beta3=beta3, scale=scale)
        self.alpha, self.beta2, self.beta3, self.scale = alpha, beta2, beta3, scale
        self.register_buffer("text", ZeroShot(text).text)
        width = self.text.shape[1]
        layers = {name: nn.Linear(width, width).to(self.text) for name in MAPS}
        for layer in layers.values():
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.maps = nn.ModuleDict(layers)

    def forward(self, features: Tensor | Encoded) -> Tensor:
        """Logits (B,K) of an `Encoded` with `tokens`, in the dtype of the text; differentiable.

        Raises:
            ValueError: features without `tokens`, with another E than the text, or on another device.
        """
        embedding, patches = patches_of(features)
        if embedding.shape[1:] != self.text.shape[1:] or embedding.device != self.text.device:
            expected = f"(B,{self.text.shape[1]}) on {self.text.device}"
            raise ValueError(f"features must be {expected}, got {tuple(embedding.shape)} on {embedding.device}")
        with torch.autocast(embedding.device.type, enabled=False):
            return self._logits(normalize_as(embedding, self.text), patches.to(self.text.dtype))

    def _logits(self, image: Tensor, patches: Tensor) -> Tensor:
        text = self.text
        maps: Any = self.maps
        query, key, value = (maps[f"{part}_text"](text) for part in ("query", "key", "value"))
        value_image, out_text = maps["value_image"], maps["out_text"]
        # q·(W x + b) = (q W)·x + q·b
        class_scores = linear(patches, query @ maps["key_image"].weight, query @ maps["key_image"].bias) / self.alpha
        mapped_image = image @ out_text.weight
        patch_values = (patches @ (mapped_image @ value_image.weight)[..., None])[..., 0] + (
            mapped_image @ value_image.bias
        )[:, None]
        second = (patch_values[:, None] @ class_scores.softmax(1))[:, 0] + (image @ out_text.bias)[:, None]
        patch_scores = linear(patches, key @ maps["query_image"].weight, key @ maps["query_image"].bias) / self.alpha
        # The rows of the softmax sum to one, so the last map can be applied to the values first.
        attended = patch_scores.softmax(2) @ maps["out_image"](value)
        third = (attended.mean(1) + attended.amax(1)) @ text.T
        return self.scale * (image @ text.T + self.beta2 * second + self.beta3 * third)

    @torch.enable_grad()
    def fit(
        self,
        features: Encoded,
        labels: Tensor,
        *,
        epochs: int = 20,
        batch_size: int = 64,
        lr: float = 1e-4,
        seed: int = 0,
        progress: Callable[[int, float], None] | None = None,
    ) -> list[float]:
        """Train all maps with AdamW on cross-entropy.

        Args:
            features: an `Encoded` with `tokens` of n images, on this head's device.
            labels: (n,) int64, the true classes.
            epochs: passes over the images.
            batch_size: images per step.
            lr: learning rate. Ten times the default, as is usual for adapters, lost CLIP's accuracy on small sets.
            seed: seed of the order of the images.
            progress: called after each epoch with its number, from 1, and its mean loss.
        Returns:
            The mean loss of each epoch.
        Raises:
            ValueError: features or labels that do not fit, no image, epochs or a batch_size below one.
            RuntimeError: in inference mode.
        """
        check_training("fit", epochs, batch_size, seed, progress, lr=lr)
        embedding, _ = patches_of(features)
        check_not_empty(len(embedding))
        labels = check_labels(labels, len(embedding), len(self.text)).to(embedding.device)
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(self.parameters(), lr)
        losses = []
        for epoch in range(epochs):
            total = 0.0
            for batch in torch.randperm(len(labels), generator=generator).to(embedding.device).split(batch_size):
                logits = self(_take_images(features, batch))
                loss = cross_entropy(logits, labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += float(loss.detach()) * len(batch)
            losses.append(total / len(labels))
            if progress is not None:
                progress(epoch + 1, losses[-1])
        return losses

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the maps and the class embeddings as safetensors, through a temporary file that is renamed.

        Raises:
            ValueError: weights that are not finite.
            OSError: the file cannot be written.
        """
        write_state(path, FORMAT, {name: getattr(self, name) for name in Numbers.__struct_fields__}, self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> FewShotCALIP:
        """Load saved maps, alpha, beta2, beta3 and scale, and return this head; on any error it is left unchanged.

        Raises:
            ValueError: a file without such weights or not as it was written, or one with other text embeddings (other
                classes, prompts or model).
            OSError: the file cannot be read.
        """
        numbers, tensors = read_state(path, FORMAT)
        ZeroShot(self.text).check_file(tensors["text"], path, "weights for")
        self.load_state_dict(tensors)
        self.__dict__.update(numbers)
        return self


def _take_images(features: Encoded, index: Tensor) -> Encoded:
    """The cached features of the images at `index`."""
    assert features.tokens is not None
    return features._replace(embedding=features.embedding[index], tokens=features.tokens[index])
