"""The order of a training: every example once in an epoch, the same from any step on, and few steps for few labels."""

from __future__ import annotations

import torch

from clipkernels.questions.training import TrainingSettings, _next_batches, steps_for


def test_an_epoch_has_every_example_once_and_goes_on_from_any_step() -> None:
    settings = TrainingSettings(steps=40, batch_size=4, seed=3)
    every = _next_batches(10, settings, 0)
    assert [len(batch) for batch in every[:6]] == [4, 4, 2, 4, 4, 2] and len(every) == 40
    for epoch in range(13):
        assert sorted(torch.cat(every[3 * epoch : 3 * epoch + 3]).tolist()) == list(range(10))
    for step in (1, 3, 17, 39):
        assert all(map(torch.equal, _next_batches(10, settings, step), every[step:]))
    assert not torch.equal(every[0], _next_batches(10, settings._replace(seed=4), 0)[0])


def test_loaders_end_with_an_epoch_that_is_long() -> None:
    settings = TrainingSettings(steps=10_000, batch_size=1)
    assert len(_next_batches(300, settings, 0)) == 300 and len(_next_batches(300, settings, 290)) == 310


def test_few_labels_are_trained_on_for_sixty_epochs_or_300_steps() -> None:
    assert steps_for(640, 64, 10_000) == 600 and steps_for(10, 64, 10_000) == 300
    assert steps_for(640, 64, 500) == 500 and steps_for(64_000, 64, 500) == 500
