"""Students: the small one that ships, the protocol of a user's, and one by import path."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from clipkernels.files import hash_of
from clipkernels.messages import first_line

WIDTH, LAYERS, HEADS, DROPOUT = 64, 2, 2, 0.1


class StudentTask(NamedTuple):
    """Everything that a student's shape depends on.

    answers: classes that it chooses among; 1 where it scores one text at a time.
    image_size: (S,S) height and width of the images.
    grid: rows and columns of the teacher's patches.
    vocabulary: number of token ids.
    length: T, tokens of a text, padding included.
    padding: the token id of padding.
    """

    answers: int
    image_size: tuple[int, int]
    grid: tuple[int, int]
    vocabulary: int
    length: int
    padding: int


class StudentOutput(NamedTuple):
    """A student's logits (B,K), pooled state (B,C), patches (B,P,C) and tokens (B,T,C)."""

    logits: Tensor
    pooled: Tensor
    visual: Tensor
    text: Tensor


class StudentModule(Protocol):
    """A student: a module that is made with a `StudentTask` alone, under a seeded generator.

    width: C, the width of its states.
    grid: rows and columns of its P patches, row by row.
    forward: a function of images (B,3,S,S) and the teacher's token ids (B,T) to a `StudentOutput`.

    A student with a tokenizer of its own has two methods more: `tokenize(texts)`, which returns ids (B,n) of one n, and
    `pieces(text)`, the pieces of a text in the order of the ids, for `align_words`.
    """

    width: int
    grid: tuple[int, int]

    def __call__(self, images: Tensor, tokens: Tensor) -> StudentOutput: ...


class Student(nn.Module):
    """A transformer over patches and tokens that answers from a token before them: 0.1 million weights and embeddings.

    Its patches have twice the side of the teacher's, as far as they fit.

    Args:
        task: the shape of the task.
    """

    def __init__(self, task: StudentTask) -> None:
        super().__init__()
        rows, columns = (max(1, count // 2) for count in task.grid)
        patch = (task.image_size[0] // rows, task.image_size[1] // columns)
        self.width, self.padding = WIDTH, task.padding
        self.grid = (task.image_size[0] // patch[0], task.image_size[1] // patch[1])
        self.patches = self.grid[0] * self.grid[1]
        self.embed = nn.Conv2d(3, WIDTH, patch, patch)
        self.tokens = nn.Embedding(task.vocabulary, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(1 + self.patches + task.length, WIDTH))
        self.first = nn.Parameter(0.02 * torch.randn(WIDTH))
        self.drop = nn.Dropout(DROPOUT)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.answer = nn.Linear(WIDTH, task.answers)

    def forward(self, images: Tensor, tokens: Tensor) -> StudentOutput:
        """The answer to a text (B,T) about each image (B,3,S,S)."""
        patches = self.embed(images).flatten(2).mT
        first = self.first.expand(len(images), 1, -1)
        x = torch.cat([first, patches, self.tokens(tokens)], 1) + self.places[: 1 + self.patches + tokens.shape[1]]
        place = torch.arange(tokens.shape[1], device=tokens.device)
        # A word may have the id of padding, so only the ids after the last other one are padding.
        length = torch.where(tokens != self.padding, place + 1, 0).amax(1, keepdim=True)
        x = self.blocks(self.drop(x), src_key_padding_mask=pad(place >= length, (1 + self.patches, 0)))
        visual, text = x[:, 1 : 1 + self.patches], x[:, 1 + self.patches :]
        return StudentOutput(self.answer(x[:, 0]), x[:, 0], visual, text)


def find_student(path: str | None) -> Callable[[StudentTask], Any]:
    """The class of an import path "module:Class"; `Student` for None. The working directory is searched too.

    Raises:
        ValueError: a path of another form, a module that cannot be imported, or no such class in it.
    """
    if path is None:
        return Student
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"expected a student as module:Class, got {path!r:.200}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(import_module(module), name, None)
    except (Exception, SystemExit) as error:  # a module may raise anything
        raise ValueError(f"expected a student that can be imported, got {path}: {first_line(error)}") from error
    if not callable(found):
        raise ValueError(f"expected a class in the module {module}, got none with the name {name!r}")
    student: Callable[[StudentTask], Any] = found
    return student


def make_student(student_class: Callable[[StudentTask], Any], task: StudentTask) -> Any:
    """A student for a task, which `check_student` accepts.

    Raises:
        ValueError: as of `check_student`, or a class that cannot be made with a `StudentTask` alone.
    """
    try:
        student = student_class(task)
    except (Exception, SystemExit) as error:  # a class may raise anything
        raise ValueError(
            f"expected a student that is made with a StudentTask alone, got {_raised(error)} from "
            f"{getattr(student_class, '__name__', student_class)}"
        ) from error
    check_student(student, task)
    return student


def check_student(student: Any, task: StudentTask) -> None:
    """Raise ValueError unless a student takes a batch of a task and returns states of the right shapes."""
    kind = type(student).__name__
    missing = [name for name in ("width", "grid", "state_dict") if not hasattr(student, name)]
    is_module = isinstance(student, nn.Module)  # a name, because mypy narrows Any to a module without width
    if missing or not is_module:
        actual = f"{kind} without {missing[0]}" if missing else f"{kind}, which is no torch.nn.Module"
        raise ValueError(f"expected a student that is a module with width and grid, got {actual}")
    sizes = (student.width, *student.grid) if isinstance(student.grid, (tuple, list)) else ()
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            f"expected {kind} to have an int width and a grid of two ints, got width {student.width!r:.80} and grid "
            f"{student.grid!r:.80}"
        )
    if hasattr(student, "tokenize") != hasattr(student, "pieces"):
        raise ValueError(f"expected {kind} to have tokenize and pieces, or none of them, got one")
    student.eval()
    try:
        tokens = student.tokenize(["a", "b"]) if hasattr(student, "tokenize") else torch.ones(2, task.length).long()
        output = student(torch.zeros(2, 3, *task.image_size), tokens)
    except Exception as error:  # a module may raise anything
        raise ValueError(f"expected {kind} to answer a batch of two texts, got {_raised(error)}") from error
    shapes = {
        "logits": (2, task.answers),
        "pooled": (2, student.width),
        "visual": (2, student.grid[0] * student.grid[1], student.width),
        "text": (2, tokens.shape[1], student.width),
    }
    for name, shape in shapes.items():
        value = getattr(output, name, None)
        actual = str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
        if actual != str(shape):
            raise ValueError(f"expected {kind}'s {name} to be {shape}, got {actual}")
    if not output.logits.requires_grad:
        raise ValueError(f"expected {kind}'s logits to depend on weights that are trained, got some without a gradient")


def source_of(student_class: Any) -> str:
    """The SHA-256 of the file of a student's class; "" for the student that ships, and for a class without a file."""
    file = getattr(sys.modules.get(getattr(student_class, "__module__", "")), "__file__", None)
    return "" if student_class is Student or file is None else hash_of(file)


def _raised(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
