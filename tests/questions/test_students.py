"""Students: the one that ships, a user's by import path with its own tokenizer, and refusals in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import clipkernels as ck
from clipkernels.learn.distill import Teacher
from clipkernels.questions.protocol import Protocol
from clipkernels.questions.student import Student, StudentTask, check_student, find_student, make_student
from tests.questions.test_protocol import FAST, folders, plan_of, run

__all__ = ["folders"]
pytestmark = pytest.mark.usefixtures("one_thread")
TASK = StudentTask(3, (32, 32), (8, 8), 259, 64, 0)

WORDS = '''
import sys

import torch
from torch import nn

from clipkernels.questions.student import StudentOutput


class Words(nn.Module):
    """A student that reads whole words."""

    width, grid = 16, (2, 2)

    def __init__(self, task):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, task.image_size[0] // 2, task.image_size[0] // 2)
        self.norm = nn.BatchNorm1d(16)
        self.words = nn.Embedding(50, 16)
        self.answer = nn.Linear(16, task.answers)

    def tokenize(self, texts):
        rows = [[sum(map(ord, word)) % 49 + 1 for word in text.split()] for text in texts]
        length = max(map(len, rows))
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])

    def pieces(self, text):
        return text.split()

    def forward(self, images, tokens):
        visual, text = self.embed(images).flatten(2).mT, self.words(tokens)
        pooled = self.norm(visual.mean(1) + text.mean(1))
        return StudentOutput(self.answer(pooled), pooled, visual, text)


class Narrow(Words):
    width = 8


class Broken(Words):
    def __init__(self, task):
        raise RuntimeError("no\\nweights")


class Leaving(Words):
    def __init__(self, task):
        sys.exit("bye")


class OfOneArgument(Words):
    def forward(self, images):
        return None


class OfLists(Words):
    def tokenize(self, texts):
        return [[1, 2]] * len(texts)


class OfOneSize(Words):
    grid = 4


class WithoutPieces(Words):
    pieces = property()


class Detached(Words):
    def forward(self, images, tokens):
        return StudentOutput(*(state.detach() for state in super().forward(images, tokens)))


class OfTuples(Words):
    def forward(self, images, tokens):
        return tuple(super().forward(images, tokens))


class NoModule:
    width, grid = 16, (2, 2)

    def __init__(self, task):
        self.state_dict = dict
'''


def test_the_student_ignores_padding_and_gives_states_of_its_shapes() -> None:
    torch.manual_seed(0)
    student = Student(TASK).eval()
    check_student(student, TASK)
    assert student.grid == (4, 4) and student.width == 64
    images = torch.randn(2, 3, 32, 32)
    tokens = torch.tensor([[5, 0, 7, 0], [5, 6, 0, 0]])
    longer = torch.cat([tokens, torch.zeros(2, 9, dtype=torch.int64)], 1)
    short, long = student(images, tokens), student(images, longer)
    assert torch.allclose(short.logits, long.logits, atol=1e-5)
    inner = tokens.clone()
    inner[0, 1] = 9  # an id of padding between two others is a word
    assert not torch.allclose(student(images, inner).logits[0], short.logits[0], atol=1e-4)


def test_a_grid_that_does_not_divide_the_image_keeps_its_patches() -> None:
    for size, grid in ((224, (7, 7)), (224, (16, 16)), (30, (7, 7)), (224, (1, 1))):
        task = TASK._replace(image_size=(size, size), grid=grid)
        check_student(Student(task), task)


def test_a_student_by_import_path_reads_its_own_words(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_student.py").write_text(WORDS)
    monkeypatch.syspath_prepend(tmp_path)
    plan = plan_of(folders["vcr"], "vcr", ("none", "targeted"), (1.0,))
    options = FAST._replace(student="users_student:Words")
    protocol = Protocol(plan, *ck.bundled(), options, lambda progress: False)
    assert (protocol.width, protocol.grid) == (16, (2, 2))
    with pytest.raises(ValueError, match="a tokenizer with convert_ids_to_tokens or a decoder"):
        run(plan, tmp_path / "out", options)
    # The bundled tokenizer of bytes has no pieces; here each letter is one, between the start and the end.
    monkeypatch.setattr(Teacher, "pieces", lambda self, text: ["", *text.lower(), ""])
    tokens = protocol.tokens._replace(pieces=protocol.teacher.pieces)
    assert tokens.ids(["is it red?", "is"]).shape == (2, 3)
    assert tokens.words(["is it red?", "is"], 3).tolist() == [[1, 4, 7], [1, -1, -1]]
    results = run(plan, tmp_path / "out", options)
    assert [row.method for row in results.rows[::3]] == ["none", "targeted"]


def test_a_student_whose_file_has_changed_is_another_one(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "changing_student.py"
    file.write_text(WORDS)
    monkeypatch.syspath_prepend(tmp_path)
    plan, options = plan_of(folders["vcr"], "vcr", ("none",), (1.0,)), FAST._replace(student="changing_student:Words")
    run(plan, tmp_path / "out", options)
    file.write_text(WORDS.replace("visual.mean(1)", "visual.amax(1)"))
    with pytest.raises(ValueError, match="got one with another student source: repeat it as it was, or choose"):
        run(plan, tmp_path / "out", options)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("users_student", "expected a student as module:Class, got 'users_student'"),
        ("no_such_module:Student", "No module named 'no_such_module'"),
        ("math:Student", "expected a class in the module math, got none with the name 'Student'"),
    ],
)
def test_a_student_that_is_not_there_is_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        find_student(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Narrow", "expected Narrow's pooled to be (2, 8), got (2, 16)"),
        ("Broken", "is made with a StudentTask alone, got RuntimeError: no weights from Broken"),
        ("Leaving", "is made with a StudentTask alone, got SystemExit: bye from Leaving"),
        ("OfOneArgument", "expected OfOneArgument to answer a batch of two texts, got TypeError: "),
        ("OfLists", "expected OfLists to answer a batch of two texts, got TypeError: "),
        ("OfOneSize", "expected OfOneSize to have an int width and a grid of two ints, got width 16 and grid 4"),
        ("WithoutPieces", "expected WithoutPieces to have tokenize and pieces, or none of them, got one"),
        ("Detached", "expected Detached's logits to depend on weights that are trained"),
        ("OfTuples", "expected OfTuples's logits to be (2, 3), got NoneType"),
        ("NoModule", "with width and grid, got NoModule, which is no torch.nn.Module"),
    ],
)
def test_a_student_that_does_not_work_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    (tmp_path / "other_student.py").write_text(WORDS)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as caught:
        make_student(find_student(f"other_student:{name}"), TASK)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_student_without_width_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a student that is a module with width and grid, got Linear without"):
        check_student(torch.nn.Linear(2, 2), TASK)
