"""Support sets: prompts and their class embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from clipkernels import support

pytestmark = pytest.mark.usefixtures("one_thread")


def test_photo_fills_one_template() -> None:
    assert support.photo(["zebra", "apple"]) == {"zebra": ["a photo of a zebra."], "apple": ["a photo of a apple."]}


def test_the_ensemble_has_the_seven_published_templates() -> None:
    assert support.photo(["cat"], support.ENSEMBLE)["cat"] == [
        "itap of a cat.",
        "a bad photo of the cat.",
        "a origami cat.",
        "a photo of the large cat.",
        "a cat in a video game.",
        "art of the cat.",
        "a photo of the small cat.",
    ]


LINKS = ["![](http://x)", "A cat ![photo]", "as shown (see [1])", "a [cat](http://x)"]


def test_short_answers_and_question_marks_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "said.json"
    sentences = {
        "cat": ["A cat\nhas  fur.", "?What is a cat?", "No.", "  ? no", "four", "fives", "", *LINKS],
        "dog": ["It barks."],
    }
    file.write_text(json.dumps(sentences), encoding="utf-8")
    assert support.cupl(["cat"], file) == support.cupl(["cat"], sentences) == {"cat": ["A cat has fur.", "fives"]}
    assert support.cupl(["cat"], {"cat": ["[A] cat (small)!"]}) == {"cat": ["[A] cat (small)!"]}
    with pytest.raises(ValueError, match="or hold a link for every class, got none for 'cat'"):
        support.cupl(["cat"], {"cat": LINKS})


def test_classes_without_sentences_are_named(tmp_path: Path) -> None:
    sentences = {"cat": ["?", "no"], "dog": ["It barks."], "ant": []}
    with pytest.raises(ValueError, match=r"got none for 'cat', 'ant'$"):
        support.cupl(["cat", "dog", "ant"], sentences)
    with pytest.raises(ValueError, match=r"expected sentences for every class, got none for 'cow'$"):
        support.cupl(["dog", "cow"], sentences)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a JSON file of sentences per class, got"),
        ("[]", "a JSON list instead of an object"),
        ('{"cat": "It has fur."}', "expected a list of sentences for 'cat', got 'It has fur.'"),
        ('{"cat": ["It has fur.", 3]}', "expected sentences for 'cat' to be strings, got 3"),
    ],
)
def test_a_file_without_sentences_per_class_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "said.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        support.cupl(["cat"], tmp_path / "said.json")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_generator_gets_every_question_ten_times_per_class() -> None:
    batches: list[list[str]] = []

    def generate(questions: list[str]) -> list[str]:
        batches.append(questions)
        return [f"{question} {number}" if number else "?" for number, question in enumerate(questions)]

    prompts = support.cupl(["cat", "dog"], generate, questions=("What is a {}?", "Describe a {}."))
    assert batches[1] == 10 * ["What is a dog?"] + 10 * ["Describe a dog."]
    assert prompts["dog"][0] == "What is a dog? 1" and prompts["dog"][-1] == "Describe a dog. 19"
    assert len(prompts["cat"]) == 19
    with pytest.raises(ValueError, match="expected an answer to each of 50 questions about 'cat', got 1"):
        support.cupl(["cat"], lambda questions: ["A cat."])


def test_combined_concatenates_both_lists() -> None:
    both = support.combined(support.photo(["cat", "dog"]), {"dog": ["It barks."], "cat": ["It purrs."]})
    assert both == {"cat": ["a photo of a cat.", "It purrs."], "dog": ["a photo of a dog.", "It barks."]}
    with pytest.raises(ValueError, match="expected prompts for the same classes, got 'dog' in only one"):
        support.combined(support.photo(["cat", "dog"]), {"cat": ["It purrs."]})


def test_class_embeddings_average_lists_of_different_lengths(bundled: Any) -> None:
    model, _, tokenizer = bundled
    prompts = {"zero": ["the digit zero.", "zero", "0"], "one": ["the digit one."]}
    embeddings = support.class_embeddings(model, tokenizer, prompts)
    with torch.no_grad():
        for row, sentences in zip(embeddings, prompts.values(), strict=True):
            expected = normalize(normalize(model.encode_text(tokenizer(sentences)), dim=-1).mean(0), dim=0)
            torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("prompts", [{}, {"cat": []}, {"cat": "a cat"}, {"cat": [1]}, ["cat"], {" ": ["a"]}])
def test_prompts_without_lists_per_class_are_refused(bundled: Any, prompts: Any) -> None:
    with pytest.raises(ValueError, match=r"prompts must|classes must"):
        support.class_embeddings(bundled[0], bundled[2], prompts)
