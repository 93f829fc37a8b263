"""TCA read literally: one image at a time, one centre at a time, one entry at a time, as its released code runs.

The oracle of the tests and the yardstick of `bench/studies/adaptation.py`. It runs an open_clip tower with
`nn.MultiheadAttention`, in the dtype of the model. Source: TCA, arXiv 2410.14729, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize


def condense(
    x: Tensor, scores: Tensor, weights: Tensor, keep: int, merge: int, centers: int, prefix: int = 1, first: int = 0
) -> tuple[Tensor, list[int], list[int]]:
    """One image's tokens (N,C) after condensing, the row of each patch, and the patch behind each kept row and each
    centre; `scores` (P,) choose and `weights` (P,) make the fused token."""
    strength = [-math.inf if value != value else value for value in scores.tolist()]
    order = sorted(range(len(strength)), key=lambda patch: (-strength[patch], patch))
    kept, middle, gone = order[:keep], order[keep : keep + merge], order[keep + merge :]
    patches = x[prefix:]
    group = patches[middle]
    chosen = [first]
    while len(chosen) < centers:
        nearest = torch.stack([(group - group[center]).norm(dim=1) for center in chosen]).amin(0)
        chosen.append(int(nearest.argmax()))
    distances = torch.stack([(group - group[center]).norm(dim=1) for center in chosen])
    joined = distances.argmin(0).tolist()
    merged = []
    for place, center in enumerate(chosen):
        total, mass = torch.zeros_like(x[0]), 0.0
        for member, to in enumerate(joined):
            if to == place:
                distance = float(distances[place, member])
                share = 1 / distance if distance else 1.0
                total, mass = total + share * group[member], mass + share
        merged.append(total / mass if mass else group[center])
    fused = torch.zeros_like(x[0])
    for patch in gone:
        weight = float(weights[patch])
        fused = fused + (weight if weight > -math.inf else 0) * patches[patch]
    rows = [prefix + keep + centers] * len(strength)
    for place, patch in enumerate(kept):
        rows[patch] = prefix + place
    for patch, to in zip(middle, joined, strict=True):
        rows[patch] = prefix + keep + to
    return torch.stack([*x[:prefix], *patches[kept], *merged, fused]), rows, kept + [middle[c] for c in chosen]


def ranks(attention: Tensor) -> Tensor:
    """The mean over heads of how many patches each patch beats, of one image's CLS attention (H,P)."""
    total = torch.zeros(attention.shape[1], dtype=torch.int64)
    for head in attention.float():
        place = head.argsort(descending=True, stable=True).argsort()
        total += len(head) - 1 - place
    return total / len(attention)


