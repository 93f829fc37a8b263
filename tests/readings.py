"""Every operation once more, in numpy and fp64, written from its docstring and from the papers, one row at a time.

They share nothing with the reference in torch. Choices follow the rules that docstrings state: ties go to the lower
index, NaN counts as -inf. `read` takes and returns tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NormArgs = tuple[Floats, Floats, float] | None

ERF = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "quick_gelu": lambda z: z / (1 + np.exp(-1.702 * z)),
    "gelu": lambda z: z * 0.5 * (1 + ERF(z / math.sqrt(2))),
    "gelu_tanh": lambda z: z * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
}


def read(reading: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The results of a reading called like its operation: tensors in fp64 on the device of the first argument."""
    results = reading(*plain(arguments), **plain(named))

    def tensor(array: Any) -> Tensor | None:
        return None if array is None else torch.from_numpy(np.asarray(array)).to(arguments[0].device)

    return tuple(map(tensor, results)) if isinstance(results, tuple) else tensor(results)


def plain(value: Any) -> Any:
    """The arguments of an operation as those of its reading: tensors as arrays, floats in fp64."""
    if isinstance(value, Tensor):
        return value.detach().cpu().double().numpy() if value.is_floating_point() else value.cpu().numpy()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return tuple(plain(part) for part in value) if isinstance(value, tuple) else value


def softmax(logits: Floats, size: Floats | None = None) -> Floats:
    """The softmax of logits (n,), whose terms count `size` times; zeros if no term is left."""
    there = np.ones(len(logits), bool) if size is None else size > 0
    result = np.zeros(len(logits))
    if there.any():
        terms = np.exp(logits[there] - logits[there].max())
        terms = terms if size is None else terms * size[there]
        result[there] = terms / terms.sum()
    return result


def strongest(scores: Floats) -> list[int]:
    """The indices of scores (P,), strongest first."""
    return sorted(range(len(scores)), key=lambda i: (-math.inf if math.isnan(scores[i]) else scores[i], -i))[::-1]


def ranks(scores: Floats) -> Floats:
    """The number of patches that each patch beats, of scores (P,)."""
    order = strongest(scores)
    result = np.empty(len(scores))
    result[order] = np.arange(len(scores))[::-1]
    return result


def reduce_heads(scores: Floats, heads: str) -> Floats:
    """Scores (P,) of scores (H,P)."""
    return scores.mean(0) if heads == "mean" else np.stack([ranks(row) for row in scores]).sum(0) / len(scores)


def layer_norm(rows: Floats, norm: NormArgs) -> Floats | None:
    """The LayerNorm of rows (…,C), or None without a norm."""
    if norm is None:
        return None
    weight, bias, eps = norm
    centred = rows - rows.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def attention(
    q: Floats, k: Floats, v: Floats, size: Floats | None, signal: str | None, prefix: int
) -> tuple[Floats, Floats | None]:
    batch, heads, rows, width = q.shape
    weights = np.zeros((batch, heads, rows, k.shape[2]))
    out = np.zeros((batch, heads, rows, v.shape[3]))
    for b, h, m in np.ndindex(batch, heads, rows):
        row = softmax(k[b, h] @ q[b, h, m] / math.sqrt(width), None if size is None else size[b])
        weights[b, h, m] = row
        out[b, h, m] = row[row > 0] @ v[b, h][row > 0]
    if signal == "cls":
        return out, weights[:, :, 0, prefix:]
    if signal == "received":
        return out, weights.mean((1, 2))[:, prefix:]
    return out, k.mean(1) if signal == "keys" else None


def rank_tokens(q: Floats, k: Floats, heads: str, query: str, size: Floats | None, prefix: int) -> Floats:
    _, signal = attention(q, k, np.zeros_like(k), size, "received" if query == "all" else "cls", prefix)
    assert signal is not None
    return signal if query == "all" else np.stack([reduce_heads(scores, heads) for scores in signal])


def fused(x: Floats, scores: Floats, patches: list[int]) -> Floats:
    """Σ scoreᵢ·xᵢ over patches of x (P,C)."""
    total = np.zeros(x.shape[1])
    for patch in patches:
        score = scores[patch]
        if not (math.isnan(score) or score in (-math.inf, 0)):
            total = total + score * x[patch]
    return total


