"""Export towers to ONNX and by `torch.export`: parity with PyTorch, operators, images per second and η on the CPU.

    python -m bench.export --towers open_clip timm --batch 1 8 --rounds 5 --out export.csv
    python -m bench.export --towers clip --layers 2 --batch 1 --rounds 1

The models are one random-weight B/16 tower of each library, unpatched and patched, with a dynamic batch:

    images, shapes = torch.randn(2, 3, 224, 224), ({0: torch.export.Dim("batch", min=1, max=64)},)
    ck.patch(model, ck.EViT(keep=0.7)).eval()
    with torch.no_grad():
        program = torch.export.export(model.visual, (images,), dynamic_shapes=shapes, strict=False)
        torch.onnx.export(model.visual, (images,), "tower.onnx", dynamo=True, opset_version=20, dynamic_shapes=shapes)

`model.visual` is the tower of open_clip and of clip. A timm model is exported itself. The `vision_model` of
transformers can also be exported, but it returns every token and so computes all of them. This module returns
only the embedding, so that the last block computes only its CLS row:

    class Embedding(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return ck.encode_image(self.model, images).embedding

Speed-ups and η are against the fastest dense variant of the same runtime. All variants are interleaved and timed by the
CPU time of one thread. A graph with wrong embeddings, or a patched graph with a scatter, stops the run before anything
is timed. For a reduced tower one image in ten may differ by more than rounding, because two of its tokens may be nearly
tied.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import clipkernels as ck
from bench.result_files import draw, resume, write
from clipkernels.measure.environment import environment
from clipkernels.measure.timing import Speed, Times, Variant, measure, tabulate
from clipkernels.testing import open_clip_tower, openai_tower, randomized, timm_tower, transformers_tower

TOWERS: dict[str, Callable[[int | None], nn.Module]] = {
    "open_clip": lambda layers: open_clip_tower("ViT-B-16", layers),
    "transformers": lambda layers: transformers_tower("CLIPModel", layers or 12),
    "timm": lambda layers: timm_tower("vit_base_patch16_siglip_224", layers),
    "clip": lambda layers: openai_tower(layers or 12).float(),
}
NAMES = {
    "open_clip": "ViT-B-16",
    "transformers": "CLIPModel B/16",
    "timm": "vit_base_patch16_siglip_224",
    "clip": "ViT-B/16",
}
METHODS: dict[str, ck.Method | None] = {
    "dense (host)": None,
    "Dense()": ck.Dense(),
    "EViT(keep=0.7)": ck.EViT(0.7),
    "ToMe(r=13)": ck.ToMe(13),
}
RUNTIMES = ("eager", "torch.export", "onnxruntime")
# Batch sizes of the parity check, in addition to 2, the size of the exported example.
PARITY = (1, 3, 8)
SHAPES = ({0: torch.export.Dim("batch", min=1, max=64)},)
MAX_ERROR = 1e-4
GRAPH = {
    "scatter": ("Scatter", "ScatterElements", "ScatterND"),
    "nonzero": ("NonZero",),
    "loop": ("Loop", "Scan"),
    "if": ("If",),
}


class Embedding(nn.Module):
    """A module that returns only the embedding of images.

    It calls the tower's own forward, or `ck.encode_image` for a patched tower whose forward returns tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        tower = ck.tower_of(self.model)
        if ck.method_of(self.model) is None or not tower.returns_tokens:
            return tower.encode(images)
        return ck.encode_image(self.model, images).embedding


