"""A frozen CLIP as a teacher: what it says of images, of their patches, of texts and of their words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from string import Formatter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from clipkernels import adapters
from clipkernels.adapters import UnsupportedTower, text
from clipkernels.classifier import PROMPTS_PER_BATCH, eval_mode
from clipkernels.encode import encode_image
from clipkernels.fingerprint import fingerprint, output_probe, weights_version
from clipkernels.learn.distill.align import rows_or_zeros
from clipkernels.learn.distill.features import Answers, TeacherFeatures, features_of
from clipkernels.methods import Dense
from clipkernels.patching import method_of

Join = str | Callable[[str, str], str]

PROBE = ("", "a", "Is it 2 o'clock already? Then 10 naïve foxes jump over the lazy dog!")


class Teacher:
    """A frozen CLIP that says what it sees and reads.

    It is no module: a student may hold it, and has none of its weights in its `state_dict` and `parameters`. It runs
    without gradients, in eval mode and in its own precision, autocast or not; then each of its modules is in the mode
    that it was in. Nothing else is changed, so that threads may share it where the model is in eval mode already. A
    model that is patched is a cheaper teacher, whose regions are what is left of each patch.

    Args:
        model: a CLIP with both of its towers, patched or not: of open_clip (CLIP, CustomTextCLIP, CoCa, with timm's and
            transformers' towers inside), of transformers (CLIP, SigLIP, SigLIP2, MetaCLIP2, ChineseCLIP, AltCLIP) or of
            OpenAI's clip. One of open_clip's ResNets may see: its regions are the positions of the last feature map. A
            tower of timm's alone, or a vision model of transformers', cannot teach: it reads nothing.
        tokenizer: n texts to token ids (n,T), padded behind the text, like open_clip's; or one of transformers', which
            pads to the length that the text tower has.
        join: what a text and one of its answers make together, with a `{}` for either, or a callable of both.
    Raises:
        UnsupportedTower: an image or a text tower that cannot be served, or a text tower whose words are not what it
            pools.
        ValueError: embeddings of different widths, a tokenizer that gives something else, or another `join`.
    """

    def __init__(self, model: nn.Module, tokenizer: text.Tokenizer, *, join: Join = "{} {}") -> None:
        self.model, self.tokenizer, self.join = model, tokenizer, join
        if isinstance(join, str) and not _has_two_fields(join):
            raise ValueError(f'join must hold {{}} for the text and for the answer, and no other field, got "{join}"')
        self.reads = text.find_text_tower(model)
        tower = None if adapters.find_resnet(model) is not None else adapters.find_tower(model)
        self.queries = tower is not None and tower.pools_with_queries
        self.probe = text.ids_of(tokenizer, list(PROBE), self.reads.context)
        self.marks = text.Marks.from_ids(self.probe)
        probes = {ids.shape[1]: ids for ids in (text.ids_of(tokenizer, [PROBE[1]], self.reads.context), self.probe)}
        for length, ids in probes.items():  # two where the tokenizer pads to the longest
            try:
                with self._frozen():
                    self.width = text.verify_text_tower(self.reads, ids.to(self.device))
            except RuntimeError as error:
                wanted = f"tokenizer must give as many ids as the text tower reads, got {length}"
                raise ValueError(f"{wanted}: {' '.join(str(error).split())}") from error
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
        what that makes of a few texts, by `glance`; the method; the tokenizer, by the ids that it gives of them."""
        probe = self.probe.cpu().contiguous()
        ids = sha256(str(tuple(probe.shape)).encode() + probe.numpy().tobytes()).hexdigest()[:16]
        image, sentences = fingerprint(self.model), fingerprint(self.model, "text")
        with self._frozen():
            read = output_probe(self.reads.host(self.probe.to(self.device)))
        known = {"image tower": image, "text tower": sentences, "reading of a few texts": read}
        return {**known, "method": self.method, "tokenizer": ids}

    @property
    def stamp(self) -> tuple[Any, ...]:
        """What is another one once the model was patched otherwise or its weights were written, replaced or moved."""
        return self.method, *weights_version(self.model)

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
            ValueError: nothing to see or to read, images of another size than the tower's, something else than a list
                of strings, or numbers of images, texts and answers that do not fit.
            UnsupportedTower: regions of a tower whose learned queries are all that it hands out: pass regions=False.
        """
        return features_of(self, images, texts, answers, regions, words)

    def see(self, images: Tensor, regions: bool = True) -> TeacherFeatures:
        """`image` of images (B,3,S,S), and `regions` with `regions_mask` where asked."""
        if images.ndim == 4 and not len(images):  # hosts cannot reshape an empty batch
            one = self.see(images.new_zeros(1, *images.shape[1:]), regions)
            return TeacherFeatures(*(None if x is None else x[:0] for x in one))
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
        return TeacherFeatures(
            image=seen.embedding.float(), regions=rows_or_zeros(tokens, holder), regions_mask=holder >= 0
        )

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
        return found._replace(words=_concat_padded(rows)[: len(texts)], words_mask=_concat_padded(masks)[: len(texts)])

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
        with torch.no_grad(), eval_mode(self.model), torch.autocast(self.device.type, enabled=False):
            yield


def _has_two_fields(join: str) -> bool:
    """Whether a format string has two fields, both `{}`."""
    try:
        fields = [field[1:] for field in Formatter().parse(join) if field[1] is not None]
    except ValueError:  # such as a single brace
        return False
    return fields == [("", "", None)] * 2


def _concat_padded(parts: list[Tensor]) -> Tensor:
    """Parts (b,T,…) one after the other, those of fewer tokens filled up with zeros."""
    length = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, 0) * (part.ndim - 2) + (0, length - part.shape[1])) for part in parts])
