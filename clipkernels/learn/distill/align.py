"""Which of a teacher's tokens stands for each of a student's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from torch import Tensor

SPECIAL = re.compile(r"\[[A-Z]+\d*\]|<[^<>\s]+>")
PRINTABLE_BYTES = [byte for byte in range(256) if chr(byte).isprintable() and not chr(byte).isspace()]
OTHER_BYTES = [byte for byte in range(256) if byte not in PRINTABLE_BYTES]
BYTE_OF_CHARACTER = {chr(byte): byte for byte in PRINTABLE_BYTES} | {
    chr(256 + place): byte for place, byte in enumerate(OTHER_BYTES)
}
"""What byte-level BPE writes for each byte: printable Latin-1 for itself, the others from U+0100 on."""


def align_words(student_pieces: Sequence[str], teacher_pieces: Sequence[str]) -> list[int]:
    """For each piece of a student's tokenizer the teacher's piece of the same text that covers most of it.

    Pieces are compared by their characters, without case, space and the marks of WordPiece ("##"), SentencePiece ("▁")
    and CLIP ("</w>"). Byte-level BPE, GPT-2's and CLIP's, is decoded; a character whose bytes are cut apart belongs to
    each piece that has some of them. Where the two differ, as where one drops accents or cuts the text, the rest is
    matched in order.

    Args:
        student_pieces: n strings, in the order of the text.
        teacher_pieces: likewise, such as `Teacher.pieces` gives; "" for what is no word.
    Returns:
        n indices of the teacher's pieces, ties to the earlier; -1 for specials such as "[CLS]" and "<s>", and for what
        no piece of the teacher covers.
    """
    (own, owners), (other, holders) = _characters_of(student_pieces), _characters_of(teacher_pieces)
    covers: list[Counter[int]] = [Counter() for _ in student_pieces]
    for start, at, size in SequenceMatcher(None, own, other, autojunk=False).get_matching_blocks():
        for offset in range(size):
            for owner in owners[start + offset]:
                covers[owner].update(holders[at + offset])
    # The first of the largest counts is the earlier piece: characters come in the order of the text.
    return [max(cover, key=lambda piece: cover[piece]) if cover else -1 for cover in covers]


def align_grid(student: tuple[int, int], teacher: tuple[int, int]) -> Tensor:
    """For each of a student's h·w patches, row by row, the teacher's patch whose centre is nearest; (h·w,) int64.

    Args:
        student: h and w, rows and columns.
        teacher: H and W, of the same image.
    Raises:
        ValueError: a grid without patches.
    Guarantees: ties to the upper and to the left.
    """
    if min(*student, *teacher) < 1:
        raise ValueError(f"expected grids of at least one patch, got {student} and {teacher}")
    rows, columns = (
        torch.tensor([-((2 * n - (2 * i + 1) * N) // (2 * n)) for i in range(n)])
        for n, N in zip(student, teacher, strict=True)
    )
    return (rows[:, None] * teacher[1] + columns).flatten()


def rows_or_zeros(x: Tensor, index: Tensor) -> Tensor:
    """The rows (B,n,E) of x (B,N,E) at index (B,n), zeros where that is negative."""
    x = x if x.shape[1] else x.new_zeros(len(x), 1, x.shape[2])
    found = x.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
    return found.masked_fill((index < 0)[..., None], 0)


def align_rows(name: str, x: Tensor | None, mask: Tensor | None, index: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of x (B,N,E) at index (B,n) or (n,), and which of them are there.

    Raises:
        ValueError: no features, or an index of another shape or dtype or out of range.
    """
    if x is None:
        raise ValueError(f"expected features with {name}, got none")
    batch, count, _ = x.shape
    if index.dtype != torch.int64 or index.ndim not in (1, 2) or (index.ndim == 2 and len(index) != batch):
        raise ValueError(f"{name} must be ({batch},n) or (n,) int64, got {tuple(index.shape)} {index.dtype}")
    if index.numel() and not -1 <= int(index.min()) <= int(index.max()) < count:
        raise ValueError(f"{name} must be from -1 to {count - 1}, got {int(index.min())} to {int(index.max())}")
    index = index.to(x.device).expand(batch, -1)
    there = index >= 0
    rows = rows_or_zeros(x, index)
    return rows, there if mask is None else rows_or_zeros(mask[..., None], index)[..., 0]


def _characters_of(pieces: Sequence[str]) -> tuple[str, list[list[int]]]:
    """The characters of all pieces, and the pieces that each belongs to."""
    written: list[tuple[str, int | None, int]] = []  # a character, the byte that it may stand for, its piece
    for index, piece in enumerate(pieces):
        piece = piece.removesuffix("</w>")
        if SPECIAL.fullmatch(piece):
            continue
        piece = piece.removeprefix("##") if len(piece) > 2 else piece
        bytewise = all(character in BYTE_OF_CHARACTER for character in piece)
        written += [(character, BYTE_OF_CHARACTER[character] if bytewise else None, index) for character in piece]
    spelled, owners, place = "", [], 0
    while place < len(written):
        character, size = _decode_first([byte for _, byte, _ in written[place : place + 4]])
        if not size:  # no byte, or no whole character: plain text, such as a WordPiece with an accent
            character, size = written[place][0], 1
        plain = "".join(character.replace("Ġ", "").replace("▁", "").casefold().split())
        spelled += plain
        owners += [sorted({piece for _, _, piece in written[place : place + size]})] * len(plain)
        place += size
    return spelled, owners


def _decode_first(codes: Sequence[int | None]) -> tuple[str, int]:
    """The character that up to four bytes begin with in UTF-8, and how many of them are its own; none, and 0, where
    they begin with none."""
    for size in range(1, len(codes) + 1):
        head = [code for code in codes[:size] if code is not None]
        if len(head) < size:
            break
        try:
            return bytes(head).decode(), size
        except UnicodeDecodeError:
            continue
    return "", 0
