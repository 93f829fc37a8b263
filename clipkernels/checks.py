"""What every operation demands of its arguments, before dispatch and the same for every backend.

A ValueError names what was expected and what came.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels.reference import Match, Mixer, Norm

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The axes of a predictor's weights.
_MIXER: dict[str, tuple[str, ...]] = {
    "norm1_weight": ("G",),
    "norm1_bias": ("G",),
    "token_in_weight": ("Ht", "N"),
    "token_in_bias": ("Ht",),
    "token_out_weight": ("N", "Ht"),
    "token_out_bias": ("N",),
    "norm2_weight": ("G",),
    "norm2_bias": ("G",),
    "channel_in_weight": ("Hc", "G"),
    "channel_in_bias": ("Hc",),
    "channel_out_weight": ("G", "Hc"),
    "channel_out_bias": ("G",),
    "score_weight": ("G",),
    "score_bias": ("1",),
}


def check_numbers(**named: float) -> None:
    """Raises ValueError for what is no finite number."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
            raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, signal: str | None, prefix: int) -> None:
    _check_queries(q, k, prefix)
    if v.shape != k.shape:
        raise ValueError(f"v must be (B,H,N,D) = {_shape(k)} like k, got {_shape(v)}")
    _same(q, v=v)
    if signal not in ("cls", "received", "keys", None):
        raise ValueError(f'signal must be "cls", "received", "keys" or None, got {signal!r}')
    if signal == "received" and q.shape[2] != k.shape[2]:
        raise ValueError(f'signal="received" needs one query per key, {k.shape[2]}, got {q.shape[2]}')
    _check_size(size, k, k.shape[0], k.shape[2])


def check_rank(q: Tensor, k: Tensor, heads: str, query: str, size: Tensor | None, prefix: int) -> None:
    _check_queries(q, k, prefix)
    if heads not in ("mean", "rank"):
        raise ValueError(f'heads must be "mean" or "rank", got {heads!r}')
    if query not in ("cls", "all"):
        raise ValueError(f'query must be "cls" or "all", got {query!r}')
    if query == "all" and heads == "rank":
        raise ValueError('query="all" is a mean over heads, got heads="rank"')
    if query == "all" and q.shape[2] != k.shape[2]:
        raise ValueError(f'query="all" needs one query per key, {k.shape[2]}, got {q.shape[2]}')
    _check_size(size, k, k.shape[0], k.shape[2])


def _check_queries(q: Tensor, k: Tensor, prefix: int) -> None:
    if q.ndim != 4 or not q.shape[2]:
        raise ValueError(f"q must be (B,H,M,D) with at least one query, got {_shape(q)}")
    _floating(q=q)
    if k.ndim != 4 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]) or k.shape[2] < q.shape[2]:
        expected = (*q.shape[:2], "N", q.shape[3])
        raise ValueError(f"k must be (B,H,N,D) = ({_join(expected)}) with N ≥ {q.shape[2]}, got {_shape(k)}")
    _same(q, k=k)
    _check_prefix(prefix, k.shape[2])


def check_predict(x: Tensor, mixer: Mixer, prefix: int) -> None:
    _check_tokens(x)
    if not x.shape[1] or not x.shape[2]:
        raise ValueError(f"x must be (B,N,C) with N and C of at least 1, got {_shape(x)}")
    _check_prefix(prefix, x.shape[1])
    sizes = {"N": x.shape[1], "1": 1}
    for letter, name in (("G", "norm1_weight"), ("Ht", "token_in_bias"), ("Hc", "channel_in_bias")):
        vector = getattr(mixer, name)
        if vector.ndim != 1 or not vector.shape[0]:
            raise ValueError(f"{name} must be ({letter},) with {letter} of at least 1, got {_shape(vector)}")
        sizes[letter] = vector.shape[0]
    for name, letters in _MIXER.items():
        weight = getattr(mixer, name)
        expected = tuple(sizes[letter] for letter in letters)
        if tuple(weight.shape) != expected:
            named = f"({letters[0]},)" if len(letters) == 1 else f"({_join(letters)})"
            raise ValueError(f"{name} must be {named} = ({_join(expected)}), got {_shape(weight)}")
        _same(x, **{name: weight})
    if not 0 < mixer.eps < float("inf"):
        raise ValueError(f"eps must be positive, got {mixer.eps!r}")


def check_prune(x: Tensor, scores: Tensor, keep: int, heads: str, prefix: int, norm: Norm | None) -> None:
    _check_tokens(x)
    _check_prefix(prefix, x.shape[1])
    patches = x.shape[1] - prefix
    _check_scores(scores, x, patches, "scores")
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 <= keep <= patches:
        raise ValueError(f"keep must be an int from 0 to P = {patches}, got {keep!r}")
    if heads not in ("mean", "rank"):
        raise ValueError(f'heads must be "mean" or "rank", got {heads!r}')
    _check_norm(norm, x)