class Export(NamedTuple):
    """One variant in one runtime.

    encode: a function from images to embeddings.
    seconds: CPU seconds of the export.
    nodes: number of nodes of the graph by kind.
    error: largest difference from eager PyTorch, over the largest entry.
    cosine: smallest cosine of any image's embedding with eager PyTorch's.
    """

    encode: Callable[[Tensor], Tensor]
    seconds: float
    nodes: Mapping[str, int]
    error: float
    cosine: float


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    header = header_of(arguments)
    records = resume(arguments.out, header)
    console = Console(width=None if sys.stdout.isatty() else 160)
    for name in arguments.towers:
        done = {(row["library"], row["batch"]) for row in records}
        batches = [batch for batch in arguments.batch if (name, batch) not in done]
        if not batches:
            console.print(f"{name}: skipped, the file has all its rows")
            continue
        if importlib.util.find_spec(name) is None:
            console.print(f"{name}: skipped, it is not installed")
            continue
        torch.manual_seed(arguments.seed)
        model = randomized(TOWERS[name](arguments.layers), arguments.seed)
        with torch.no_grad():
            exports = export_all(model, name, arguments, console)
            for batch in batches:
                for runtime, rows in paired(model, exports, batch, arguments, console).items():
                    console.print(draw(f"{name} {NAMES[name]}, {runtime}, batch {batch}", rows))
                    for row in rows:
                        case = {"library": name, "tower": NAMES[name], "runtime": runtime, "batch": batch}
                        commit = {"commit": header["environment"]["commit"]}
                        records.append({**case, **record(row, exports[runtime][row.name]), **commit})
                if arguments.out:  # an interrupted run keeps its rows
                    write(records, header, arguments.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS), help="libraries; default: all")
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[1, 8], metavar="B", help="images per timed batch; default: 1 8"
    )
    parser.add_argument("--layers", type=int, metavar="L", help="cut every tower to its first L blocks")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; default %(default)s")
    parser.add_argument("--opset", type=int, default=20, help="ONNX opset, 18 or more; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="random weights and images; default %(default)s")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.csv",
        help="rows; FILE.json adds the environment; existing rows are not measured again",
    )
    arguments = parser.parse_args()
    if arguments.opset < 18:
        parser.error(f"expected --opset 18 or more, got {arguments.opset}")
    return arguments


def header_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the header of the rows: environment, package versions and options."""
    versions = environment()
    for name in ("onnx", "onnxruntime", "onnxscript", "timm", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    options = {name: getattr(arguments, name) for name in ("layers", "rounds", "opset", "seed")}
    return {"environment": versions, "clock": "process", **options}


def export_all(
    model: nn.Module, name: str, arguments: argparse.Namespace, console: Console
) -> dict[str, dict[str, Export]]:
    """Return every variant in every runtime, after checking its embeddings."""
    generator = torch.Generator().manual_seed(arguments.seed + 1)
    size = ck.tower_of(model).image_size
    inputs = {batch: torch.randn(batch, 3, *size, generator=generator) for batch in (2, *PARITY)}
    exports: dict[str, dict[str, Export]] = {runtime: {} for runtime in RUNTIMES}
    for variant, method in METHODS.items():
        memo = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        twin = copy.deepcopy(model, memo)
        module = Embedding(twin if method is None else ck.patch(twin, method)).eval()
        expected = {batch: module(images) for batch, images in inputs.items()}
        exports["eager"][variant] = Export(module, 0.0, {}, 0.0, 1.0)
        for runtime in RUNTIMES[1:]:
            start = time.process_time()
            if runtime == "onnxruntime":
                encode, nodes = in_onnxruntime(module, inputs[2], arguments.opset)
            else:
                program = torch.export.export(module, (inputs[2],), dynamic_shapes=SHAPES, strict=False)
                encode, nodes = program.module(), {"nodes": len(program.graph.nodes)}
            seconds = time.process_time() - start
            errors, cosine = compare(encode, inputs, expected)
            error, num_wrong = errors.max().item(), int((errors > MAX_ERROR).sum())
            exports[runtime][variant] = Export(encode, seconds, nodes, error, cosine)
            counts = ", ".join(f"{count} {kind}" for kind, count in nodes.items())
            difference = f"error {error:.1e}, {num_wrong} of {len(errors)} images differ"
            console.print(f"{name}, {variant}, {runtime}: {seconds:.0f} s, {difference}, {counts}")
            # If two choices differ by less than rounding, another runtime may make the other one.
            max_wrong = 0 if isinstance(method or ck.Dense(), ck.Dense) else len(errors) // 10
            assert num_wrong <= max_wrong and cosine > 0.999, (
                f"{name} {variant} in {runtime}: {difference}, cosine {cosine:.6f}"
            )
            assert method is None or not nodes.get("scatter"), (
                f"{name} {variant}: expected no scatter in the graph, got {nodes['scatter']}"
            )
    return exports


def in_onnxruntime(module: nn.Module, images: Tensor, opset: int) -> tuple[Callable[[Tensor], Tensor], dict[str, int]]:
    """Return a module exported to ONNX as a function on one CPU thread, and its number of nodes by kind."""
    program = torch.onnx.export(
        module, (images,), dynamo=True, opset_version=opset, dynamic_shapes=SHAPES, verbose=False
    )
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/tower.onnx"
        program.save(file)
        nodes = count(onnx.load(file, load_external_data=False))
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0]), nodes


def count(model: onnx.ModelProto) -> dict[str, int]:
    """Return an ONNX model's number of nodes, and of those that are slow or make shapes depend on data, by kind."""

    def walk(nodes: Any) -> Counter[str]:
        kinds = Counter(node.op_type for node in nodes)
        for node in nodes:
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    kinds += walk(graph.node)
        return kinds

    kinds = walk(model.graph.node)
    for function in model.functions:
        kinds += walk(function.node)
    return {"nodes": kinds.total(), **{name: sum(kinds[kind] for kind in group) for name, group in GRAPH.items()}}


