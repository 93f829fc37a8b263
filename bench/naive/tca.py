"""TCA, transcribed literally: one image, one centre and one reservoir entry at a time, like its released code.

It is the oracle of the tests and the baseline of `bench/studies/adaptation.py`. It runs an open_clip tower with
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
    """Condense one image's tokens (N,C).

    `scores` (P,) select the patches, and `weights` (P,) weigh the fused token.

    Returns:
        The remaining tokens, the row of each patch, and the patch behind each kept row and each centre.
    """
    strength = [-math.inf if value != value else value for value in scores.tolist()]
    order = sorted(range(len(strength)), key=lambda patch: (-strength[patch], patch))
    keeping, merging, fusing = order[:keep], order[keep : keep + merge], order[keep + merge :]
    patches = x[prefix:]
    group = patches[merging]
    center_ids = [first]
    while len(center_ids) < centers:
        nearest = torch.stack([(group - group[center]).norm(dim=1) for center in center_ids]).amin(0)
        center_ids.append(int(nearest.argmax()))
    distances = torch.stack([(group - group[center]).norm(dim=1) for center in center_ids])
    assignment = distances.argmin(0).tolist()
    merged = []
    for place, center in enumerate(center_ids):
        total, mass = torch.zeros_like(x[0]), 0.0
        for member, row in enumerate(assignment):
            if row == place:
                distance = float(distances[place, member])
                share = 1 / distance if distance else 1.0
                total, mass = total + share * group[member], mass + share
        merged.append(total / mass if mass else group[center])
    fused = torch.zeros_like(x[0])
    for patch in fusing:
        weight = float(weights[patch])
        fused = fused + (weight if weight > -math.inf else 0) * patches[patch]
    rows = [prefix + keep + centers] * len(strength)
    for place, patch in enumerate(keeping):
        rows[patch] = prefix + place
    for patch, row in zip(merging, assignment, strict=True):
        rows[patch] = prefix + keep + row
    return (
        torch.stack([*x[:prefix], *patches[keeping], *merged, fused]),
        rows,
        keeping + [merging[c] for c in center_ids],
    )


def ranks(attention: Tensor) -> Tensor:
    """Return the number of patches that each patch beats (P,), averaged over heads, from CLS attention (H,P)."""
    total = torch.zeros(attention.shape[1], dtype=torch.int64)
    for head in attention.float():
        place = head.argsort(descending=True, stable=True).argsort()
        total += len(head) - 1 - place
    return total / len(attention)


def run_tower(visual: Any, image: Tensor, method: Any, anchors: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """Return the last tokens (N',C) of an image (1,3,S,S) and its CLS token after every block (L,C).

    Anchors are CLS paths, each (L,C).
    """
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
    """A reservoir's entry for one image: its entropy, its CLS path (L,C) and its arrival number."""

    entropy: float
    path: Tensor
    arrival: int


class Reservoir:
    """A reservoir with a list of entries per class. Settings are those of `ck.Reservoir`; the numbers are required."""

    def __init__(self, text: Tensor, capacity: int, temperature: float, strength: float, beta: float, **choices: Any):
        self.text, self.capacity = normalize(text, dim=1), capacity
        self.temperature, self.strength, self.beta = temperature, strength, beta
        self.evict: str = choices.get("evict", "diversity")
        self.correction: str = choices.get("correction", "exp")
        self.self_vote: bool = choices.get("self_vote", True)
        self.anchor_classes: str = choices.get("anchors", "seen")
        self.scale: float = choices.get("scale", 100.0)
        self.classes: list[list[Entry]] = [[] for _ in text]
        self.arrivals = 0

    def anchors(self) -> list[Tensor]:
        """Return the mean CLS path (L,C) of each class with at least two entries."""
        full = [entries for entries in self.classes if len(entries) >= 2]
        if self.anchor_classes == "all" and len(full) < len(self.classes):
            return []
        return [torch.stack([entry.path for entry in entries]).mean(0) for entries in full]

    def see(self, embedding: Tensor, path: Tensor) -> Tensor:
        """Return the corrected logits (K,) of one image from its embedding (E,) and CLS path (L,C); store the path."""
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
        """Return one score per entry; the entry with the largest score is evicted."""
        if self.evict == "uncertainty":
            return [entry.entropy for entry in entries]
        if self.evict == "fifo":
            return [-float(entry.arrival) for entry in entries]
        means = [entry.path.mean(0) for entry in entries]
        similarities = []
        for i in range(len(entries)):
            others = [cosine_similarity(means[i], means[j], dim=0).item() for j in range(len(entries)) if j != i]
            similarities.append(sum(others) / len(others))
        if self.evict == "diversity":
            return [entry.entropy + likeness for entry, likeness in zip(entries, similarities, strict=True)]
        entropies, distances = [entry.entropy for entry in entries], [1 - likeness for likeness in similarities]
        spread = max(distances) - min(distances)
        weight = int((max(entropies) - min(entropies)) / spread) if spread else 0
        return [entropy + weight * distance for entropy, distance in zip(entropies, distances, strict=True)]

    def correct(self, logits: Tensor, path: Tensor) -> Tensor:
        """Return the logits (K,) plus the votes of all entries."""
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
    """Return embeddings (n,E), or with a reservoir corrected logits (n,K), of images (n,3,S,S) one after another."""
    visual, results = model.visual, []
    for image in images.split(1):
        x, path = run_tower(visual, image, method, reservoir.anchors() if reservoir else ())
        embedding = visual.ln_post(x[0]) @ visual.proj
        results.append(reservoir.see(embedding, path) if reservoir else embedding)
    return torch.stack(results)
