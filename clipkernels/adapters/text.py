"""Where the parts of each library's text tower are: what it makes of token ids, word by word and as a whole.

The words of open_clip's and of transformers' models are public intermediates, which are projected here. OpenAI's clip
and the towers of transformers that open_clip wraps hand out none: for these a few lines of the host's forward are
retraced, of its own modules (`OpenAIText`, `WrappedText`). So is which row is pooled, where no pooled one is handed out
(OpenAI's clip, ChineseCLIP). When a teacher is made, `verify` compares the embeddings of its tower with the host's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from clipkernels.adapters import UnsupportedTower

SUPPORTED = "a text tower of open_clip, transformers or OpenAI's clip"
Tokenizer = Callable[[list[str]], Tensor]
"""n texts to token ids (n,T)."""


class Sentences(NamedTuple):
    """What a text tower makes of token ids (B,T), nothing normalised.

    text (B,E): what the host's own encode_text, or get_text_features, returns.
    words (B,T,E): every token after the final norm and the projection.
    more (B,n,E): likewise tokens that the tower adds itself, such as CoCa's CLS; None where it adds none.
    """

    text: Tensor
    words: Tensor
    more: Tensor | None = None


class TextTower(Protocol):
    """What an adapter says of a host's text tower. Everything reads the host as it is now, and writes nothing to it."""

    @property
    def pools_row(self) -> bool:
        """Whether the embedding is one of the rows, projected."""

    @property
    def context(self) -> int | None:
        """The most tokens that a text may have, None where the host does not say."""

    def encode(self, ids: Tensor) -> Sentences:
        """Embeddings of ids (B,T) int64 on the tower's device, and their words."""

    def host(self, ids: Tensor) -> Tensor:
        """The embeddings (B,E) by the host's own forward."""


def find_text_tower(model: nn.Module) -> TextTower:
    """The text tower of a model.

    Raises:
        UnsupportedTower: it has none that can be served; the message names what was found.
    """
    if hasattr(model, "text_model") and hasattr(model, "get_text_features"):
        if not hasattr(model, "text_projection") and not hasattr(model.text_model, "head"):
            raise UnsupportedTower(f"expected a text tower with a projection, got {type(model.text_model).__name__}")
        return TransformersText(model)
    if not hasattr(model, "encode_text") or isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedTower(f"expected {SUPPORTED}, got {type(model).__name__}")
    text: Any = getattr(model, "text", model)
    if hasattr(text, "pooler") and hasattr(text, "proj"):
        return WrappedText(model)
    if not hasattr(text, "ln_final") or not hasattr(text, "text_projection"):
        raise UnsupportedTower(f"expected {SUPPORTED}, got {type(model).__name__} with {type(text).__name__}")
    return OpenCLIPText(model) if hasattr(model, "forward_intermediates") else OpenAIText(model)


class OpenCLIPText:
    """The text half of open_clip's CLIP, CustomTextCLIP and CoCa, by their intermediates."""

    pools_row = True

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def context(self) -> int | None:
        return getattr(self.model, "text", self.model).context_length

    def encode(self, ids: Tensor) -> Sentences:
        out = self.model.forward_intermediates(
            text=ids, text_indices=1, normalize=False, normalize_intermediates=True, text_output_extra_tokens=True
        )
        added = out.get("text_intermediates_suffix")
        more = None if added is None else self._projected(added[-1])
        return Sentences(out["text_features"], self._projected(out["text_intermediates"][-1]), more)

    def host(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids, normalize=False)

    def _projected(self, x: Tensor) -> Tensor:
        projection = getattr(self.model, "text", self.model).text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Module) else x @ projection


class WrappedText:
    """A text tower of transformers as open_clip wraps it, with a pooler and a projection of its own; retraced."""

    pools_row = False

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def context(self) -> int | None:
        return self.model.text.context_length or None

    def encode(self, ids: Tensor) -> Sentences:
        text = self.model.text
        mask = (ids != text.config.pad_token_id).long()
        out = text.transformer(input_ids=ids, attention_mask=mask)
        return Sentences(text.proj(text.pooler(out, mask)), text.proj(out.last_hidden_state))

    def host(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids, normalize=False)


class TransformersText:
    """The text half of Hugging Face's CLIP, SigLIP, SigLIP2, ChineseCLIP, AltCLIP and MetaCLIP2."""

    pools_row = True

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def context(self) -> int | None:
        return getattr(self.model.text_model.config, "max_position_embeddings", None)

    def encode(self, ids: Tensor) -> Sentences:
        text = self.model.text_model
        out = text(**self._inputs(ids))
        states, pooled = out.last_hidden_state, out.pooler_output
        if not hasattr(self.model, "text_projection"):  # SigLIP's head has been applied to what is pooled
            return Sentences(pooled, text.head(states))
        project = self.model.text_projection
        return Sentences(project(states[:, 0] if pooled is None else pooled), project(states))

    def host(self, ids: Tensor) -> Tensor:
        out = self.model.get_text_features(**self._inputs(ids))
        return out if isinstance(out, Tensor) else out.pooler_output

    def _inputs(self, ids: Tensor) -> dict[str, Tensor]:
        config = self.model.text_model.config
        # BERTs are trained with a mask of padding; CLIP looks back only, and SigLIP at its padding too.
        if not hasattr(config, "type_vocab_size"):
            return {"input_ids": ids}
        return {"input_ids": ids, "attention_mask": (ids != config.pad_token_id).long()}


