"""Adapters to the text towers of each library: the embedding of a text, and of each of its tokens.

The token states of open_clip's and of transformers' models are public intermediates, which are projected here. OpenAI's
clip, and the transformers towers that open_clip wraps, return none. For these, a few lines of the host's forward are
repeated with its own modules (`OpenAIText`, `WrappedText`). The choice of the pooled row is repeated too for towers
that do not return it (OpenAI's clip, ChineseCLIP). When a teacher is made, `verify_text_tower` compares the embeddings
of its tower with the host's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from clipkernels.adapters.protocols import UnsupportedTower

SUPPORTED = "a text tower of open_clip, transformers or OpenAI's clip"


class Sentences(NamedTuple):
    """The output of a text tower for token ids (B,T), nothing normalised.

    text (B,E): the output of the host's own encode_text or get_text_features.
    words (B,T,E): every token after the final norm and the projection.
    extra (B,n,E): tokens that the tower itself adds, such as CoCa's CLS, after norm and projection, or None.
    """

    text: Tensor
    words: Tensor
    extra: Tensor | None = None


class TextTower(Protocol):
    """An adapter's view of a host's text tower. It reads the host's current state and never changes it."""

    @property
    def pools_row(self) -> bool:
        """True if the embedding is one of the rows, projected."""

    @property
    def context(self) -> int | None:
        """The largest number of tokens in a text, or None if the host does not define it."""

    def encode(self, ids: Tensor) -> Sentences:
        """The embeddings of texts, and of their tokens, by ids (B,T) int64 on the tower's device."""

    def host(self, ids: Tensor) -> Tensor:
        """The embeddings (B,E), computed by the host's own forward."""


def find_text_tower(model: nn.Module) -> TextTower:
    """The text tower of a model.

    Raises:
        UnsupportedTower: the model has no supported text tower; the message names its type.
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


class TextEncoder(NamedTuple):
    """A host's own function from ids (B,T) to embeddings (B,E), and the largest number of tokens, None if undefined."""

    encode: Callable[[Tensor], Tensor]
    context: int | None


def find_text_encoder(model: Any) -> TextEncoder:
    """The text encoder of a model, which need not be one whose tokens can be read.

    Raises:
        UnsupportedTower: the model encodes no text; the message names its type.
    """
    if hasattr(model, "encode_text"):
        return TextEncoder(model.encode_text, getattr(getattr(model, "text", model), "context_length", None) or None)
    tower = find_text_tower(model)
    return TextEncoder(tower.host, tower.context)


class OpenCLIPText:
    """The text half of open_clip's CLIP, CustomTextCLIP and CoCa, read from their intermediates."""

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
        suffix = out.get("text_intermediates_suffix")
        extra = None if suffix is None else self._project(suffix[-1])
        return Sentences(out["text_features"], self._project(out["text_intermediates"][-1]), extra)

    def host(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids, normalize=False)

    def _project(self, x: Tensor) -> Tensor:
        projection = getattr(self.model, "text", self.model).text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Module) else x @ projection


class WrappedText:
    """A transformers text tower inside open_clip's wrapper, which has pooler and projection; repeats its forward."""

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
        if not hasattr(self.model, "text_projection"):  # SigLIP's pooled output already includes its head
            return Sentences(pooled, text.head(states))
        project = self.model.text_projection
        return Sentences(project(states[:, 0] if pooled is None else pooled), project(states))

    def host(self, ids: Tensor) -> Tensor:
        out = self.model.get_text_features(**self._inputs(ids))
        return out if isinstance(out, Tensor) else out.pooler_output

    def _inputs(self, ids: Tensor) -> dict[str, Tensor]:
        config = self.model.text_model.config
        # BERTs are trained with a padding mask. CLIP attends backwards only, and SigLIP attends to its padding.
        if not hasattr(config, "type_vocab_size"):
            return {"input_ids": ids}
        return {"input_ids": ids, "attention_mask": (ids != config.pad_token_id).long()}


class OpenAIText:
    """The text half of OpenAI's clip, which runs sequence-first and returns no intermediates; repeats its forward."""

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
    """The width E of a tower's embeddings, after checking them on ids (B,T).

    Raises:
        UnsupportedTower: the embeddings differ from the host's own, or the host pools a row and they are not among the
            rows.
    """
    expected = tower.host(ids).float()
    actual = tower.encode(ids)
    rows = actual.words if actual.extra is None else torch.cat([actual.words, actual.extra], 1)
    if not expected.isfinite().all():
        warnings.warn("the model's weights are not finite, its text tower could not be verified", stacklevel=3)
        return expected.shape[1]
    scale = expected.abs().amax(1)
    # Room for TF32, or for the rounding of products of other sizes in half precision.
    tolerance = max(2e-3, 8 * torch.finfo(actual.text.dtype).eps) * scale
    difference = (actual.text.float() - expected).abs().amax(1)
    if not (difference <= tolerance).all():
        raise UnsupportedTower(
            f"expected the host's own text embedding, got a relative difference of {(difference / scale).max():.1e}"
        )
    difference = (rows.float() - expected[:, None]).abs().amax(2).amin(1)
    if tower.pools_row and not (difference <= tolerance).all():
        raise UnsupportedTower(
            f"expected one of the tokens to be the text's embedding, got a relative difference of at least "
            f"{(difference / scale).max():.1e}"
        )
    return expected.shape[1]
