"""State files on the command line: an altered one is one line that names it, with exit status 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.cli.commands import error, run, succeed
from tests.mutants import read, write
from tests.state_kinds import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")

# Per kind: the command, in which FILE is the file, SET its folder, GOOD a good predictor and OUT a new file; a field of
# the header; and a tensor that must be finite or in a range.
CLASSIFY = ("classify", "IMAGES", "--classes", "a,b,c")
COMMANDS: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    "reservoir": ((*CLASSIFY, "--adapt", "tca", "--reservoir", "FILE"), "seen", "unit"),
    "TDA": ((*CLASSIFY, "--adapt", "tda", "--reservoir", "FILE"), "threshold", "negative.keys"),
    "predictor": ((*CLASSIFY, "--method", "patch-ranking", "--predictor", "FILE"), "prefix", "token_in.weight"),
    "learnt tokens": (
        (*CLASSIFY, "--method", "patch-ranking", "--predictor", "GOOD", "--tokens", "FILE"),
        "count",
        "context",
    ),
    "rankings": (("train-predictor", "FILE", "--output", "OUT"), "block", "features"),
    "features": (("support", "build", "OUT", "--from-embeddings", "FILE", "--classes", "a"), "encoder", "features"),
    "manifest": ((*CLASSIFY, "--head", "tip", "--support", "SET"), "classes", None),
    "support features": ((*CLASSIFY, "--head", "tip", "--support", "SET"), "encoder", "features"),
}


def flipped(file: Path, field: str, tensor: str | None) -> None:
    data = bytearray(file.read_bytes())
    data[-8] ^= 16
    file.write_bytes(data)


def cut(file: Path, field: str, tensor: str | None) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def older(file: Path, field: str, tensor: str | None) -> None:
    header, tensors = read(file)
    write(file, {**header, "format": f"{header['format'].rpartition('.')[0]}.0"}, tensors)


def lacking(file: Path, field: str, tensor: str | None) -> None:
    header, tensors = read(file)
    write(file, {name: value for name, value in header.items() if name != field}, tensors)


def poisoned(file: Path, field: str, tensor: str | None) -> None:
    header, tensors = read(file)
    if tensor is None:
        header["classes"][0]["folder"] = "../elsewhere"
    else:
        tensors[tensor] = torch.full_like(tensors[tensor], float("nan"))
    write(file, header, tensors)


@pytest.mark.parametrize("change", [flipped, cut, older, lacking, poisoned])
@pytest.mark.parametrize("name", COMMANDS)
def test_an_altered_file_is_one_line_and_exit_two(
    name: str, change: Callable[[Path, str, str | None], None], tmp_path: Path
) -> None:
    if name == "features":
        pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "good").mkdir()
    kind, good = KINDS[name](tmp_path), KINDS["predictor"](tmp_path / "good")
    command, field, tensor = COMMANDS[name]
    change(kind.file, field, tensor)
    before = kind.file.read_bytes()
    places = {"FILE": kind.file, "SET": kind.file.parent, "GOOD": good.file, "OUT": tmp_path / "out"}
    places["IMAGES"] = tmp_path / "images"
    line = error(run(*(places.get(word, word) for word in command)))
    assert line.startswith("error: expected") and str(kind.file) in line
    assert kind.file.read_bytes() == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [flipped, lacking, poisoned])
def test_rank_leaves_an_altered_file_of_rankings_unchanged(
    change: Callable[[Path, str, str | None], None], tmp_path: Path
) -> None:
    kind = KINDS["rankings"](tmp_path)
    change(kind.file, "block", "features")
    before = kind.file.read_bytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert str(kind.file) in error(run("rank", tmp_path, "--score", "feature", "--output", kind.file))
    assert kind.file.read_bytes() == before


# Reading this file fails with an error that names no file.
UNREADABLE = Path("/proc/self/mem")


@pytest.mark.skipif(not UNREADABLE.exists(), reason="this system has no /proc/self/mem")
@pytest.mark.parametrize(
    "command",
    [
        (*CLASSIFY, "--adapt", "tca", "--frozen", "--reservoir", UNREADABLE),
        (*CLASSIFY, "--adapt", "tda", "--frozen", "--reservoir", UNREADABLE),
        (*CLASSIFY, "--method", "patch-ranking", "--predictor", UNREADABLE),
        ("bench", "IMAGES", "--method", "patch-ranking", "--predictor", UNREADABLE),
        ("train-predictor", UNREADABLE, "--output", "OUT"),
        ("support", "build", "OUT", "--from-embeddings", UNREADABLE, "--classes", "a"),
        (*CLASSIFY, "--head", "tip", "--support", "SET"),
        ("support", "build", "SET"),
    ],
    ids=lambda command: " ".join(map(str, command)),
)
def test_a_file_that_cannot_be_read_is_one_line_that_names_it(command: tuple[object, ...], tmp_path: Path) -> None:
    if "support" in command:
        pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.json").symlink_to(UNREADABLE)
    places = {"IMAGES": tmp_path / "images", "OUT": tmp_path / "out", "SET": tmp_path / "set"}
    line = error(run(*(places.get(str(word), word) for word in command)))
    file = tmp_path / "set" / "manifest.json" if "SET" in command else UNREADABLE
    assert line.endswith(f"got {file}: Input/output error") and not (tmp_path / "out").exists()


def test_warnings_of_pillow_do_not_reach_stderr(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05")
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        Image.open(tmp_path / "a.jpg").getexif().get(274)
    result = succeed("classify", tmp_path / "a.jpg", "--classes", "a,b")
    assert len(result.stderr.splitlines()) == 1 and "EXIF" not in result.stderr
