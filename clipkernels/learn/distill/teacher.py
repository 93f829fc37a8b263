"""A frozen CLIP as a teacher: features of images, of their patches, of texts and of their words."""

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
from clipkernels.adapters.tokenizers import Marks, Tokenizer, ids_of
from clipkernels.arguments import describe
from clipkernels.classifier import PROMPTS_PER_BATCH, eval_mode
from clipkernels.encode import encode_image, tower_weight
from clipkernels.fingerprint import fingerprint, output_probe, weights_version
from clipkernels.learn.distill.align import rows_or_zeros
from clipkernels.learn.distill.features import Answers, TeacherFeatures, features_of
from clipkernels.methods import Dense
from clipkernels.patching import method_of

Join = str | Callable[[str, str], str]

PROBE = ("", "a", "Is it 2 o'clock already? Then 10 naïve foxes jump over the lazy dog!")


class Teacher:
    """A frozen CLIP that computes features of images and texts.

    A teacher is not a module, so a student may hold it without having its weights in `state_dict` and `parameters`. It
    runs without gradients, in eval mode and in the model's precision, even under autocast; afterwards each module is
    back in its previous mode. Nothing else is changed, so threads may share a teacher whose model is already in eval
    mode. A patched model is a cheaper teacher; its regions are the tokens that hold each patch after the method.

    Args:
        model: a CLIP with both of its towers, patched or not: from open_clip (CLIP, CustomTextCLIP, CoCa, with timm's
            and transformers' towers inside), from transformers (CLIP, SigLIP, SigLIP2, MetaCLIP2, ChineseCLIP, AltCLIP)
            or from OpenAI's clip. One of open_clip's ResNets may be the image tower; its regions are the positions of
            the last feature map. A timm tower or a transformers vision model alone is refused, because it has no text
            tower.
        tokenizer: a callable from n texts to token ids (n,T) that pads behind the text, like open_clip's; or a
            tokenizer or a processor of transformers, which is made to pad to the context length of the text tower.
        join: format string with a `{}` for the text and a `{}` for the answer, or a callable of both.
    Raises:
        UnsupportedTower: an image or text tower that is not supported, or a text tower that pools something else than
            its words' features.
        ValueError: embeddings of different widths, a tokenizer with another kind of result, or another `join`.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, *, join: Join = "{} {}") -> None:
        self.model, self.tokenizer, self.join = model, tokenizer, join
        if not isinstance(join, str) and not callable(join):
            raise TypeError(f"join must be a format string or a callable, got {describe(join)}")
        if isinstance(join, str) and not _has_two_fields(join):
            raise ValueError(
                f"join must hold one {{}} for the text, one for the answer and no more, got {describe(join)}"
            )
        self.reads = text.find_text_tower(model)
        tower = None if adapters.find_resnet(model) is not None else adapters.find_tower(model)
        self.queries = tower is not None and tower.pools_with_queries
        self.probe = ids_of(tokenizer, list(PROBE), self.reads.context)
        self.marks = Marks.from_ids(self.probe)
        probes = {ids.shape[1]: ids for ids in (ids_of(tokenizer, [PROBE[1]], self.reads.context), self.probe)}
        for length, ids in probes.items():  # two lengths if the tokenizer pads to the longest text
            try:
                with self._frozen():
                    self.width = text.verify_text_tower(self.reads, ids.to(self.device))
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"tokenizer must give as many ids as the text tower reads, got {length}: {reason}"
                ) from error
        if tower is not None and tower.out != self.width:
            raise ValueError(f"expected embeddings of one width, got {tower.out} for images and {self.width} for texts")

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._like.device

    @property
    def method(self) -> str:
        """The repr of the method that the model is patched with; "host" for an unpatched model and for `Dense`."""
        method = None if adapters.find_resnet(self.model) is not None else method_of(self.model)
        return "host" if method is None or isinstance(method, Dense) else repr(method)

    @property
    def about(self) -> dict[str, Any]:
        """Everything besides the inputs that determines the features.

        Both towers' fingerprints, a probe of the text tower's outputs, the method, and a hash of the tokenizer's ids
        for a few texts.
        """
        probe = self.probe.cpu().contiguous()
        ids = sha256(str(tuple(probe.shape)).encode() + probe.numpy().tobytes()).hexdigest()[:16]
        with self._frozen():
            outputs = output_probe(self.reads.host(self.probe.to(self.device)))
        return {
            "image tower": fingerprint(self.model),
            "text tower": fingerprint(self.model, "text"),
            "reading of a few texts": outputs,
            "method": self.method,
            "tokenizer": ids,
        }

    @property
    def stamp(self) -> tuple[Any, ...]:
        """A cheap, process-local stamp that changes with the method and if weights are written, replaced or moved."""
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
        """The features of B images, of B texts and of each text with its answers; images or texts may be None.

        Args:
            images: (B,3,S,S) preprocessed, on any device and of any dtype.
            texts: B strings; each distinct one is encoded once.
            answers: a strings for all texts, or a strings for each of them. A text and an answer are encoded as one
                text, joined by `join`.
            regions: also compute the features of each patch.
            words: also compute the features of each token of the texts.
        Returns:
            TeacherFeatures, fp32, on the device of the model; features that were not requested are None.
        Raises:
            ValueError: neither images nor texts, images of another size than the tower's, texts that are not a list of
                strings, or numbers of images, texts and answers that do not fit.
            UnsupportedTower: regions of a tower that outputs only its learned queries: pass regions=False.
        """
        return features_of(self, images, texts, answers, regions, words)

    def see(self, images: Tensor, regions: bool = True) -> TeacherFeatures:
        """`image` of images (B,3,S,S), and optionally `regions` with `regions_mask`."""
        if images.ndim == 4 and not len(images):  # the hosts' forwards cannot reshape an empty batch
            one = self.see(images.new_zeros(1, *images.shape[1:]), regions)
            return TeacherFeatures(*(None if x is None else x[:0] for x in one))
        resnet = adapters.find_resnet(self.model) is not None
        if regions and self.queries:
            raise UnsupportedTower(
                "expected a tower that outputs its patches, got one that outputs its queries: pass regions=False"
            )
        with self._frozen():
            images = images.to(self.device, self._like.dtype)
            encoded = encode_image(self.model, images, tokens=regions, source=regions and not resnet)
        embedding = encoded.embedding.float()
        if not regions:
            return TeacherFeatures(image=embedding)
        assert encoded.tokens is not None
        tokens, source = encoded.tokens.float(), encoded.source
        if source is None or not source.shape[1]:
            return TeacherFeatures(image=embedding, regions=tokens[:, encoded.prefix :])
        holder = source[:, -1].long()
        return TeacherFeatures(image=embedding, regions=rows_or_zeros(tokens, holder), regions_mask=holder >= 0)

    def read(self, texts: Sequence[str], words: bool = True) -> TeacherFeatures:
        """`text` of texts, and optionally `words` with `words_mask`."""
        sentences, pooled, rows, masks = list(texts) or [""], [], [], []
        with self._frozen():
            for start in range(0, len(sentences), PROMPTS_PER_BATCH):
                part = sentences[start : start + PROMPTS_PER_BATCH]
                ids = ids_of(self.tokenizer, part, self.reads.context).to(self.device)
                features = self.reads.encode(ids)
                pooled.append(features.text.float())
                if words:
                    rows.append(features.words.float())
                    masks.append(self.marks.words(ids))
        embedding = torch.cat(pooled)[: len(texts)]
        if not words:
            return TeacherFeatures(text=embedding)
        return TeacherFeatures(
            text=embedding, words=_concat_padded(rows)[: len(texts)], words_mask=_concat_padded(masks)[: len(texts)]
        )

    def joined(self, sentence: str, answer: str) -> str:
        """A text joined with one of its answers."""
        return self.join.format(sentence, answer) if isinstance(self.join, str) else self.join(sentence, answer)

    def pieces(self, sentence: str) -> list[str]:
        """The T pieces of a text for `align_words`: one for each of its `words`, "" for tokens that are not words.

        Raises:
            ValueError: a tokenizer that cannot convert ids to pieces.
        """
        ids = ids_of(self.tokenizer, [sentence], self.reads.context)
        inner: Any = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        if hasattr(inner, "convert_ids_to_tokens"):
            pieces = inner.convert_ids_to_tokens(ids[0].tolist())
        elif hasattr(inner, "decoder"):
            pieces = [inner.decoder[number] for number in ids[0].tolist()]
        else:
            raise ValueError(
                f"expected a tokenizer with convert_ids_to_tokens or a decoder, got {type(self.tokenizer).__name__}"
            )
        is_word = self.marks.words(ids)[0].tolist()
        return [piece if word else "" for piece, word in zip(pieces, is_word, strict=True)]

    @property
    def _like(self) -> Tensor:
        return tower_weight(self.model)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        with torch.no_grad(), eval_mode(self.model), torch.autocast(self.device.type, enabled=False):
            yield


def _has_two_fields(join: str) -> bool:
    """Return true if a format string has exactly two fields, both `{}`."""
    try:
        fields = [field[1:] for field in Formatter().parse(join) if field[1] is not None]
    except ValueError:  # such as a single brace
        return False
    return fields == [("", "", None)] * 2


def _concat_padded(parts: list[Tensor]) -> Tensor:
    """The concatenation of parts (b,T,…), each padded with zeros to the largest T."""
    length = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, 0) * (part.ndim - 2) + (0, length - part.shape[1])) for part in parts])
