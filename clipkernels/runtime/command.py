"""The command line of an exported folder: embeddings of images, or the probabilities of texts."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipkernels.images.walker import find_images
from clipkernels.messages import one_line
from clipkernels.runtime.encoders import Runtime


def main(folder: Path | None, arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        folder: the exported folder that this is a copy in, or None if the first argument names it.
        arguments: the arguments, or None for those of the process.
    Raises:
        SystemExit: with status 1 if an image was skipped, 2 for an error, which is one line on stderr.
    """
    options = parse(folder, arguments)
    warnings.showwarning = lambda message, *_, **__: print(message, file=sys.stderr)
    try:
        runtime = Runtime(options.folder, threads=options.threads)
        paths = find_images(options.images).paths
        embeddings = runtime.encode_image(paths, normalize=options.normalize, errors="skip")
        read = np.isfinite(embeddings).all(1)
        if options.texts:
            show_texts(runtime, paths, embeddings, options)
        elif options.out:
            np.save(options.out, embeddings)
        else:
            for path, embedding in zip(paths, embeddings.tolist(), strict=True):
                print_json({"path": path, "embedding": embedding})
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        raise SystemExit(2) from error
    raise SystemExit(0 if read.all() else 1 if read.any() else 2)


def parse(folder: Path | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m clipkernels.runtime" if folder is None else f"python {os.path.join(folder.name, 'runtime')}",
        description="Encode images with an exported model, and compare them with texts.",
    )
    if folder is None:
        parser.add_argument("folder", metavar="FOLDER", help="folder that clipkernels export wrote")
    else:
        parser.set_defaults(folder=folder)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders or quoted globs")
    parser.add_argument("--texts", nargs="+", metavar="TEXT", help="print the probability of each text")
    parser.add_argument("--normalize", action="store_true", help="divide embeddings by their length")
    parser.add_argument("--json", action="store_true", help="with --texts: an object per image, for programs")
    parser.add_argument("--out", metavar="FILE.npy", help="write embeddings (n,E) float32 here, not JSON to stdout")
    parser.add_argument("--threads", type=int, metavar="N", help="threads; default: the runtime's choice")
    options = parser.parse_args(arguments)
    if options.out and options.texts:
        parser.error("expected --out or --texts, got both")
    return options


def show_texts(runtime: Runtime, paths: Sequence[str], embeddings: Any, options: argparse.Namespace) -> None:
    """Print the probabilities of texts for each image that could be read, the likeliest first."""
    probabilities = runtime.probabilities(embeddings, runtime.encode_text(options.texts))
    for path, row in zip(paths, probabilities.tolist(), strict=True):
        if row[0] != row[0]:
            continue
        pairs = sorted(zip(row, options.texts, strict=True), key=lambda pair: -pair[0])
        if options.json:
            print_json({"path": path, "probabilities": {text: value for value, text in pairs}})
        else:
            print(one_line(path), *(f"  {value:.4f}  {one_line(text)}" for value, text in pairs), sep="\n")


def print_json(record: dict[str, Any]) -> None:
    """Print an object in a line; rows of NaN become null."""
    embedding = record.get("embedding")
    if embedding is not None and any(value != value for value in embedding):
        record = {**record, "embedding": None}
    print(json.dumps(record))
