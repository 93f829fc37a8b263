"""VQA's soft accuracy of an answer, after the official normalisation.

    accuracy = mean over the ten annotators of min(answers of the other nine that agree / 3, 1)

The rules are those of GT-Vision-Lab/VQA's evaluation since 2021, restated: all answers are normalised, unless the ten
annotators wrote the same. Two of their quirks count, because published figures have them: a full stop stays only before
a digit, and "somebody'd" becomes "somebodyd". Entries of the official list that no lower-case word can match are left
out ("Im", "Ive", "Id've"), and so are those that change nothing ("she's", "let's").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

ARTICLES = ("a", "an", "the")
NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBER_WORDS.split())}}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
MOST_FULL_STOPS = 32
CONTRACTIONS = (
    "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't "
    "shan't shouldn't wasn't weren't won't wouldn't could've might've must've not've should've they've we've what've "
    "where've who've would've you've he'd how'd it'd someone'd something'd there'd they'd where'd who'd you'd how'll "
    "it'll somebody'll someone'll something'll they'll what'll who'll why'll you'll there're they're what're why're "
    "you're he's how's somebody's someone's that's there's what's when's where's who's why's ma'am o'clock "
    "'twas y'all couldn't've hadn't've mightn't've shouldn't've wouldn't've he'd've it'd've she'd've somebody'd've "
    "someone'd've something'd've there'd've they'd've we'd've who'd've you'd've y'all'll y'all'd've 'ow's'at"
)


def _without_one_mark(word: str) -> list[str]:
    """A word without one of its apostrophes, for each of them."""
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


WITH_MARKS = {
    **{short: word for word in CONTRACTIONS.split() for short in _without_one_mark(word)},
    "somebody'd": "somebodyd",
}


@lru_cache(maxsize=1 << 20)
def normalize_answer(answer: str) -> str:
    """An answer in lower case, without articles and punctuation, with digits for numbers up to ten and apostrophes."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_blank or COMMA_IN_NUMBER.search(text) else " ")
    cleaned = FULL_STOP.sub("", cleaned, count=MOST_FULL_STOPS)
    words = [NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(WITH_MARKS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """The soft accuracy of an answer, in [0, 1], given those of the annotators.

    Args:
        answer: the answer.
        answers: one of each annotator, ten in VQA; at least one.
    Raises:
        ValueError: no annotator.
    Source: VQA, arXiv 1505.00468, section 3; the mean over annotators is that of the official evaluation.
    """
    if not answers:
        raise ValueError("expected the answers of annotators, got none")
    written = [other.replace("\n", " ").replace("\t", " ").strip() for other in answers]
    given = answer.replace("\n", " ").replace("\t", " ").strip()
    if len(set(written)) > 1:
        given, written = normalize_answer(given), [normalize_answer(other) for other in written]
    agree = written.count(given)
    return sum(min((agree - (other == given)) / 3, 1.0) for other in written) / len(written)
