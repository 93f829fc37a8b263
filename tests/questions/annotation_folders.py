"""Tiny made-up annotation files of the three tasks, in their own layouts, with images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
SPLITS = {"vqa": ("train2014", "val2014"), "snli-ve": ("train", "test"), "vcr": ("train", "val")}


def picture(path: Path, colour: tuple[int, int, int], number: int = 0) -> None:
    """Write an image of one colour with a mark by number, so that no two are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (32, 32), colour)
    image.putpixel((number % 32, number // 32), (255, 255, 255))
    image.save(path, quality=95)


def write_lines(path: Path, lines: Sequence[Mapping[str, Any] | str]) -> Path:
    """Write JSON Lines, of objects or of lines as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def vqa_entry(number: int, text: str, answers: Sequence[str], kind: str = "other", image: int = 0) -> tuple[Any, Any]:
    """A question and its annotation."""
    question = {"image_id": image or number, "question": text, "question_id": number}
    annotation = {
        "question_type": " ".join(text.split()[:2]), "answer_type": kind, "image_id": image or number,
        "question_id": number, "multiple_choice_answer": answers[0],
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": 1 + i} for i, a in enumerate(answers)],
    }  # fmt: skip
    return question, annotation


def write_vqa(folder: Path, split: str, entries: Sequence[tuple[Any, Any]]) -> None:
    """Write both files of VQA v2."""
    folder.mkdir(parents=True, exist_ok=True)
    info = {"data_type": "mscoco", "data_subtype": split}
    questions = {**info, "task_type": "Open-Ended", "questions": [question for question, _ in entries]}
    annotations = {**info, "annotations": [annotation for _, annotation in entries]}
    (folder / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps(questions))
    (folder / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps(annotations))


def snli_ve_pair(number: int, image: str, text: str, label: str, key: str = "Flickr30K_ID") -> dict[str, Any]:
    """A pair of SNLI-VE, with fields that are not read."""
    return {"pairID": f"{image}.jpg#{number}", key: image, "sentence1": "A caption.", "sentence2": text,
            "gold_label": label, "annotator_labels": [label]}  # fmt: skip


def vcr_question(number: int, image: str, **changes: Any) -> dict[str, Any]:
    """A question of VCR, with fields that are not read."""
    line = {
        "movie": image.split("/")[0], "img_fn": image, "metadata_fn": image.replace(".jpg", ".json"),
        "objects": ["person", "person", "car"], "annot_id": f"train-{number}", "answer_likelihood": "likely",
        "question": ["Is", [1], "happy", "?"],
        "answer_choices": [["Yes", ",", [1], "is", "."], ["No", "."], [[0, 1], "are", "sad"], ["It", "is", [2], "."]],
        "answer_label": 1,
        "rationale_choices": [["He", "does", "n't", "smile"], ["She", "'s", "sad"], ["Why", "?"], ["a", "b"]],
        "rationale_label": 2,
    }  # fmt: skip
    return {**line, **changes}


def write_colours(folder: Path, task: str, count: int) -> None:
    """Write a whole task whose answers are the colours of its images: annotations, and images in `images`.

    Its splits are those that `clipkernels distill` takes by default, with `count` items to train on and as many others.
    """
    names = list(COLOURS)
    for split_number, split in enumerate(SPLITS[task]):
        entries: list[Any] = []
        for index in range(count):
            colour, number = names[index % 3], 1 + index + split_number * count
            if task == "vqa":
                image = f"COCO_{split}_{number:012d}.jpg"
                kind = "yes/no" if index % 2 else "other"
                if kind == "other":
                    text, answers = "what color is it?", [colour] * 7 + [names[(index + 1) % 3]] * 3
                else:
                    text, answers = f"is it {colour}?", ["yes"] * 9 + ["no"]
                entries.append(vqa_entry(number, text, answers, kind))
            elif task == "snli-ve":
                image = f"{number}.jpg"
                label = ("entailment", "neutral", "contradiction")[index % 3]
                text = ("It is {}.", "It is wet.", "It is not {}.")[index % 3].format(colour)
                entries.append(snli_ve_pair(number, str(number), text, label))
            else:
                source = ("lsmdc", "movieclips")[index % 2]
                image = f"{source}_Film{index % 4}/{number}.jpg"
                right, reason = index % 4, (index + 1) % 4
                choices = [["It", "is", word, "."] for word in ("wet", "dry", "old", "new")]
                choices[right] = ["It", "is", colour, "."]
                reasons = [["All", "of", "it", "is", word] for word in ("wet", "dry", "old", "new")]
                reasons[reason] = ["All", "of", "it", "is", colour]
                entries.append(
                    vcr_question(
                        number, image, question=["How", "is", [0], "?"], answer_choices=choices, answer_label=right,
                        rationale_choices=reasons, rationale_label=reason,
                    )
                )  # fmt: skip
            picture(folder / "images" / image, COLOURS[colour], index)
        if task == "vqa":
            write_vqa(folder, split, entries)
        else:
            write_lines(folder / (f"snli_ve_{split}.jsonl" if task == "snli-ve" else f"{split}.jsonl"), entries)