def check_condense(
    x: Tensor,
    scores: Tensor,
    keep: int,
    merge: int,
    centers: int,
    weights: Tensor | None,
    heads: str,
    prefix: int,
    first: int,
    norm: Norm | None,
) -> None:
    check_prune(x, scores, keep, heads, prefix, norm)
    patches = x.shape[1] - prefix
    if isinstance(merge, bool) or not isinstance(merge, int) or not 1 <= merge <= patches - keep:
        raise ValueError(f"merge must be an int from 1 to P - keep = {patches - keep}, got {merge!r}")
    if isinstance(centers, bool) or not isinstance(centers, int) or not 1 <= centers <= merge:
        raise ValueError(f"centers must be an int from 1 to merge = {merge}, got {centers!r}")
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < merge:
        raise ValueError(f"first must be an int from 0 to merge - 1 = {merge - 1}, got {first!r}")
    if weights is not None:
        _check_scores(weights, x, patches, "weights")


def check_match(metric: Tensor, r: int, prefix: int) -> None:
    if metric.ndim not in (3, 4) or (metric.ndim == 4 and not metric.shape[1]):
        raise ValueError(f"metric must be (B,N,D) or (B,H,N,D), got {_shape(metric)}")
    _floating(metric=metric)
    _check_prefix(prefix, metric.shape[-2])
    limit = (metric.shape[-2] - prefix) // 2
    if isinstance(r, bool) or not isinstance(r, int) or not 0 <= r <= limit:
        raise ValueError(f"r must be an int from 0 to (N - prefix)//2 = {limit}, got {r!r}")


