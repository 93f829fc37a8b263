"""A student's tokens and patches beside a teacher's."""

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
def test_pieces_are_matched_by_the_characters_they_cover(student, expected):
    assert align_words(student, CLIP) == expected


def test_ties_go_to_the_earlier_piece():
    assert align_words(["abcd"], ["", "ab", "cd"]) == [1]
    assert align_words(["xabcdy"], ["x", "abc", "dy", "z"]) == [1]
    assert align_words(["a", "a"], ["a", "a"]) == [0, 1]


def test_what_a_teacher_cut_off_or_spells_otherwise_has_no_piece_and_moves_no_other():
    assert align_words(["one", "two", "three"], ["one</w>", "tw"]) == [0, 1, -1]
    assert align_words(["one", "two"], ["", "<|startoftext|>"]) == [-1, -1]
    assert align_words(["the", "cafe", "closed"], ["the</w>", "cafÃ©</w>", "closed</w>"]) == [0, 1, 2]
    assert align_words(["STRASSE", "3"], ["straße</w>", "3</w>"]) == [0, 1]


def test_marks_that_are_text_stay_text():
    assert align_words(["##", "a"], ["##</w>", "a</w>"]) == [0, 1]
    assert align_words(["<", "b", ">"], ["<</w>", "b</w>", "></w>"]) == [0, 1, 2]


def test_each_cell_of_a_grid_has_the_one_whose_centre_is_nearest():
    for h in range(1, 8):
        for H in range(1, 17):
            expected = [
                min(range(H), key=lambda j: (abs(Fraction(2 * i + 1, 2 * h) - Fraction(2 * j + 1, 2 * H)), j))
                for i in range(h)
            ]
            assert align_grid((h, 1), (H, 1)).tolist() == align_grid((1, h), (1, H)).tolist() == expected
    came = align_grid((2, 3), (4, 5))
    assert came.dtype == torch.int64 and came.tolist() == [0, 2, 4, 10, 12, 14]
    assert align_grid((7, 7), (7, 7)).tolist() == list(range(49))
    with pytest.raises(ValueError, match=r"at least one patch, got \(0, 3\) and \(4, 5\)"):
        align_grid((0, 3), (4, 5))
