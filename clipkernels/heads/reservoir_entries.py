"""Entries of a reservoir: what is stored per image, and which entries of a class stay when images arrive."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from clipkernels.formats import Count, Format, TensorSpec
from clipkernels.messages import quantity

Evict = Literal["diversity", "similarity", "uncertainty", "fifo"]


class Entries(NamedTuple):
    """Stored images, along any leading axes.

    unit (…,L,C): direction of the CLS token after each block.
    length (…,L): its length.
    mean (…,C): direction of its mean over the blocks.
    entropy (…): entropy of the zero-shot prediction.
    arrival (…): int64 arrival number, -1 for a free slot.
    """

    unit: Tensor
    length: Tensor
    mean: Tensor
    entropy: Tensor
    arrival: Tensor


class ReservoirHeader(msgspec.Struct, forbid_unknown_fields=True):
    """The header of a reservoir's file: the images seen, and the factor of the cosines of its entropies."""

    seen: Count
    scale: float


def _tensors(header: ReservoirHeader) -> dict[str, TensorSpec]:
    wide = (torch.float32, torch.float64)
    return {
        "unit": TensorSpec(wide, "classes capacity blocks width", -1.001, 1.001),
        "length": TensorSpec(wide, "classes capacity blocks", 0),
        "mean": TensorSpec(wide, "classes capacity width", -1.001, 1.001),
        "entropy": TensorSpec(wide, "classes capacity", -0.001),
        "arrival": TensorSpec((torch.int64,), "classes capacity", -1, header.seen - 1),
        "text": TensorSpec(wide, "classes embedding", -1.001, 1.001),
    }


def _check(header: ReservoirHeader, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a class's entries are different images in order of entropy, before its free slots."""
    entropy, arrival = tensors["entropy"], tensors["arrival"]
    dtypes = {tensors[name].dtype for name in Entries._fields} - {torch.int64}
    if len(dtypes) > 1:
        raise ValueError("entries of several dtypes")
    if float(entropy.max()) > math.log(len(entropy)) + 0.001:
        raise ValueError(f"entropy {float(entropy.max()):g}, more than that of {quantity(len(entropy), 'class')}")
    is_held = arrival >= 0
    if (entropy.masked_fill(~is_held, math.inf).diff(dim=1) < 0).any() or (is_held[:, 1:] > is_held[:, :-1]).any():
        raise ValueError("entries that are not in order of entropy")
    if len(arrival[is_held].unique()) < int(is_held.sum()):
        raise ValueError("two entries with one arrival")


FORMAT = Format("clipkernels.reservoir.2", "a reservoir", ReservoirHeader, _tensors, _check)


def empty_entries(like: Entries, classes: int, capacity: int) -> Entries:
    """Slots (K,M) for entries, all free, with the dtypes and device of `like`."""
    entries = Entries(*(tensor.new_zeros(classes, capacity, *tensor.shape[1:]) for tensor in like))
    entries.arrival.fill_(-1)
    return entries


def occupied(entries: Entries) -> Tensor:
    """The slots that hold an entry, bool."""
    return entries.arrival >= 0


def places_after_arrivals(
    mean: Tensor, entropy: Tensor, arrival: Tensor, present: Tensor, capacity: int, evict: Evict
) -> Tensor:
    """The places that each class holds after each of R arrivals, (R+1,T,M) int64, sorted by entropy.

    Places 0..M-1 are the class's old slots, M..M+R-1 its arrivals, and M+R means none.

    Args:
        mean: (T,M+R,C) direction of the mean over blocks, of the old entries and of the arrivals.
        entropy: (T,M+R).
        arrival: (T,M+R) int64, -1 for a free slot.
        present: (T,R) bool, True for the arrivals of this class.
        capacity: M.
        evict: the rule that chooses the entry to remove from a full class.
    """
    free = entropy.shape[1]
    padding = torch.zeros_like(mean[:, :1]), torch.full_like(entropy[:, :1], float("inf")), arrival[:, :1]
    mean, entropy, arrival = (torch.cat(parts, 1) for parts in zip((mean, entropy, arrival), padding, strict=True))
    places = torch.arange(free, device=present.device)
    states = [torch.where(arrival[:, :capacity] >= 0, places[:capacity], free)]
    arrivals = torch.where(present, places[capacity:], free)
    slots = torch.arange(capacity + 1, device=present.device)
    for new in arrivals.split(1, dim=1):
        candidates = torch.cat([states[-1], new], 1)  # [T, M+1]
        candidate_entropy = entropy.gather(1, candidates)
        victim = _eviction_score(mean, candidate_entropy, arrival, candidates, evict).argmax(1, keepdim=True)
        full = (candidates[:, -2:] < free).all(1, keepdim=True)
        candidate_entropy = candidate_entropy.masked_fill((slots == victim) & full, float("inf"))
        states.append(candidates.gather(1, candidate_entropy.argsort(dim=1, stable=True)[:, :capacity]))
    return torch.stack(states)


def _eviction_score(mean: Tensor, entropy: Tensor, arrival: Tensor, places: Tensor, evict: Evict) -> Tensor:
    """The eviction score (T,M+1) of each of the places (T,M+1), given their entropies (T,M+1).

    A full class removes the entry of the largest score, ties to the first.
    """
    if evict == "uncertainty":
        return entropy
    if evict == "fifo":
        return -arrival.gather(1, places)
    rows = mean.gather(1, places[..., None].expand(-1, -1, mean.shape[2]))
    # Not a matrix product: its rounding may depend on the position, and equal entries must tie.
    cosines = (rows[:, :, None] * rows[:, None]).sum(-1)
    cosines.diagonal(dim1=1, dim2=2).zero_()
    similarity = cosines.sum(2) / (places.shape[1] - 1)
    if evict == "diversity":
        return entropy + similarity
    distance = 1 - similarity
    spread = distance.amax(1) - distance.amin(1)
    weight = ((entropy.amax(1) - entropy.amin(1)) / spread).trunc().masked_fill(spread == 0, 0)
    return entropy + weight[:, None] * distance
