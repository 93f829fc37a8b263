"""Tip-Adapter-F: Tip-Adapter whose support features, the keys of its cache, are trained on labelled images.

    logits = scale · cos(image, class) + α Σⱼ exp(-β(1 - image·keyⱼ))·onehot(classⱼ)

A key starts as the direction of a support image. It is not normalised again, so training also sets the weight of its
vote.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from clipkernels import ops, reference
from clipkernels.arguments import check_numbers
from clipkernels.formats import FLOATS, Format, TensorSpec
from clipkernels.heads.arguments import check_labels, check_not_empty, check_rows, embedding_of, normalize_as
from clipkernels.heads.tip import grid_of, search_alphas, search_betas
from clipkernels.heads.zero_shot import ZeroShot
from clipkernels.learn.checkpoints import check_training, weight_specs
from clipkernels.reference.precision import autocast_disabled
from clipkernels.state_files import read_state, write_state

if TYPE_CHECKING:
    from clipkernels.encode import Encoded


class Numbers(msgspec.Struct, forbid_unknown_fields=True):
    """The header of a head's file: its arguments."""

    alpha: float
    beta: float
    scale: float


def _tensors(header: Numbers) -> dict[str, TensorSpec]:
    specs = {
        "text": TensorSpec(FLOATS, "classes width", -1.01, 1.01),
        "labels": TensorSpec((torch.int64,), "images", 0),
    }
    return {**specs, **weight_specs({"keys": "images width"})}


