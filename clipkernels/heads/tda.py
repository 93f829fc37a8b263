"""TDA: confident images of each class vote for it, uncertain ones against the classes that they may be.

    logits = scale · cos(image, class) + α Σ_{positive} exp(-β(1 - z·zᵢ))·onehot(classᵢ)
             - α' Σ_{negative} exp(-β'(1 - z·zᵢ))·[threshold < pᵢ < 1]

z is the direction of an image's embedding and pᵢ the softmax (K,) of a cached image's zero-shot logits.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels.arguments import (
    check_choice,
    check_flags,
    check_int,
    check_numbers,
    check_range,
    check_tensors,
    describe,
    is_list,
    shape_of,
)
from clipkernels.heads.arguments import embedding_of
from clipkernels.heads.presets import TDA_PRESETS
from clipkernels.heads.tda_entries import (
    FORMAT,
    Entries,
    candidates_of,
    empty_entries,
    relative_entropy,
    store,
    sum_by_class,
    sum_by_target,
    votes_of,
)
from clipkernels.heads.zero_shot import ZeroShot
from clipkernels.state_files import read_state, write_state

if TYPE_CHECKING:
    from clipkernels.encode import Encoded

# Images that are processed at once, because each holds one vote per slot and class in memory.
IMAGES = 256
STORED = ("keys", "entropy", "arrival")  # of both caches, in a file


class TDA:
    """A head that adapts to a stream of images: call it with the stream's batches, in order.

    Each image joins the positive cache under the class of its zero-shot prediction, and the negative one if its
    entropy is in a range. A full class replaces its most uncertain image by one of less entropy. An image votes on
    itself, because it joins before its logits are corrected. A batch gives the same logits as its images one after
    another, up to the rounding of matrix products. Images with features that are not finite are not stored.

    Args:
        text: class embeddings (K,E), any floating dtype; need not be normalised.
        preset: data set whose published strength and beta replace those that are None; use ImageNet's for other data.
        strength: α, the weight of the positive cache.
        beta: β.
        capacity: images per class in the positive cache.
        negative_strength: α', the weight of the negative cache.
        negative_beta: β'.
        negative_capacity: images per class in the negative cache.
        entropy_range: limits of the entropy of negative images, as shares of log2 K; both are left out. The entropy is
            in nats, as in the released code, so no share exceeds ln 2.
        threshold: probability above which a negative image votes against a class, at least 0 and below 1.
        frozen: correct without storing; may be set at any time.
        scale: factor of the cosines, 100 in the source; "model" as in `ZeroShot`. Entropies are always those of the
            softmax.
    Raises:
        ValueError: an unknown preset, a capacity below one, numbers that are not finite or out of range, text that is
            not (K,E).
    Guarantees: computed in fp32 (fp64 stays fp64); deterministic. An image takes E multiplications per cached image, of
        which there are at most K times the sum of both capacities.
    Source: TDA, arXiv 2403.18293, section 3; rules and presets are those of its released code.
    """

    needs: tuple[str, ...] = ()

    def __init__(
        self,
        text: Tensor,
        preset: str = "imagenet",
        *,
        strength: float | None = None,
        beta: float | None = None,
        capacity: int = 3,
        negative_strength: float = 0.117,
        negative_beta: float = 1.0,
        negative_capacity: int = 2,
        entropy_range: tuple[float, float] = (0.2, 0.5),
        threshold: float = 0.03,
        frozen: bool = False,
        scale: float | Literal["model"] = 100.0,
    ) -> None:
        check_choice("preset", preset, *TDA_PRESETS)
        published = TDA_PRESETS[preset]
        self.strength = published.strength if strength is None else strength
        self.beta = published.beta if beta is None else beta
        check_numbers(strength=self.strength, beta=self.beta)
        check_numbers(negative_strength=negative_strength, negative_beta=negative_beta)
        check_int("capacity", capacity, 1)
        check_int("negative_capacity", negative_capacity, 1)
        if not is_list(entropy_range) or len(entropy_range) != 2:
            raise ValueError(f"entropy_range must be its two limits, got {describe(entropy_range)}")
        for end, limit in zip(("low", "high"), entropy_range, strict=True):
            check_numbers(**{f"the {end} end of entropy_range": limit})
        if entropy_range[0] >= entropy_range[1]:
            raise ValueError(f"entropy_range must ascend, got {tuple(entropy_range)}")
        check_range("threshold", threshold, 0, 1, "[)")
        check_flags(frozen=frozen)
        self.zero_shot = ZeroShot(text, scale)
        self.capacity, self.negative_capacity, self.threshold = capacity, negative_capacity, threshold
        self.negative_strength, self.negative_beta = negative_strength, negative_beta
        self.entropy_low, self.entropy_high = entropy_range
        self.frozen = frozen
        # More classes cannot exceed the threshold, even if probabilities are rounded up.
        classes = len(text)
        self._targets = min(classes, int(1 / threshold) + 1) if threshold * classes > 1 else classes
        self.reset()

    def reset(self) -> None:
        """Remove all entries and counts."""
        with torch.inference_mode(False):  # the entries may be used after the inference mode of this call
            self.seen, text = 0, self.zero_shot.text
            self._positive = empty_entries(text, self.capacity, 0)
            self._negative = empty_entries(text, self.negative_capacity, self._targets)

    @property
    def counts(self) -> Tensor:
        """The number of images of each class in the positive cache, (K,) int64."""
        return (self._positive.arrival >= 0).sum(1)

    @property
    def negative_counts(self) -> Tensor:
        """The number of images of each class in the negative cache, (K,) int64."""
        return (self._negative.arrival >= 0).sum(1)

    def __call__(self, features: Tensor | Encoded) -> Tensor:
        """Corrected logits (B,K) of embeddings (B,E) or an `Encoded`, in the order of the stream; stores the images.

        Raises:
            TypeError: features that are no tensor and no `Encoded`.
            ValueError: features that are not (B,E) with the E of the text.
        """
        logits, image = self.zero_shot(features), embedding_of(features, self.zero_shot.text.shape[1])
        # Outside of inference mode, because the entries may be used after it.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            keys = normalize(image.to(logits.dtype), dim=1)
            votes = self._observe(keys, logits, logits.log_softmax(1))
        return logits + votes

    def from_views(self, embeddings: Tensor, keep: int | None = None) -> Tensor:
        """Corrected logits (B,K) of images from several augmented views of each, in the order of the stream.

        The views of least entropy stand for the image: the mean of their logits is its zero-shot prediction, the mean
        of their probabilities gives its entropy and its votes against classes, and the mean of their directions is its
        key, which is not normalised again. The released code takes 64 views, an image and 63 views by AugMix, for
        ImageNet-A, -R, -Sketch and -V2, and one for other data. Images are stored as by a call of the head.

        Args:
            embeddings: (B,V,E) of V views of each image.
            keep: number of views that stand for an image, ties to the first; None is a tenth of them, but at least one.
        Raises:
            TypeError: embeddings that are no tensor.
            ValueError: embeddings that are not (B,V,E) with V ≥ 1 and the E of the text, or a keep outside of 1 to V.
        """
        text = self.zero_shot.text
        check_tensors(embeddings=embeddings)
        if embeddings.ndim != 3 or not embeddings.shape[1] or embeddings.shape[2] != text.shape[1]:
            expected = f"embeddings must be (B,V,E) with V ≥ 1 and E = {text.shape[1]}"
            raise ValueError(f"{expected}, got {shape_of(embeddings)}")
        if not embeddings.is_floating_point():
            raise ValueError(f"embeddings must be of a floating dtype, got {embeddings.dtype}")
        batch, views, _ = embeddings.shape
        keep = max(1, views // 10) if keep is None else keep
        check_int("keep", keep, 1, views, "V")
        logits = self.zero_shot(embeddings.flatten(0, 1)).view(batch, views, len(text))
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(embeddings.device.type, enabled=False):
            logs = logits.log_softmax(2)
            best = entropies(logs).argsort(dim=1, stable=True)[:, :keep]  # NaN comes last
            keys = normalize(take_views(embeddings, best).to(logits.dtype), dim=2).mean(1)
            log_mean = take_views(logs, best).logsumexp(1) - math.log(keep)
            votes = self._observe(keys, take_views(logits, best).mean(1), log_mean)
        return take_views(logits, best).mean(1) + votes

    def __repr__(self) -> str:
        settings = f"strength={self.strength:g}, beta={self.beta:g}"
        return f"TDA({self.zero_shot.describe()}, {settings}, seen={self.seen})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the entries as safetensors, through a temporary file that is renamed.

        Raises:
            ValueError: no image has been processed yet.
            OSError: the file cannot be written.
        """
        if not self.seen:
            raise ValueError("expected a TDA that has processed images, got an empty one: nothing to save")
        tensors = {"text": self.zero_shot.text, "negative.targets": self._negative.targets}
        for name, entries in (("positive", self._positive), ("negative", self._negative)):
            tensors |= {f"{name}.{part}": getattr(entries, part) for part in STORED}
        write_state(path, FORMAT, {"seen": self.seen, **self._settings()}, tensors)

    def load(self, path: str | os.PathLike[str]) -> TDA:
        """Replace this head's entries by those of a file, and return it; on any error it is left unchanged.

        Raises:
            ValueError: a file that holds no caches of a TDA or not as they were written, or caches with other text
                embeddings (other classes, prompts or model), or of other capacities, entropies, threshold or scale.
            OSError: the file cannot be read.
        """
        with torch.inference_mode(False):  # the entries may be used after the inference mode of this call
            header, tensors = read_state(path, FORMAT)
        self.zero_shot.check_file(tensors["text"], path, "caches of")
        for name, value in self._settings().items():
            if header[name] != value:
                raise ValueError(f"expected caches of {name} {value}, got {path} of {header[name]}")
        positive, negative = ({part: tensors[f"{name}.{part}"] for part in STORED} for name in ("positive", "negative"))
        targets = tensors["negative.targets"]
        actual, capacities = (positive["arrival"].shape[1], *targets.shape[1:]), (self.capacity, self.negative_capacity)
        if actual != (*capacities, self._targets):
            raise ValueError(f"expected caches of capacities {capacities}, got {path} of {actual[:2]}")
        with torch.inference_mode(False):
            none = positive["arrival"].new_empty(*positive["arrival"].shape, 0)
        self._positive, self._negative = Entries(**positive, targets=none), Entries(**negative, targets=targets)
        self.seen = header["seen"]
        return self

    def _settings(self) -> dict[str, float]:
        """The settings that entries depend on, by the names of a file's header."""
        settings = {name: float(getattr(self, name)) for name in ("entropy_low", "entropy_high", "threshold")}
        return {"scale": self.zero_shot.scale, **settings}

    def _observe(self, keys: Tensor, logits: Tensor, logs: Tensor) -> Tensor:
        """The votes (B,K) on images with these keys (B,E), uncorrected logits and log-probabilities; stores them."""
        if not len(keys):
            return torch.zeros_like(logits)
        parts = (tensor.split(IMAGES) for tensor in (keys, logits, logs))
        return torch.cat([self._observe_part(*part) for part in zip(*parts, strict=True)])

    def _observe_part(self, keys: Tensor, logits: Tensor, logs: Tensor) -> Tensor:
        count, classes = logits.shape
        entropy, labels = entropies(logs), logits.argmax(1)
        share = relative_entropy(entropy, classes)
        joins = logits.isfinite().all(1) & keys.isfinite().all(1) & entropy.isfinite() & (not self.frozen)
        joined = joins.nonzero()[:, 0]
        against = (joins & (self.entropy_low < share) & (share < self.entropy_high)).nonzero()[:, 0]
        arrival = torch.arange(self.seen, self.seen + count, device=keys.device)
        images = Entries(keys, entropy, arrival, labels.new_empty(count, 0))
        sure, unsure = images.take(joined), images.take(against)._replace(targets=self._targets_of(logs[against]))
        self._positive, self._negative = self._positive.move(keys), self._negative.move(keys)
        positive = candidates_of(self._positive, sure.entropy, labels[joined], joined, count)
        negative = candidates_of(self._negative, unsure.entropy, labels[against], against, count)
        votes = votes_of(self._positive, sure, positive, keys, self.beta)
        total = self.strength * sum_by_class(votes, self._positive, positive)
        votes = votes_of(self._negative, unsure, negative, keys, self.negative_beta)
        total -= self.negative_strength * sum_by_target(votes, self._negative, unsure, negative)
        if not self.frozen:
            self.seen += count  # first, because it bounds the arrivals in a file
            store(self._positive, sure, positive)
            store(self._negative, unsure, negative)
        return total.T

    def _targets_of(self, logs: Tensor) -> Tensor:
        """The classes (n,S) between the threshold and 1 for log-probabilities (n,K), ascending after -1 for none."""
        probability, target = logs.exp().topk(self._targets, 1)
        is_target = (probability > self.threshold) & (probability < 1)
        return target.masked_fill(~is_target, -1).sort(1).values


def entropies(logs: Tensor) -> Tensor:
    """The entropies (…) in nats of log-probabilities (…,K)."""
    return -(logs.exp() * logs.clamp_min(torch.finfo(logs.dtype).min)).sum(-1)


def take_views(x: Tensor, index: Tensor) -> Tensor:
    """The views (B,n,…) at an index (B,n) of each image, from all views (B,V,…)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
