"""Entries of TDA's caches: what is stored per image, and how long an image stays while others join its class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from clipkernels.formats import Count, Format, TensorSpec
from clipkernels.messages import quantity


class Entries(NamedTuple):
    """Stored images, along any leading axes; in a cache these are (K,M), each class by entropy, free slots last.

    keys (…,E): direction of the embedding, or the mean of the directions of several views.
    entropy (…): entropy of the zero-shot prediction, in nats.
    arrival (…): int64 arrival number, -1 for a free slot.
    targets (…,S): int64 classes that the image votes against, -1 for none; S is 0 in the positive cache.
    """

    keys: Tensor
    entropy: Tensor
    arrival: Tensor
    targets: Tensor

    def take(self, index: Tensor) -> Entries:
        """The entries at an index of the first axis."""
        return Entries(*(tensor[index] for tensor in self))

    def move(self, like: Tensor) -> Entries:
        """The entries on the device of `like`, their floats in its dtype."""
        return Entries(*(x.to(like.device, like.dtype if x.is_floating_point() else None) for x in self))


class TDAHeader(msgspec.Struct, forbid_unknown_fields=True):
    """The header of the file of a TDA: the images seen, and the settings that its entries depend on."""

    seen: Count
    scale: float
    entropy_low: float
    entropy_high: float
    threshold: float


def _tensors(header: TDAHeader) -> dict[str, TensorSpec]:
    wide, specs = (torch.float32, torch.float64), {}
    for name in ("positive", "negative"):
        specs[f"{name}.keys"] = TensorSpec(wide, f"classes {name} width", -1.001, 1.001)
        specs[f"{name}.entropy"] = TensorSpec(wide, f"classes {name}", -0.001)
        specs[f"{name}.arrival"] = TensorSpec((torch.int64,), f"classes {name}", -1, header.seen - 1)
    specs["negative.targets"] = TensorSpec((torch.int64,), "classes negative targets", -1)
    specs["text"] = TensorSpec(wide, "classes width", -1.001, 1.001)
    return specs


def _check(header: TDAHeader, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a class's entries are different images in order of entropy, before its free slots."""
    classes, caches = len(tensors["text"]), ("positive", "negative")
    if len({tensors[f"{name}.{part}"].dtype for name in caches for part in ("keys", "entropy")}) > 1:
        raise ValueError("entries of several dtypes")
    for name in caches:
        entropy, arrival = tensors[f"{name}.entropy"], tensors[f"{name}.arrival"]
        if float(entropy.max()) > math.log(classes) + 0.001:
            raise ValueError(f"entropy {float(entropy.max()):g}, more than that of {quantity(classes, 'class')}")
        is_held = arrival >= 0
        if (entropy.masked_fill(~is_held, math.inf).diff(dim=1) < 0).any() or (is_held[:, 1:] > is_held[:, :-1]).any():
            raise ValueError(f"{name} entries that are not in order of entropy")
        if len(arrival[is_held].unique()) < int(is_held.sum()):
            raise ValueError(f"two {name} entries with one arrival")
    share = relative_entropy(tensors["negative.entropy"][tensors["negative.arrival"] >= 0], classes)
    if ((share < header.entropy_low - 0.001) | (share > header.entropy_high + 0.001)).any():
        raise ValueError("negative entries with an entropy out of range")
    targets = tensors["negative.targets"]
    step = targets.diff(dim=2)
    if int(targets.max()) >= classes or (step < 0).any() or ((step == 0) & (targets[..., 1:] >= 0)).any():
        raise ValueError(f"targets of negative entries that are not ascending classes below {classes}")


FORMAT = Format("clipkernels.tda.1", "the caches of a TDA", TDAHeader, _tensors, _check)


