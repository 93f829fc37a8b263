"""CALIP: an image's patches and the classes look at each other, without a parameter, before they are compared.

logits = scale · (cos(image, class) + β₂ ⟨image, class that saw the patches⟩ + β₃ ⟨patches that saw the classes, class⟩)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from clipkernels import ops
from clipkernels.arguments import check_numbers
from clipkernels.heads.arguments import check_labels, check_positive, check_not_empty, normalize_as
from clipkernels.heads.presets import CALIP_PRESETS
from clipkernels.heads.weight_search import grid, search
from clipkernels.heads.zero_shot import ZeroShot

if TYPE_CHECKING:
    from clipkernels.encode import Encoded


class CALIP:
    """A zero-shot head that also reads the patches.

    The patches are all tokens but the prefix after the tower's final norm and projection, however many a method leaves
    of them: merged and fused ones count once. Image, patches and classes are L2-normalised here, what they see in each
    other is not. The published weights are for ResNet-50 with another alpha and normalisation: `fit` finds a model's
    own.

    Args:
        text: class embeddings (K,E), any floating dtype; need not be normalised.
        alpha: what similarities are divided by before the softmax.
        beta2: weight of the classes that have looked at the patches.
        beta3: weight of the patches that have looked at the classes.
        preset: the data set whose published weights stand in for those not given.
        scale: what the cosines are multiplied by, 100 in the source.
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
        scale: float = 100.0,
    ) -> None:
        if preset not in CALIP_PRESETS:
            raise ValueError(f"preset must be one of {', '.join(CALIP_PRESETS)}, got {preset!r}")
        check_positive(alpha=alpha)
        self.zero_shot = ZeroShot(text, scale)
        self.alpha = alpha
        published = CALIP_PRESETS[preset]
        self.beta2 = published.beta2 if beta2 is None else beta2
        self.beta3 = published.beta3 if beta3 is None else beta3
        check_numbers(beta2=self.beta2, beta3=self.beta3, scale=scale)

    def __call__(self, features: Tensor | Encoded) -> Tensor:
        """Logits (B,K) of an `Encoded` with `tokens`, fp32 (fp64 for fp64 features).

        Raises:
            ValueError: features without `tokens`, or of another E than the text.
        """
        first, second, third = self.terms(features)
        return first + self.beta2 * second + self.beta3 * third

    def terms(self, features: Tensor | Encoded) -> Tensor:
        """What the weights one, beta2 and beta3 multiply, (3,B,K)."""
        pooled, patches = patches_of(features)
        first = self.zero_shot(pooled)
        text = self.zero_shot.text.to(patches.device, patches.dtype)
        with torch.autocast(patches.device.type, enabled=False):
            others = ops.calip_logits(patches, normalize_as(pooled, patches), text, self.alpha, terms=True)[1:]
        return torch.cat([first[None], others.to(first.dtype) * (self.zero_shot.scale / 100)])

    def fit(self, features: Encoded | Iterable[Encoded], labels: Tensor) -> float:
        """Sets beta2 and beta3 to the best of the published grid, 200 values below 2 by 200 below .1, on a validation
        split; some presets lie beyond.

        Args:
            features: of n images with `tokens`, or batches of them in the order of the labels, of which only three
                numbers per image and class are kept.
            labels: (n,) int64, the true classes. Not those of images that accuracy is reported on.
        Returns:
            the accuracy there, 0 to 1; of equally good weights the lowest are taken.
        Raises:
            ValueError: labels that do not fit, or no image.
        """
        batches = [cast("Encoded", features)] if hasattr(features, "embedding") else features
        with torch.no_grad():
            terms = [self.terms(batch) for batch in batches]
            check_not_empty(sum(part.shape[1] for part in terms))
            first, second, third = torch.cat(terms, 1)
            labels = check_labels(labels, *first.shape).to(first.device)
            found = search(first, second, third, labels, grid(0.001, 2, 200), grid(0.001, 0.1, 200))
        self.beta2, self.beta3 = found.first, found.second
        return found.accuracy


def patches_of(features: Tensor | Encoded) -> tuple[Tensor, Tensor]:
    """The embedding (B,E) and the L2-normalised patches (B,P,E), in their dtype.

    Raises:
        ValueError: features without tokens, with no patch among them, or of other images or width than the embedding.
    """
    if isinstance(features, Tensor) or features.tokens is None:
        raise ValueError("features must be an Encoded with tokens, as ck.encode_image(tokens=True) gives")
    tokens, pooled = tuple(features.tokens.shape), tuple(features.embedding.shape)
    if len(tokens) != 3 or len(pooled) != 2 or (tokens[0], tokens[2]) != pooled:
        raise ValueError(f"features must hold tokens (B,N,E) for an embedding (B,E) = {pooled}, got {tokens}")
    patches = features.tokens[:, features.prefix :]
    if not patches.shape[1]:
        raise ValueError(f"features must hold at least one patch, got tokens {tuple(features.tokens.shape)}")
    return features.embedding, normalize_as(patches, patches)
