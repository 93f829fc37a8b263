"""Report the measurements of a device as tables and pictures: targets, towers, operations.

    python -m bench.gpu.report bench/results/nvidia-h200
    python -m bench.gpu.report bench/results/nvidia-h200 --into docs/results.md

The report reads a folder filled by `make gpu`, complete or not, and writes report.md, roofline.png and efficiency.png
into it. With --into, the summary replaces the part of that file between <!-- gpu --> and <!-- /gpu -->. Nothing is
extrapolated: a missing row is missing in the report, and a target without rows says "not measured". The reason of a
missed target is explained by hand in the folder's reasons.json, {target: reason}, and appears next to the target.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu.targets import Row, efficiencies, fastest, grouped, targets, way_of
from bench.result_files import read_csv, save
from clipkernels.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- gpu -->", "<!-- /gpu -->"
# Titles of the tables that are shown unchanged.
WHOLE = {
    "launches": "Kernel launches of one image",
    "tuned": "Configurations: a kernel's own and the fastest",
    "counters": "Counters of the two kernels furthest from their floor",
    "distill-cost-bf16": "CLIP-TD's distance",
    "check-first": "Against fp64, bf16, B/16",
    "check-bfloat16": "Against fp64, bf16",
    "check-float32": "Against fp64, fp32",
    "check-float16": "Against fp64, fp16",
}
NOTHING = "No GPU has been measured yet: `make gpu` on a machine with one fills this in.\n"


class Results(NamedTuple):
    """A folder with its rows of operations and of towers, their environment, and the reasons of missed targets."""

    folder: Path
    ops: list[Row]
    towers: list[Row]
    environment: Row
    reasons: dict[str, str]


def main() -> None:
    arguments = parse()
    print(render(arguments.folder, arguments.into))


def render(folder: Path, document: Path | None = None) -> str:
    """Write the report and the pictures of a folder's results, and the summary into a document; return the summary.

    Without matplotlib, no pictures are written.
    """
    results = read(folder)
    if find_spec("matplotlib"):
        if results.ops:
            draw(roofline, results.ops, folder / "roofline.png")
        if results.towers:
            draw(panels, results.towers, folder / "efficiency.png")
    title = results.environment.get("device", folder.name)
    text = f"# {title}\n\n{summary(results, folder)}{tables(results)}"
    with atomic_write(folder / "report.md") as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
    if document:
        put(summary(results, document.parent), document)
    return summary(results, Path.cwd())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="bench/results/<device>")
    parser.add_argument("--into", type=Path, metavar="FILE.md", help="also put the summary into this file")
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        parser.error(f"expected a folder with results of `make gpu`, got {arguments.folder}")
    return arguments


def read(folder: Path) -> Results:
    """Return the rows of the campaign's files that exist in a folder."""
    ops = [{key: number(value) for key, value in row.items()} for row in read_csv(folder / "ops.csv")]
    towers, environment, reasons = [], ops[-1] if ops else {}, {}
    for file in sorted(folder.glob("towers-bf16*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        environment = content["environment"]
        towers += [{**row, "run": file.stem} for row in content["rows"]]
    if (folder / "reasons.json").exists():
        reasons = json.loads((folder / "reasons.json").read_text(encoding="utf-8"))
    return Results(folder, ops, towers, environment, reasons)


def number(text: str) -> Any:
    """Return a CSV field as a number if it is one, else as text; None if it is empty."""
    try:
        return float(text)
    except ValueError:
        return text or None


def summary(results: Results, base: Path) -> str:
    """Return the targets, the towers and the pictures, linked relative to the folder of the text."""
    if not results.ops and not results.towers:
        return NOTHING
    environment = results.environment
    versions = ", ".join(
        f"{name} {environment[name]}" for name in ("torch", "triton", "driver") if environment.get(name)
    )
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in (*results.ops, *results.towers)))
    lines = [
        f"One {environment.get('device')} ({versions}; commits {commits}), bf16, random weights, random images.",
        "",
    ]
    lines += markdown(
        ("target", "bound", "measured: worst to best", "worst at", "result", "reason"), target_rows(results)
    )
    if results.towers:
        lines += ["", "The fastest way of each method; η against the fastest measured dense variant:", ""]
        lines += markdown(("tower", "method", "batch 1", "batch 32", "batch 256"), tower_rows(results.towers))
    for name in ("roofline", "efficiency"):
        picture = (results.folder / f"{name}.png").resolve()
        if picture.exists():
            lines += ["", f"![{name}]({Path(os.path.relpath(picture, base.resolve())).as_posix()})"]
    return "\n".join([*lines, ""])