def empty_entries(text: Tensor, capacity: int, targets: int) -> Entries:
    """Slots (K,M) for entries, all free, with the dtype and on the device of the class embeddings (K,E)."""
    classes, width = text.shape
    arrival = torch.full((classes, capacity), -1, device=text.device)
    keys, entropy = (text.new_zeros(classes, capacity, *more) for more in ((width,), ()))
    return Entries(keys, entropy, arrival, arrival[..., None].repeat(1, 1, targets))


def relative_entropy(entropy: Tensor, classes: int) -> Tensor:
    """Entropies in nats as shares of log2 K; 0 stays 0 for one class."""
    return entropy / math.log2(max(2, classes))


def lifetimes(group: Tensor, entropy: Tensor, birth: Tensor, end: int, capacity: int) -> tuple[Tensor, Tensor]:
    """The order of candidates, and the time at which each of them, in that order, leaves its class.

    A class holds the candidates of least entropy among those that are born, ties to the first: the rule of TDA, which
    replaces the last entry of a full class by an image of less entropy. So a candidate leaves, or never joins, when the
    class's `capacity`-th better one is born.

    Args:
        group: (n,) int64 class, in any numbering from 0.
        entropy: (n,), without NaN.
        birth: (n,) int64 times from 0 to `end`.
        end: the last time.
        capacity: M.
    Returns:
        The order (n,), by class, then by entropy, then by place, and in that order the times (n,) int64, later than
        `end` for candidates that stay.
    """
    order = entropy.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    # Every class has times below those of earlier classes, so a running minimum starts anew with each class.
    base = group[order] * (end + 1)
    time, death = birth[order] - base, base
    for _ in range(capacity if len(order) else 0):
        # The earliest birth among the better ones; the other births go on to the next round, the second earliest.
        earliest = torch.cat([time.new_full((1,), end + 1), time.cummin(0).values[:-1]])
        time, death = torch.maximum(time, earliest), earliest + base
    return order, death


class Candidates(NamedTuple):
    """The candidates for the classes that a batch touches: their old slots and the images that join them.

    Candidates come by class, then by entropy; equal ones come in order of arrival.

    touched (T,): int64 classes.
    row (r,): int64 old slot k·M + m, or K·M + the place among the joining images.
    group (r,): int64 place of the candidate's class in `touched`.
    rank (r,): int64 place of the candidate in its class.
    is_held (r,B): bool, true where the candidate is in the cache just after the arrival of the batch's image.
    """

    touched: Tensor
    row: Tensor
    group: Tensor
    rank: Tensor
    is_held: Tensor


def candidates_of(entries: Entries, entropy: Tensor, labels: Tensor, joined: Tensor, batch: int) -> Candidates:
    """The candidates of a batch of B images, of which those at `joined` (m,) join the classes `labels` (m,).

    Args:
        entries: the cache before the batch, slots (K,M).
        entropy: (m,) entropies of the joining images.
        labels: (m,) int64.
        joined: (m,) int64, ascending.
        batch: B.
    """
    (classes, capacity), device = entries.arrival.shape, labels.device
    touched, group = labels.unique(return_inverse=True)
    slots = touched[:, None] * capacity + torch.arange(capacity, device=device)
    row = torch.cat([slots.flatten(), classes * capacity + torch.arange(len(joined), device=device)])
    group = torch.cat([torch.arange(len(touched), device=device).repeat_interleave(capacity), group])
    free = (entries.arrival[touched] < 0).flatten()
    # A free slot is worse than any image, and is born after the batch.
    entropy = torch.cat([entries.entropy[touched].flatten().masked_fill(free, math.inf), entropy])
    birth = torch.cat([torch.where(free, batch + 1, 0), joined + 1])
    order, death = lifetimes(group, entropy, birth, batch + 1, capacity)
    row, group, birth = row[order], group[order], birth[order]
    start = torch.searchsorted(group, torch.arange(len(touched), device=device))
    time = torch.arange(1, batch + 1, device=device)
    is_held = (birth[:, None] <= time) & (time < death[:, None])
    return Candidates(touched, row, group, torch.arange(len(row), device=device) - start[group], is_held)


