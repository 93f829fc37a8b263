"""The class `Runtime`: an exported folder that encodes images and texts."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from PIL import Image

from clipkernels.images.reader import Reader
from clipkernels.messages import join_sizes, one_line, reason_of, skip_message
from clipkernels.runtime.engines import Engine, load_engine
from clipkernels.runtime.manifest import check_files, read_export
from clipkernels.runtime.preprocessing import preprocess
from clipkernels.runtime.tokenization import TextTokenizer

DEFAULT_SCALE = 100.0
"""The scale of cosines for a model without one, as for heads in clipkernels."""
PARTS = {
    "text": ("text tower", "export a model with a text tower"),
    "tokenizer": ("tokenizer", "export with tokenizer="),
}
"""The parts of a folder that texts need, by their names in export.json: nouns and remedies."""


class Runtime:
    """An exported folder: images and texts to embeddings, without torch. Threads may share it.

    Args:
        folder: a folder that `clipkernels export` wrote.
        threads: threads of a call, or None for the runtime's own choice.
        verify: compare the SHA-256 of every file.
    Attributes:
        info: the content of export.json.
        logit_scale, logit_bias: the scale and the bias of the model's logits, or None.
    Raises:
        ValueError: no exported folder, one of a newer format, or one that has changed; or no number of threads.
        ImportError: the folder's runtime is not installed.
        OSError: a file cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], *, threads: int | None = None, verify: bool = True) -> None:
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ValueError(f"threads must be at least 1, or None, got {threads!r:.40}")
        # Absolute, because the text tower is read later and copies open the folder again.
        self.folder, self.threads = Path(os.path.abspath(folder)), threads
        self.info = read_export(folder)
        if verify:
            check_files(folder, self.info)
        self.logit_scale: float | None = self.info["logit_scale"]
        self.logit_bias: float | None = self.info["logit_bias"]
        self._image = self._engine("image")
        self._reader = Reader()

    def encode_image(
        self,
        images: Any,
        batch_size: int = 32,
        *,
        normalize: bool = False,
        errors: Literal["raise", "skip"] = "raise",
    ) -> Any:
        """The embeddings (n,E) float32 of n images, as the model gives them.

        Args:
            images: n images, or one: paths, the content of files as bytes, PIL images, arrays (H,W,3) uint8, or
                preprocessed arrays (3,S,S) float32.
            batch_size: images of a forward.
            normalize: divide embeddings by their length.
            errors: "skip" warns of an image that cannot be read and gives it a row of NaN.
        Raises:
            ValueError: an image that cannot be read, with its name.
            TypeError: no images.
        """
        if errors not in ("raise", "skip"):
            raise ValueError(f'errors must be "raise" or "skip", got {errors!r:.40}')
        single = isinstance(images, str | os.PathLike | bytes | Image.Image) or getattr(images, "ndim", 0) == 3
        if not single and not isinstance(images, Iterable):
            raise TypeError(f"images must be an image or a list of images, got {images!r:.80}")
        items = [images] if single else list(images)
        embeddings = np.full((len(items), self.info["image"]["width"]), np.nan, np.float32)
        for start in _starts(len(items), batch_size):
            rows, pixels = [], []
            for row in range(start, min(start + batch_size, len(items))):
                try:
                    pixels.append(self.preprocess(items[row]))
                    rows.append(row)
                except Exception as error:  # Pillow raises exceptions of many kinds for a broken file
                    if errors == "raise":
                        _refuse(items[row], row, error)
                    warnings.warn(skip_message(_name_of(items[row], row), reason_of(error)), stacklevel=2)
            if rows:
                embeddings[rows] = self._image(np.stack(pixels))
        return _unit(embeddings) if normalize else embeddings

    def encode_text(self, texts: str | Sequence[str], batch_size: int = 64, *, normalize: bool = False) -> Any:
        """The embeddings (n,E) float32 of n texts, as the model gives them; arguments as in `encode_image`.

        Raises:
            ValueError: the folder has no text tower or no tokenizer.
            TypeError: no list of texts.
        """
        embeddings = self.encode_ids(self.tokenize([texts] if isinstance(texts, str) else texts), batch_size)
        return _unit(embeddings) if normalize else embeddings

    def encode_ids(self, ids: Any, batch_size: int = 64) -> Any:
        """The embeddings (n,E) float32 of token ids (n,L), of a folder with a text tower.

        Raises:
            ValueError: the folder has no text tower, or ids of another shape or dtype.
        """
        text, ids = self._part("text"), np.asarray(ids)
        length = text["context_length"]
        if ids.ndim != 2 or ids.shape[1] != length or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"ids must be (n,{length}) of integers, got ({join_sizes(ids.shape)}) {ids.dtype}")
        embeddings = np.empty((len(ids), text["width"]), np.float32)
        for start in _starts(len(ids), batch_size):
            rows = slice(start, start + batch_size)
            embeddings[rows] = self._text(ids[rows].astype(text["dtype"]))
        return embeddings

    def tokenize(self, texts: Sequence[str]) -> Any:
        """The token ids (n,L) int64 of n texts; errors as in `encode_text`."""
        return self._tokenizer(texts)

    def preprocess(self, image: Any) -> Any:
        """The pixels (3,S,S) float32 of an image as in `encode_image`; preprocessed ones are returned as they are.

        A file is read as clipkernels reads it: upright, without alpha, 16 bits scaled to 8.

        Raises:
            ValueError, OSError: the image cannot be read, or has another shape.
            Exception: of any kind, as Pillow's decoders raise it for a broken file.
        """
        size = tuple(self.info["image"]["size"])
        if isinstance(image, np.ndarray):
            if image.dtype == np.float32 and image.shape == (3, *size):
                return image
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                expected = f"expected an array (H,W,3) uint8 or (3,{size[0]},{size[1]}) float32"
                raise ValueError(f"{expected}, got {image.shape} {image.dtype}")
            image = Image.fromarray(image)
        elif isinstance(image, bytes):
            image = self._reader.decode(io.BytesIO(image))
        elif isinstance(image, str | os.PathLike):
            image = self._reader.read(image)
        elif not isinstance(image, Image.Image):
            raise ValueError(f"expected a path, bytes, a PIL image or an array, got {image!r:.60}")
        pixels = preprocess(image, self.info["preprocess"]["steps"])
        if pixels.shape != (3, *size):
            raise ValueError(f"expected pixels (3,{size[0]},{size[1]}) from the preprocessing, got {pixels.shape}")
        return pixels

    def probabilities(self, images: Any, texts: Any) -> Any:
        """The probabilities (n,K) of K texts for n images, by their embeddings (n,E) and (K,E).

        They are a softmax over the texts, or sigmoids if the model's logits have a bias, as SigLIP's.

        Raises:
            ValueError: embeddings of other shapes, or no text.
        """
        images, texts = np.asarray(images), np.asarray(texts)
        if images.ndim != 2 or texts.ndim != 2 or not len(texts) or images.shape[1] != texts.shape[1]:
            shapes = f"({join_sizes(images.shape)}) and ({join_sizes(texts.shape)})"
            raise ValueError(f"expected embeddings (n,E) of images and (K,E) of texts, K at least 1, got {shapes}")
        logits = (self.logit_scale or DEFAULT_SCALE) * (_unit(images) @ _unit(texts).T)
        if self.logit_bias is not None:
            return 1 / (1 + np.exp(-(logits + np.float32(self.logit_bias))))
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and other processes open the folder again."""
        return partial(type(self), threads=self.threads, verify=False), (self.folder,)

    def __repr__(self) -> str:
        method = self.info["method"] or "dense"
        return f"Runtime({str(self.folder)!r}, {self.info['runtime']}, {self.info['precision']}, {method})"

    @cached_property
    def _text(self) -> Engine:
        return self._engine("text")

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        self._part("text")
        return TextTokenizer(self.folder, self._part("tokenizer"))

    def _part(self, part: str) -> Any:
        """The record of the text tower or the tokenizer.

        Raises:
            ValueError: the folder has none.
        """
        name, remedy = PARTS[part]
        if self.info[part] is None:
            raise ValueError(f"expected a folder with a {name} for texts, got {self.folder} without: {remedy}")
        return self.info[part]

    def _engine(self, part: str) -> Engine:
        graph = self.info[part]
        return load_engine(
            self.info["runtime"], self.info["precision"], self.folder / graph["file"], graph, self.threads
        )


def _starts(count: int, batch_size: int) -> Iterable[int]:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r:.40}")
    return range(0, count, batch_size)


def _unit(embeddings: Any) -> Any:
    """Embeddings divided by their length, zeros left as they are."""
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), np.float32(1e-12))


def _name_of(image: Any, row: int) -> str:
    return os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {row}"


def _refuse(image: Any, row: int, error: Exception) -> NoReturn:
    name = one_line(_name_of(image, row))
    raise ValueError(f"expected an image that can be read, got {name}: {reason_of(error)}") from error
