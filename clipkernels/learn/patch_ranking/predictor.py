"""The predictor: one MLP-Mixer block that ranks patches by a block's input tokens, trained on golden rankings.

    target q = softmax(v), v = 0 for the patches that stay and -5 - rank/10 for those that go;  loss KL(q ‖ softmax(ŝ))

About 46,000 parameters for a ViT-B/16. It belongs to one tower, one block and one number of tokens, and checks them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from clipkernels import ops
from clipkernels.adapters import Tower
from clipkernels.arguments import (
    check_device,
    check_int,
    check_mapping,
    check_positive,
    check_prefix,
    check_range,
    check_tensors,
    check_tokens,
    describe,
    shape_of,
)
from clipkernels.fingerprint import check_fingerprint, digest_of, fingerprinted_module
from clipkernels.formats import Count, Format, Size, TensorSpec
from clipkernels.learn.checkpoints import check_training, load_module, save_module, seeded, weight_specs
from clipkernels.learn.patch_ranking.rankings import RankingOptions, Rankings
from clipkernels.messages import quantity
from clipkernels.reference.predict import Mixer, mix
from clipkernels.reference.ranking import strongest_first

MARGIN_PAIRS = 1000


class RankPredictor(nn.Module):
    """A network that ranks the patches of one tower by the tokens that enter one of its blocks.

    Args:
        tokens: N, tokens that enter the block, prefix included.
        prefix: leading tokens that are not patches.
        block: zero-based block whose input is ranked.
        channels: G, the number of channels after pooling.
        token_hidden: hidden width of the MLP across tokens.
        channel_hidden: hidden width of the MLP across channels.
        eps: added to the variance in both LayerNorms; 1e-6 in the released code.
        about: properties of the tower: "tower", its fingerprint, "image_size", "blocks", "width".
    Raises:
        ValueError: an eps that is not positive, or another number that is no int or out of range.
    Source: Patch Ranking, arXiv 2409.14607, section 3.2; MLP-Mixer, arXiv 2105.01601. The released code trains on the
        features of the last block instead of those that enter the block it prunes before.
    """

    def __init__(
        self,
        tokens: int,
        prefix: int = 1,
        block: int = 3,
        *,
        channels: int = 64,
        token_hidden: int = 32,
        channel_hidden: int = 256,
        eps: float = 1e-5,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_positive(eps=eps)
        check_int("tokens", tokens, 1)
        check_int("prefix", prefix, 0, tokens - 1, "tokens - 1")
        check_int("block", block, 0)
        for name, size in (("channels", channels), ("token_hidden", token_hidden), ("channel_hidden", channel_hidden)):
            check_int(name, size, 1)
        check_mapping(about={} if about is None else about)
        self.tokens, self.prefix, self.block = tokens, prefix, block
        self.channels, self.token_hidden, self.channel_hidden = channels, token_hidden, channel_hidden
        self.eps, self.about = eps, dict(about or {})
        self.norm1 = nn.LayerNorm(channels, eps)
        self.token_in = nn.Linear(tokens, token_hidden)
        self.token_out = nn.Linear(token_hidden, tokens)
        self.norm2 = nn.LayerNorm(channels, eps)
        self.channel_in = nn.Linear(channels, channel_hidden)
        self.channel_out = nn.Linear(channel_hidden, channels)
        self.score = nn.Linear(channels, 1)

    def forward(self, x: Tensor, prefix: int | None = None) -> Tensor:
        """Scores (B,P) fp32, detached, of the patches of the block's input x (B,N,C); larger scores stay longer.

        Args:
            x: in the dtype of the weights; any dtype under autocast.
            prefix: number of leading tokens of x, if learnt tokens follow the tower's prefix; those are ignored.
        Raises:
            ValueError: another number of tokens, dtype or device.
        """
        check_tokens(x)
        if prefix is not None:
            check_prefix(prefix, x.shape[1])
        if prefix is not None and prefix > self.prefix:
            x = torch.cat([x[:, : self.prefix], x[:, prefix:]], 1)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(self.score.weight.dtype)
        return ops.predict_scores(x, self.mixer(), self.prefix)

    def mixer(self) -> Mixer:
        """The weights in the form that `ck.ops.predict_scores` takes."""
        norm1, token_in, token_out = self.norm1, self.token_in, self.token_out
        norm2, channel_in, channel_out = self.norm2, self.channel_in, self.channel_out
        return Mixer(  # positionally, because torch 2.6 traces no other way of making a NamedTuple
            norm1.weight, norm1.bias, token_in.weight, token_in.bias, token_out.weight, token_out.bias,
            norm2.weight, norm2.bias, channel_in.weight, channel_in.bias, channel_out.weight, channel_out.bias,
            self.score.weight[0], self.score.bias, norm1.eps,
        )  # fmt: skip

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations per image."""
        mixing = 2 * self.tokens * self.channels * (self.token_hidden + self.channel_hidden)
        return mixing + (self.tokens - self.prefix) * self.channels

    def check_tower(self, tower: Tower) -> None:
        """Raise ValueError unless this predictor was trained for the tower."""
        about = {**self.about, "tokens": self.tokens, "prefix": self.prefix}
        actual = {
            **{"tokens": tower.num_tokens, "prefix": tower.prefix, "blocks": len(tower.blocks), "width": tower.width},
            "image_size": list(tower.image_size),
        }
        for name, value in actual.items():
            if about.get(name, value) != value:
                words = name.replace("_", " ")
                raise ValueError(f"the predictor is for a tower with {words} {about[name]}, got one with {value}")
        if "tower" in self.about:
            check_fingerprint(self.about["tower"], fingerprinted_module(tower), "the predictor", self.about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights and the properties of their tower as safetensors, through a temporary file.

        Raises:
            ValueError: weights that are not finite, or unknown properties in `about`.
            OSError: the file cannot be written.
        """
        save_module(path, self, FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RankPredictor:
        """The predictor that `save` wrote, in fp32, on the CPU.

        Raises:
            ValueError: the file holds no predictor, or not the one that was written.
            OSError: the file cannot be read.
        """
        return load_module(cls, path, FORMAT)

    def __repr__(self) -> str:
        return f"RankPredictor(block={self.block}, tokens={self.tokens}, eps={self.eps:g}, sha256={digest_of(self)})"


# What is known about the tower and the training: the options of the rankings, and more.
About = msgspec.defstruct(
    "About",
    [
        (name, kind | msgspec.UnsetType, msgspec.UNSET)
        for name, kind in (
            *((field.name, field.type) for field in msgspec.structs.fields(RankingOptions)),
            ("keep", Annotated[float, msgspec.Meta(gt=0, lt=1)]),
            ("images", Size),
        )
    ],
    forbid_unknown_fields=True,
)


class PredictorHeader(msgspec.Struct, forbid_unknown_fields=True):
    """The header of a predictor's file: the arguments of `RankPredictor`."""

    tokens: Size
    prefix: Count
    block: Count
    channels: Size
    token_hidden: Size
    channel_hidden: Size
    eps: Annotated[float, msgspec.Meta(gt=0)]
    about: About  # type: ignore[valid-type]  # made at run time, so that it follows the options of the rankings

    def __post_init__(self) -> None:
        if self.prefix >= self.tokens:
            raise ValueError(f"prefix {self.prefix} of {quantity(self.tokens, 'token')}")


def _tensors(header: PredictorHeader) -> dict[str, TensorSpec]:
    return weight_specs(
        {
            **{f"norm{number}.{part}": "channels" for number in (1, 2) for part in ("weight", "bias")},
            **{"token_in.weight": "token_hidden tokens", "token_in.bias": "token_hidden"},
            **{"token_out.weight": "tokens token_hidden", "token_out.bias": "tokens"},
            **{"channel_in.weight": "channel_hidden channels", "channel_in.bias": "channel_hidden"},
            **{"channel_out.weight": "channels channel_hidden", "channel_out.bias": "channels"},
            **{"score.weight": "1 channels", "score.bias": "1"},
        }
    )


FORMAT = Format("clipkernels.rank_predictor.2", "a predictor", PredictorHeader, _tensors)


class Fitted(NamedTuple):
    """A predictor in eval mode, the mean loss of each epoch, and the overlap on held-out images after each epoch."""

    predictor: RankPredictor
    losses: list[float]
    overlaps: list[float]


@torch.enable_grad()
def fit_predictor(
    rankings: Rankings,
    *,
    keep: float = 0.6,
    held_out: float = 0.1,
    margin: float = 0.0,
    epochs: int = 50,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    token_hidden: int = 32,
    channel_hidden: int = 256,
    eps: float = 1e-5,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, float, float], object] | None = None,
) -> Fitted:
    """A predictor trained on golden rankings, for the tower and the block of these rankings.

    The optimizer is Adam; its learning rate falls along a cosine to a tenth.

    Args:
        rankings: from `golden_ranking`.
        keep: share of the patches that stay, in (0, 1). The predictor also learns the order of the removed patches, so
            a larger share can be kept with the same predictor.
        held_out: share of the images, drawn by the seed, that are not trained on and give the overlap.
        margin: weight, 0 or more, of an additional loss max(0, 1 - (ŝᵢ - ŝⱼ)) over 1,000 random pairs, of which patch
            i stays longer.
        epochs: passes over the images.
        batch_size: images per step.
        lr: initial learning rate.
        weight_decay: weight decay of Adam.
        token_hidden: hidden width of the MLP across tokens.
        channel_hidden: hidden width of the MLP across channels.
        eps: added to the variance in both LayerNorms; 1e-6 in the released code.
        seed: seed of the weights, of the order of the images and of the pairs.
        device: device of the training; the returned predictor is on the CPU.
        progress: called after each epoch with its number, from 1, its mean loss and the overlap (nan without held-out
            images).
    Returns:
        Fitted.
    Raises:
        ValueError: numbers out of range, no image to train on, or features or a loss that are not finite.
        RuntimeError: in inference mode.
    Source: Patch Ranking, arXiv 2409.14607, section 3.2; the target and the numbers are those of its released code.
    """
    check_training("fit_predictor", epochs, batch_size, seed, progress, lr=lr)
    if not isinstance(rankings, Rankings):
        raise TypeError(f"rankings must be Rankings, as golden_ranking returns, got {describe(rankings)}")
    check_range("keep", keep, 0, 1, "()")
    check_range("held_out", held_out, 0, 1, "[)")
    check_range("margin", margin, 0, math.inf, "[)")
    check_range("weight_decay", weight_decay, 0, math.inf, "[)")
    device = check_device(device)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rankings.ranks), generator=generator)
    test, train = order[: round(held_out * len(order))], order[round(held_out * len(order)) :]
    if not len(train):
        raise ValueError(
            f"rankings must hold at least one image that is not held out, got {quantity(len(order), 'image')}"
        )
    num_invalid = int((~rankings.features.isfinite()).flatten(1).any(1).sum())
    if num_invalid:
        raise ValueError(f"rankings must have finite features, got {quantity(num_invalid, 'image')} with others")
    _, tokens, channels = rankings.features.shape
    about = rankings.about
    prefix, patches = about["prefix"], rankings.ranks.shape[1]
    num_removed = patches - math.ceil(keep * patches)
    if not num_removed:
        raise ValueError(f"keep must remove at least one of {quantity(patches, 'patch')}, got {keep}")
    with seeded(seed):
        predictor = RankPredictor(
            tokens, prefix, about["block"], channels=channels, token_hidden=token_hidden, channel_hidden=channel_hidden,
            eps=eps, about={**about, "keep": keep, "images": len(train)},
        ).to(device)  # fmt: skip
    features, ranks = rankings.features.to(device), rankings.ranks.to(device)
    optimizer = torch.optim.Adam(predictor.parameters(), lr, weight_decay=weight_decay)
    steps = epochs * math.ceil(len(train) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, lr / 10)
    losses, overlaps = [], []
    for epoch in range(epochs):
        total = 0.0
        for batch in train[torch.randperm(len(train), generator=generator)].split(batch_size):
            batch = batch.to(device)
            scores = mix(features[batch], predictor.mixer(), prefix)
            loss = kl_div(scores.log_softmax(1), target_distribution(ranks[batch], num_removed), reduction="batchmean")
            if margin:
                pairs = torch.randint(patches, (2, MARGIN_PAIRS), generator=generator).to(device)
                loss = loss + margin * _margin_loss(scores, ranks[batch], pairs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(batch)
        losses.append(total / len(train))
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"lr must keep the loss finite, got {lr}, which makes it {losses[-1]} in epoch {epoch + 1}: lower it"
            )
        with torch.no_grad():
            scores = mix(features[test], predictor.mixer(), prefix)
        overlaps.append(overlap(scores, ranks[test], num_removed) if len(test) else math.nan)
        if progress is not None:
            progress(epoch + 1, losses[-1], overlaps[-1])
    return Fitted(predictor.cpu().eval(), losses, overlaps)