def store(entries: Entries, images: Entries, candidates: Candidates) -> None:
    """Set the touched classes to the candidates that are held after the batch; `images` (m) are those that join."""
    slots = entries.arrival.numel()
    row, group = candidates.row[candidates.is_held[:, -1]], candidates.group[candidates.is_held[:, -1]]
    if not (row >= slots).any():
        return
    start = torch.searchsorted(group, torch.arange(len(candidates.touched), device=row.device))
    index = row.new_full((len(candidates.touched), entries.arrival.shape[1]), -1)
    index[group, torch.arange(len(row), device=row.device) - start[group]] = row
    from_new, is_free, values = index >= slots, index < 0, []
    for old, new in zip(entries, images, strict=True):
        shape = (*index.shape, *[1] * (old.ndim - 2))
        rows = old.flatten(0, 1)[index.clamp(0, slots - 1)]
        rows = torch.where(from_new.view(shape), new[(index - slots).clamp_min(0)], rows)
        values.append(rows.masked_fill(is_free.view(shape), 0 if old.is_floating_point() else -1))
    # An exception in between leaves these classes empty, not inconsistent.
    entries.arrival[candidates.touched] = -1
    for name in ("keys", "entropy", "targets", "arrival"):
        getattr(entries, name)[candidates.touched] = values[Entries._fields.index(name)]


def votes_of(entries: Entries, images: Entries, candidates: Candidates, queries: Tensor, beta: float) -> Tensor:
    """The votes exp(-β(1 - q·key)) of slots and joining images on a batch (B,E), 0 outside of the cache: (K·M+m,B)."""
    slots = entries.arrival.numel()
    votes = queries.new_empty(slots + len(images.keys), len(queries))
    torch.mm(entries.keys.flatten(0, 1), queries.T, out=votes[:slots])
    torch.mm(images.keys, queries.T, out=votes[slots:])
    votes.sub_(1).mul_(beta).exp_()
    votes[:slots].masked_fill_((entries.arrival < 0).view(-1, 1), 0)
    votes[candidates.row] = votes[candidates.row].masked_fill(~candidates.is_held, 0)
    return votes


def sum_by_class(votes: Tensor, entries: Entries, candidates: Candidates) -> Tensor:
    """The votes (K·M+m,B) of a positive cache, each class's in order of entropy, as (K,B)."""
    classes, capacity = entries.arrival.shape
    by_slot = votes[: classes * capacity].view(classes, capacity, -1)
    total = by_slot[:, 0].clone()
    for slot in range(1, capacity):
        total += by_slot[:, slot]
    offsets = torch.searchsorted(candidates.group, torch.arange(len(candidates.touched) + 1, device=votes.device))
    total[candidates.touched] = torch.segment_reduce(votes[candidates.row], "sum", offsets=offsets, axis=0)
    return total


def sum_by_target(votes: Tensor, entries: Entries, images: Entries, candidates: Candidates) -> Tensor:
    """The votes (K·M+m,B) of a negative cache, for each target in order of class and entropy, as (K,B)."""
    classes, capacity = entries.arrival.shape
    targets = torch.cat([entries.targets.flatten(0, 1), images.targets])
    # Places by class and by rank in it; those of slots that candidates take are replaced.
    span, slot = capacity + len(images.keys), torch.arange(len(targets), device=votes.device)
    place = slot // capacity * span + slot % capacity
    place[candidates.row] = candidates.touched[candidates.group] * span + candidates.rank
    row, column = (targets >= 0).nonzero(as_tuple=True)
    target = targets[row, column]
    order = (target * (classes * span) + place[row]).argsort()
    offsets = torch.searchsorted(target[order], torch.arange(classes + 1, device=votes.device))
    return torch.segment_reduce(votes[row[order]], "sum", offsets=offsets, axis=0)
