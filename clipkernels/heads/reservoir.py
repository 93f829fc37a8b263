"""TCA's reservoir: caches the most confident images of each class and lets them vote on later images.

    logits = scale · cos(image, class) + λ Σᵢ exp(-β(1 - aᵢ))·onehot(classᵢ)
    aᵢ = Σ_l w_l cos(V[l], Vᵢ[l]),  w_l ∝ exp(u_l / temperature),  u from 0 in the first block to 1 in the last

V (L,C) is the CLS token after every block. The votes are one product of (B,L·C) with (K·M,L·C) and a sum by class.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels import ops
from clipkernels.arguments import check_choice, check_flags, check_int, check_numbers, check_positive, shape_of
from clipkernels.heads.arguments import encoded_with
from clipkernels.heads.presets import RESERVOIR_PRESETS, ReservoirPreset
from clipkernels.heads.reservoir_entries import FORMAT, Entries, Evict, empty_entries, occupied, places_after_arrivals
from clipkernels.heads.zero_shot import ZeroShot
from clipkernels.messages import quantity
from clipkernels.state_files import read_state, write_state

if TYPE_CHECKING:
    from clipkernels.encode import Encoded


class Reservoir:
    """A head that adapts to a stream of images: call it with the stream's batches, in order.

    Each image is stored under the class of its zero-shot prediction, before correction. A class over its capacity
    removes the entry with the highest score of its `evict` rule, ties to the first in order of entropy. A batch gives
    the same logits as its images one after another; only the anchors differ, because a whole batch is encoded with the
    anchors of its start. Images with features that are not finite are not stored.

    Args:
        text: class embeddings (K,E), any floating dtype; need not be normalised.
        preset: data set whose published capacity, temperature, strength and beta replace those that are None; use
            ImageNet's for other data.
        capacity: M, entries per class; with one entry no anchors ever form.
        temperature: temperature of the softmax over the blocks; a smaller one gives the last blocks more weight.
        strength: λ.
        beta: β.
        evict: "diversity", entropy plus mean cosine to the class's other entries; "similarity", entropy plus its
            opposite, weighted as in the released code; "uncertainty", only the entropy; "fifo", the oldest entry.
        correction: "exp" as above and in the released code, or "linear", λ/M Σᵢ aᵢ, as in the paper.
        anchors: classes that contribute `anchors`: "seen", those with two entries, or "all", none until every class
            has two.
        self_vote: store an image before it is corrected, as in the released code, instead of after.
        frozen: correct without storing; may be set at any time.
        scale: factor of the cosines, 100 in the source; "model" as in `ZeroShot`. Entropies are always those of the
            softmax.
    Raises:
        ValueError: an unknown preset or choice, a capacity below one, numbers that are not finite, a temperature that
            is not positive, text that is not (K,E).
    Source: TCA, arXiv 2410.14729, section 3; rules and presets are those of its released code.
    """

    needs: tuple[str, ...] = ("cls_path",)

    def __init__(
        self,
        text: Tensor,
        preset: str = "imagenet",
        *,
        capacity: int | None = None,
        temperature: float | None = None,
        strength: float | None = None,
        beta: float | None = None,
        evict: Evict = "diversity",
        correction: Literal["exp", "linear"] = "exp",
        anchors: Literal["seen", "all"] = "seen",
        self_vote: bool = True,
        frozen: bool = False,
        scale: float | Literal["model"] = 100.0,
    ) -> None:
        check_choice("preset", preset, *RESERVOIR_PRESETS)
        settings = ReservoirPreset(*RESERVOIR_PRESETS[preset])._asdict() | {
            name: value
            for name, value in zip(ReservoirPreset._fields, (capacity, temperature, strength, beta), strict=True)
            if value is not None
        }
        preset_values = ReservoirPreset(**settings)
        check_int("capacity", preset_values.capacity, 1)
        check_numbers(strength=preset_values.strength, beta=preset_values.beta)
        check_positive(temperature=preset_values.temperature)
        check_choice("evict", evict, "diversity", "similarity", "uncertainty", "fifo")
        check_choice("correction", correction, "exp", "linear")
        check_choice("anchors", anchors, "seen", "all")
        check_flags(self_vote=self_vote, frozen=frozen)
        self.zero_shot = ZeroShot(text, scale)
        self.capacity, self.temperature, self.strength, self.beta = preset_values
        self.evict, self.correction, self.anchors_of = evict, correction, anchors
        self.self_vote, self.frozen = self_vote, frozen
        self.reset()

    def reset(self) -> None:
        """Remove all entries, anchors and counts."""
        self.seen = 0
        self._entries: Entries | None = None  # along (K,M), each class sorted by entropy, free slots last
        self._table = torch.empty(0)
        self._anchored = False

    @property
    def counts(self) -> Tensor:
        """The number of entries of each class, (K,) int64."""
        if self._entries is None:
            return torch.zeros(len(self.zero_shot.text), dtype=torch.int64)
        return occupied(self._entries).sum(1)

    @property
    def anchors(self) -> Tensor | None:
        """The mean CLS token after every block, (K,L,C), of each class with at least two entries; zeros for the others.

        None as long as no anchor exists.
        """
        return self._table if self._anchored else None

    def __call__(self, features: Tensor | Encoded) -> Tensor:
        """Corrected logits (B,K) of an `Encoded` with `cls_path`, in the order of the stream; stores its images.

        Raises:
            ValueError: features without `cls_path`, or with another depth or width than earlier ones.
        """
        features = encoded_with("cls_path", features)
        assert features.cls_path is not None
        logits, path = self.zero_shot(features), features.cls_path.detach()
        if path.ndim != 3 or len(path) != len(logits) or not path.is_floating_point():
            actual = f"{shape_of(path)} {path.dtype}"
            raise ValueError(f"cls_path must be floating-point (B,L,C) with B = {len(logits)}, got {actual}")
        # Outside of inference mode, because the entries may be used after it.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(path.device.type, enabled=False):
            votes = self._observe(logits.detach().clone(), path.clone())
        return logits + votes

    def __repr__(self) -> str:
        settings = f"capacity={self.capacity}, strength={self.strength:g}, beta={self.beta:g}"
        return f"Reservoir({self.zero_shot.describe()}, {settings}, seen={self.seen})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the entries as safetensors, through a temporary file that is renamed.

        Raises:
            ValueError: no image has been processed yet.
            OSError: the file cannot be written.
        """
        if self._entries is None:
            raise ValueError("expected a reservoir that has processed images, got an empty one: nothing to save")
        tensors = {**self._entries._asdict(), "text": self.zero_shot.text}
        write_state(path, FORMAT, {"seen": self.seen, "scale": self.zero_shot.scale}, tensors)

    def load(self, path: str | os.PathLike[str]) -> Reservoir:
        """Replace this reservoir's entries by those of a file, and return it; on any error it is left unchanged.

        Raises:
            ValueError: a file that is not a reservoir or not as it was written, or a reservoir with other text
                embeddings (other classes, prompts or model), another capacity or scale, or another depth or width than
                this one's entries.
            OSError: the file cannot be read.
        """
        with torch.inference_mode(False):  # the entries may be used after the inference mode of this call
            header, tensors = read_state(path, FORMAT)
        self.zero_shot.check_file(tensors.pop("text"), path, "a reservoir of")
        entries = Entries(**tensors)
        k, m, depth, width = entries.unit.shape
        if m != self.capacity:
            raise ValueError(f"expected a reservoir of capacity {self.capacity}, got {path} of capacity {m}")
        if header["scale"] != self.zero_shot.scale:
            raise ValueError(f"expected a reservoir of scale {self.zero_shot.scale}, got {path} of {header['scale']}")
        if self._entries is not None:
            self._check_shape(entries.unit.shape[2:])
        self.reset()
        with torch.inference_mode(False):
            self._entries, self.seen = entries, header["seen"]
            self._table = entries.unit.new_zeros(k, depth, width)
            self._update_anchors(torch.arange(k))
        return self

    def _check_shape(self, shape: torch.Size) -> None:
        assert self._entries is not None
        expected = self._entries.unit.shape[2:]
        if shape != expected:
            raise ValueError(
                f"expected the CLS tokens of {quantity(expected[0], 'block')} of width {expected[1]}, got "
                f"{quantity(shape[0], 'block')} of width {shape[1]}"
            )

    def _observe(self, logits: Tensor, path: Tensor) -> Tensor:
        """The votes (B,K) on a batch with these uncorrected logits (B,K) and CLS tokens (B,L,C); stores its images."""
        batch, classes = logits.shape
        if not batch or not path.numel():
            return torch.zeros_like(logits)
        new = self._describe(logits, path)
        if self._entries is None:
            if self.frozen:
                return torch.zeros_like(logits)
            self._entries = empty_entries(new, classes, self.capacity)
            self._table = new.unit.new_zeros(classes, *path.shape[1:])
        self._check_shape(path.shape[1:])
        dtype = new.unit.dtype
        self._entries = old = Entries(
            *(tensor.to(path.device, dtype if tensor.is_floating_point() else None) for tensor in self._entries)
        )
        self._table = self._table.to(path.device, dtype)
        depth = torch.linspace(0, 1, path.shape[1], dtype=new.unit.dtype, device=path.device) / self.temperature
        query = (new.unit * depth.softmax(0)[:, None]).flatten(1)
        total = self._votes_of(query, old)
        if self.frozen:
            return total
        finite = logits.isfinite().all(1) & path.flatten(1).isfinite().all(1) & new.length.isfinite().all(1)
        self.seen += batch
        touched, touched_index = logits.argmax(1)[finite].unique(return_inverse=True)
        if not len(touched):
            return total
        # Per touched class: its M slots, then its new images in order of arrival.
        membership = torch.zeros(batch, len(touched), dtype=torch.bool, device=path.device)
        membership[finite] = torch.arange(len(touched), device=path.device) == touched_index[:, None]
        arrived = membership.cumsum(0)
        rounds = int(arrived[-1].max())
        # [T, R] images, those of other classes last
        order = torch.where(membership, 0, 1).argsort(dim=0, stable=True)[:rounds].T
        present = torch.arange(rounds, device=path.device) < arrived[-1][:, None]
        mean, entropy, arrival = (
            torch.cat([a[touched], b[order]], 1)  # [T, M+R, …]
            for a, b in ((old.mean, new.mean), (old.entropy, new.entropy), (old.arrival, new.arrival))
        )
        states = places_after_arrivals(mean, entropy, arrival, present, self.capacity, self.evict)  # [R+1, T, M]
        # The entries that each image meets in the touched classes: their state after the arrivals up to that image.
        states_met = arrived if self.self_vote else arrived - membership.long()
        entries_met = states[states_met, torch.arange(len(touched), device=path.device)]  # [B, T, M]
        votes_of_new = self._vote(query @ new.unit.flatten(1).T)[:, order]  # [B, T, R]
        zero_vote = votes_of_new.new_zeros(batch, len(touched), 1)
        votes_of_old = self._vote(query @ old.unit[touched].flatten(0, 1).flatten(1).T).view(batch, len(touched), -1)
        votes_met = torch.cat([votes_of_old, votes_of_new, zero_vote], 2).gather(2, entries_met).sum(2)
        total[:, touched] = votes_met.to(total.dtype)
        self._store(old, new, touched, order, states[-1])
        return total

    def _store(self, old: Entries, new: Entries, touched: Tensor, order: Tensor, last: Tensor) -> None:
        """Set the touched classes' entries to the places `last` (T,M): old slots, then the new images `order` (T,R)."""
        capacity, rounds = self.capacity, order.shape[1]
        from_new = last >= capacity
        old_index = touched[:, None] * capacity + last.clamp_max(capacity - 1)
        new_index = order.gather(1, (last - capacity).clamp(0, rounds - 1))
        is_free, values = last == capacity + rounds, []
        for a, b in zip(old, new, strict=True):
            ones = [1] * (a.ndim - 2)
            rows = torch.where(from_new.view(*last.shape, *ones), b[new_index], a.flatten(0, 1)[old_index])
            values.append(rows.masked_fill(is_free.view(*last.shape, *ones), 0))  # the gathered value may be NaN
        # An exception in between leaves these classes empty, not inconsistent.
        old.arrival[touched] = -1
        for tensor, target in list(zip(old, values, strict=True))[:-1]:
            tensor[touched] = target
        old.arrival[touched] = values[-1].masked_fill(is_free, -1)
        self._update_anchors(touched)

    def _describe(self, logits: Tensor, path: Tensor) -> Entries:
        """The images of a batch as entries along (B,)."""
        cls = path.to(torch.promote_types(path.dtype, torch.float32))
        log_probability = logits.log_softmax(1)
        arrival = torch.arange(self.seen, self.seen + len(path), device=path.device)
        entropy = -(log_probability.exp() * log_probability).nan_to_num(0.0).sum(1).to(cls.dtype)
        return Entries(normalize(cls, dim=2), cls.norm(dim=2), normalize(cls.mean(1), dim=1), entropy, arrival)

    def _votes_of(self, query: Tensor, entries: Entries) -> Tensor:
        """The votes (B,K) of all entries for these queries (B,L·C)."""
        classes, capacity = entries.arrival.shape
        is_held = occupied(entries).to(query.dtype)
        if self.correction == "linear":
            class_sums = torch.einsum("kmlc,km->klc", entries.unit, is_held).flatten(1)
            return query @ class_sums.T * (self.strength / capacity)
        rows, offsets = entries.unit.flatten(0, 1).flatten(1), torch.arange(classes + 1, device=query.device)
        labels, weights = offsets[:-1].repeat_interleave(capacity), self.strength * is_held.flatten()
        return ops.affinity(query, rows, labels, classes, self.beta, weights, offsets * capacity)

    def _vote(self, similarity: Tensor) -> Tensor:
        """The contribution of an entry to the logit of its class, given its similarity aᵢ."""
        if self.correction == "linear":
            return similarity * (self.strength / self.capacity)
        return self.strength * torch.exp(self.beta * (similarity - 1))

    def _update_anchors(self, touched: Tensor) -> None:
        """Recompute the anchors of the touched classes (T,), and note if `anchors` is ready."""
        assert self._entries is not None
        unit, length, *_, arrival = (tensor[touched] for tensor in self._entries)
        is_held = (arrival >= 0).to(unit.dtype)
        count = is_held.sum(1)
        mean = torch.einsum("tmlc,tml->tlc", unit, length * is_held[..., None]) / count.clamp_min(1)[:, None, None]
        # A new table, because a forward that holds the old one may still need it for its backward.
        self._table = self._table.index_copy(0, touched, mean * (count >= 2)[:, None, None])
        if not self._anchored:  # never reset, because no class shrinks
            enough = self.counts >= 2
            self._anchored = bool(enough.all() if self.anchors_of == "all" else enough.any())
