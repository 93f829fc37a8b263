"""CLIP's zero-shot head: logits = scale · cos(image, class) + bias. Reads B·E + K·E values, writes B·K."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from clipkernels.arguments import check_numbers, shape_of
from clipkernels.heads.arguments import check_rows, embedding_of

if TYPE_CHECKING:
    from clipkernels.encode import Encoded


class ZeroShot:
    """Logits from class embeddings only.

    Args:
        text: class embeddings (K,E), any floating dtype; need not be normalised.
        scale: factor of the cosines. "model" takes scale and bias of the model when a `ck.Classifier` is made with the
            head.
        bias: added to the logits of a model that has one, such as SigLIP; each logit is then that of a probability of
            its own, its sigmoid.
    Raises:
        TypeError: text that is no tensor.
        ValueError: text that is not (K,E) with K ≥ 1 or not finite, another scale, numbers that are not finite, or a
            bias beside scale="model".
    Source: CLIP, arXiv 2103.00020, section 3.1; the bias is SigLIP's, arXiv 2303.15343, section 3.2.
    """

    needs: tuple[str, ...] = ()

    def __init__(self, text: Tensor, scale: float | Literal["model"] = 100.0, bias: float | None = None) -> None:
        check_rows("text", "class embeddings (K,E) with K ≥ 1", text)
        if not len(text):
            raise ValueError(f"text must be class embeddings (K,E) with K ≥ 1, got {shape_of(text)}")
        with torch.inference_mode(False):  # a head may be used after the inference mode that it is made in
            self.text = normalize(text.to(torch.promote_types(text.dtype, torch.float32)), dim=-1)
        self.takes_model = isinstance(scale, str) and scale == "model"
        self._scale: float | None = None
        self.bias: float | None = None
        if not self.takes_model:
            self.set_logits(cast(float, scale), bias)
        elif bias is not None:
            raise ValueError(f'expected no bias with scale="model", which takes the model\'s, got {bias!r}')

    @property
    def scale(self) -> float:
        """The factor of the cosines.

        Raises:
            ValueError: it is the model's, and no `ck.Classifier` was made with the head.
        """
        if self._scale is None:
            raise ValueError('expected a model for scale="model", got none: make a ck.Classifier with the head')
        return self._scale

    def set_logits(self, scale: float, bias: float | None) -> None:
        """Set scale and bias of the logits; `ck.Classifier` sets its model's where `takes_model` is true.

        Raises:
            ValueError: numbers that are not finite.
        """
        check_numbers(scale=scale, **({} if bias is None else {"bias": bias}))
        self._scale, self.bias = scale, bias

    def __call__(self, features: Tensor | Encoded) -> Tensor:
        """Logits (B,K) of image embeddings (B,E), or of the embedding of an `Encoded`.

        They are computed in fp32 (fp64 stays fp64) for features of any dtype, and differentiable in the features.

        Raises:
            TypeError: features that are no tensor and no `Encoded`.
            ValueError: features that are not (B,E) with the E of the text, or a scale that is not known.
        """
        image = embedding_of(features, self.text.shape[1])
        dtype = torch.promote_types(image.dtype, self.text.dtype)
        with torch.autocast(image.device.type, enabled=False):
            logits = self.scale * normalize(image.to(dtype), dim=-1) @ self.text.to(image.device, dtype).T
            return logits if self.bias is None else logits + self.bias

    def matches(self, text: Tensor) -> bool:
        """Return true if class embeddings (K,E) equal this head's up to rounding: same classes, prompts and model."""
        expected = self.text.cpu()
        return text.shape == expected.shape and bool(
            (cosine_similarity(text.to(expected.dtype), expected) > 0.999).all()
        )

    def check_file(self, text: Tensor, path: str | os.PathLike[str], content: str) -> None:
        """Raise ValueError unless the class embeddings (K,E) in a file match; `content` is "a reservoir of", say."""
        if not self.matches(text):
            raise ValueError(
                f"expected {content} the same classes, prompts and model, {tuple(self.text.shape)}, got {path} with "
                f"other text embeddings {tuple(text.shape)}"
            )

    def describe(self) -> str:
        """The number of classes, and the scale and the bias of the logits, for the repr of a head."""
        scale = "'model'" if self._scale is None else f"{self._scale:g}"
        bias = "" if self.bias is None else f", bias={self.bias:g}"
        return f"classes={len(self.text)}, scale={scale}{bias}"

    def __repr__(self) -> str:
        return f"ZeroShot({self.describe()})"
