"""TCA's reservoir: remembers the most certain images of each class, and lets them vote on those that follow.

    logits = scale · cos(image, class) + λ Σᵢ exp(-β(1 - aᵢ))·onehot(classᵢ)
    aᵢ = Σ_l w_l cos(V[l], Vᵢ[l]),  w_l ∝ exp(u_l / temperature),  u from 0 in the first block to 1 in the last

V (L,C) is the CLS token after every block. Votes are one product of (B,L·C) with (K·M,L·C) and a sum by class.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels import ops
from clipkernels.arguments import check_numbers
from clipkernels.files import read_tensors, write_tensors
from clipkernels.heads.arguments import check_positive
from clipkernels.heads.presets import RESERVOIR_PRESETS, ReservoirPreset
from clipkernels.heads.reservoir_entries import Entries, Evict, empty_entries, places_after_arrivals, occupied
from clipkernels.heads.zero_shot import ZeroShot

if TYPE_CHECKING:
    from clipkernels.encode import Encoded

FORMAT = "clipkernels.reservoir.1"


class Reservoir:
    """A head that adapts as it sees images: call it with batches of a stream, in order.

    Each image goes to the class it is predicted as, before correction; a class that holds more than its capacity lets
    the entry go that its `evict` rule scores highest, ties to the first in order of entropy. A batch gives what its
    images would one after another, but for the anchors: all of them are encoded with those of the batch's start. An
    image whose features are not finite is not remembered.

    Args:
        text: class embeddings (K,E), any floating dtype; need not be normalised.
        preset: the data set whose published capacity, temperature, strength and beta stand in for those not given;
            for other data ImageNet's.
        capacity: M, entries per class; with one no anchors ever form.
        temperature: of the softmax that weighs the blocks: the smaller, the more the last ones count.
        strength: λ.
        beta: β.
        evict: "diversity", entropy plus mean cosine to the class's other entries; "similarity", entropy plus its
            opposite, weighed as the released code does; "uncertainty", entropy alone; "fifo", the oldest.
        correction: "exp" as above and in the released code, or "linear", λ/M Σᵢ aᵢ, as in the paper.
        anchors: which classes lend `anchors`: "seen", those that hold two entries, or "all", none until all do.
        self_vote: whether an image is remembered before it is corrected, as in the released code, or after.
        frozen: correct without remembering; may be set at any time.
        scale: what the cosines are multiplied by, 100 in the source.
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
        scale: float = 100.0,
    ) -> None:
        if preset not in RESERVOIR_PRESETS:
            raise ValueError(f"preset must be one of {', '.join(RESERVOIR_PRESETS)}, got {preset!r}")
        given = ReservoirPreset(*RESERVOIR_PRESETS[preset])._asdict() | {
            name: value
            for name, value in zip(ReservoirPreset._fields, (capacity, temperature, strength, beta), strict=True)
            if value is not None
        }
        chosen = ReservoirPreset(**given)
        if isinstance(chosen.capacity, bool) or not isinstance(chosen.capacity, int) or chosen.capacity < 1:
            raise ValueError(f"capacity must be a positive int, got {chosen.capacity!r}")
        check_numbers(**dict(list(given.items())[1:]), scale=scale)
        check_positive(temperature=chosen.temperature)
        rules = {"evict": evict, "correction": correction, "anchors": anchors}
        choices = {
            "evict": ("diversity", "similarity", "uncertainty", "fifo"),
            "correction": ("exp", "linear"),
            "anchors": ("seen", "all"),
        }
        for name, rule in rules.items():
            if rule not in choices[name]:
                raise ValueError(f"{name} must be one of {', '.join(choices[name])}, got {rule!r}")
        self.zero_shot = ZeroShot(text, scale)
        self.capacity, self.temperature, self.strength, self.beta = chosen
        self.evict, self.correction, self.anchors_of = evict, correction, anchors
        self.self_vote, self.frozen = self_vote, frozen
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.seen = 0
        self._entries: Entries | None = None  # along (K,M), each class sorted by entropy, empty places last
        self._table = torch.empty(0)
        self._anchored = False

    @property
    def counts(self) -> Tensor:
        """Entries that each class holds, (K,) int64."""
        if self._entries is None:
            return torch.zeros(len(self.zero_shot.text), dtype=torch.int64)
        return occupied(self._entries).sum(1)

    @property
    def anchors(self) -> Tensor | None:
        """The mean CLS token after every block of each class that holds two entries, zeros for the others, (K,L,C);
        None until there are any."""
        return self._table if self._anchored else None

    def __call__(self, features: Tensor | Encoded) -> Tensor:
        """Corrected logits (B,K) of an `Encoded` with `cls_path`, in the order of the stream; remembers its images.

        Raises:
            ValueError: features without `cls_path`, or of another depth or width than those before.
        """
        if isinstance(features, Tensor) or features.cls_path is None:
            raise ValueError("features must be an Encoded with cls_path, as ck.encode_image(cls_path=True) gives")
        logits, path = self.zero_shot(features), features.cls_path.detach()
        if path.ndim != 3 or len(path) != len(logits):
            raise ValueError(f"cls_path must be (B,L,C) with B = {len(logits)}, got {tuple(path.shape)}")
        # Outside of inference mode, which what is remembered may outlive.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(path.device.type, enabled=False):
            votes = self._observe(logits.detach().clone(), path.clone())
        return logits + votes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what is remembered as safetensors, by way of a temporary file that is renamed.

        Raises:
            ValueError: nothing has been seen yet.
        """
        if self._entries is None:
            raise ValueError("a reservoir that has seen nothing cannot be saved")
        tensors = {**self._entries._asdict(), "text": self.zero_shot.text}
        about = {"format": FORMAT, "seen": str(self.seen), "scale": repr(float(self.zero_shot.scale))}
        write_tensors(path, tensors, about)

    def load(self, path: str | os.PathLike[str]) -> Reservoir:
        """This reservoir, remembering what was saved; whatever is raised, it is as it was.

        Raises:
            ValueError: the file is no reservoir, or one of other text embeddings (other classes, prompts or model),
                another capacity or scale, or another depth or width than what this one has seen.
        """
        with torch.inference_mode(False):  # which what is remembered may outlive
            tensors, about = read_tensors(path)
        whole = set(tensors) == {*Entries._fields, "text"} and about.get("seen", "").isdigit()
        if about.get("format") != FORMAT or not whole:
            raise ValueError(f"expected a reservoir, got {path} with format {about.get('format')!r}")
        own, text = self.zero_shot.text, tensors.pop("text")
        if not self.zero_shot.matches(text):
            raise ValueError(
                f"expected a reservoir of the same classes, prompts and model, {tuple(own.shape)}, got {path} of other "
                f"text embeddings {tuple(text.shape)}"
            )
        entries = Entries(**tensors)
        came = [tuple(tensor.shape) for tensor in entries]
        k, m, depth, width = (*came[0], 0, 0, 0, 0)[:4]
        if came != [(k, m, depth, width), (k, m, depth), (k, m, width), (k, m), (k, m)] or k != len(own):
            raise ValueError(f"expected a reservoir of {len(own)} classes, got {path} with shapes {came}")
        if m != self.capacity:
            raise ValueError(f"expected a reservoir of capacity {self.capacity}, got {m}")
        if about.get("scale") != repr(float(self.zero_shot.scale)):
            raise ValueError(f"expected a reservoir of scale {self.zero_shot.scale}, got {about.get('scale')}")
        if self._entries is not None:
            self._check_shape(entries.unit.shape[2:])
        self.reset()
        with torch.inference_mode(False):
            self._entries, self.seen = entries, int(about["seen"])
            self._table = entries.unit.new_zeros(k, depth, width)
            self._update_anchors(torch.arange(k))
        return self

    def _check_shape(self, shape: torch.Size) -> None:
        assert self._entries is not None
        known = self._entries.unit.shape[2:]
        if shape != known:
            raise ValueError(
                f"expected the CLS tokens of {known[0]} blocks of width {known[1]}, got {shape[0]} of {shape[1]}"
            )

    def _observe(self, logits: Tensor, path: Tensor) -> Tensor:
        """The votes (B,K) on a batch with these uncorrected logits (B,K) and CLS tokens (B,L,C)."""
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
        good = logits.isfinite().all(1) & path.flatten(1).isfinite().all(1)
        self.seen += batch
        touched, belongs = logits.argmax(1)[good].unique(return_inverse=True)
        if not len(touched):
            return total
        # Of each touched class: its places, then those of its new images, in order of arrival.
        mine = torch.zeros(batch, len(touched), dtype=torch.bool, device=path.device)
        mine[good] = torch.arange(len(touched), device=path.device) == belongs[:, None]
        arrived = mine.cumsum(0)
        rounds = int(arrived[-1].max())
        order = torch.where(mine, 0, 1).argsort(dim=0, stable=True)[:rounds].T  # [T, R] images, those of others last
        present = torch.arange(rounds, device=path.device) < arrived[-1][:, None]
        mean, entropy, arrival = (
            torch.cat([a[touched], b[order]], 1)  # [T, M+R, …]
            for a, b in ((old.mean, new.mean), (old.entropy, new.entropy), (old.arrival, new.arrival))
        )
        states = places_after_arrivals(mean, entropy, arrival, present, self.capacity, self.evict)  # [R+1, T, M]
        # What each image finds in the touched classes: the state after as many arrivals as there have been.
        states_met = arrived if self.self_vote else arrived - mine.long()
        found = states[states_met, torch.arange(len(touched), device=path.device)]  # [B, T, M]
        among = self._vote(query @ new.unit.flatten(1).T)[:, order]  # [B, T, R]
        none = among.new_zeros(batch, len(touched), 1)
        votes = self._vote(query @ old.unit[touched].flatten(0, 1).flatten(1).T).view(batch, len(touched), -1)
        heard = torch.cat([votes, among, none], 2).gather(2, found).sum(2)
        total[:, touched] = heard.to(total.dtype)
        self._store(old, new, touched, order, states[-1])
        return total

    def _store(self, old: Entries, new: Entries, touched: Tensor, order: Tensor, last: Tensor) -> None:
        """Leaves in the touched classes the places `last` (T,M) of their own and of the images `order` (T,R)."""
        capacity, rounds = self.capacity, order.shape[1]
        from_new = last >= capacity
        place = touched[:, None] * capacity + last.clamp_max(capacity - 1)
        image = order.gather(1, (last - capacity).clamp(0, rounds - 1))
        empty, settled = last == capacity + rounds, []
        for a, b in zip(old, new, strict=True):
            narrow = [1] * (a.ndim - 2)
            kept = torch.where(from_new.view(*last.shape, *narrow), b[image], a.flatten(0, 1)[place])
            settled.append(kept.masked_fill(empty.view(*last.shape, *narrow), 0))  # of some image, finite or not
        # Cut short in between, these classes are empty.
        old.arrival[touched] = -1
        for tensor, values in list(zip(old, settled, strict=True))[:-1]:
            tensor[touched] = values
        old.arrival[touched] = settled[-1].masked_fill(empty, -1)
        self._update_anchors(touched)

    def _describe(self, logits: Tensor, path: Tensor) -> Entries:
        """Entries along (B,)."""
        wide = path.to(torch.promote_types(path.dtype, torch.float32))
        share = logits.log_softmax(1)
        arrival = torch.arange(self.seen, self.seen + len(path), device=path.device)
        entropy = -(share.exp() * share).nan_to_num(0.0).sum(1).to(wide.dtype)
        return Entries(normalize(wide, dim=2), wide.norm(dim=2), normalize(wide.mean(1), dim=1), entropy, arrival)

    def _votes_of(self, query: Tensor, entries: Entries) -> Tensor:
        """The votes (B,K) of all entries on these queries (B,L·C)."""
        classes, capacity = entries.arrival.shape
        held = occupied(entries).to(query.dtype)
        if self.correction == "linear":
            whole = torch.einsum("kmlc,km->klc", entries.unit, held).flatten(1)
            return query @ whole.T * (self.strength / capacity)
        rows, at = entries.unit.flatten(0, 1).flatten(1), torch.arange(classes + 1, device=query.device)
        labels, weights = at[:-1].repeat_interleave(capacity), self.strength * held.flatten()
        return ops.affinity(query, rows, labels, classes, self.beta, weights, at * capacity)

    def _vote(self, likeness: Tensor) -> Tensor:
        """What an entry of this likeness adds to the logit of its class."""
        if self.correction == "linear":
            return likeness * (self.strength / self.capacity)
        return self.strength * torch.exp(self.beta * (likeness - 1))

    def _update_anchors(self, touched: Tensor) -> None:
        """The anchors of some classes, and whether there are any."""
        assert self._entries is not None
        unit, length, *_, arrival = (tensor[touched] for tensor in self._entries)
        held = (arrival >= 0).to(unit.dtype)
        count = held.sum(1)
        mean = torch.einsum("tmlc,tml->tlc", unit, length * held[..., None]) / count.clamp_min(1)[:, None, None]
        # Another table: forwards that hold the last one may not have come to their backward yet.
        self._table = self._table.index_copy(0, touched, mean * (count >= 2)[:, None, None])
        if not self._anchored:  # once there, they stay: no class shrinks
            enough = self.counts >= 2
            self._anchored = bool(enough.all() if self.anchors_of == "all" else enough.any())
