"""Alignment of a student's tokens and patches with a teacher's."""

from fractions import Fraction

import pytest
import torch

from clipkernels.learn.distill import align_grid, align_words

CLIP = ["<start_of_text>", "a</w>", "photograph</w>", "of</w>", "hu", "skies</w>", "!</w>", "<end_of_text>"]


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        (["[CLS]", "A", "photo", "##graph", "of", "huskies", "!", "[SEP]", "[PAD]"], [-1, 1, 2, 2, 3, 5, 6, -1, -1]),
        (["<s>", "A", "Ġphoto", "graph", "Ġof", "Ġhusk", "ies", "!", "</s>"], [-1, 1, 2, 2, 3, 4, 5, 6, -1]),
        (["▁A", "▁photograph", "▁of", "▁", "hus", "kies", "!", "</s>"], [1, 2, 3, -1, 4, 5, 6, -1]),
        (["a photograph", "of huskies!"], [2, 5]),  # the piece that covers most
        (["[UNK]", "photograph", "of", "[UNK]", "!"], [-1, 2, 3, -1, 6]),
        ([], []),
    ],
)
def test_pieces_are_matched_by_their_characters(student, expected):
    assert align_words(student, CLIP) == expected


def test_ties_go_to_the_earlier_piece():
    assert align_words(["abcd"], ["", "ab", "cd"]) == [1]
    assert align_words(["xabcdy"], ["x", "abc", "dy", "z"]) == [1]
    assert align_words(["a", "a"], ["a", "a"]) == [0, 1]


def test_truncated_or_respelled_text_has_no_piece_and_shifts_no_other():
    assert align_words(["one", "two", "three"], ["one</w>", "tw"]) == [0, 1, -1]
    assert align_words(["one", "two"], ["", "<|startoftext|>"]) == [-1, -1]
    assert align_words(["the", "cafe", "closed"], ["the</w>", "cafÃ©</w>", "closed</w>"]) == [0, 1, 2]
    assert align_words(["the", "café", "closed"], ["the</w>", "cafÃ©</w>", "closed</w>"]) == [0, 1, 2]
    assert align_words(["STRASSE", "3"], ["straße</w>", "3</w>"]) == [0, 1]


def bytewise(text):
    """The characters that GPT-2's tokenizer writes for the bytes of a text, by its published table."""
    ranges = (range(33, 127), range(161, 173), range(174, 256))
    table = {byte: chr(byte) for some in ranges for byte in some}
    for byte in range(256):
        table.setdefault(byte, chr(256 + len(table) - 188))
    return "".join(table[byte] for byte in text.encode())


def test_bytes_are_decoded_to_characters():
    assert bytewise(" é\n") == "ĠÃ©Ċ"
    student = ["[CLS]", "две", "кош", "##ки", "и", "猫", "[SEP]"]
    teacher = ["", *(bytewise(word) + "</w>" for word in ("две", "кошки", "и", "猫")), ""]
    assert align_words(student, teacher) == [-1, 1, 2, 2, 3, 4, -1]
    roberta = ["<s>", bytewise("две"), bytewise(" ко"), bytewise("шки"), bytewise(" и"), bytewise(" 猫"), "</s>"]
    assert align_words(roberta, teacher) == [-1, 1, 2, 2, 3, 4, -1]
    assert align_words(student, roberta) == [-1, 1, 2, 3, 4, 5, -1]
    for byte in range(256):  # each byte by itself, next to others, if it is a character
        if byte < 128 and chr(byte).isprintable() and byte != 32:
            assert align_words([chr(byte) * 2], ["", bytewise(2 * chr(byte))]) == [1]


def test_a_character_with_split_bytes_belongs_to_each_piece():
    encoded, cut = bytewise("猫が"), [bytewise("猫が")[:2], bytewise("猫が")[2:4], bytewise("猫が")[4:]]
    assert align_words(["猫", "が"], cut) == [0, 1]
    assert align_words(cut, ["猫", "が"]) == [0, 0, 1]
    assert align_words(cut, ["", encoded + "</w>"]) == [1, 1, 1]
    assert align_words(["狗", "が"], cut) == [-1, 1]  # single equal bytes do not match
    assert align_words(["猫", "が"], [encoded[:5]]) == [0, -1]  # the teacher's text ends within a character


def test_accented_letters_are_not_decoded_as_bytes():
    assert align_words(["Straße", "für", "éé"], ["stra", "ße", "für", "éé"]) == [0, 2, 3]
    assert align_words(["für"], [bytewise("für")]) == align_words([bytewise("für")], ["für"]) == [0]


def test_marks_that_are_text_are_kept():
    assert align_words(["##", "a"], ["##</w>", "a</w>"]) == [0, 1]
    assert align_words(["<", "b", ">"], ["<</w>", "b</w>", "></w>"]) == [0, 1, 2]


def test_each_cell_maps_to_the_nearest_centre():
    for h in range(1, 8):
        for H in range(1, 17):
            expected = [
                min(range(H), key=lambda j: (abs(Fraction(2 * i + 1, 2 * h) - Fraction(2 * j + 1, 2 * H)), j))
                for i in range(h)
            ]
            assert align_grid((h, 1), (H, 1)).tolist() == align_grid((1, h), (1, H)).tolist() == expected
    index = align_grid((2, 3), (4, 5))
    assert index.dtype == torch.int64 and index.tolist() == [0, 2, 4, 10, 12, 14]
    assert align_grid((7, 7), (7, 7)).tolist() == list(range(49))
    with pytest.raises(ValueError, match="student's rows must be an int of at least 1, got 0"):
        align_grid((0, 3), (4, 5))
