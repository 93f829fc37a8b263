"""A process that embeds a folder, for tests that kill it. Its argument is JSON, its output a line for each event."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import clipkernels as ck
from clipkernels.collection import engines, ray_engine, run
from clipkernels.collection.store import Store, compaction
from clipkernels.collection.store.plans import plan_file


class Preceded:
    """A preprocessing that calls a function before each image, in an actor only.

    Args:
        first: the function.
        preprocess: the preprocessing.
    """

    def __init__(self, first: Callable[[], object], preprocess: Callable[[Image.Image], Tensor]) -> None:
        self.first, self.preprocess, self.driver = first, preprocess, os.getpid()

    def __call__(self, image: Image.Image) -> Tensor:
        """The preprocessed image."""
        if os.getpid() != self.driver:
            self.first()
        return self.preprocess(image)

    def __repr__(self) -> str:
        return repr(self.preprocess)


def break_actors(fault: str, out: str, model: nn.Module, preprocess: Callable[[Image.Image], Tensor]) -> Any:
    """Break what the Ray engine's actors need; return the preprocessing.

    fault: "model"; "plan"; "disk", which is full; "folder", which has a newer plan;
        "crash" of one process while two units are there; "crashes" of all.
    """
    driver, encode_units = os.getpid(), ray_engine.encode_units

    def check(module: nn.Module, arguments: Any) -> None:
        if os.getpid() != driver:
            raise RuntimeError("the model is broken")

    def fill() -> None:
        def replace(source: str, target: str) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.replace = replace  # type: ignore[assignment]

    def crash() -> None:
        if fault == "crash":
            if len(os.listdir(f"{out}/units")) != 2 or os.path.exists(f"{out}/../crashed"):
                return
            os.mkdir(f"{out}/../crashed")
        os.kill(os.getpid(), signal.SIGKILL)

    def encode(items: Any, *arguments: Any, **options: Any) -> None:
        plan_file(items.folder, items.generation).write_bytes(b"nothing")
        encode_units(items, *arguments, **options)

    if fault == "model":
        ck.tower_of(model).blocks[0].register_forward_pre_hook(check)
    elif fault == "plan":
        ray_engine.encode_units = encode
    renew = partial(os.utime, plan_file(out, 1))
    first: dict[str, Callable[[], object]] = {"disk": fill, "folder": renew, "crash": crash, "crashes": crash}
    return Preceded(first[fault], preprocess) if fault in first else preprocess


def main(options: dict[str, Any]) -> None:
    """Embed `source` to `out`; print "unit" after each unit, "compacted" after each shard and "done" at the end.

    `shard_rows` are the rows of a complete shard. `die` kills the process in the middle of its first compaction
    ("appending"), or after the shard and before the units are deleted ("appended"). `fault` is of `break_actors`. The
    other options are those of `ck.embed`.
    """
    torch.set_num_threads(1)
    model, preprocess, _ = ck.bundled()
    if fault := options.pop("fault", None):
        preprocess = break_actors(fault, options["out"], model, preprocess)
    die = options.pop("die", None)
    run.Store = partial(Store, shard_rows=options.pop("shard_rows"))  # type: ignore[misc, assignment]
    append_units = compaction.append_units

    def append(folder: Any, shard: Any, schema: Any, units: Any, tables: Any, notes: Any) -> Any:
        def dying() -> Any:
            yield from tables
            os.kill(os.getpid(), signal.SIGKILL)

        result = append_units(folder, shard, schema, units, dying() if die == "appending" else tables, notes)
        if die == "appended":
            os.kill(os.getpid(), signal.SIGKILL)
        print("compacted", flush=True)
        return result

    compaction.append_units = append
    done: list[int] = []

    def report(progress: engines.Progress) -> None:
        unit = progress.done // options["unit_rows"]
        if unit > len(done):
            done.append(unit)
            print("unit", flush=True)

    source, out = options.pop("source"), options.pop("out")
    result = run.embed(model, [source], out, preprocess=preprocess, progress=report, **options)
    print("done", json.dumps(result._asdict()), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
