"""CLIP's zero-shot head: logits = scale · cos(image, class). Reads B·E + K·E values, writes B·K."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

if TYPE_CHECKING:
    from clipkernels.encode import Encoded


class ZeroShot:
    """Logits from class embeddings only.

    Args:
        text: class embeddings (K,E), any floating dtype; need not be normalised.
        scale: factor of the cosines.
    Raises:
        ValueError: text that is not (K,E) with K ≥ 1.
    Source: CLIP, arXiv 2103.00020, section 3.1.
    """

    needs: tuple[str, ...] = ()

    def __init__(self, text: Tensor, scale: float = 100.0) -> None:
        if text.ndim != 2 or not len(text):
            raise ValueError(f"text must be class embeddings (K,E) with K ≥ 1, got {tuple(text.shape)}")
        with torch.inference_mode(False):  # a head may be used after the inference mode that it is made in
            self.text = normalize(text.to(torch.promote_types(text.dtype, torch.float32)), dim=-1)
        self.scale = scale

    def __call__(self, features: Tensor | Encoded) -> Tensor:
        """Logits (B,K) of image embeddings (B,E), or of the embedding of an `Encoded`.

        They are computed in fp32 (fp64 stays fp64) for features of any dtype, and differentiable in the features.

        Raises:
            ValueError: features that are not (B,E) with the E of the text.
        """
        image = features if isinstance(features, Tensor) else features.embedding
        if image.ndim != 2 or image.shape[1] != self.text.shape[1]:
            raise ValueError(f"features must be (B,E) with E = {self.text.shape[1]}, got {tuple(image.shape)}")
        dtype = torch.promote_types(image.dtype, self.text.dtype)
        with torch.autocast(image.device.type, enabled=False):
            return self.scale * normalize(image.to(dtype), dim=-1) @ self.text.to(image.device, dtype).T

    def matches(self, text: Tensor) -> bool:
        """Return true if class embeddings (K,E) equal this head's up to rounding: same classes, prompts and model."""
        expected = self.text.cpu()
        return text.shape == expected.shape and bool(
            (cosine_similarity(text.to(expected.dtype), expected) > 0.999).all()
        )
