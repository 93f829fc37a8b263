"""The readers of VQA v2, SNLI-VE and VCR: values, left-out items, and faults that name the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipkernels.questions import annotation_files
from clipkernels.questions.annotation_files import find_images, read_json_lines
from clipkernels.questions.snli_ve import EntailmentPair, read_snli_ve
from clipkernels.questions.vcr import VCRQuestion, plain_text, read_vcr
from clipkernels.questions.vqa import VQAQuestion, read_vqa
from tests.questions.annotation_folders import (
    picture,
    snli_ve_pair,
    vcr_question,
    vqa_entry,
    write_lines,
    write_vqa,
)

TEN = ["net"] * 6 + ["a net", "goal", "nets", "mesh"]


def test_vqa_has_ten_answers_and_an_image_of_twelve_digits(tmp_path: Path) -> None:
    entries = [vqa_entry(458752000, "What is this?", TEN, image=458752), vqa_entry(7, "Is it?", ["yes"] * 10, "yes/no")]
    write_vqa(tmp_path, "train2014", entries)
    assert read_vqa(tmp_path, "train2014").items == (
        VQAQuestion(458752000, "COCO_train2014_000000458752.jpg", "What is this?", tuple(TEN), "What is", "other"),
        VQAQuestion(7, "COCO_train2014_000000000007.jpg", "Is it?", ("yes",) * 10, "Is it?", "yes/no"),
    )


def test_vqa_refuses_files_that_do_not_belong_together(tmp_path: Path) -> None:
    first, second = vqa_entry(1, "Is it?", ["yes"] * 10), vqa_entry(2, "Is it?", ["yes"] * 10)

    def fault(entries: list[tuple[Any, Any]]) -> str:
        write_vqa(tmp_path, "val2014", entries)
        with pytest.raises(ValueError) as caught:
            read_vqa(tmp_path, "val2014")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "without it" in fault([first, (second[0], {**second[1], "question_id": 3})])
    assert "with image 5" in fault([first, (second[0], {**second[1], "image_id": 5})])
    assert "2 entries of 1 question" in fault([first, first])
    nine = {**first[1], "answers": first[1]["answers"][:9]}
    assert "length >= 10" in fault([(first[0], nine)]) and "$.annotations[0].answers" in fault([(first[0], nine)])
    assert "missing required field `question`" in fault([({"image_id": 1, "question_id": 1}, first[1])])
    assert "without any" in fault([])
    write_vqa(tmp_path, "val2014", [first, second])
    file = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    file.write_text(json.dumps({"questions": [first[0]]}))
    with pytest.raises(ValueError, match="without question 2"):
        read_vqa(tmp_path, "val2014")
    with pytest.raises(FileNotFoundError, match="test2015"):
        read_vqa(tmp_path, "test2015")


@pytest.mark.parametrize("key", ["Flickr30K_ID", "Flikr30kID", "Flickr30kID"])
def test_snli_ve_leaves_out_pairs_without_a_gold_label(tmp_path: Path, key: str) -> None:
    lines = [
        snli_ve_pair(0, "36979", "A dog runs.", "entailment", key),
        snli_ve_pair(1, "36979", "A dog sits.", "-", key),
        snli_ve_pair(2, "36980", "A cat.", "contradiction", key),
    ]
    write_lines(tmp_path / "snli_ve_dev.jsonl", lines)
    annotations = read_snli_ve(tmp_path, "dev")
    assert annotations.items == (
        EntailmentPair("36979.jpg#0", "36979.jpg", "A dog runs.", 0),
        EntailmentPair("36980.jpg#2", "36980.jpg", "A cat.", 2),
    )
    assert annotations.notes == ("left out 1 pair without a gold label",)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"sentence2": "A", "gold_label": "maybe", "Flikr30kID": "1"}', "Invalid enum value 'maybe'"),
        ('{"sentence2": 3, "gold_label": "neutral", "Flikr30kID": "1"}', "Expected `str`, got `int`"),
        ('{"sentence2": "A", "gold_label": "neutral"}', "no Flickr30K_ID and no Flikr30kID"),
        ('{"sentence2": "A", "gold_label": "neutral", "Flikr30kID": "../1"}', "'../1.jpg': a path must be relative"),
        ('{"sentence2": "A"', "truncated"),
    ],
)
def test_a_faulty_line_is_named_with_its_number(tmp_path: Path, line: str, fault: str) -> None:
    good = snli_ve_pair(0, "1", "A dog.", "neutral")
    file = write_lines(tmp_path / "snli_ve_test.jsonl", [good, "", line])
    with pytest.raises(ValueError) as caught:
        read_snli_ve(tmp_path, "test")
    assert f"line 3 of {file}: " in str(caught.value) and fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_long_lines_marks_and_devices_are_handled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert list(read_json_lines(file, "lines", dict)) == [(1, {"a": 1}), (3, {"a": 2})]
    monkeypatch.setattr(annotation_files, "MAX_LINE_BYTES", 7)
    with pytest.raises(ValueError, match=r"line 1 of .* in one line"):
        list(read_json_lines(file, "lines", dict))
    with pytest.raises(ValueError, match="not a regular file"):
        list(read_json_lines("/dev/zero", "lines", dict))


def test_vcr_writes_references_as_objects_with_numbers(tmp_path: Path) -> None:
    write_lines(tmp_path / "val.jsonl", [vcr_question(0, "lsmdc_Film/1@0.jpg")])
    (question,) = read_vcr(tmp_path, "val").items
    assert question == VCRQuestion(
        "train-0", "lsmdc_Film/1@0.jpg", "Is person 2 happy?",
        ("Yes, person 2 is.", "No.", "person 1 and person 2 are sad", "It is car 3."), 1,
        ("He doesn't smile", "She's sad", "Why?", "a b"), 2, "lsmdc_Film", "lsmdc",
    )  # fmt: skip
    assert plain_text(["It", "'", "s", [0]], ["dog"]) == "It ' s dog 1"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"question": ["Is", [3], "?"]}, "a reference to object 3 of 3"),
        ({"question": ["Is", [-1], "?"]}, "a reference to object -1 of 3"),
        ({"answer_label": 4}, "Expected `int` <= 3"),
        ({"answer_choices": [["a"]] * 3}, "length >= 4"),
        ({"img_fn": "/etc/passwd"}, "a path must be relative"),
        ({"question": "Is it?"}, "Expected `array`, got `str`"),
    ],
)
def test_vcr_refuses_faulty_lines(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    file = write_lines(
        tmp_path / "train.jsonl", [vcr_question(0, "lsmdc_F/1.jpg"), vcr_question(1, "lsmdc_F/1.jpg", **changes)]
    )
    with pytest.raises(ValueError) as caught:
        read_vcr(tmp_path, "train")
    assert f"line 2 of {file}" in str(caught.value) and fault in str(caught.value)


@pytest.mark.parametrize("label", ["answer_label", "rationale_label"])
def test_a_test_split_of_vcr_without_labels_is_refused(tmp_path: Path, label: str) -> None:
    line = vcr_question(0, "lsmdc_F/1.jpg")
    del line[label]
    write_lines(tmp_path / "test.jsonl", [line])
    with pytest.raises(ValueError, match=rf"line 1 of .* without {label}; VCR's test split has no public labels: take"):
        read_vcr(tmp_path, "test")


def test_a_test_split_of_vqa_without_answers_is_refused(tmp_path: Path) -> None:
    write_vqa(tmp_path, "test2015", [vqa_entry(1, "Is it?", ["yes"] * 10)])
    (tmp_path / "v2_mscoco_test2015_annotations.json").unlink()
    with pytest.raises(ValueError, match="no such file; VQA's test splits have no public answers: take train2014 or"):
        read_vqa(tmp_path, "test2015")


def test_missing_images_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "flickr30k-images" / "1.jpg", (1, 2, 3))
    picture(tmp_path / "2.jpg", (1, 2, 3))
    names = ["1.jpg", "3.jpg", "2.jpg", "4.jpg", "3.jpg"]
    paths, note = find_images(names, tmp_path, ("", "flickr30k-images"), "dev")
    assert paths == {"1.jpg": str(tmp_path / "flickr30k-images" / "1.jpg"), "2.jpg": str(tmp_path / "2.jpg")}
    assert note == "2 of the 4 files of the dev split are missing, the first '3.jpg'"
    assert find_images(["2.jpg"], tmp_path, ("",), "dev") == ({"2.jpg": str(tmp_path / "2.jpg")}, None)
    with pytest.raises(ValueError, match=r"such as '9.jpg', in .*none of them: name their folder"):
        find_images(["9.jpg"], tmp_path, ("", "images"), "dev")