def prune_tokens(
    x: Floats,
    scores: Floats,
    keep: int,
    fuse: bool = False,
    heads: str = "mean",
    prefix: int = 1,
    norm: NormArgs = None,
) -> tuple[Floats, Ints, Floats | None]:
    tokens, index = [], []
    for image, score in zip(x, scores, strict=True):
        score = score if score.ndim == 1 else reduce_heads(score, heads)
        order = strongest(score)
        kept = sorted(order[:keep])
        extra = [fused(image[prefix:], score, order[keep:])] if fuse else []
        tokens.append(np.stack([*image[:prefix], *image[prefix:][kept], *extra]) if prefix + keep + fuse else image[:0])
        index.append(kept)
    rows = np.stack(tokens)
    return rows, np.array(index, np.int64).reshape(len(x), keep), layer_norm(rows, norm)


def condense_tokens(
    x: Floats,
    scores: Floats,
    keep: int,
    merge: int,
    centers: int,
    weights: Floats | None = None,
    heads: str = "mean",
    prefix: int = 1,
    first: int = 0,
    norm: NormArgs = None,
) -> tuple[Floats, Ints, Ints, Floats | None]:
    tokens, sources, indices = [], [], []
    for b, image in enumerate(x):
        score = scores[b] if scores.ndim == 2 else reduce_heads(scores[b], heads)
        weight = score if weights is None else weights[b] if weights.ndim == 2 else weights[b].mean(0)
        patches, order = image[prefix:], strongest(score)
        middle = order[keep : keep + merge]
        chosen = [first]
        squares = [((patches[middle] - patches[middle[first]]) ** 2).sum(1)]
        while len(chosen) < centers:
            chosen.append(int(np.argmax(np.min(squares, 0))))
            squares.append(((patches[middle] - patches[middle[chosen[-1]]]) ** 2).sum(1))
        joined = np.argmin(squares, 0)
        merged = []
        for number in range(centers):
            members = np.flatnonzero(joined == number)
            if not len(members):
                merged.append(patches[middle[chosen[number]]])
                continue
            distance = np.sqrt(squares[number][members])
            share = np.where(distance == 0, 1.0, 1 / np.where(distance == 0, 1, distance))
            merged.append(share @ patches[np.array(middle)[members]] / share.sum())
        rest = fused(patches, weight, order[keep + merge :])
        tokens.append(np.stack([*image[:prefix], *patches[order[:keep]], *merged, rest]))
        source = np.full(len(patches), prefix + keep + centers)
        source[order[:keep]] = prefix + np.arange(keep)
        source[middle] = prefix + keep + joined
        sources.append(source)
        indices.append([*order[:keep], *(middle[center] for center in chosen)])
    rows = np.stack(tokens)
    return rows, np.stack(sources), np.array(indices, np.int64), layer_norm(rows, norm)