class OpenAIText:
    """The text half of OpenAI's clip, which runs sequence-first and has no intermediates to give; retraced."""

    pools_row = True

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def context(self) -> int | None:
        return self.model.context_length

    def encode(self, ids: Tensor) -> Sentences:
        model = self.model
        x = model.token_embedding(ids).type(model.dtype)
        x = x + model.positional_embedding[: ids.shape[1]].type(model.dtype)
        x = model.transformer(x.transpose(0, 1)).transpose(0, 1)
        x = model.ln_final(x).type(model.dtype)
        pooled = x[torch.arange(len(x), device=x.device), ids.argmax(1)]
        return Sentences(pooled @ model.text_projection, x @ model.text_projection)

    def host(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids)


@torch.no_grad()
def verify_text_tower(tower: TextTower, ids: Tensor) -> int:
    """The width E of a tower's embeddings, once it was seen that the embeddings of ids (B,T) are the host's own, and,
    where the host pools a row, that they are among the rows.

    Raises:
        UnsupportedTower: they are not.
    """
    expected = tower.host(ids).float()
    came = tower.encode(ids)
    rows = came.words if came.more is None else torch.cat([came.words, came.more], 1)
    if not expected.isfinite().all():
        warnings.warn("the model's weights are not finite, its text tower could not be verified", stacklevel=3)
        return expected.shape[1]
    scale = expected.abs().amax(1)
    # Room for TF32, or for the rounding of products of other sizes in half precision.
    room = max(2e-3, 8 * torch.finfo(came.text.dtype).eps) * scale
    off = (came.text.float() - expected).abs().amax(1)
    if not (off <= room).all():
        raise UnsupportedTower(
            f"expected the host's own text embedding, got one that is off by {(off / scale).max():.1e}"
        )
    off = (rows.float() - expected[:, None]).abs().amax(2).amin(1)
    if tower.pools_row and not (off <= room).all():
        raise UnsupportedTower(
            f"expected one of the words to be the text's embedding, got none that comes closer than "
            f"{(off / scale).max():.1e} of it"
        )
    return expected.shape[1]


class Marks(NamedTuple):
    """What a tokenizer puts around words: so many ids before them, these behind them, then padding."""

    start: int
    end: tuple[int, ...]
    padding: int

    @classmethod
    def from_ids(cls, ids: Tensor) -> Marks:
        """The marks of a tokenizer by its ids (n,T) of no text, of a short one and of others.

        Raises:
            ValueError: it puts no padding behind a text, or nothing between the marks of one.
        """
        empty, some = ids[0].tolist(), ids[1].tolist()
        padding = empty[-1]
        around, short = _stripped(empty, padding), _stripped(some, padding)
        start = 0
        while start < len(around) and around[start] == some[start]:
            start += 1
        # What is behind a text grows shorter with it; what is before it is no padding.
        if not len(around) < len(short) < len(some) or some[start] == padding:
            raise ValueError(
                f"tokenizer must put its padding behind a text, got ids {empty!r:.60} of no text and {some!r:.60} of a "
                "short one: set its padding_side to right"
            )
        marks = cls(start, tuple(around[start:]), padding)
        counts = marks.words(ids).sum(1).tolist()
        if counts[0] or not all(counts[1:]):
            raise ValueError(
                f"tokenizer must put the same marks around each text, got {counts[0]} words of no text and "
                f"{counts[1:]} of some, by ids {ids.tolist()!r:.200}"
            )
        return marks

    def words(self, ids: Tensor) -> Tensor:
        """Which of ids (B,T) are words; bool."""
        place = torch.arange(ids.shape[1], device=ids.device)
        # Padding may be a word's id too, such as CLIP's, which is that of an exclamation mark: it is what comes last.
        length = torch.where(ids != self.padding, place + 1, 0).amax(1)
        if self.end:
            ends = (length[:, None] - len(self.end) + place[: len(self.end)]).clamp(min=0)
            closed = ids.gather(1, ends) == torch.tensor(self.end, device=ids.device)
            length = length - len(self.end) * closed.all(1)
        return (place >= self.start) & (place < length[:, None])


def _stripped(ids: list[int], padding: int) -> list[int]:
    """Ids without the padding at their end."""
    length = len(ids)
    while length and ids[length - 1] == padding:
        length -= 1
    return ids[:length]


def ids_of(tokenizer: Any, texts: list[str], context: int | None) -> Tensor:
    """The token ids (n,T) int64 of texts. One of transformers' tokenizers, which does neither unless asked, pads behind
    them and cuts to the length that a tower was trained with, whichever side it is set to pad.

    Raises:
        ValueError: the tokenizer gives something else, or pads before a text and cannot be asked otherwise.
    """
    if hasattr(tokenizer, "model_max_length"):
        length = min(tokenizer.model_max_length, context or tokenizer.model_max_length)
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": length}
        if "padding_side" in signature(tokenizer).parameters:
            options["padding_side"] = "right"
        elif getattr(tokenizer, "padding_side", "right") != "right":
            raise ValueError(
                f"tokenizer must pad behind a text, got {type(tokenizer).__name__} that pads before it: set its "
                "padding_side to right"
            )
        return tokenizer(texts, return_tensors="pt", **options)["input_ids"]
    ids = tokenizer(texts)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != len(texts):
        came = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"tokenizer must give ids ({len(texts)},T) of {len(texts)} texts, got {came}")
    return ids.long()
