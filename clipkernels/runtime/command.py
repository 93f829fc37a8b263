"""The command line of an exported folder: embeddings of images, or the probabilities of texts."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from clipkernels.files import atomic_write
from clipkernels.images.walker import find_images
from clipkernels.messages import one_line
from clipkernels.runtime.encoders import Runtime

BATCH = 32
"""Images that are encoded before their results are printed."""


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
        count = write(runtime, paths, options.out, options.normalize) if options.out else show(runtime, paths, options)
    except BrokenPipeError:  # such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(2) from None
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(0 if count == len(paths) else 1 if count else 2)


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
    parser.add_argument(
        "--out",
        metavar="FILE.npy",
        help="write embeddings (n,E) float32 here, in the order of the files, not JSON to stdout",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads; default: the runtime's choice")
    options = parser.parse_args(arguments)
    if options.out and options.texts:
        parser.error("expected --out or --texts, got both")
    return options


def encoded(runtime: Runtime, paths: Sequence[str], normalize: bool) -> Iterator[tuple[list[str], Any]]:
    """Yield images by batches: their paths, and their embeddings (B,E), NaN for one that cannot be read."""
    for start in range(0, len(paths), BATCH):
        batch = list(paths[start : start + BATCH])
        yield batch, runtime.encode_image(batch, BATCH, normalize=normalize, errors="skip")


def write(runtime: Runtime, paths: Sequence[str], out: str, normalize: bool) -> int:
    """Write the embeddings (n,E) of images to a file, and return the number of those that could be read.

    Raises:
        ValueError: a file that cannot be written.
    """
    if os.path.exists(out) and not os.path.isfile(out):  # a device must not be replaced
        raise ValueError(f"expected a file for --out, got {out}")
    with ExitStack() as stack:
        try:
            temporary = stack.enter_context(atomic_write(out))
        except OSError as error:
            raise ValueError(f"expected a file that can be written for --out, got {out}: {error.strerror}") from error
        rows = []
        for _, embeddings in encoded(runtime, paths, normalize):
            rows.append(embeddings)
            if sys.stderr.isatty():
                print(f"\r{sum(map(len, rows))} of {len(paths)} images ", end="", file=sys.stderr)
        if sys.stderr.isatty():
            print(file=sys.stderr)
        embeddings = np.concatenate(rows)
        with open(temporary, "wb") as stream:  # a name without .npy stays as it is
            np.save(stream, embeddings)
    return int(np.isfinite(embeddings).all(1).sum())


def show(runtime: Runtime, paths: Sequence[str], options: argparse.Namespace) -> int:
    """Print the embeddings of images, or the probabilities of texts, and return the number that could be read."""
    texts = runtime.encode_text(options.texts) if options.texts else None
    count = 0
    for batch, embeddings in encoded(runtime, paths, options.normalize):
        readable = np.isfinite(embeddings).all(1)
        count += int(readable.sum())
        values = embeddings if texts is None else runtime.probabilities(embeddings, texts)
        for path, row, is_readable in zip(batch, values.tolist(), readable, strict=True):
            if texts is None:
                print(json.dumps({"path": path, "embedding": row if is_readable else None}))
            elif is_readable:
                show_texts(path, row, options)
        sys.stdout.flush()
    return count


def show_texts(path: str, row: Sequence[float], options: argparse.Namespace) -> None:
    """Print the probabilities of texts for an image, the likeliest first."""
    pairs = sorted(zip(row, options.texts, strict=True), key=lambda pair: -pair[0])
    if options.json:
        print(json.dumps({"path": path, "probabilities": {text: value for value, text in pairs}}))
    else:
        print(one_line(path), *(f"  {value:.4f}  {one_line(text)}" for value, text in pairs), sep="\n")
