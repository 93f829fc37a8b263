"""The predictor: one MLP-Mixer block that ranks patches by the tokens that enter a block, trained on golden rankings.

    target q = softmax(v), v = 0 for the patches that stay and -5 - rank/10 for those that go;  loss KL(q ‖ softmax(ŝ))

Some 46,000 parameters for a ViT-B/16. It is made for one tower, one block and one number of tokens, and says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from clipkernels import ops
from clipkernels.adapters import Tower
from clipkernels.fingerprint import check_fingerprint, digest_of, fingerprinted_module
from clipkernels.heads.arguments import check_positive
from clipkernels.learn.checkpoints import check_training, load_module, save_module, seeded
from clipkernels.learn.patch_ranking.rankings import Rankings
from clipkernels.reference.predict import Mixer, mix
from clipkernels.reference.ranking import strongest_first

FORMAT = "clipkernels.rank_predictor.1"
SIZES = ("tokens", "prefix", "channels", "token_hidden", "channel_hidden", "block")
MARGIN_PAIRS = 1000


class RankPredictor(nn.Module):
    """What ranks the patches of one tower by the tokens that enter one of its blocks.

    Args:
        tokens: N entering the block, the prefix included.
        prefix: leading tokens that are no patches.
        block: zero-based block that they enter.
        channels: G that the tokens' channels are pooled to.
        token_hidden: hidden width of the MLP across tokens.
        channel_hidden: hidden width of the MLP across channels.
        about: what is known of the tower: "tower", its fingerprint, "image_size", "blocks", "width".
    Source: Patch Ranking, arXiv 2409.14607, section 3.2; MLP-Mixer, arXiv 2105.01601.
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
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.tokens, self.prefix, self.block = tokens, prefix, block
        self.channels, self.token_hidden, self.channel_hidden = channels, token_hidden, channel_hidden
        self.about = dict(about or {})
        self.norm1 = nn.LayerNorm(channels)
        self.token_in = nn.Linear(tokens, token_hidden)
        self.token_out = nn.Linear(token_hidden, tokens)
        self.norm2 = nn.LayerNorm(channels)
        self.channel_in = nn.Linear(channels, channel_hidden)
        self.channel_out = nn.Linear(channel_hidden, channels)
        self.score = nn.Linear(channels, 1)

    def forward(self, x: Tensor, prefix: int | None = None) -> Tensor:
        """Scores (B,P) fp32, detached, of the patches of x (B,N,C) that enter the block; larger stays longer.

        Args:
            x: in the dtype of the weights, unless autocast makes it another.
            prefix: its leading tokens, where learnt ones stand behind the tower's; those are not looked at.
        Raises:
            ValueError: another number of tokens, dtype or device.
        """
        if prefix is not None and prefix > self.prefix:
            x = torch.cat([x[:, : self.prefix], x[:, prefix:]], 1)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(self.score.weight.dtype)
        return ops.predict_scores(x, self.mixer(), self.prefix)

    def mixer(self) -> Mixer:
        """The weights as the operation takes them."""
        first, into, out = self.norm1, self.token_in, self.token_out
        second, widen, narrow = self.norm2, self.channel_in, self.channel_out
        return Mixer(  # one by one: torch 2.6 traces no other way of making a NamedTuple
            first.weight, first.bias, into.weight, into.bias, out.weight, out.bias,
            second.weight, second.bias, widen.weight, widen.bias, narrow.weight, narrow.bias,
            self.score.weight[0], self.score.bias, first.eps,
        )  # fmt: skip

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        mixing = 2 * self.tokens * self.channels * (self.token_hidden + self.channel_hidden)
        return mixing + (self.tokens - self.prefix) * self.channels

    def check_tower(self, tower: Tower) -> None:
        """Raises ValueError unless this was trained for the tower."""
        about = {**self.about, "tokens": self.tokens, "prefix": self.prefix}
        came = {
            **{"tokens": tower.num_tokens, "prefix": tower.prefix, "blocks": len(tower.blocks), "width": tower.width},
            "image_size": list(tower.image_size),
        }
        for name, found in came.items():
            if about.get(name, found) != found:
                said = name.replace("_", " ")
                raise ValueError(f"the predictor is for a tower with {said} {about[name]}, got one with {found}")
        if "tower" in self.about:
            check_fingerprint(self.about["tower"], fingerprinted_module(tower), "the predictor", self.about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the weights, and what they are for, as safetensors, by way of a temporary file that is renamed."""
        save_module(path, self, FORMAT, SIZES)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RankPredictor:
        """What `save` wrote, in fp32, on the CPU.

        Raises:
            ValueError: the file is none of these.
            OSError: it cannot be read.
        """
        return load_module(cls, path, FORMAT, SIZES)

    def __repr__(self) -> str:
        return f"RankPredictor(block={self.block}, tokens={self.tokens}, sha256={digest_of(self)})"


class Fitted(NamedTuple):
    """A predictor, in eval mode, the mean loss of each epoch, and after each the overlap on what was held out."""

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
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, float, float], object] | None = None,
) -> Fitted:
    """A predictor trained on golden rankings, for the tower and the block that they are of.

    Adam, its learning rate falling along a cosine to a tenth.

    Args:
        rankings: from `golden_ranking`.
        keep: share of the patches that stay, in (0, 1); of those that go it learns the order, too, so that a larger
            share can be kept with the same predictor.
        held_out: share of the images, drawn by the seed, that are not trained on and whose overlap is told.
        margin: weight, 0 or more, of another loss, max(0, 1 - (ŝᵢ - ŝⱼ)), for 1,000 random pairs, i staying longer.
        epochs: times that every image is seen.
        batch_size: images of a step.
        lr: learning rate at the start.
        weight_decay: of Adam.
        token_hidden: hidden width of the MLP across tokens.
        channel_hidden: hidden width of the MLP across channels.
        seed: of the weights, the order of the images and the pairs.
        device: where it is trained; what comes out is on the CPU.
        progress: called after each epoch with its number from 1, its mean loss and the overlap (nan without images
            held out).
    Returns:
        Fitted.
    Raises:
        ValueError: numbers out of range, no image to train on, features that are not finite, or a loss that is not.
        RuntimeError: in inference mode.
    Source: Patch Ranking, arXiv 2409.14607, section 3.2; the target and the numbers are those of its released code.
    """
    check_training("fit_predictor", epochs, batch_size)
    if not 0 < keep < 1 or not 0 <= held_out < 1:
        raise ValueError(f"keep must be in (0, 1) and held_out in [0, 1), got {keep} and {held_out}")
    check_positive(lr=lr)
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be a finite number from 0, got {margin}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rankings.ranks), generator=generator)
    test, train = order[: round(held_out * len(order))], order[round(held_out * len(order)) :]
    if not len(train):
        raise ValueError(f"rankings must be of at least one image that is not held out, got {len(order)} images")
    wrong = int((~rankings.features.isfinite()).flatten(1).any(1).sum())
    if wrong:
        raise ValueError(f"rankings must have finite features, got {wrong} images whose are not")
    _, tokens, channels = rankings.features.shape
    about = rankings.about
    prefix, patches = about["prefix"], rankings.ranks.shape[1]
    gone = patches - math.ceil(keep * patches)
    if not gone:
        raise ValueError(f"keep must let at least one of {patches} patches go, got {keep}")
    with seeded(seed):
        predictor = RankPredictor(
            tokens, prefix, about["block"], channels=channels, token_hidden=token_hidden, channel_hidden=channel_hidden,
            about={**about, "keep": keep, "images": len(train)},
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
            loss = kl_div(scores.log_softmax(1), target_distribution(ranks[batch], gone), reduction="batchmean")
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
            raise ValueError(f"lr must be one that training survives, got {lr}: the loss of epoch {epoch + 1} is none")
        with torch.no_grad():
            scores = mix(features[test], predictor.mixer(), prefix)
        overlaps.append(overlap(scores, ranks[test], gone) if len(test) else math.nan)
        if progress is not None:
            progress(epoch + 1, losses[-1], overlaps[-1])
    return Fitted(predictor.cpu().eval(), losses, overlaps)


def target_distribution(ranks: Tensor, gone: int) -> Tensor:
    """The distribution (n,P) that a predictor is to give: all alike that stay, those that go by their ranks."""
    stays = ranks < ranks.shape[1] - gone
    return torch.where(stays, 0.0, -5 - 0.1 * ranks).softmax(1)


def overlap(scores: Tensor, ranks: Tensor, gone: int) -> float:
    """The share of the `gone` patches that a ranking (n,P) lets go first that the lowest scores (n,P) are of, too.

    A random order has gone / P. Of equal scores the lower index stays, as in pruning.
    """
    patches = ranks.shape[1]
    lowest = strongest_first(scores)[:, patches - gone :]
    return float((ranks.gather(1, lowest) >= patches - gone).double().mean())


def _margin_loss(scores: Tensor, ranks: Tensor, pairs: Tensor) -> Tensor:
    """The mean of max(0, 1 - (sᵢ - sⱼ)) over pairs (2,n) of different patches, i the one that stays longer."""
    sign = (ranks[:, pairs[1]] - ranks[:, pairs[0]]).sign()
    apart = sign * (scores[:, pairs[0]] - scores[:, pairs[1]])
    return ((1 - apart).relu() * (sign != 0)).mean()
