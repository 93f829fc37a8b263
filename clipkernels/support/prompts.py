"""Sentences for each class: of templates, of a language model, or both; and the class embeddings they make."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from clipkernels import classifier
from clipkernels.classifier import check_classes, check_templates, prompts_of

Prompts = Mapping[str, Sequence[str]]
"""A list of sentences for each class; its order is the order of the classes."""

PHOTO = ("a photo of a {}.",)
ENSEMBLE = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
QUESTIONS = (
    "Describe what a {} looks like.",
    "How can you identify a {}?",
    "What does a {} look like?",
    "Describe an image from the internet of a {}.",
    "A caption of an image of a {}:",
)
MIN_CHARACTERS = 5


def photo(classes: Sequence[str], templates: Sequence[str] = PHOTO) -> dict[str, list[str]]:
    """The sentences that templates make of each class: one by default; `ENSEMBLE` has seven.

    Raises:
        ValueError: no classes, an empty or repeated name, a string in place of a list, a template without `{}`.
    """
    return prompts_of(check_classes(classes), check_templates(templates))


def cupl(
    classes: Sequence[str],
    source: str | os.PathLike[str] | Mapping[str, Sequence[str]] | Callable[[list[str]], Sequence[str]],
    *,
    questions: Sequence[str] = QUESTIONS,
    answers: int = 10,
) -> dict[str, list[str]]:
    """A language model's sentences about each class, of which those under five characters, or that begin with "?", are
    dropped. White space, line breaks included, is one blank each.

    Args:
        classes: K different names.
        source: a JSON file of {class: [sentences]}, which may hold other classes too; such a mapping; or what answers
            a list of questions with as many strings, such as a local language model: it is called once per class.
        questions: with `{}` where the name goes, for a source that answers them.
        answers: how often each question is asked.
    Raises:
        ValueError: a file that is no such JSON, classes that are not in it or are left without a sentence, another
            number of answers than of questions, and what `photo` raises.
        OSError: the file cannot be read.
    Source: CuPL, arXiv 2209.03320; the filter is that of SuS-X's released code.
    """
    names = check_classes(classes)
    if callable(source):
        questions = check_templates(questions)
        said: Mapping[str, Any] = {name: _ask(source, name, questions, answers) for name in names}
    elif isinstance(source, Mapping):
        said = source
    else:
        try:
            said = json.loads(Path(source).read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, or no UTF-8
            raise ValueError(f"expected a JSON file of sentences per class, got {source}: {error}") from error
        if not isinstance(said, dict):
            raise ValueError(f"expected a JSON file of sentences per class, got {source} with a {type(said).__name__}")
    missing = [name for name in names if name not in said]
    if missing:
        raise ValueError(f"expected sentences for every class, got none for {list_names(missing)}")
    kept = {name: _filtered(name, said[name]) for name in names}
    empty = [name for name, sentences in kept.items() if not sentences]
    if empty:
        raise ValueError(
            f'expected sentences of {MIN_CHARACTERS} characters or more that do not begin with "?" for every class, got none '
            f"for {list_names(empty)}"
        )
    return kept


def combined(*prompts: Prompts) -> dict[str, list[str]]:
    """Every class's sentences of several mappings, one list after another; TIP-X's default is of
    `photo(classes, ENSEMBLE)` and `cupl(classes, …)`.

    Raises:
        ValueError: nothing to combine, or mappings of different classes.
    """
    if not prompts:
        raise ValueError("combined takes at least one mapping of prompts, got none")
    first = check_prompts(prompts[0])
    for other in prompts[1:]:
        if set(other) != set(first):
            raise ValueError(
                f"expected prompts for the same classes, got {list_names(set(other) ^ set(first))} in one alone"
            )
    return {name: [sentence for each in prompts for sentence in each[name]] for name in first}


def class_embeddings(model: Any, tokenizer: Callable[[list[str]], Tensor], prompts: Prompts) -> Tensor:
    """Class embeddings (K,E) fp32, L2-normalised means of the normalised embeddings of each class's sentences, of which
    classes may have different numbers; on the model's device, which is left in its mode.

    Raises:
        ValueError: a class without sentences.
    """
    return classifier.class_embeddings(model, tokenizer, check_prompts(prompts))


def check_prompts(prompts: Prompts) -> dict[str, list[str]]:
    """The prompts, every class with a list of its own.

    Raises:
        ValueError: no classes, or one without a list of sentences.
    """
    if not isinstance(prompts, Mapping) or not prompts:
        raise ValueError(f"prompts must be a mapping of classes to sentences, got {prompts!r:.100}")
    check_classes(list(prompts))
    for name, sentences in prompts.items():
        if isinstance(sentences, str) or not sentences or not all(isinstance(each, str) for each in sentences):
            raise ValueError(f"prompts must hold a list of sentences for {name!r}, got {sentences!r:.100}")
    return {name: list(sentences) for name, sentences in prompts.items()}


def list_names(names: Sequence[str] | set[str]) -> str:
    """The first of some names, and how many there are more."""
    first = [repr(name) for name in (sorted(names) if isinstance(names, set) else names)]
    return ", ".join(first[:10]) + (f" and {len(first) - 10} more" if len(first) > 10 else "")


def _ask(
    generate: Callable[[list[str]], Sequence[str]], name: str, questions: Sequence[str], answers: int
) -> list[str]:
    asked = [question.replace("{}", name) for question in questions for _ in range(answers)]
    said = list(generate(asked))
    if len(said) != len(asked):
        raise ValueError(f"expected an answer to each of {len(asked)} questions about {name!r}, got {len(said)}")
    return said


def _filtered(name: str, sentences: Any) -> list[str]:
    if not isinstance(sentences, Sequence) or isinstance(sentences, str):
        raise ValueError(f"expected a list of sentences for {name!r}, got {sentences!r:.100}")
    for sentence in sentences:
        if not isinstance(sentence, str):
            raise ValueError(f"expected sentences for {name!r} to be strings, got {sentence!r:.100}")
    kept = [" ".join(sentence.split()) for sentence in sentences]
    return [sentence for sentence in kept if len(sentence) >= MIN_CHARACTERS and not sentence.startswith("?")]
