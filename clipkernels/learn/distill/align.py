"""Alignment of tokens: the teacher's word or patch that corresponds to each of the student's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from torch import Tensor

from clipkernels.arguments import check_int, check_tensors, describe, is_list

SPECIAL = re.compile(r"\[[A-Z]+\d*\]|<[^<>\s]+>")
PRINTABLE_BYTES = [byte for byte in range(256) if chr(byte).isprintable() and not chr(byte).isspace()]
OTHER_BYTES = [byte for byte in range(256) if byte not in PRINTABLE_BYTES]
BYTE_OF_CHARACTER = {chr(byte): byte for byte in PRINTABLE_BYTES} | {
    chr(256 + place): byte for place, byte in enumerate(OTHER_BYTES)
}
"""The byte of each character of byte-level BPE: printable Latin-1 stands for itself, the others start at U+0100."""


def align_words(student_pieces: Sequence[str], teacher_pieces: Sequence[str]) -> list[int]:
    """For each piece of the student's tokenizer, the index of the teacher's piece that covers most of its characters.

    Pieces are compared by their characters, without case, spaces and the marks of WordPiece ("##"), SentencePiece ("▁")
    and CLIP ("</w>"). Byte-level BPE (GPT-2's and CLIP's) is decoded; a character whose bytes are split belongs to each
    piece that holds one of its bytes. If the two texts differ, for example because one tokenizer drops accents or
    truncates, the remaining characters are matched in order.

    Args:
        student_pieces: n strings, in the order of the text.
        teacher_pieces: strings in the order of the text, such as those of `Teacher.pieces`; "" for tokens that are no
            words.
    Returns:
        n indices of the teacher's pieces, ties to the earlier one; -1 for specials such as "[CLS]" and "<s>", and for
        pieces that no piece of the teacher covers.
    Raises:
        TypeError: pieces that are not a list of strings.
    """
    for name, pieces in (("student_pieces", student_pieces), ("teacher_pieces", teacher_pieces)):
        if not is_list(pieces) or not all(isinstance(piece, str) for piece in pieces):
            raise TypeError(f"{name} must be a list of strings, got {describe(pieces)}")
    student_text, student_owners = _characters_of(student_pieces)
    teacher_text, teacher_owners = _characters_of(teacher_pieces)
    overlaps: list[Counter[int]] = [Counter() for _ in student_pieces]
    matcher = SequenceMatcher(None, student_text, teacher_text, autojunk=False)
    for student_start, teacher_start, size in matcher.get_matching_blocks():
        for offset in range(size):
            for owner in student_owners[student_start + offset]:
                overlaps[owner].update(teacher_owners[teacher_start + offset])
    # max returns the first of equal counts, which is the earlier piece because characters are in text order.
    return [max(overlap, key=lambda piece: overlap[piece]) if overlap else -1 for overlap in overlaps]


def align_grid(student: tuple[int, int], teacher: tuple[int, int]) -> Tensor:
    """For each of the student's h·w patches, row by row, the teacher's patch with the nearest centre; (h·w,) int64.

    Args:
        student: h and w, rows and columns.
        teacher: H and W, rows and columns for the same image.
    Raises:
        ValueError: a grid without patches.
    Guarantees: ties go to the upper and to the left patch.
    """
    for name, grid in (("student", student), ("teacher", teacher)):
        if not is_list(grid) or len(grid) != 2:
            raise ValueError(f"{name} must be a grid (rows, columns), got {describe(grid)}")
        check_int(f"{name}'s rows", grid[0], 1)
        check_int(f"{name}'s columns", grid[1], 1)
    rows, columns = (
        torch.tensor([-((2 * n - (2 * i + 1) * N) // (2 * n)) for i in range(n)])
        for n, N in zip(student, teacher, strict=True)
    )
    return (rows[:, None] * teacher[1] + columns).flatten()


def rows_or_zeros(x: Tensor, index: Tensor) -> Tensor:
    """The rows (B,n,E) of x (B,N,E) at index (B,n), zeros where the index is negative."""
    x = x if x.shape[1] else x.new_zeros(len(x), 1, x.shape[2])
    rows = x.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
    return rows.masked_fill((index < 0)[..., None], 0)


def align_rows(name: str, x: Tensor | None, mask: Tensor | None, index: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (B,n,E) of x (B,N,E) at index (B,n) or (n,), and a mask (B,n), False for missing rows.

    Raises:
        TypeError: an index that is no tensor.
        ValueError: no features, or an index of another shape or dtype or out of range.
    """
    if x is None:
        raise ValueError(f"expected features with {name}, got none")
    check_tensors(**{name: index})
    batch, count, _ = x.shape
    if index.dtype != torch.int64 or index.ndim not in (1, 2) or (index.ndim == 2 and len(index) != batch):
        raise ValueError(f"{name} must be ({batch},n) or (n,) int64, got {tuple(index.shape)} {index.dtype}")
    if index.numel() and not -1 <= int(index.min()) <= int(index.max()) < count:
        raise ValueError(f"{name} must be from -1 to {count - 1}, got {int(index.min())} to {int(index.max())}")
    index = index.to(x.device).expand(batch, -1)
    is_aligned = index >= 0
    rows = rows_or_zeros(x, index)
    return rows, is_aligned if mask is None else rows_or_zeros(mask[..., None], index)[..., 0]


def _characters_of(pieces: Sequence[str]) -> tuple[str, list[list[int]]]:
    """The normalised characters of all pieces, and for each character the pieces that it belongs to."""
    characters: list[tuple[str, int | None, int]] = []  # a character, the byte that it may stand for, its piece
    for index, piece in enumerate(pieces):
        piece = piece.removesuffix("</w>")
        if SPECIAL.fullmatch(piece):
            continue
        piece = piece.removeprefix("##") if len(piece) > 2 else piece
        bytewise = all(character in BYTE_OF_CHARACTER for character in piece)
        characters += [(character, BYTE_OF_CHARACTER[character] if bytewise else None, index) for character in piece]
    text, owners, place = "", [], 0
    while place < len(characters):
        character, size = _decode_first([byte for _, byte, _ in characters[place : place + 4]])
        if not size:  # the bytes form no whole character: plain text, such as a WordPiece with an accent
            character, size = characters[place][0], 1
        normalized = "".join(character.replace("Ġ", "").replace("▁", "").casefold().split())
        text += normalized
        owners += [sorted({piece for _, _, piece in characters[place : place + size]})] * len(normalized)
        place += size
    return text, owners


def _decode_first(codes: Sequence[int | None]) -> tuple[str, int]:
    """The UTF-8 character that up to four bytes begin with, and its length in bytes; "" and 0 if there is none."""
    for size in range(1, len(codes) + 1):
        prefix = [code for code in codes[:size] if code is not None]
        if len(prefix) < size:
            break
        try:
            return bytes(prefix).decode(), size
        except UnicodeDecodeError:
            continue
    return "", 0