def match_tokens(metric: Floats, r: int, prefix: int = 1) -> tuple[Ints, Ints, Ints]:
    metric = metric.mean(1) if metric.ndim == 4 else metric
    kept, source, target = [], [], []
    for rows in metric:
        lengths = np.maximum(np.sqrt((rows**2).sum(1, keepdims=True)), 1e-12)
        similarity = (rows / lengths)[::2] @ (rows / lengths)[1::2].T
        edges = []
        for i in range((prefix + 1) // 2, len(similarity)):
            row = [-math.inf if math.isnan(s) else s for s in similarity[i]]
            j = max(range(prefix // 2, len(row)), key=lambda j: (row[j], -j), default=0)
            edges.append((row[j] if row else -math.inf, i, j))
        best = sorted(sorted(edges, key=lambda edge: (edge[0], -edge[1]))[::-1][:r], key=lambda edge: edge[1])
        source.append([i for _, i, _ in best])
        target.append([j for _, _, j in best])
        kept.append([i for i in range(len(similarity)) if i not in source[-1]])
    a, b, c = (np.array(rows, np.int64).reshape(len(metric), -1) for rows in (kept, source, target))
    return a, b, c


def merge_tokens(
    x: Floats, match: tuple[Ints, Ints, Ints], size: Floats | None = None, norm: NormArgs = None
) -> tuple[Floats, Floats, Floats | None]:
    size = np.ones(x.shape[:2]) if size is None else size
    tokens, sizes = [], []
    for image, count, kept, source, target in zip(x, size, *match, strict=True):
        rows, totals = [], []
        for j, row in enumerate(image[1::2]):
            members = [i for i, to in zip(source, target, strict=True) if to == j and count[2 * i] > 0]
            total = count[2 * j + 1] + sum(count[2 * i] for i in members)
            parts = [image[2 * i] * count[2 * i] for i in members]
            parts += [row * count[2 * j + 1]] if count[2 * j + 1] > 0 else []
            rows.append(sum(parts) / total if members else row)
            totals.append(total)
        tokens.append(np.stack([*(image[2 * i] for i in kept), *rows]))
        sizes.append([*(count[2 * i] for i in kept), *totals])
    rows = np.stack(tokens)
    return rows, np.array(sizes), layer_norm(rows, norm)


def predict_scores(x: Floats, mixer: dict[str, Any], prefix: int) -> Floats:
    channels, width = len(mixer["norm1_weight"]), x.shape[2]
    bins = [range(g * width // channels, -(-(g + 1) * width // channels)) for g in range(channels)]
    p = np.stack([x[:, :, list(columns)].mean(2) for columns in bins], 2)
    gelu, eps = ACTIVATIONS["gelu"], mixer["eps"]
    normed = layer_norm(p, (mixer["norm1_weight"], mixer["norm1_bias"], eps))
    assert normed is not None
    hidden = gelu(np.swapaxes(normed, 1, 2) @ mixer["token_in_weight"].T + mixer["token_in_bias"])
    p = p + np.swapaxes(hidden @ mixer["token_out_weight"].T + mixer["token_out_bias"], 1, 2)
    normed = layer_norm(p, (mixer["norm2_weight"], mixer["norm2_bias"], eps))
    assert normed is not None
    hidden = gelu(normed @ mixer["channel_in_weight"].T + mixer["channel_in_bias"])
    p = p + hidden @ mixer["channel_out_weight"].T + mixer["channel_out_bias"]
    scores: Floats = p[:, prefix:] @ mixer["score_weight"] + mixer["score_bias"]
    return scores


def bias_act(x: Floats, bias: Floats | None, act: str) -> Floats:
    return ACTIVATIONS[act](x if bias is None else x + bias)


def add_norm(
    x: Floats, y: Floats, bias: Floats | None, scale: Floats | None, norm: NormArgs
) -> tuple[Floats, Floats | None]:
    branch = y if bias is None else y + bias
    total = x + (branch if scale is None else scale * branch)
    return total, layer_norm(total, norm)


def cross_attention(visual: Floats, text: Floats, alpha: float = 0.5) -> tuple[Floats, Floats]:
    logits = visual @ text.T / alpha
    patches = [np.stack([softmax(row) for row in image]) @ text for image in logits]
    classes = [
        np.stack([softmax(column) for column in image.T]) @ rows for image, rows in zip(logits, visual, strict=True)
    ]
    return np.stack(patches), np.stack(classes)


def calip_logits(
    visual: Floats,
    pooled: Floats,
    text: Floats,
    alpha: float = 0.5,
    beta2: float = 1.12,
    beta3: float = 0.02,
    terms: bool = False,
) -> Floats:
    patches, classes = cross_attention(visual, text, alpha)
    image = patches.mean(1) + patches.max(1)
    parts = np.stack([pooled @ text.T, np.stack([c @ p for c, p in zip(classes, pooled, strict=True)]), image @ text.T])
    result: Floats = 100 * (parts if terms else parts[0] + beta2 * parts[1] + beta3 * parts[2])
    return result


def affinity(
    queries: Floats, support: Floats, labels: Ints, classes: int, beta: float, weights: Floats | None = None
) -> Floats:
    total = np.zeros((len(queries), classes))
    for j, label in enumerate(labels):
        if 0 <= label < classes:
            votes = np.exp(-beta * (1 - queries @ support[j]))
            total[:, label] += votes if weights is None else weights[j] * votes
    return total


def targeted_l1(
    student: Floats, teacher: Floats, projection: Floats, weights: Floats, mask: NDArray[np.bool_]
) -> Floats:
    total = np.zeros(len(student))
    for b, i in np.argwhere(mask):
        total[b] += weights[b, i] * np.abs(projection @ student[b, i] - teacher[b, i]).sum() / len(projection)
    return total


def targeted_l1_gradients(
    student: Floats, teacher: Floats, projection: Floats, weights: Floats, mask: NDArray[np.bool_], grad: Floats
) -> tuple[Floats, Floats]:
    """The gradients of student (B,n,d) and projection (E,d) for the gradients (B,) of the distances."""
    to_student, to_projection = np.zeros(student.shape), np.zeros(projection.shape)
    for b, i in np.argwhere(mask):
        signs = np.sign(projection @ student[b, i] - teacher[b, i])
        factor = grad[b] * weights[b, i] / len(projection)
        to_student[b, i] = factor * signs @ projection
        to_projection += factor * np.outer(signs, student[b, i])
    return to_student, to_projection
