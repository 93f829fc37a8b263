"""The tasks as choices among answers: labels, votes, VCR's two choices, and the candidates of a confidence."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipkernels.questions.examples import candidates_of, kinds_of, read_examples, score_examples, vqa_classes
from clipkernels.questions.vqa import read_vqa
from tests.questions.annotation_folders import picture, vcr_question, vqa_entry, write_lines, write_vqa


@pytest.fixture
def vqa_folder(tmp_path: Path) -> Path:
    """Six questions with answers of two types, of which one has an answer that is no class."""
    entries = [
        vqa_entry(1, "what?", ["red"] * 6 + ["The Red", "blue", "pink", "pink"]),
        vqa_entry(2, "what?", ["blue"] * 10),
        vqa_entry(3, "is it?", ["yes"] * 6 + ["no"] * 4, "yes/no"),
        vqa_entry(4, "is it?", ["no"] * 10, "yes/no"),
        vqa_entry(5, "how many?", ["two"] * 9 + ["3"], "number"),
        vqa_entry(6, "what?", ["pink"] * 4 + ["red"] * 4 + ["old", "new"]),
    ]
    write_vqa(tmp_path, "train2014", entries)
    for number in range(1, 7):
        picture(tmp_path / f"COCO_train2014_{number:012d}.jpg", (1, 2, 3))
    return tmp_path


def test_vqa_has_votes_for_its_classes_and_a_label(vqa_folder: Path) -> None:
    annotations = read_vqa(vqa_folder, "train2014")
    assert vqa_classes(annotations, 9) == ("2", "blue", "no", "pink", "red", "yes")
    classes = ("2", "blue", "no", "red", "yes")
    examples = read_examples("vqa", vqa_folder, vqa_folder, "train2014", classes)
    assert [example.label for example in examples.examples] == [3, 1, 4, 2, 0, -1]
    assert examples.examples[0].votes == {3: 7, 1: 1} and examples.examples[5].votes == {3: 4}
    assert examples.labels == [3, 1, 4, 2, 0, -1]
    # "red" agrees with four of ten, of whom any three make it right; the last one is scored, too.
    scores = score_examples(examples, [3, 1, 4, 2, 0, 3])
    assert scores["accuracy"] == pytest.approx(1.0) and scores["accuracy (number)"] == 1.0
    assert score_examples(examples, [1, 0, 2, 2, 0, 0])["accuracy"] == pytest.approx((0.3 + 0 + 1 + 1 + 1 + 0) / 6)


def test_candidates_are_of_one_type_as_far_as_there_are_enough(vqa_folder: Path) -> None:
    classes = vqa_classes(read_vqa(vqa_folder, "train2014"), 9)
    examples = read_examples("vqa", vqa_folder, vqa_folder, "train2014", classes)
    kinds = kinds_of(examples)
    assert kinds.members == {"number": [0], "other": [1, 3, 4], "yes/no": [2, 5]}
    for example in examples.examples:
        candidates, place = candidates_of(examples, example, kinds)
        assert candidates[place] == example.label and len(set(candidates)) == 4 and candidates == sorted(candidates)
        alike = set(kinds.members[kinds.kind_of[example.label]])
        assert alike <= set(candidates)
        assert candidates_of(examples, example, kinds) == (candidates, place)
    few = read_examples("vqa", vqa_folder, vqa_folder, "train2014", classes[:3])
    assert candidates_of(few, few.examples[1], kinds_of(few)) == ([0, 1, 2], 1)


def test_vcr_is_two_choices_and_the_second_knows_the_answer(tmp_path: Path) -> None:
    write_lines(tmp_path / "val.jsonl", [vcr_question(0, "lsmdc_Film/1.jpg")])
    picture(tmp_path / "vcr1images" / "lsmdc_Film" / "1.jpg", (1, 2, 3))
    examples = read_examples("vcr", tmp_path, tmp_path, "val")
    first, second = examples.examples
    assert (first.text, first.label, len(first.choices)) == ("Is person 2 happy?", 1, 4)
    assert (second.text, second.label, second.choices[2]) == ("Is person 2 happy? No.", 2, "Why?")
    assert first.item == second.item == 0 and examples.labels == [1]
    assert score_examples(examples, [1, 0]) == {"Q→A": 1.0, "QA→R": 0.0, "Q→AR": 0.0}
    assert candidates_of(examples, second, kinds_of(examples)) == ([0, 1, 2, 3], 2)
