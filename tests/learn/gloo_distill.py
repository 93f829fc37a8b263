"""One of several processes that distil a student together: python gloo_distill.py RANK WORLD FOLDER.

Writes the gradients that it ends with to FOLDER/RANK.safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from clipkernels.learn.distill import TargetedDistillation, TeacherFeatures

BATCH, WORDS, REGIONS, WIDTH, OUT = 8, 5, 9, 12, 16


class Taught(nn.Module):
    """A student of two layers with its objective, in one module, because DDP syncs only the module it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.answer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.distil = TargetedDistillation(OUT, text=WIDTH, visual=WIDTH)

    def forward(self, features: TeacherFeatures, text: Tensor, visual: Tensor, labels: Tensor) -> Tensor:
        text, visual = self.student(text), self.student(visual)
        logits = self.answer(text.mean(1) + visual.mean(1))
        pooled = {"text_pooled": text[:, 0], "visual_pooled": visual[:, 0]}
        result = self.distil(features, text=text, visual=visual, **pooled, logits=logits, labels=labels)
        loss: Tensor = cross_entropy(logits, labels) + result.loss
        return loss


def batch() -> tuple[TeacherFeatures, Tensor, Tensor, Tensor]:
    """Random features and states; one instance is only padding, another has a single word."""
    torch.manual_seed(0)
    mask = torch.rand(BATCH, WORDS) < 0.7
    mask[1], mask[2] = False, torch.arange(WORDS) == 1
    features = TeacherFeatures(
        image=torch.randn(BATCH, OUT),
        text=torch.randn(BATCH, OUT),
        regions=torch.randn(BATCH, REGIONS, OUT),
        words=torch.randn(BATCH, WORDS, OUT),
        words_mask=mask,
        answers=torch.randn(BATCH, 3, OUT),
    )
    return features, torch.randn(BATCH, WORDS, WIDTH), torch.randn(BATCH, REGIONS, WIDTH), torch.arange(BATCH) % 3


def build() -> Taught:
    """The student in the initial state of every process."""
    torch.manual_seed(1)
    return Taught()


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    model = DistributedDataParallel(build())
    features, *others = batch()
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    local = TeacherFeatures(*(None if x is None else x[part] for x in features))
    model(local, *(x[part] for x in others)).backward()
    gradients = {name: x.grad.clone() for name, x in model.module.named_parameters() if x.grad is not None}
    save_file(gradients, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