def target_distribution(ranks: Tensor, num_removed: int) -> Tensor:
    """The predictor's target distribution (n,P): equal for the patches that stay, by rank for the removed ones."""
    stays = ranks < ranks.shape[1] - num_removed
    return torch.where(stays, 0.0, -5 - 0.1 * ranks).softmax(1)


def overlap(scores: Tensor, ranks: Tensor, gone: int) -> float:
    """The share of the `gone` patches that a ranking (n,P) removes first that also have the lowest scores (n,P).

    The expected value of a random order is gone / P. Of equal scores the lower index stays, as in pruning.

    Raises:
        TypeError: scores or ranks are no tensors.
        ValueError: their shapes do not fit, or `gone` is no int from 1 to P.
    """
    check_tensors(scores=scores, ranks=ranks)
    if scores.ndim != 2 or scores.shape != ranks.shape or not len(scores):
        raise ValueError(f"scores and ranks must be (n,P) of one size, got {shape_of(scores)} and {shape_of(ranks)}")
    patches = ranks.shape[1]
    check_int("gone", gone, 1, patches, "P")
    lowest = strongest_first(scores)[:, patches - gone :]
    return float((ranks.gather(1, lowest) >= patches - gone).double().mean())


def _margin_loss(scores: Tensor, ranks: Tensor, pairs: Tensor) -> Tensor:
    """The mean of max(0, 1 - (sᵢ - sⱼ)) over pairs (2,n) of different patches; patch i is the one that stays longer."""
    sign = (ranks[:, pairs[1]] - ranks[:, pairs[0]]).sign()
    difference = sign * (scores[:, pairs[0]] - scores[:, pairs[1]])
    return ((1 - difference).relu() * (sign != 0)).mean()
