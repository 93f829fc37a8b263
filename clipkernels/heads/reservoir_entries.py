"""What a reservoir remembers of each class, and which of it stays when another image arrives."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Evict = Literal["diversity", "similarity", "uncertainty", "fifo"]


class Entries(NamedTuple):
    """What is remembered of images, along leading axes: the direction (…,L,C) and the length (…,L) of CLS after each
    block, the direction of the mean over blocks (…,C), entropy and arrival number."""

    unit: Tensor
    length: Tensor
    mean: Tensor
    entropy: Tensor
    arrival: Tensor


def empty_entries(like: Entries, classes: int, capacity: int) -> Entries:
    """Places (K,M) for entries, all free."""
    entries = Entries(*(tensor.new_zeros(classes, capacity, *tensor.shape[1:]) for tensor in like))
    entries.arrival.fill_(-1)
    return entries


def occupied(entries: Entries) -> Tensor:
    """Which places hold an entry."""
    return entries.arrival >= 0


def places_after_arrivals(mean: Tensor, entropy: Tensor, arrival: Tensor, present: Tensor, capacity: int, evict: Evict) -> Tensor:
    """Which of the places (T,M+R) each class holds after each of R arrivals (those that are `present`), sorted by
    entropy and M+R for none, (R+1,T,M)."""
    free = entropy.shape[1]
    nothing = torch.zeros_like(mean[:, :1]), torch.full_like(entropy[:, :1], float("inf")), arrival[:, :1]
    mean, entropy, arrival = (torch.cat(parts, 1) for parts in zip((mean, entropy, arrival), nothing, strict=True))
    places = torch.arange(free, device=present.device)
    states = [torch.where(arrival[:, :capacity] >= 0, places[:capacity], free)]
    arrivals = torch.where(present, places[capacity:], free)
    at = torch.arange(capacity + 1, device=present.device)
    for new in arrivals.split(1, dim=1):
        held = torch.cat([states[-1], new], 1)  # [T, M+1]
        left = entropy.gather(1, held)
        victim = _eviction_score(mean, left, arrival, held, evict).argmax(1, keepdim=True)
        full = (held[:, -2:] < free).all(1, keepdim=True)
        left = left.masked_fill((at == victim) & full, float("inf"))
        states.append(held.gather(1, left.argsort(dim=1, stable=True)[:, :capacity]))
    return torch.stack(states)


def _eviction_score(mean: Tensor, entropy: Tensor, arrival: Tensor, held: Tensor, evict: Evict) -> Tensor:
    """A number (T,M+1) for each held place, of these entropies: where all are held, the first of the largest
    goes."""
    if evict == "uncertainty":
        return entropy
    if evict == "fifo":
        return -arrival.gather(1, held)
    rows = mean.gather(1, held[..., None].expand(-1, -1, mean.shape[2]))
    # Not as a matrix product, which may round a cosine by where it stands: equal entries must tie.
    alike = (rows[:, :, None] * rows[:, None]).sum(-1)
    alike.diagonal(dim1=1, dim2=2).zero_()
    likeness = alike.sum(2) / (held.shape[1] - 1)
    if evict == "diversity":
        return entropy + likeness
    apart = 1 - likeness
    spread = apart.amax(1) - apart.amin(1)
    weight = ((entropy.amax(1) - entropy.amin(1)) / spread).trunc().masked_fill(spread == 0, 0)
    return entropy + weight[:, None] * apart