def run_tower(visual: Any, image: Tensor, method: Any, anchors: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """The last tokens (N',C) of one image (1,3,S,S), and its CLS token after every block (L,C); `anchors` are (L,C)."""
    blocks = visual.transformer.resblocks
    plan = method.plan(visual.positional_embedding.shape[0], len(blocks))
    x, path = visual._embeds(image)[0], []
    for index, (host, step) in enumerate(zip(blocks, plan.steps, strict=True)):
        sequence = x
        if step and anchors and index:
            likeness = [cosine_similarity(anchor[index - 1], x[0], dim=0).item() for anchor in anchors]
            sequence = torch.cat([anchors[likeness.index(max(likeness))][index - 1][None], x])
        normed = host.ln_1(sequence)[None]
        out, attention = host.attn(normed, normed, normed, need_weights=step is not None, average_attn_weights=False)
        out = out[0]
        if len(sequence) > len(x):
            out, attention = out[1:], attention[:, :, 1:, 1:]
        x = x + host.ls_1(out)
        if step:
            cls = attention[0, :, 0, 1:]
            scores = ranks(cls) if method.score == "rank" else cls.mean(0)
            x, _, _ = condense(x, scores, cls.mean(0), step.keep, step.merge, step.centers, first=step.first)
        x = x + host.ls_2(host.mlp(host.ln_2(x)))
        path.append(x[0])
    return x, torch.stack(path)


class Entry(NamedTuple):
    """What a reservoir remembers of an image."""

    entropy: float
    path: Tensor
    arrival: int


class Reservoir:
    """Entries by class, in lists; settings as those of `ck.Reservoir`, all required."""

    def __init__(self, text: Tensor, capacity: int, temperature: float, strength: float, beta: float, **choices: Any):
        self.text, self.capacity = normalize(text, dim=1), capacity
        self.temperature, self.strength, self.beta = temperature, strength, beta
        self.evict: str = choices.get("evict", "diversity")
        self.correction: str = choices.get("correction", "exp")
        self.self_vote: bool = choices.get("self_vote", True)
        self.seen_or_all: str = choices.get("anchors", "seen")
        self.scale: float = choices.get("scale", 100.0)
        self.classes: list[list[Entry]] = [[] for _ in text]
        self.arrivals = 0

    def anchors(self) -> list[Tensor]:
        """The mean CLS path (L,C) of each class that has two entries."""
        full = [entries for entries in self.classes if len(entries) >= 2]
        if self.seen_or_all == "all" and len(full) < len(self.classes):
            return []
        return [torch.stack([entry.path for entry in entries]).mean(0) for entries in full]

    def see(self, embedding: Tensor, path: Tensor) -> Tensor:
        """The corrected logits (K,) of one image by its embedding (E,) and CLS path (L,C), which is remembered."""
        logits = self.scale * normalize(embedding, dim=0) @ self.text.T
        corrected = logits if self.self_vote else self.correct(logits, path)
        share = logits.softmax(0)
        entropy = float(-(share * share.clamp_min(1e-300).log()).sum())
        entries = self.classes[int(logits.argmax())]
        entries.append(Entry(entropy, path, self.arrivals))
        self.arrivals += 1
        if len(entries) > self.capacity:
            scores = self.eviction(entries)
            del entries[scores.index(max(scores))]
        entries.sort(key=lambda entry: entry.entropy)
        return self.correct(logits, path) if self.self_vote else corrected

    def eviction(self, entries: list[Entry]) -> list[float]:
        """One number per entry; the entry with the largest goes."""
        if self.evict == "uncertainty":
            return [entry.entropy for entry in entries]
        if self.evict == "fifo":
            return [-float(entry.arrival) for entry in entries]
        means = [entry.path.mean(0) for entry in entries]
        alike = []
        for one in range(len(entries)):
            others = [
                cosine_similarity(means[one], means[two], dim=0).item() for two in range(len(entries)) if two != one
            ]
            alike.append(sum(others) / len(others))
        if self.evict == "diversity":
            return [entry.entropy + likeness for entry, likeness in zip(entries, alike, strict=True)]
        entropies, apart = [entry.entropy for entry in entries], [1 - likeness for likeness in alike]
        spread = max(apart) - min(apart)
        weight = int((max(entropies) - min(entropies)) / spread) if spread else 0
        return [entropy + weight * distance for entropy, distance in zip(entropies, apart, strict=True)]

    def correct(self, logits: Tensor, path: Tensor) -> Tensor:
        """The logits (K,) with the votes of all entries."""
        depth = torch.linspace(0, 1, len(path), dtype=path.dtype) / self.temperature
        weights, corrected = depth.softmax(0), logits.clone()
        for place, entries in enumerate(self.classes):
            for entry in entries:
                likeness = float((weights * cosine_similarity(path, entry.path, dim=1)).sum())
                if self.correction == "exp":
                    corrected[place] += self.strength * math.exp(-self.beta * (1 - likeness))
                else:
                    corrected[place] += self.strength / self.capacity * likeness
        return corrected


def stream(model: Any, images: Tensor, method: Any, reservoir: Reservoir | None) -> Tensor:
    """The embeddings (n,E), or with a reservoir the corrected logits (n,K), of images (n,3,S,S) one after another."""
    visual, found = model.visual, []
    for image in images.split(1):
        x, path = run_tower(visual, image, method, reservoir.anchors() if reservoir else ())
        embedding = visual.ln_post(x[0]) @ visual.proj
        found.append(reservoir.see(embedding, path) if reservoir else embedding)
    return torch.stack(found)
