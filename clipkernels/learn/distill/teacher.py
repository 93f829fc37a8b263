"""A frozen CLIP as a teacher: what it says of images, of their patches, of texts and of their words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from clipkernels import adapters
from clipkernels.adapters import UnsupportedTower, text
from clipkernels.classifier import PROMPTS_PER_BATCH, evaluating
from clipkernels.encode import encode_image
from clipkernels.identity import fingerprint
from clipkernels.learn.distill.align import aligned, rows_at
from clipkernels.methods import Dense
from clipkernels.patch import method_of

Answers = Sequence[str] | Sequence[Sequence[str]]
Join = str | Callable[[str, str], str]

PROBE = ("", "Is it 2 o'clock already? Then 10 naïve foxes jump over the lazy dog!")


class TeacherFeatures(NamedTuple):
    """What a frozen CLIP says of B pairs of an image and a text, nothing normalised; what is not known is None.

    image (B,E): embeddings.
    text (B,E): likewise.
    regions (B,P,E): each patch after the final norm and the projection.
    words (B,T,E): each token of the text, likewise.
    regions_mask (B,P): bool, False where a patch is gone; None where all are there.
    words_mask (B,T): bool, True for words: no padding, no start and no end; None where all are.
    answers (B,a,E): embeddings of the text with each of a answers.
    """

    image: Tensor | None = None
    text: Tensor | None = None
    regions: Tensor | None = None
    words: Tensor | None = None
    regions_mask: Tensor | None = None
    words_mask: Tensor | None = None
    answers: Tensor | None = None

    def align(self, words: Tensor | None = None, regions: Tensor | None = None) -> TeacherFeatures:
        """These features with one word for each of a student's n tokens, and one region for each of its m patches.

        Args:
            words: (B,n) or (n,) int64 the teacher's token for each of the student's, -1 for none, such as `align_words`
                gives; None leaves the words as they are.
            regions: (B,m) or (m,) int64 the teacher's patch for each of the student's, likewise, such as `align_grid`
                gives.
        Returns:
            TeacherFeatures with words (B,n,E) and regions (B,m,E), zeros at -1, and masks that are False there.
        Raises:
            ValueError: an index of another shape or dtype or out of range, or features without what is aligned.
        """
        made = self
        if words is not None:
            rows, mask = aligned("words", self.words, self.words_mask, words)
            made = made._replace(words=rows, words_mask=mask)
        if regions is not None:
            rows, mask = aligned("regions", self.regions, self.regions_mask, regions)
            made = made._replace(regions=rows, regions_mask=mask)
        return made


class Teacher:
    """A frozen CLIP that says what it sees and reads.

    It is no module: a student may hold it, and has none of its weights in its `state_dict` and `parameters`. It runs
    without gradients, in eval mode and in its own precision, autocast or not; then each of its modules is in the mode
    that it was in. Nothing else is changed, so that threads may share it where the model is in eval mode already. A
    model that is patched is a cheaper teacher, whose regions are what is left of each patch.

    Args:
        model: a CLIP of open_clip, transformers or OpenAI's clip, patched or not, such as `ck.patch` takes; or with one
            of open_clip's ResNets, whose regions are the positions of the last feature map.
        tokenizer: n texts to token ids (n,T) like open_clip's, or one of transformers', which pads to the length that
            the text tower has.
        join: what a text and one of its answers make together, with a `{}` for either, or a callable of both.
    Raises:
        UnsupportedTower: an image or a text tower that cannot be served, or a text tower whose words are not what it
            pools.
        ValueError: embeddings of different widths, or a tokenizer that gives something else.
    """

    def __init__(self, model: nn.Module, tokenizer: text.Tokenizer, *, join: Join = "{} {}") -> None:
        self.model, self.tokenizer, self.join = model, tokenizer, join
        if isinstance(join, str) and join.count("{}") != 2:
            raise ValueError(f'join must hold {{}} for the text and for the answer, got "{join}"')
        self.reads = text.find(model)
        tower = None if adapters.find_resnet(model) is not None else adapters.find(model)
        self.queries = tower is not None and tower.pools_by_query
        self.probe = text.ids_of(tokenizer, list(PROBE), self.reads.context)
        self.marks = text.Marks.of(self.probe)
        with self._frozen():
            self.width = text.verify(self.reads, self.probe.to(self.device))
        if tower is not None and tower.out != self.width:
            raise ValueError(f"expected embeddings of one width, got {tower.out} of images and {self.width} of texts")

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._like.device

    @property
    def method(self) -> str:
        """What the model is patched with, as it prints itself; "host" for nothing, and for what changes nothing."""
        method = None if adapters.find_resnet(self.model) is not None else method_of(self.model)
        return "host" if method is None or isinstance(method, Dense) else repr(method)

    @property
    def about(self) -> dict[str, Any]:
        """What features depend on besides what is seen and read: the image tower and the text tower, by `fingerprint`;
        the method; the tokenizer, by the ids that it gives of a sentence."""
        probe = self.probe.cpu().contiguous()
        ids = sha256(str(tuple(probe.shape)).encode() + probe.numpy().tobytes()).hexdigest()[:16]
        image, sentences = fingerprint(self.model), fingerprint(self.model, "text")
        return {"image tower": image, "text tower": sentences, "method": self.method, "tokenizer": ids}

    def __call__(
        self,
        images: Tensor | None = None,
        texts: Sequence[str] | None = None,
        answers: Answers | None = None,
        *,
        regions: bool = True,
        words: bool = True,
    ) -> TeacherFeatures:
        """What the teacher says of B images, of B texts, and of each text with its answers, or of some of these.

        Args:
            images: (B,3,S,S) preprocessed, of any device and dtype.
            texts: B strings; each that occurs is encoded once.
            answers: a strings for all texts, or a strings for each of them; a text and an answer are read as one,
                joined by `join`.
            regions: also what it says of each patch.
            words: also what it says of each token of the texts.
        Returns:
            TeacherFeatures, fp32, on the device of the model; what was not asked is None.
        Raises:
            ValueError: nothing to see or to read, images of another size than the tower's, a string in place of a list,
                or numbers of images, texts and answers that do not fit.
            UnsupportedTower: regions of a tower whose learned queries are all that it hands out: pass regions=False.
        """
        return features_of(self, images, texts, answers, regions, words)

    def see(self, images: Tensor, regions: bool = True) -> TeacherFeatures:
        """`image` of images (B,3,S,S), and `regions` with `regions_mask` where asked."""
        resnet = adapters.find_resnet(self.model) is not None
        if regions and self.queries:
            raise UnsupportedTower(
                "expected a tower whose patches can be told apart, got one that hands out its queries: regions=False"
            )
        with self._frozen():
            images = images.to(self.device, self._like.dtype)
            seen = encode_image(self.model, images, tokens=regions, source=regions and not resnet)
        if not regions:
            return TeacherFeatures(image=seen.embedding.float())
        assert seen.tokens is not None
        tokens, source = seen.tokens.float(), seen.source
        if source is None or not source.shape[1]:
            return TeacherFeatures(image=seen.embedding.float(), regions=tokens[:, seen.prefix :])
        holder = source[:, -1].long()
        return TeacherFeatures(image=seen.embedding.float(), regions=rows_at(tokens, holder), regions_mask=holder >= 0)

    def read(self, texts: Sequence[str], words: bool = True) -> TeacherFeatures:
        """`text` of texts, and `words` with `words_mask` where asked."""
        sentences, pooled, rows, masks = list(texts) or [""], [], [], []
        with self._frozen():
            for start in range(0, len(sentences), PROMPTS_PER_BATCH):
                part = sentences[start : start + PROMPTS_PER_BATCH]
                ids = text.ids_of(self.tokenizer, part, self.reads.context).to(self.device)
                made = self.reads.encode(ids)
                pooled.append(made.text.float())
                if words:
                    rows.append(made.words.float())
                    masks.append(self.marks.words(ids))
        found = TeacherFeatures(text=torch.cat(pooled)[: len(texts)])
        if not words:
            return found
        return found._replace(words=_stacked(rows)[: len(texts)], words_mask=_stacked(masks)[: len(texts)])

    def joined(self, sentence: str, answer: str) -> str:
        """A text with one of its answers."""
        return self.join.format(sentence, answer) if isinstance(self.join, str) else self.join(sentence, answer)

    def pieces(self, sentence: str) -> list[str]:
        """The T pieces that a text is cut into, one for each of its `words`, "" for what is no word; for `align_words`.

        Raises:
            ValueError: the tokenizer does not say what its ids stand for.
        """
        ids = text.ids_of(self.tokenizer, [sentence], self.reads.context)
        inner: Any = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        if hasattr(inner, "convert_ids_to_tokens"):
            named = inner.convert_ids_to_tokens(ids[0].tolist())
        elif hasattr(inner, "decoder"):
            named = [inner.decoder[number] for number in ids[0].tolist()]
        else:
            wanted = "expected a tokenizer with convert_ids_to_tokens or a decoder"
            raise ValueError(f"{wanted}, got {type(self.tokenizer).__name__}")
        return [piece if word else "" for piece, word in zip(named, self.marks.words(ids)[0].tolist(), strict=True)]

    @property
    def _like(self) -> Tensor:
        # The patches' convolution tells the precision: some other weights of a half tower are fp32.
        return next((each for each in self.model.parameters() if each.ndim == 4), next(self.model.parameters()))

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        with torch.no_grad(), evaluating(self.model), torch.autocast(self.device.type, enabled=False):
            yield


class Source(Protocol):
    """What sees and reads: a teacher, or what it said before."""

    def see(self, images: Tensor, regions: bool = True) -> TeacherFeatures:
        """`image`, and `regions` with their mask."""

    def read(self, texts: Sequence[str], words: bool = True) -> TeacherFeatures:
        """`text`, and `words` with their mask, of different texts."""

    def joined(self, sentence: str, answer: str) -> str:
        """A text with one of its answers."""


def features_of(
    source: Source,
    images: Tensor | None,
    texts: Sequence[str] | None,
    answers: Answers | None,
    regions: bool,
    words: bool,
) -> TeacherFeatures:
    """What a source says, which reads each different text once; arguments and errors as of `Teacher`."""
    if images is None and texts is None:
        raise ValueError("expected images or texts, got neither")
    if images is not None and images.ndim != 4:
        raise ValueError(f"images must be (B,3,S,S), got {tuple(images.shape)}")
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list of strings, got the string {texts!r}")
    if images is not None and texts is not None and len(images) != len(texts):
        raise ValueError(f"expected one text for each image, got {len(images)} images and {len(texts)} texts")
    together = None if answers is None else _joined(source, texts, answers)
    made = TeacherFeatures() if images is None else source.see(images, regions)
    if texts is None:
        return made
    once = {sentence: row for row, sentence in enumerate(dict.fromkeys(texts))}
    read, rows = source.read(list(once), words), torch.tensor([once[each] for each in texts], dtype=torch.int64)
    for name, found in read._asdict().items():
        if found is not None:
            made = made._replace(**{name: found[rows.to(found.device)]})
    if together is None:
        return made
    once = {sentence: row for row, sentence in enumerate(dict.fromkeys(each for row in together for each in row))}
    embedded = source.read(list(once), False).text
    assert embedded is not None
    index = torch.tensor([[once[each] for each in row] for row in together], dtype=torch.int64, device=embedded.device)
    return made._replace(answers=embedded[index.view(len(together), -1)])


def _joined(source: Source, texts: Sequence[str] | None, answers: Answers) -> list[list[str]]:
    """Each text with each of its answers.

    Raises:
        ValueError: no texts, a string in place of a list, no answers, or more for one text than for another.
    """
    if texts is None:
        raise ValueError("expected texts with the answers, got none")
    if isinstance(answers, str) or not len(answers):
        raise ValueError(f"answers must be a list of strings, or one for each text, got {answers!r:.100}")
    shared = isinstance(answers[0], str)
    if not shared and len(answers) != len(texts):
        raise ValueError(f"expected answers for {len(texts)} texts, got them for {len(answers)}")
    lists = [answers] * len(texts) if shared else answers
    wrong = [each for each in lists if isinstance(each, str) or not each or len(each) != len(lists[0])]
    if wrong:
        raise ValueError(f"expected {len(lists[0])} answers for each text, got {wrong[0]!r:.100}")
    return [[source.joined(one, str(answer)) for answer in each] for one, each in zip(texts, lists, strict=True)]


def _stacked(parts: list[Tensor]) -> Tensor:
    """Parts (b,T,…) one after the other, those of fewer tokens filled up with zeros."""
    length = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, 0) * (part.ndim - 2) + (0, length - part.shape[1])) for part in parts])
