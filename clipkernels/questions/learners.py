"""Models that are trained on examples: a student, with or without distillation, and CLIP itself with a head."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, pad

from clipkernels.adapters.text import find_text_tower
from clipkernels.encode import encode_image
from clipkernels.learn.distill import TargetedDistillation
from clipkernels.questions.batches import Batch
from clipkernels.questions.student import StudentOutput

Tuned = Literal["linear", "mlp", "full"]


class StudentLearner(nn.Module):
    """A student, and the objective that pulls its states toward the teacher's; None for no distillation.

    Of an example with choices, the states of the text with the right choice are distilled [ours].
    """

    needs_texts = False

    def __init__(self, student: Any, objective: TargetedDistillation | None = None) -> None:
        super().__init__()
        self.student, self.objective = student, objective

    @property
    def needs_features(self) -> bool:
        """True if the loss needs the teacher's features."""
        return self.objective is not None

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B,a)."""
        return self._answer(batch)[0]

    def loss(self, batch: Batch) -> tuple[Tensor, float | None]:
        """The mean loss, and the mean weight of the distances; None without distillation."""
        logits, output = self._answer(batch)
        loss = cross_entropy(logits, batch.targets)
        if self.objective is None:
            return loss, None
        choices = batch.tokens.shape[1]
        rows = torch.arange(len(logits), device=logits.device) * choices
        if choices > 1:
            rows = rows + batch.labels
        pooled = output.pooled[rows]
        distilled = self.objective(
            batch.features, text=output.text[rows], text_pooled=pooled, visual=output.visual[rows],
            visual_pooled=pooled, logits=logits.gather(1, batch.candidates), labels=batch.right,
        )  # fmt: skip
        return loss + distilled.loss, float(distilled.weight.mean())

    def _answer(self, batch: Batch) -> tuple[Tensor, StudentOutput]:
        choices = batch.tokens.shape[1]
        images = batch.images if choices == 1 else batch.images.repeat_interleave(choices, 0)
        output = self.student(images, batch.tokens.flatten(0, 1))
        return output.logits if choices == 1 else output.logits.view(-1, choices), output


class ClipLearner(nn.Module):
    """CLIP with a head on the directions of image and text and their product; the baseline of fine-tuning.

    Args:
        model: a CLIP; it is copied if it is trained.
        width: E of its embeddings.
        answers: classes; 1 for a score of each choice.
        tuned: "linear" or "mlp" trains a head on frozen features, "full" a linear head and the model.
        length, padding: tokens that the text tower reads, and the id that fills a shorter text.
    """

    needs_features = False

    def __init__(
        self, model: nn.Module, width: int, answers: int, tuned: Tuned, length: int = 0, padding: int = 0
    ) -> None:
        super().__init__()
        self.length, self.padding = length, padding
        self.model = copy.deepcopy(model).requires_grad_(True).eval() if tuned == "full" else None
        self.head: nn.Module = nn.Linear(3 * width, answers)
        if tuned == "mlp":
            self.head = nn.Sequential(nn.Linear(3 * width, width), nn.GELU(), nn.Linear(width, answers))

    @property
    def needs_texts(self) -> bool:
        """True if the logits need the teacher's embeddings."""
        return self.model is None

    def train(self, mode: bool = True) -> ClipLearner:
        """Set the mode of the head; CLIP stays in eval mode."""
        self.training = mode
        self.head.train(mode)
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B,a)."""
        count, choices = batch.tokens.shape[:2]
        if self.model is None:
            assert batch.features.image is not None and batch.texts is not None
            image, text = batch.features.image, batch.texts
        else:
            image = encode_image(self.model, batch.images).embedding
            tokens = batch.tokens.flatten(0, 1)
            tokens = pad(tokens, (0, max(0, self.length - tokens.shape[1])), value=self.padding)
            text = find_text_tower(self.model).host(tokens).view(count, choices, -1)
        image, text = normalize(image, dim=1)[:, None].expand_as(text), normalize(text, dim=2)
        logits: Tensor = self.head(torch.cat([image, text, image * text], 2))
        return logits[:, 0] if choices == 1 else logits[..., 0]

    def loss(self, batch: Batch) -> tuple[Tensor, None]:
        """The mean loss, and None."""
        return cross_entropy(self(batch), batch.targets), None


Learner = StudentLearner | ClipLearner