def _check(header: Numbers, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the keys are sorted by their labels, which are classes."""
    labels, classes = tensors["labels"], len(tensors["text"])
    if (labels.diff() < 0).any() or int(labels[-1]) >= classes:
        raise ValueError(f"labels that are not ascending classes below {classes}")


FORMAT = Format("clipkernels.tip_f.1", "the keys of a TipAdapterF", Numbers, _tensors, _check)


class TipAdapterF(nn.Module):
    """A head to train on cached embeddings of frozen towers. It is a module: move it with `.to()`.

    Args:
        text: class embeddings (K,E), any floating dtype; need not be normalised.
        features: (n,E) embeddings of the support images, n ≥ 1, any floating dtype; need not be normalised. In the
            released code each is the mean of ten random crops of an image.
        labels: (n,) int64, the classes of the support images; a class without support gets no vote.
        alpha: weight of the votes.
        beta: decay rate of a vote with cosine distance.
        scale: factor of the cosines.
    Raises:
        TypeError: text, features or labels that are no tensors.
        ValueError: shapes that do not fit, no support image, labels outside of the classes, rows or numbers that are
            not finite.
    Source: Tip-Adapter, arXiv 2111.03930, section 3.3; the settings of the training are those of its released code.
    """

    needs: tuple[str, ...] = ()
    text: Tensor
    labels: Tensor
    offsets: Tensor

    def __init__(
        self,
        text: Tensor,
        features: Tensor,
        labels: Tensor,
        alpha: float = 1.17,
        beta: float = 1.0,
        *,
        scale: float = 100.0,
    ) -> None:
        super().__init__()
        check_numbers(alpha=alpha, beta=beta, scale=scale)
        self.alpha, self.beta, self.scale = alpha, beta, scale
        self.register_buffer("text", ZeroShot(text).text)
        check_rows("features", "(n,E)", features, self.text.shape[1])
        check_not_empty(len(features))
        check_labels(labels, len(features), len(self.text))
        with torch.inference_mode(False), torch.no_grad():  # the keys may be trained after the inference mode
            order, offsets = reference.sort_by_class(labels.to(self.text.device), len(self.text))
            self.keys = nn.Parameter(normalize(features.to(self.text), dim=1)[order])
            self.register_buffer("labels", labels.to(self.text.device)[order])
            self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, features: Tensor | Encoded) -> Tensor:
        """Logits (B,K) of embeddings (B,E) or an `Encoded`, in the dtype of the text; differentiable.

        Raises:
            TypeError: features that are no tensor and no `Encoded`.
            ValueError: features that are not (B,E) with the E of the text, or on another device.
        """
        queries = self._queries(features)
        with autocast_disabled(queries):
            return self.scale * queries @ self.text.T + self.alpha * self._votes(queries, self.beta)

    def _queries(self, features: Tensor | Encoded) -> Tensor:
        """The directions (B,E) of embeddings, in the dtype of the text."""
        image = embedding_of(features, self.text.shape[1])
        if image.device != self.text.device:
            raise ValueError(f"features must be on {self.text.device} like the head, got {image.device}")
        return normalize_as(image, self.text)

    def _votes(self, queries: Tensor, beta: float) -> Tensor:
        """The votes (B,K) of all keys on images (B,E)."""
        if not (torch.is_grad_enabled() and (self.keys.requires_grad or queries.requires_grad)):
            return ops.affinity(queries, self.keys, self.labels, len(self.text), beta, offsets=self.offsets)
        # With a backward on every device, and deterministic on all, which a sum by index is not.
        votes = torch.exp(beta * (self.keys @ queries.T - 1))
        return torch.segment_reduce(votes, "sum", offsets=self.offsets, axis=0).T

    @torch.enable_grad()
    def fit(
        self,
        features: Tensor | Encoded,
        labels: Tensor,
        *,
        epochs: int = 20,
        batch_size: int = 256,
        lr: float = 1e-3,
        seed: int = 0,
        progress: Callable[[int, float], None] | None = None,
    ) -> list[float]:
        """Train the keys with AdamW on cross-entropy, at a learning rate that falls to 0 by a cosine over all steps.

        The released code trains on the support images themselves, in each epoch on a new random crop of each. Features
        of several crops, with their labels repeated, come close to that. It also keeps the epoch that is best on the
        test set; here the last epoch counts.

        Args:
            features: (n,E), or an `Encoded`, of n images on this head's device.
            labels: (n,) int64, the true classes.
            epochs: passes over the images.
            batch_size: images per step.
            lr: learning rate of the first step.
            seed: seed of the order of the images.
            progress: called after each epoch with its number, from 1, and its mean loss.
        Returns:
            The mean loss of each epoch.
        Raises:
            ValueError: features or labels that do not fit, no image, epochs or a batch_size below one.
            RuntimeError: in inference mode.
        """
        check_training("fit", epochs, batch_size, seed, progress, lr=lr)
        queries = self._queries(features).detach()
        check_not_empty(len(queries))
        labels = check_labels(labels, len(queries), len(self.text)).to(queries.device)
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW([self.keys], lr, eps=1e-4)
        steps = epochs * -(-len(queries) // batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        losses = []
        with autocast_disabled(queries):
            zero_shot = self.scale * queries @ self.text.T
            for epoch in range(epochs):
                total = torch.zeros((), dtype=queries.dtype, device=queries.device)
                for batch in torch.randperm(len(labels), generator=generator).to(queries.device).split(batch_size):
                    logits = zero_shot[batch] + self.alpha * self._votes(queries[batch], self.beta)
                    loss = cross_entropy(logits, labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    total += loss.detach() * len(batch)
                losses.append(float(total) / len(labels))
                if progress is not None:
                    progress(epoch + 1, losses[-1])
        return losses

    @torch.no_grad()
    def search(self, features: Tensor | Encoded, labels: Tensor, grid: tuple[float, float] = (7.0, 3.0)) -> float:
        """Set alpha and beta to the best values of the published grid on a validation split, as `TipAdapter.fit` does.

        Args:
            features: (n,E), or an `Encoded`, of images that are neither in the support nor in the test set.
            labels: (n,) int64, the true classes.
            grid: ends of the ranges of beta and alpha.
        Returns:
            The accuracy on these images, 0 to 1. Ties go to the lowest weights, beta first.
        Raises:
            ValueError: shapes or labels that do not fit, no image, or a grid whose ends are not finite and above 0.1.
        """
        betas, alphas = grid_of(grid, 0.1)
        queries = self._queries(features)
        check_not_empty(len(queries))
        labels = check_labels(labels, len(queries), len(self.text)).to(queries.device)
        with autocast_disabled(queries):
            first = self.scale * queries @ self.text.T
            self.beta, best = search_betas(
                lambda beta: search_alphas(first, self._votes(queries, beta), labels, alphas), betas
            )
        self.alpha = best.second
        return best.accuracy

    def extra_repr(self) -> str:
        """The classes, the support images and the weights, for the repr."""
        weights = f"alpha={self.alpha:g}, beta={self.beta:g}"
        return f"classes={len(self.text)}, scale={self.scale:g}, images={len(self.keys)}, {weights}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the keys, their labels and the class embeddings as safetensors, through a temporary file.

        Raises:
            ValueError: keys that are not finite.
            OSError: the file cannot be written.
        """
        write_state(path, FORMAT, {name: getattr(self, name) for name in Numbers.__struct_fields__}, self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> TipAdapterF:
        """Load saved keys of any number of images, alpha, beta and scale, and return this head.

        On any error it is left unchanged.

        Raises:
            ValueError: a file without such keys or not as it was written, or one with other text embeddings (other
                classes, prompts or model).
            OSError: the file cannot be read.
        """
        with torch.inference_mode(False):  # the keys may be trained after the inference mode of this call
            numbers, tensors = read_state(path, FORMAT)
        ZeroShot(self.text).check_file(tensors["text"], path, "keys for")
        with torch.inference_mode(False), torch.no_grad():
            labels = tensors["labels"].to(self.labels.device)
            self.keys = nn.Parameter(tensors["keys"].to(self.keys), self.keys.requires_grad)
            self.labels, self.offsets = labels, reference.sort_by_class(labels, len(self.text))[1]
        self.__dict__.update(numbers)
        return self
