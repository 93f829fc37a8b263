"""The training of a recovery.

    loss (1 - cos(z, d)) + contrast · (-log softmax(z·D/τ) at d)

z is the reduced and d the dense embedding of an image, D the dense embeddings of the batch, τ = 0.01 as in CLIP. The
second term moves z away from the neighbours of d, whose cosines may differ in the third decimal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clipkernels.learn.adamw import adamw, flatten, generator_of, moments, rate_at, restore, write
from clipkernels.learn.recovery.batches import Images, read_batches
from clipkernels.learn.recovery.results import Closeness, Evaluation, Progress, best_of, closeness_of
from clipkernels.learn.recovery.state import Checkpoint, Settings, State
from clipkernels.learn.recovery.targets import Targets

TEMPERATURE = 0.01
MAX_NORM = 1.0
"""Limit of the norm of all gradients."""


class Run(NamedTuple):
    """Everything that a training reads.

    settings: the settings.
    encode: L2-normalised embeddings (b,E) of images (b,3,S,S), by the reduced tower.
    weights: the weights that are trained.
    images, targets: the images and their dense embeddings.
    train, held_out: indices (m,) of the images that are trained on, and of the others.
    workers: loader processes.
    state: the folder of checkpoints.
    progress: called after each batch; a true result stops the run.
    """

    settings: Settings
    encode: Callable[[Tensor], Tensor]
    weights: Sequence[nn.Parameter]
    images: Images
    targets: Targets
    train: Tensor
    held_out: Tensor
    workers: int
    state: State
    progress: Callable[[Progress], bool]


class Trained(NamedTuple):
    """The steps and the evaluations of a training; true if `progress` stopped it."""

    step: int
    history: list[Evaluation]
    stopped: bool


def train(run: Run) -> Trained:
    """Train until the last epoch, or until `patience` evaluations brought no better one; go on from a checkpoint.

    The held-out images are evaluated before the first step and after each epoch.

    Raises:
        ValueError: a loss that is not finite, or images that have changed.
    """
    settings, errors = run.settings, len(run.images) - len(run.train) - len(run.held_out)
    per_epoch = math.ceil(len(run.train) / settings.batch_size)
    total = settings.epochs * per_epoch
    optimizer = adamw(run.weights, settings.lr, settings.weight_decay)
    step, loss, losses, history = 0, 0.0, 0, list[Evaluation]()
    earlier = run.state.checkpoint()
    if earlier is not None:
        step, loss, losses, history = earlier.step, earlier.loss, earlier.losses, earlier.history
        write(earlier.weights, run.weights)
        if step:
            restore(optimizer, run.weights, earlier.first, earlier.second, earlier.step)

    def save() -> None:
        first, second = (flatten(moments(optimizer, run.weights, name)) for name in ("exp_avg", "exp_avg_sq"))
        content = Checkpoint(step, loss, losses, history, flatten(run.weights), first, second)
        run.state.save(content, best_of(history).step)

    while True:
        if step % per_epoch == 0 and (not history or history[-1].step != step):
            closeness = evaluate(run, history)
            if closeness is None:
                if history:
                    save()
                return Trained(step, history, True)
            history.append(Evaluation(step, loss / losses if losses else 0.0, closeness))
            loss, losses = 0.0, 0
            if best_of(history).step == step:
                run.state.save_best(step, flatten(run.weights))
            save()
        if step == total or step - best_of(history).step >= settings.patience * per_epoch:
            return Trained(step, history, False)
        order = torch.randperm(len(run.train), generator=generator_of(settings.seed, f"epoch {step // per_epoch}"))
        batches = run.train[order].split(settings.batch_size)[step % per_epoch :]
        for batch in read_batches(run.images, batches, run.workers, run.targets.digests):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * rate_at(step, total, settings.warmup)
            assert batch.images is not None
            dense = run.targets.embeddings[batch.indices]
            loss += _step(run, optimizer, batch.images, dense, step) * len(dense)
            losses += len(dense)
            step += 1
            done = step // per_epoch * len(run.train) + step % per_epoch * settings.batch_size
            state = Progress(
                "training", done, settings.epochs * len(run.train), errors, loss / losses,
                history[-1].closeness.cosine,
            )  # fmt: skip
            if run.progress(state):
                save()
                return Trained(step, history, True)
            if run.state.is_due():
                save()


@torch.no_grad()
def evaluate(run: Run, history: Sequence[Evaluation] = ()) -> Closeness | None:
    """The closeness of the held-out images now, or None if `progress` returns true."""
    reduced: list[Tensor] = []
    errors, done = len(run.images) - len(run.train) - len(run.held_out), 0
    batches = run.held_out.split(run.settings.batch_size)
    for batch in read_batches(run.images, batches, run.workers, run.targets.digests):
        assert batch.images is not None
        reduced.append(run.encode(batch.images).float().cpu())
        done += len(batch.indices)
        cosine = history[-1].closeness.cosine if history else 0.0
        if run.progress(Progress("measuring", done, len(run.held_out), errors, 0.0, cosine)):
            return None
    closeness = closeness_of(torch.cat(reduced), run.targets.embeddings[run.held_out])
    if not math.isfinite(closeness.cosine):
        raise ValueError(_not_finite(run.settings.lr, "the embeddings"))
    return closeness


def objective(reduced: Tensor, dense: Tensor, contrast: float) -> Tensor:
    """The mean loss of reduced embeddings (b,E), given the dense ones (b,E), the rows of both L2-normalised."""
    loss = (1 - (reduced * dense).sum(1)).mean()
    if not contrast:
        return loss
    own = torch.arange(len(dense), device=dense.device)
    return loss + contrast * cross_entropy(reduced @ dense.T / TEMPERATURE, own)


def _step(run: Run, optimizer: torch.optim.Optimizer, images: Tensor, dense: Tensor, step: int) -> float:
    """Make one step, and return its mean loss."""
    reduced = run.encode(images)
    loss = objective(reduced, dense.to(reduced), run.settings.contrast)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(run.weights, MAX_NORM)
    value = float(loss.detach())
    if not (math.isfinite(value) and math.isfinite(float(norm))):
        raise ValueError(_not_finite(run.settings.lr, f"the loss or its gradient in step {step + 1}"))
    optimizer.step()
    return value


def _not_finite(lr: float, what: str) -> str:
    return f"lr must keep all numbers finite, got {lr}, which makes {what} infinite or NaN: lower it"
