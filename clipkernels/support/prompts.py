"""Sentences for each class, from templates, from a language model, or both; and their class embeddings."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from clipkernels import classifier
from clipkernels.adapters.tokenizers import Tokenizer
from clipkernels.arguments import check_int, describe
from clipkernels.classifier import check_classes, check_prompt_lists, check_templates, prompts_of
from clipkernels.formats import parse_object
from clipkernels.images import read_bytes
from clipkernels.messages import list_names

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
MIN_CHARACTERS, MAX_ANSWERS = 5, 10_000
LINKS = ("![", "])", "](")
"""Pieces of Markdown's pictures and links, which language models answer with."""


def photo(classes: Sequence[str], templates: Sequence[str] = PHOTO) -> dict[str, list[str]]:
    """Sentences from templates for each class: one by default; `ENSEMBLE` has seven.

    Raises:
        ValueError: no classes, an empty or repeated name, a string instead of a list, a template without `{}`.
    """
    return prompts_of(check_classes(classes), check_templates(templates))


def cupl(
    classes: Sequence[str],
    source: str | os.PathLike[str] | Mapping[str, Sequence[str]] | Callable[[list[str]], Sequence[str]],
    *,
    questions: Sequence[str] = QUESTIONS,
    answers: int = 10,
) -> dict[str, list[str]]:
    """A language model's sentences about each class.

    Sentences of fewer than five characters, that start with "?", or that contain "![", "])" or "](" are dropped. White
    space, line breaks included, is collapsed to single blanks.

    Args:
        classes: K distinct names.
        source: a JSON file of {class: [sentences]}, which may also hold other classes; such a mapping; or a callable
            from a list of questions to a list of as many answers, such as a local language model. The callable is
            called once per class.
        questions: questions with `{}` for the class name, if the source is a callable.
        answers: answers per question.
    Raises:
        ValueError: a file that is not such JSON, classes that are missing or have no valid sentence, a wrong number of
            answers, and the errors of `photo`.
        OSError: the file cannot be read.
    Source: CuPL, arXiv 2209.03320; the filter is that of SuS-X's released code.
    """
    names = check_classes(classes)
    questions = check_templates(questions, "questions")
    check_int("answers", answers, 1, MAX_ANSWERS, "answers to a question")
    if callable(source) and not isinstance(source, type):
        sentences_of: Mapping[str, Any] = {name: _ask(source, name, questions, answers) for name in names}
    elif isinstance(source, Mapping):
        sentences_of = source
    else:
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"source must be a file, a mapping of sentences or a callable, got {describe(source)}")
        try:
            sentences_of = parse_object(read_bytes(source).decode())
        except ValueError as error:
            raise ValueError(f"expected a JSON file of sentences per class, got {source}: {error}") from error
    missing = [name for name in names if name not in sentences_of]
    if missing:
        raise ValueError(f"expected sentences for every class, got none for {list_names(missing)}")
    result = {name: _filter_sentences(name, sentences_of[name]) for name in names}
    empty = [name for name, sentences in result.items() if not sentences]
    if empty:
        raise ValueError(
            f'expected sentences of {MIN_CHARACTERS} characters or more that do not begin with "?" or hold a link for '
            f"every class, got none for {list_names(empty)}"
        )
    return result


def combined(*prompts: Prompts) -> dict[str, list[str]]:
    """The concatenation of several mappings' sentences for each class.

    TIP-X's default is `combined(photo(classes, ENSEMBLE), cupl(classes, …))`.

    Raises:
        ValueError: no mapping, or mappings of different classes.
    """
    if not prompts:
        raise ValueError("combined takes at least one mapping of prompts, got none")
    first = check_prompts(prompts[0])
    for other in prompts[1:]:
        if set(other) != set(first):
            raise ValueError(
                f"expected prompts for the same classes, got {list_names(set(other) ^ set(first))} in only one of them"
            )
    return {name: [sentence for mapping in prompts for sentence in mapping[name]] for name in first}


def class_embeddings(model: Any, tokenizer: Tokenizer, prompts: Prompts) -> Tensor:
    """Class embeddings (K,E) fp32: the L2-normalised means of the normalised embeddings of each class's sentences.

    Classes may have different numbers of sentences. The result is on the model's device; the model's training mode is
    left unchanged. A warning names the classes that have a sentence whose end the tokenizer drops.

    Args:
        model: a model with a text tower: open_clip's, one of transformers' CLIP and SigLIP families, OpenAI's, or
            another model with `encode_text`.
        tokenizer: a callable from a list of n texts to token ids (n,T), or a tokenizer or a processor of transformers.
        prompts: the sentences of each class.
    Raises:
        ValueError: a class without sentences.
        UnsupportedTower: a model without a text tower.
    """
    return classifier.class_embeddings(model, tokenizer, check_prompts(prompts))


def check_prompts(prompts: Prompts) -> dict[str, list[str]]:
    """The prompts as a new dict with a new list for each class.

    Raises:
        ValueError: no classes, or a class without a list of sentences.
    """
    if not isinstance(prompts, Mapping) or not prompts:
        raise ValueError(f"prompts must be a mapping of classes to sentences, got {describe(prompts)}")
    check_classes(list(prompts))
    return check_prompt_lists(prompts, noun="sentences")


def _ask(
    generate: Callable[[list[str]], Sequence[str]], name: str, questions: Sequence[str], answers: int
) -> list[str]:
    batch = [question.replace("{}", name) for question in questions for _ in range(answers)]
    result = list(generate(batch))
    if len(result) != len(batch):
        raise ValueError(f"expected an answer to each of {len(batch)} questions about {name!r}, got {len(result)}")
    return result


def _filter_sentences(name: str, sentences: Any) -> list[str]:
    if not isinstance(sentences, Sequence) or isinstance(sentences, str):
        raise ValueError(f"expected a list of sentences for {name!r}, got {sentences!r:.100}")
    for sentence in sentences:
        if not isinstance(sentence, str):
            raise ValueError(f"expected sentences for {name!r} to be strings, got {sentence!r:.100}")
    collapsed = [" ".join(sentence.split()) for sentence in sentences]
    return [sentence for sentence in collapsed if _is_valid(sentence)]


def _is_valid(sentence: str) -> bool:
    has_link = any(piece in sentence for piece in LINKS)
    return len(sentence) >= MIN_CHARACTERS and not sentence.startswith("?") and not has_link
