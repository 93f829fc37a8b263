"""CALIP: patches and class embeddings attend to each other, without parameters, before they are compared.

    logits = scale · (cos(image, class) + β₂ ⟨image, attended class⟩ + β₃ ⟨attended patches, class⟩)

An attended class is the patches' average, weighted by their similarity to the class; attended patches are averages of
the classes, pooled over the patches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from clipkernels import ops
from clipkernels.arguments import check_choice, check_numbers, check_positive
from clipkernels.heads.arguments import check_batches, check_labels, check_not_empty, encoded_with, normalize_as
from clipkernels.heads.presets import CALIP_PRESETS
from clipkernels.heads.weight_search import search, spaced
from clipkernels.heads.zero_shot import ZeroShot

if TYPE_CHECKING:
    from clipkernels.encode import Encoded


class CALIP:
    """A zero-shot head that also reads the patches.

    The patches are all tokens but the prefix, after the tower's final norm and projection. A method may leave any
    number of them; a merged or fused token counts once. Image, patches and classes are L2-normalised here; the
    attended classes and patches are not. The published weights are for ResNet-50 with another alpha and another
    normalisation: use `fit` to find the weights of a model.

    Args:
        text: class embeddings (K,E), any floating dtype; need not be normalised.
        alpha: temperature, the divisor of the similarities before the softmax.
        beta2: weight of the classes after they attended to the patches.
        beta3: weight of the patches after they attended to the classes.
        preset: data set whose published weights replace a beta2 or beta3 of None.
        scale: factor of the cosines, 100 in the source; "model" as in `ZeroShot`.
    Raises:
        ValueError: text that is not (K,E), an unknown preset, an alpha that is not positive, numbers that are not
            finite.
    Source: CALIP, arXiv 2209.14169, section 3.2; the presets are those of SuS-X's code, arXiv 2211.16198.
    """

    needs: tuple[str, ...] = ("tokens",)

    def __init__(
        self,
        text: Tensor,
        alpha: float = 0.5,
        beta2: float | None = None,
        beta3: float | None = None,
        *,
        preset: str = "imagenet",
        scale: float | Literal["model"] = 100.0,
    ) -> None:
        check_choice("preset", preset, *CALIP_PRESETS)
        check_positive(alpha=alpha)
        self.zero_shot = ZeroShot(text, scale)
        self.alpha = alpha
        published = CALIP_PRESETS[preset]
        self.beta2 = published.beta2 if beta2 is None else beta2
        self.beta3 = published.beta3 if beta3 is None else beta3
        check_numbers(beta2=self.beta2, beta3=self.beta3)

    def __call__(self, features: Tensor | Encoded) -> Tensor:
        """Logits (B,K) of an `Encoded` with `tokens`, fp32 (fp64 for fp64 features).

        Raises:
            ValueError: features without `tokens`, or with another E than the text.
        """
        first, second, third = self.terms(features)
        return first + self.beta2 * second + self.beta3 * third

    def terms(self, features: Tensor | Encoded) -> Tensor:
        """The three terms (3,B,K) of the logits, before their weights 1, beta2 and beta3."""
        pooled, patches = patches_of(features)
        first = self.zero_shot(pooled)
        text = self.zero_shot.text.to(patches.device, patches.dtype)
        with torch.autocast(patches.device.type, enabled=False):
            others = ops.calip_logits(patches, normalize_as(pooled, patches), text, self.alpha, terms=True)[1:]
        return torch.cat([first[None], others.to(first.dtype) * (self.zero_shot.scale / 100)])

    def fit(self, features: Encoded | Iterable[Encoded], labels: Tensor) -> float:
        """Set beta2 and beta3 to the best values of the published grid on a validation split.

        The grid has 200 values of beta2 below 2 and 200 values of beta3 below 0.1; some presets lie outside of it.

        Args:
            features: an `Encoded` with `tokens` of n images, or batches of such in the order of the labels. Only three
                numbers per image and class are held in memory.
            labels: (n,) int64, the true classes. Use other images than those that accuracy is reported on.
        Returns:
            The accuracy on these images, 0 to 1. Ties go to the lowest weights.
        Raises:
            ValueError: labels that do not fit, or no image.
        """
        with torch.no_grad():
            terms = [self.terms(batch) for batch in check_batches(features)]
            check_not_empty(sum(part.shape[1] for part in terms))
            first, second, third = torch.cat(terms, 1)
            labels = check_labels(labels, *first.shape).to(first.device)
            best = search(first, second, third, labels, spaced(0.001, 2, 200), spaced(0.001, 0.1, 200))
        self.beta2, self.beta3 = best.first, best.second
        return best.accuracy

    def __repr__(self) -> str:
        weights = f"alpha={self.alpha:g}, beta2={self.beta2:g}, beta3={self.beta3:g}"
        return f"CALIP({self.zero_shot.describe()}, {weights})"


def patches_of(features: Tensor | Encoded) -> tuple[Tensor, Tensor]:
    """The embedding (B,E) and the L2-normalised patches (B,P,E), each in its own dtype.

    Raises:
        ValueError: features without tokens or without a patch, or tokens whose B or E is not the embedding's.
    """
    features = encoded_with("tokens", features)
    assert features.tokens is not None
    tokens, pooled = tuple(features.tokens.shape), tuple(features.embedding.shape)
    if len(tokens) != 3 or len(pooled) != 2 or (tokens[0], tokens[2]) != pooled:
        raise ValueError(f"features must hold tokens (B,N,E) for an embedding (B,E) = {pooled}, got {tokens}")
    patches = features.tokens[:, features.prefix :]
    if not patches.shape[1]:
        raise ValueError(f"features must hold at least one patch, got tokens {tuple(features.tokens.shape)}")
    return features.embedding, normalize_as(patches, patches)