def compare(
    encode: Callable[[Tensor], Tensor], inputs: Mapping[int, Tensor], expected: Mapping[int, Tensor]
) -> tuple[Tensor, float]:
    """Return each image's largest error over the largest entry at every batch size, and the smallest cosine of all."""
    actual = {batch: encode(images) for batch, images in inputs.items()}
    errors = [(actual[batch] - right).abs().amax(1) / right.abs().max() for batch, right in expected.items()]
    cosines = [cosine_similarity(actual[batch], right).min().item() for batch, right in expected.items()]
    return torch.cat(errors), min(cosines)


def paired(
    model: nn.Module,
    exports: Mapping[str, Mapping[str, Export]],
    batch: int,
    arguments: argparse.Namespace,
    console: Console,
) -> dict[str, list[Speed]]:
    """Return the rows of each runtime at one batch size, with the variants of all runtimes interleaved."""
    tower = ck.tower_of(model)
    generator = torch.Generator().manual_seed(arguments.seed + 2)
    sets = torch.randn(3, batch, 3, *tower.image_size, generator=generator).unbind()

    def runner(encode: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        turn = cycle(sets)
        return lambda: encode(next(turn))

    calls = {
        f"{runtime} {variant}": runner(export.encode)
        for runtime, variants in exports.items()
        for variant, export in variants.items()
    }
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"batch {batch}", total=(arguments.rounds + 1) * len(calls))
        advance = lambda: bar.advance(task)  # noqa: E731
        times = measure(calls, arguments.rounds, seed=arguments.seed, clock="process", progress=advance)
    rows = {}
    for runtime, variants in exports.items():
        seconds = {variant: times.seconds[f"{runtime} {variant}"] for variant in variants}
        ran = {
            variant: Variant(export.encode, METHODS[variant] or ck.Dense(), tower.pools_cls and bool(METHODS[variant]))
            for variant, export in variants.items()
        }
        rows[runtime] = tabulate(Times(seconds), ran, tower, batch)
    return rows


def record(row: Speed, export: Export) -> dict[str, Any]:
    """Return one row as plain numbers."""
    return {
        **row.record(),
        "error": float(f"{export.error:.2e}"),
        "cosine": round(export.cosine, 7),
        "export_seconds": round(export.seconds, 1),
        **{kind: export.nodes.get(kind) for kind in ("nodes", *GRAPH)},
    }


if __name__ == "__main__":
    main()