def target_rows(results: Results) -> list[tuple[str, ...]]:
    """Return a row for each target."""
    lines: list[tuple[str, ...]] = []
    for target in targets(results.ops, results.towers):
        if not target.figures:
            lines.append((target.name, target.bound, "not measured", "", "", ""))
            continue
        low_is_good = target.is_met(-math.inf)
        order = sorted(target.figures.items(), key=lambda item: item[1], reverse=low_is_good)
        (where, worst), (_, best) = order[0], order[-1]
        missed = sum(not target.is_met(value) for value in target.figures.values())
        verdict = f"missed in {missed} of {len(order)}" if missed else "met"
        reason = results.reasons.get(target.name, "") if missed else ""
        if target.unmeasured:
            gaps = ", ".join(f"{where} {modes}" for where, modes in target.unmeasured.items())
            reason = f"{reason}; host not measured under: {gaps}".removeprefix("; ")
        lines.append((target.name, target.bound, f"{worst:.2f} to {best:.2f}", where, verdict, reason))
    return lines


def tower_rows(towers: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return a row for each tower and method: images/s and η of its fastest variant, by batch."""
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for (model, batch), rows in grouped(towers).items():
        etas = efficiencies(rows, batch)
        for name, (row, _) in fastest(rows).items():
            eta = f", η {etas[f'{model} {name}']:.2f}" if f"{model} {name}" in etas else ""
            cell = f"{per_second(row)}/s{eta} ({way_of(row)})"
            lines.setdefault((model, name), {})[batch] = cell
    return [(*name, *(cells.get(batch, "") for batch in (1, 32, 256))) for name, cells in lines.items()]


def per_second(row: Row) -> str:
    """Return images/s as text, with at least three significant digits."""
    images = row["images_per_second"]
    return f"{images:,.0f}" if images >= 100 else f"{images:.3g}"


def tables(results: Results) -> str:
    """Return all tables: one for each run, tower and batch, one of the operations, and the small tables unchanged."""
    lines: list[str] = []
    columns = ("variant", "ms", "images/s", "speed-up", "η", "against", "of matmul", "MiB")
    for run in dict.fromkeys(row["run"] for row in results.towers):
        for (model, batch), rows in grouped(row for row in results.towers if row["run"] == run).items():
            cells = [
                (
                    row["variant"],
                    f"{row['milliseconds']:.3f}",
                    per_second(row),
                    f"×{row['speedup']:.2f}",
                    f"{row['efficiency']:.2f} [{row['efficiency_p10']:.2f}-{row['efficiency_p90']:.2f}]",
                    row["baseline"],
                    f"{row['of_matmul']:.0%}",
                    "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
                )
                for row in rows
            ]
            title = f"## {model}, batch {batch} ({run}, commit {rows[0]['commit']})"
            lines += ["", title, "", *markdown(columns, cells)]
    if results.ops:
        cells = [
            (
                row["op"],
                f"{row['tower']} b{row['batch']:.0f}",
                row["variant"],
                f"{row['microseconds']:.1f}",
                f"{row['gb_per_s']:.0f}",
                "" if row["tflop_per_s"] is None else f"{row['tflop_per_s']:.1f}",
                f"{row['of_floor']:.0%}",
            )
            for row in sorted(results.ops, key=lambda row: (row["op"], row["tower"], row["batch"], row["microseconds"]))
        ]
        columns = ("operation", "shape", "variant", "µs", "GB/s", "TFLOP/s", "of its floor")
        lines += ["", "## Operations", "", *markdown(columns, cells)]
    if (results.folder / "staircase.json").exists():
        gains = json.loads((results.folder / "staircase.json").read_text(encoding="utf-8"))["rounding"]
        cells = [[str(value) for value in gain.values()] for gain in gains]
        lines += ["", "## Keep counts rounded up", "", *markdown(list(gains[0]), cells)]
    for name, title in WHOLE.items():
        rows = read_csv(results.folder / f"{name}.csv")
        if rows:
            lines += ["", f"## {title}", "", *markdown(list(rows[0]), [list(row.values()) for row in rows])]
    return "\n".join([*lines, ""])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def put(text: str, document: Path) -> None:
    """Replace the text between the two marks.

    Raises:
        SystemExit: the marks are missing or in the wrong order.
    """
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"error: expected {BEGIN} and {END} in {document}, got neither or one: add both")
    with atomic_write(document) as temporary:
        Path(temporary).write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def draw(picture: Callable[[Any, Sequence[Row]], None], rows: Sequence[Row], file: Path) -> None:
    """Draw a picture into a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    picture(figure, rows)
    save(figure, file)


def roofline(figure: Any, ops: Sequence[Row]) -> None:
    """Plot TFLOP/s against operations per byte for matrix products, and the share of a copy's speed for the rest."""
    roof_axes, share_axes = figure.subplots(1, 2)
    batch = max(row["batch"] for row in ops)
    fused = any(row["variant"] == "triton" for row in ops)
    ways = ("triton", "auto") if fused else ("reference",)
    ours = [row for row in ops if row["batch"] == batch and row["variant"] in ways]
    best: dict[tuple[str, str], Row] = {}
    for row in ours:
        key = row["op"], row["tower"]
        if key not in best or row["microseconds"] < best[key]["microseconds"]:
            best[key] = row
    copy, rate = (ops[-1][name] for name in ("copy_gb_per_s", "matmul_tflop_per_s"))
    multiplying = [row for row in best.values() if row["flops"]]
    if multiplying:
        intensities = [row["flops"] / row["bytes"] for row in multiplying]
        span = [min(intensities) / 2, max(*intensities, 2e3 * rate / copy)]
        xs = [span[0] * (span[1] / span[0]) ** (step / 99) for step in range(100)]
        roof = [min(x * copy / 1e3, rate) for x in xs]
        roof_axes.plot(xs, roof, color="black", label=f"{copy:.0f} GB/s, {rate:.3g} TFLOP/s")
        for index, op in enumerate(dict.fromkeys(row["op"] for row in multiplying)):
            points_of_op = [row for row in multiplying if row["op"] == op]
            points = zip(*((row["flops"] / row["bytes"], row["tflop_per_s"]) for row in points_of_op), strict=True)
            roof_axes.plot(*points, "os"[index // 10], label=op)  # matplotlib cycles through ten colours
        roof_axes.set(
            xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s", title=f"batch {batch:.0f}"
        )
        roof_axes.legend(fontsize=7)
    copying = sorted((row for row in best.values() if not row["flops"]), key=lambda row: row["of_copy"])
    share_axes.barh([f"{row['op']} {row['tower']}" for row in copying], [row["of_copy"] for row in copying])
    share_axes.axvline(1, color="black")
    share_axes.set(xlabel=f"share of a copy's {copy:.0f} GB/s", title=f"no products, batch {batch:.0f}")
    share_axes.tick_params(axis="y", labelsize=6)


def panels(figure: Any, towers: Sequence[Row]) -> None:
    """Plot η of every method's fastest way against the batch, one panel for each tower."""
    models = list(dict.fromkeys(row["model"] for row in towers))
    batches = sorted({row["batch"] for row in towers})
    figure.set_size_inches(4 * max(len(models), 2), 5)
    for panel, model in zip(figure.subplots(1, len(models), sharey=True, squeeze=False)[0], models, strict=True):
        lines: dict[str, dict[int, float]] = {}
        for batch in batches:
            for name, value in efficiencies([row for row in towers if row["model"] == model], batch).items():
                lines.setdefault(name.removeprefix(f"{model} "), {})[batch] = value
        for name, values in lines.items():
            panel.plot(list(values), list(values.values()), "o-", label=name)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(xscale="log", xlabel="batch", ylabel="η", title=model)
        panel.set_xticks(batches, batches)
        if lines:
            panel.legend(fontsize=7)


if __name__ == "__main__":
    main()
