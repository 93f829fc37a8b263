"""A process that embeds a folder, for tests that kill it. Its argument is JSON, its output a line for each event."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from typing import Any

import torch

import clipkernels as ck
from clipkernels.collection import run, store


def main(options: dict[str, Any]) -> None:
    """Embed `source` to `out`; print "unit" after each unit, "compacted" after each shard and "done" at the end.

    `shard_rows` are the rows of a complete shard. `die` kills the process in the middle of its first compaction
    ("appending"), or after the shard and before the units are deleted ("appended"). The other options are those of
    `ck.embed`.
    """
    torch.set_num_threads(1)
    die = options.pop("die", None)
    run.Store = partial(store.Store, shard_rows=options.pop("shard_rows"))  # type: ignore[misc, assignment]
    append_units = store.append_units

    def append(folder: Any, shard: Any, schema: Any, units: Any, tables: Any) -> Any:
        def dying() -> Any:
            yield from tables
            os.kill(os.getpid(), signal.SIGKILL)

        result = append_units(folder, shard, schema, units, dying() if die == "appending" else tables)
        if die == "appended":
            os.kill(os.getpid(), signal.SIGKILL)
        print("compacted", flush=True)
        return result

    store.append_units = append
    done: list[int] = []

    def report(progress: run.Progress) -> None:
        unit = progress.done // options["unit_rows"]
        if unit > len(done):
            done.append(unit)
            print("unit", flush=True)

    model, preprocess, _ = ck.bundled()
    source, out = options.pop("source"), options.pop("out")
    result = run.embed(model, [source], out, preprocess=preprocess, progress=report, **options)
    print("done", json.dumps(result._asdict()), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
