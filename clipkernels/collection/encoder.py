"""The encoder of a collection: prepared batches to rows of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipkernels.adapters.text import find_text_encoder
from clipkernels.adapters.tokenizers import Tokenizer, find_cut, ids_of
from clipkernels.collection.packages import pyarrow
from clipkernels.collection.preparation import Prepared
from clipkernels.encode import encode_image, tower_weight
from clipkernels.freezing import CompiledForward
from clipkernels.messages import first_line

if TYPE_CHECKING:
    import pyarrow as pa


class Encoder:
    """A model that embeds prepared batches. It is in eval mode; patched or not.

    Args:
        model: a model that `ck.encode_image` takes.
        schema: the columns of the rows, as `layout.unit_schema` gives them.
        batch_size: the images of a whole batch.
        normalised: divide embeddings by their length.
        text: the column of captions, which are embedded too, or None.
        tokenizer: as in `ck.Classifier`, for captions.
        compiled: compile the tower with `torch.compile`, on a CPU with frozen weights, which must not change then.
            Batches that are not whole are filled up with copies of their last image, because another size would be
            compiled again.
    """

    def __init__(
        self,
        model: nn.Module,
        schema: pa.Schema,
        batch_size: int,
        normalised: bool,
        text: str | None = None,
        tokenizer: Tokenizer | None = None,
        compiled: bool = False,
    ) -> None:
        self.model, self.schema, self.batch_size = model.eval(), schema, batch_size
        self.normalised, self.text, self.tokenizer, self.compiled = normalised, text, tokenizer, compiled
        self.weights = tower_weight(model)
        self.cut_texts = 0
        run: Callable[[Tensor], Tensor] = lambda images: encode_image(model, images).embedding  # noqa: E731
        self._run: Callable[[Tensor], Tensor] = (
            CompiledForward(run, freeze=self.weights.device.type == "cpu") if compiled else run
        )

    @torch.inference_mode()
    def __call__(self, batch: Prepared) -> pa.Table:
        """The rows of a batch: embeddings of the images, and the reason of each item that has none."""
        pa = pyarrow()
        reasons, width = list(batch.reasons), self.schema.field("embedding").type.list_size
        vectors = np.zeros((len(batch.ids), width), np.float32)
        rows = [row for row, reason in enumerate(reasons) if reason is None]
        if batch.images is not None:
            vectors[rows] = self._finish(self.embed(batch.images))
        dtype = self.schema.field("embedding").type.value_type.to_pandas_dtype()
        vectors, faults = _as_stored(vectors, dtype)
        for row in rows:
            reasons[row] = faults[row] and f"the model's embedding {faults[row]}"
        columns: dict[str, Any] = {name: [record.get(name) for record in batch.records] for name in self.schema.names}
        columns["id"] = batch.ids
        if self.text is not None:
            texts = [record.get(self.text) for record in batch.records]
            columns["text"] = texts
            captions, faults = _as_stored(self._captions(texts, width), dtype)
            for row, has_text in enumerate(texts):
                if has_text and faults[row] and reasons[row] is None:
                    reasons[row] = f"the model's embedding of the text {faults[row]}"
            columns["text_embedding"] = self._vectors(captions, faults)
        columns["reason"] = reasons
        columns["embedding"] = self._vectors(vectors, reasons)
        arrays = [
            columns[field.name]
            if isinstance(columns[field.name], pa.Array)
            else pa.array(columns[field.name], field.type)
            for field in self.schema
        ]
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def embed(self, images: Tensor) -> Tensor:
        """The embeddings (B,E) fp32 of preprocessed images (B,3,S,S), as the tower gives them.

        Raises:
            RuntimeError: the tower cannot be compiled.
        """
        count = len(images)
        if self.compiled and count < self.batch_size:
            images = torch.cat([images, images[-1:].expand(self.batch_size - count, *images.shape[1:])])
        images = images.to(self.weights.device, self.weights.dtype, non_blocking=True)
        try:
            embeddings = self._run(images)
        except Exception as error:  # of the tower, the compiler or the device
            if not isinstance(self._run, CompiledForward) or self._run.cost is not None:
                raise
            raise RuntimeError(
                f"torch.compile cannot compile this tower, leave out compiled=True (--compile): {first_line(error)}"
            ) from error
        return embeddings[:count].float()

    def _captions(self, texts: Sequence[str | None], width: int) -> Any:
        """The embeddings (B,E) fp32 of texts; zeros where there is none."""
        vectors, rows = np.zeros((len(texts), width), np.float32), [r for r, text in enumerate(texts) if text]
        if rows:
            encoder, captions = find_text_encoder(self.model), [str(texts[row]) for row in rows]
            ids = ids_of(self.tokenizer, captions, encoder.context)
            self.cut_texts += len(find_cut(self.tokenizer, captions, ids, encoder.context))
            vectors[rows] = self._finish(encoder.encode(ids.to(self.weights.device)).float())
        return vectors

    def _finish(self, embeddings: Tensor) -> Any:
        """Embeddings as they are stored, but in fp32."""
        return (normalize(embeddings) if self.normalised else embeddings).cpu().numpy()

    def _vectors(self, vectors: Any, faults: Sequence[str | None]) -> pa.Array:
        """Vectors (B,E) as an Arrow array, zeros where they have a fault.

        They are not null, because pyarrow before version 26 cannot read null lists of a fixed size from Parquet.
        """
        pa, kind = pyarrow(), self.schema.field("embedding").type
        vectors[[fault is not None for fault in faults]] = 0
        return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), kind.value_type), type=kind)


def _as_stored(vectors: Any, dtype: Any) -> tuple[Any, list[str | None]]:
    """Vectors (B,E) fp32 in the dtype of the files, and why each is of no use there, or None."""
    with np.errstate(over="ignore", invalid="ignore"):
        stored = vectors.astype(dtype)
    finite, fits, nonzero = np.isfinite(vectors).all(1), np.isfinite(stored).all(1), stored.any(1)
    faults: list[str | None] = [None] * len(vectors)
    for row in np.flatnonzero(~(fits & nonzero)).tolist():
        if not finite[row]:
            faults[row] = "is not finite"
        else:
            faults[row] = "is zero" if fits[row] else f"is too large for {np.dtype(dtype).name}"
    return stored, faults
