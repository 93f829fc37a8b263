"""The training of a learner on examples, which goes on from a checkpoint with the same bits on the same CPU.

    loss  cross-entropy to the shares of the answers, and the distillation's

The order of an epoch depends on the seed and its number alone, and dropout on the seed and the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clipkernels.learn.adamw import adamw, flatten, generator_of, moments, rate_at, restore, write
from clipkernels.questions.batches import Batch
from clipkernels.questions.learners import Learner

MAX_NORM = 1.0
"""Limit of the norm of all gradients."""
EPOCHS, FEWEST_STEPS = 60, 300
"""Most epochs, but not fewer steps than these, so that few labels are trained on for long enough."""


FEWEST_BATCHES = 256
"""Batches that loader processes read before they end, at least."""


class TrainingSettings(NamedTuple):
    """The settings of a training.

    steps: steps that are made.
    batch_size: examples per step.
    lr: largest learning rate.
    warmup: share of the steps in which it rises.
    weight_decay: of matrices.
    seed: of the order and of dropout.
    """

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.05
    seed: int = 0


class Checkpoint(NamedTuple):
    """The state of a training after a step.

    step: steps that were made.
    weight, weighed: the sum of the mean weights of the distances, and their number.
    weights, first, second: the weights and both moments of AdamW as vectors on the CPU.
    buffers: the learner's buffers as a vector on the CPU, fp64.
    """

    step: int
    weight: float
    weighed: int
    weights: Tensor
    first: Tensor
    second: Tensor
    buffers: Tensor


class Trained(NamedTuple):
    """The steps that were made; the mean weight of the distances, None without any; true if the caller stopped it."""

    step: int
    weight: float | None
    stopped: bool


def steps_for(count: int, batch_size: int, most: int) -> int:
    """The steps of a training on `count` examples: at most `most`, and at most 60 epochs unless these are few."""
    return min(most, max(FEWEST_STEPS, EPOCHS * math.ceil(count / batch_size)))


def train(
    learner: Learner,
    count: int,
    batches: Callable[[Sequence[Tensor]], Iterator[Batch]],
    settings: TrainingSettings,
    *,
    earlier: Checkpoint | None = None,
    progress: Callable[[int, float], bool] = lambda step, loss: False,
    save: Callable[[Callable[[], Checkpoint], bool], None] = lambda checkpoint, last: None,
) -> Trained:
    """Train a learner in place.

    Args:
        learner: the learner, on its device.
        count: the number of examples.
        batches: a function from the indices of batches to the batches.
        settings: the settings.
        earlier: a checkpoint of the same training, from which it goes on.
        progress: called with the steps made and the loss after each; a true result stops the training.
        save: called after each step with a function that makes a checkpoint, and true after the last one.
    Raises:
        ValueError: a loss that is not finite.
    """
    weights = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    device = weights[0].device
    optimizer = adamw(weights, settings.lr, settings.weight_decay)
    step, weight, weighed = 0, 0.0, 0
    if earlier is not None:
        step, weight, weighed = earlier.step, earlier.weight, earlier.weighed
        write(earlier.weights, weights)
        _write_buffers(earlier.buffers, learner)
        restore(optimizer, weights, earlier.first, earlier.second, step)

    def checkpoint() -> Checkpoint:
        first, second = (flatten(moments(optimizer, weights, name)) for name in ("exp_avg", "exp_avg_sq"))
        return Checkpoint(step, weight, weighed, flatten(weights), first, second, _read_buffers(learner))

    learner.train()
    while step < settings.steps:
        for batch in batches(_next_batches(count, settings, step)):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * rate_at(step, settings.steps, settings.warmup)
            with _seeded_step(settings.seed, step, device):
                loss, mean_weight = learner.loss(batch.to(device))
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(weights, MAX_NORM)
            value = float(loss.detach())
            if not (math.isfinite(value) and math.isfinite(float(norm))):
                raise ValueError(
                    f"lr must keep all numbers finite, got {settings.lr}, which makes the loss or its gradient in step "
                    f"{step + 1} infinite or NaN: lower it"
                )
            optimizer.step()
            step += 1
            if mean_weight is not None:
                weight, weighed = weight + mean_weight, weighed + 1
            stopped = progress(step, value)
            save(checkpoint, stopped)
            if stopped:
                return Trained(step, None, True)
    learner.eval()
    return Trained(step, weight / weighed if weighed else None, False)


@torch.no_grad()
def predict(
    learner: Learner, batches: Iterator[Batch], progress: Callable[[int], bool] = lambda done: False
) -> list[int] | None:
    """The answer with the largest logit to each example, ties to the first; None if `progress` returns true.

    Args:
        learner: the learner, in eval mode.
        batches: the examples.
        progress: called with the number of examples after each batch.
    """
    device = next(learner.parameters()).device
    predictions: list[int] = []
    for batch in batches:
        predictions += learner(batch.to(device)).argmax(1).tolist()
        if progress(len(predictions)):
            return None
    return predictions


def _next_batches(count: int, settings: TrainingSettings, step: int) -> list[Tensor]:
    """The indices of the batches from a step on: to the end of an epoch, of several if they are short.

    Loader processes start with each such list.
    """
    per_epoch = math.ceil(count / settings.batch_size)
    indices: list[Tensor] = []
    while len(indices) < FEWEST_BATCHES and step < settings.steps:
        order = torch.randperm(count, generator=generator_of(settings.seed, f"epoch {step // per_epoch}"))
        epoch = order.split(settings.batch_size)[step % per_epoch :][: settings.steps - step]
        indices.extend(epoch)
        step += len(epoch)
    return indices


@contextmanager
def _seeded_step(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of the CPU and of a device for a step, and restore them."""
    value = generator_of(seed, f"dropout {step}").initial_seed()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(value) if device.type == "cuda" else torch.default_generator.manual_seed(value)
        yield


def _read_buffers(learner: nn.Module) -> Tensor:
    return torch.cat(
        [torch.zeros(0, dtype=torch.float64), *(b.detach().flatten().double().cpu() for b in learner.buffers())]
    )


@torch.no_grad()
def _write_buffers(vector: Tensor, learner: nn.Module) -> None:
    buffers = list(learner.buffers())
    for buffer, values in zip(buffers, vector.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(values.view(buffer.shape))
