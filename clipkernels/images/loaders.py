"""Loader processes, which decode images beside the process that encodes them."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from threading import Thread
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

Batch = TypeVar("Batch", covariant=True)
SECONDS_BETWEEN_LOOKS = 1.0
"""The time after which a loader process looks again whether its parent lives."""


class Loader(DataLoader[Batch]):
    """A loader that leaves the number of its processes to the caller, and moves no generator of the caller.

    The processes leave Ctrl-C and SIGTERM to the caller, and end with it.
    """

    def __init__(self, dataset: Any, workers: int, **options: Any) -> None:
        super().__init__(
            dataset,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            worker_init_fn=partial(_start_worker, os.getpid()),
            generator=torch.Generator(),  # a loader draws a seed, which must not move the caller's generator
            **options,
        )

    def check_worker_number_rationality(self) -> None:
        """No warning of torch about more processes than CPUs, which a slow disk is reason enough for."""


def _start_worker(parent: int, worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which may reach all of a group, to the process that writes, and end with that one.

    A loader process that torch has started notices a killed parent too, but then waits until a batch has gone through a
    full pipe that nobody reads.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)
