"""The report of an export: parity, products in INT8, sizes, seconds, memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from clipkernels.exporting.parity import Parity


class Products(NamedTuple):
    """The products of a graph with a weight: matrix products and convolutions.

    quantised: number of those that run in INT8.
    float_names: names in the graph of those that stay float, because INT8 would change the embeddings too much.
    """

    quantised: int
    float_names: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The values for JSON."""
        return {"quantised": self.quantised, "float": list(self.float_names)}


class Report(NamedTuple):
    """The result of `ck.export`.

    folder: the folder.
    runtime, precision: as they were asked for.
    image, text: parity of the files in the folder with PyTorch in fp32; None without a text tower.
    products: the products with a weight in the image graph that are INT8; None in other precisions.
    nodes: number of nodes of the image graph, and of those by kind that make it slow or its shapes depend on data.
    sizes: bytes of each file by name.
    seconds: of writing each graph, quantisation included.
    peak_memory: peak resident bytes of a process that loads the image graph and encodes a batch of eight; None where
        the system does not tell.
    """

    folder: str
    runtime: str
    precision: str
    image: Parity
    text: Parity | None
    products: Products | None
    nodes: Mapping[str, int]
    sizes: Mapping[str, int]
    seconds: Mapping[str, float]
    peak_memory: int | None

    def record(self) -> dict[str, Any]:
        """The values for JSON."""
        return {
            "image": self.image.record(),
            "text": None if self.text is None else self.text.record(),
            "products": None if self.products is None else self.products.record(),
            "nodes": dict(self.nodes),
            "sizes": dict(self.sizes),
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "peak_memory": self.peak_memory,
        }