def check_merge(x: Tensor, match: Match, size: Tensor | None, norm: Norm | None) -> None:
    _check_tokens(x)
    batch, tokens = x.shape[:2]
    r = match.source.shape[-1]
    expected = ((batch, (tokens + 1) // 2 - r), (batch, r), (batch, r))
    came = tuple(tuple(index.shape) for index in match)
    if came != expected:
        raise ValueError(f"match must hold kept, source, target of shapes {expected} for x {_shape(x)}, got {came}")
    if any(index.dtype != torch.int64 or index.device != x.device for index in match):
        raise ValueError(f"match must be int64 on {x.device}, got {[(i.dtype, str(i.device)) for i in match]}")
    _check_size(size, x, batch, tokens)
    _check_norm(norm, x)


def check_bias_act(x: Tensor, bias: Tensor | None, act: str) -> None:
    if x.ndim == 0:
        raise ValueError(f"x must be (…,C), got {_shape(x)}")
    _floating(x=x)
    if act not in ("quick_gelu", "gelu", "gelu_tanh"):
        raise ValueError(f'act must be "quick_gelu", "gelu" or "gelu_tanh", got {act!r}')
    _check_vectors(x, bias=bias)


def check_add_norm(x: Tensor, y: Tensor, bias: Tensor | None, scale: Tensor | None, norm: Norm | None) -> None:
    if x.ndim == 0:
        raise ValueError(f"x must be (…,C), got {_shape(x)}")
    _floating(x=x)
    if y.shape != x.shape:
        raise ValueError(f"y must be {_shape(x)} like x, got {_shape(y)}")
    _floating(y=y)
    if y.device != x.device:
        raise ValueError(f"y must be on {x.device} like x, got {y.device}")
    _check_vectors(x, bias=bias, scale=scale)
    _check_norm(norm, x)


def check_cross_attention(visual: Tensor, text: Tensor, alpha: float) -> None:
    if visual.ndim != 3 or 0 in visual.shape[1:]:
        raise ValueError(f"visual must be (B,P,E) with at least one patch, got {_shape(visual)}")
    _floating(visual=visual)
    if text.ndim != 2 or not len(text) or text.shape[1] != visual.shape[2]:
        raise ValueError(f"text must be (K,E) with K ≥ 1 and E = {visual.shape[2]}, got {_shape(text)}")
    _same(visual, text=text)
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be positive, got {alpha!r}")


def check_calip(visual: Tensor, pooled: Tensor, text: Tensor, alpha: float, beta2: float, beta3: float) -> None:
    check_numbers(beta2=beta2, beta3=beta3)
    check_cross_attention(visual, text, alpha)
    if pooled.shape != (visual.shape[0], visual.shape[2]):
        raise ValueError(f"pooled must be (B,E) = ({visual.shape[0]},{visual.shape[2]}), got {_shape(pooled)}")
    _same(visual, pooled=pooled)


def check_affinity(
    queries: Tensor,
    support: Tensor,
    labels: Tensor,
    classes: int,
    beta: float,
    weights: Tensor | None,
    offsets: Tensor | None,
) -> None:
    if queries.ndim != 2 or not queries.shape[1]:
        raise ValueError(f"queries must be (t,E) with E ≥ 1, got {_shape(queries)}")
    _floating(queries=queries)
    if support.ndim != 2 or support.shape[1] != queries.shape[1]:
        raise ValueError(f"support must be (n,E) with E = {queries.shape[1]}, got {_shape(support)}")
    _same(queries, support=support)
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise ValueError(f"classes must be a positive int, got {classes!r}")
    check_numbers(beta=beta)
    rows = (len(support),)
    for name, tensor, shape in (("labels", labels, rows), ("offsets", offsets, (classes + 1,))):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != torch.int64 or tensor.device != queries.device:
            came = f"{_shape(tensor)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} must be ({_join(shape)}) torch.int64 on {queries.device}, got {came}")
    if weights is not None:
        if tuple(weights.shape) != rows or weights.device != queries.device:
            came = f"{_shape(weights)} on {weights.device}"
            raise ValueError(f"weights must be (n) = ({len(support)}) on {queries.device}, got {came}")
        _floating(weights=weights)


def check_targeted_l1(student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor) -> None:
    if student.ndim != 3 or not student.shape[2]:
        raise ValueError(f"student must be (B,n,d) with d ≥ 1, got {_shape(student)}")
    _floating(student=student)
    batch, tokens, width = student.shape
    if teacher.ndim != 3 or teacher.shape[:2] != student.shape[:2] or not teacher.shape[2]:
        raise ValueError(f"teacher must be (B,n,E) = ({batch},{tokens},E) with E ≥ 1, got {_shape(teacher)}")
    if tuple(projection.shape) != (teacher.shape[2], width):
        raise ValueError(f"projection must be (E,d) = ({teacher.shape[2]},{width}), got {_shape(projection)}")
    _same(student, projection=projection)
    for name, tensor in (("weights", weights), ("mask", mask)):
        if tuple(tensor.shape) != (batch, tokens):
            raise ValueError(f"{name} must be (B,n) = ({batch},{tokens}), got {_shape(tensor)}")
    for name, tensor in (("teacher", teacher), ("weights", weights), ("mask", mask)):
        if tensor.device != student.device:
            raise ValueError(f"{name} must be on {student.device} like student, got {tensor.device}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be torch.bool, got {mask.dtype}")
    _floating(teacher=teacher, weights=weights)
    for name, tensor in (("teacher", teacher), ("weights", weights)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, for it gets none: detach it")


def _check_tokens(x: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be (B,N,C), got {_shape(x)}")
    _floating(x=x)


def _check_scores(scores: Tensor, x: Tensor, patches: int, name: str) -> None:
    batch = x.shape[0]
    if scores.ndim not in (2, 3) or (scores.shape[0], scores.shape[-1]) != (batch, patches) or 0 in scores.shape[1:-1]:
        raise ValueError(f"{name} must be (B,P) = ({batch},{patches}) or (B,H,P), got {_shape(scores)}")
    _floating(**{name: scores})
    if scores.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {scores.device}")


def _check_prefix(prefix: int, tokens: int) -> None:
    if isinstance(prefix, bool) or not isinstance(prefix, int) or not 0 <= prefix <= tokens:
        raise ValueError(f"prefix must be an int from 0 to N = {tokens}, got {prefix!r}")


def _check_size(size: Tensor | None, like: Tensor, batch: int, tokens: int) -> None:
    if size is not None and (tuple(size.shape) != (batch, tokens) or size.device != like.device):
        came = f"{_shape(size)} on {size.device}"
        raise ValueError(f"size must be (B,N) = ({batch},{tokens}) on {like.device}, got {came}")


def _check_norm(norm: Norm | None, x: Tensor) -> None:
    if norm is None:
        return
    if len(norm) != 3:
        raise ValueError(f"norm must be (weight, bias, eps), got {len(norm)} of them")
    _check_vectors(x, **{"norm's weight": norm[0], "norm's bias": norm[1]})
    check_numbers(**{"norm's eps": norm[2]})


def _check_vectors(x: Tensor, **named: Tensor | None) -> None:
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != x.shape[-1:] or tensor.device != x.device:
            came = f"{_shape(tensor)} on {tensor.device}"
            raise ValueError(f"{name} must be (C,) = ({x.shape[-1]}) on {x.device}, got {came}")
        _floating(**{name: tensor})


def _floating(**named: Tensor) -> None:
    for name, tensor in named.items():
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")


def _same(like: Tensor, **named: Tensor) -> None:
    for name, tensor in named.items():
        if tensor.dtype != like.dtype or tensor.device != like.device:
            raise ValueError(f"{name} must be {like.dtype} on {like.device}, got {tensor.dtype} on {tensor.device}")


def _shape(tensor: Tensor) -> str:
    return f"({_join(tuple(tensor.shape))})"


def _join(sizes: tuple[object, ...]) -> str:
    return ",".join(str(size) for size in sizes)
