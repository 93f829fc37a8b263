"""What was measured on a device, as tables and pictures: the targets and what came, towers, operations.

    python -m bench.gpu.report bench/results/nvidia-h200
    python -m bench.gpu.report bench/results/nvidia-h200 --readme README.md

It reads what `make gpu` left in a folder, whole or not, and writes report.md, roofline.png and efficiency.png in
it. With --readme the part of that file between <!-- gpu --> and <!-- /gpu --> becomes the report's summary. Nothing is
computed that was not measured: a row that is missing is missing here, and a target without rows says so. Why a target
is missed is written by hand into reasons.json there, {target: reason}, and comes with it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu.targets import Row, efficiencies, fastest, grouped, targets, way_of
from bench.result_files import read_csv, save
from clipkernels.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- gpu -->", "<!-- /gpu -->"
# Tables that are shown as they are, and what each is.
WHOLE = {
    "launches": "Launches of one image",
    "tuned": "Configurations: a kernel's own and the fastest found",
    "counters": "Counters of the two kernels furthest from their floor",
    "distill-cost-bf16": "CLIP-TD's distance",
    "check-first": "Against fp64, bf16, B/16",
    "check-bfloat16": "Against fp64, bf16",
    "check-float32": "Against fp64, fp32",
    "check-float16": "Against fp64, fp16",
}
NOTHING = "No GPU has been measured yet: `make gpu` on a machine with one fills this in.\n"


class Measured(NamedTuple):
    """The rows of operations and of towers that a folder holds, where they were taken, and why targets are missed."""

    folder: Path
    ops: list[Row]
    towers: list[Row]
    environment: Row
    reasons: dict[str, str]


def main() -> None:
    arguments = parse()
    print(render(arguments.folder, arguments.readme))


def render(folder: Path, readme: Path | None = None) -> str:
    """Writes the report and the pictures of a folder's results, and the summary into a README; returns the summary.

    Without matplotlib there are no pictures.
    """
    found = read(folder)
    if find_spec("matplotlib"):
        if found.ops:
            draw(roofline, found.ops, folder / "roofline.png")
        if found.towers:
            draw(panels, found.towers, folder / "efficiency.png")
    title = found.environment.get("device", folder.name)
    text = f"# {title}\n\n{summary(found, folder)}{tables(found)}"
    with atomic_write(folder / "report.md") as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
    if readme:
        put(summary(found, readme.parent), readme)
    return summary(found, Path.cwd())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="bench/results/<device>")
    parser.add_argument("--readme", type=Path, metavar="FILE.md", help="put the summary in it, too")
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        parser.error(f"expected a folder with results, got {arguments.folder}")
    return arguments


def read(folder: Path) -> Measured:
    """Whatever is there of a campaign's files."""
    ops = [{key: number(value) for key, value in row.items()} for row in read_csv(folder / "ops.csv")]
    towers, environment, reasons = [], ops[-1] if ops else {}, {}
    for file in sorted(folder.glob("towers-bf16*.json")):
        taken = json.loads(file.read_text(encoding="utf-8"))
        environment = taken["environment"]
        towers += [{**row, "run": file.stem} for row in taken["rows"]]
    if (folder / "reasons.json").exists():
        reasons = json.loads((folder / "reasons.json").read_text(encoding="utf-8"))
    return Measured(folder, ops, towers, environment, reasons)


def number(text: str) -> Any:
    """A field of a CSV: a number, or what it says."""
    try:
        return float(text)
    except ValueError:
        return text or None


def summary(found: Measured, seen_from: Path) -> str:
    """The targets, the towers and the pictures, linked from where the text will stand."""
    if not found.ops and not found.towers:
        return NOTHING
    known = found.environment
    versions = ", ".join(f"{name} {known[name]}" for name in ("torch", "triton", "driver") if known.get(name))
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in (*found.ops, *found.towers)))
    lines = [f"One {known.get('device')} ({versions}; commits {commits}), bf16, random weights, random images.", ""]
    lines += markdown(("target", "asked", "came: worst to best", "the worst is", "", "why"), targets_told(found))
    if found.towers:
        lines += ["", "The fastest way of each; η against the fastest dense one that was measured:", ""]
        lines += markdown(("tower", "method", "batch 1", "batch 32", "batch 256"), towers_told(found.towers))
    for name in ("roofline", "efficiency"):
        picture = (found.folder / f"{name}.png").resolve()
        if picture.exists():
            inside = picture.is_relative_to(seen_from.resolve())
            lines += ["", f"![{name}]({picture.relative_to(seen_from.resolve()) if inside else picture})"]
    return "\n".join([*lines, ""])


def targets_told(found: Measured) -> list[tuple[str, ...]]:
    """A line for each target."""
    lines: list[tuple[str, ...]] = []
    for target in targets(found.ops, found.towers):
        if not target.came:
            lines.append((target.what, target.asked, "not measured", "", "", ""))
            continue
        low_is_good = target.met(-math.inf)
        order = sorted(target.came.items(), key=lambda item: item[1], reverse=low_is_good)
        (where, worst), (_, best) = order[0], order[-1]
        missed = sum(not target.met(value) for value in target.came.values())
        said = f"missed in {missed} of {len(order)}" if missed else "met"
        reason = found.reasons.get(target.what, "") if missed else ""
        if target.without:
            each = ", ".join(f"{where} {modes}" for where, modes in target.without.items())
            reason = f"{reason}; host not measured under: {each}".removeprefix("; ")
        lines.append((target.what, target.asked, f"{worst:.2f} to {best:.2f}", where, said, reason))
    return lines


def towers_told(towers: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each tower and method: images a second and η of its fastest way, by batch."""
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for (model, batch), rows in grouped(towers).items():
        etas = efficiencies(rows, batch)
        for name, (row, _) in fastest(rows).items():
            eta = f", η {etas[f'{model} {name}']:.2f}" if f"{model} {name}" in etas else ""
            said = f"{per_second(row)}/s{eta} ({way_of(row)})"
            lines.setdefault((model, name), {})[batch] = said
    return [(*name, *(cells.get(batch, "") for batch in (1, 32, 256))) for name, cells in lines.items()]


def per_second(row: Row) -> str:
    """Images a second, three digits at least."""
    images = row["images_per_second"]
    return f"{images:,.0f}" if images >= 100 else f"{images:.3g}"


def tables(found: Measured) -> str:
    """Everything: a table for each tower, batch and run, one of the operations, and the small tables as they are."""
    lines: list[str] = []
    columns = ("variant", "ms", "images/s", "speed-up", "η", "against", "of matmul", "MiB")
    for run in dict.fromkeys(row["run"] for row in found.towers):
        for (model, batch), rows in grouped(row for row in found.towers if row["run"] == run).items():
            told = [
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
            lines += ["", title, "", *markdown(columns, told)]
    if found.ops:
        told = [
            (
                row["op"],
                f"{row['tower']} b{row['batch']:.0f}",
                row["variant"],
                f"{row['microseconds']:.1f}",
                f"{row['gb_per_s']:.0f}",
                "" if row["tflop_per_s"] is None else f"{row['tflop_per_s']:.1f}",
                f"{row['of_floor']:.0%}",
            )
            for row in sorted(found.ops, key=lambda row: (row["op"], row["tower"], row["batch"], row["microseconds"]))
        ]
        columns = ("operation", "shape", "variant", "µs", "GB/s", "TFLOP/s", "of its floor")
        lines += ["", "## Operations", "", *markdown(columns, told)]
    if (found.folder / "staircase.json").exists():
        gains = json.loads((found.folder / "staircase.json").read_text(encoding="utf-8"))["rounding"]
        told = [[str(value) for value in gain.values()] for gain in gains]
        lines += ["", "## Keep counts rounded up", "", *markdown(list(gains[0]), told)]
    for name, title in WHOLE.items():
        rows = read_csv(found.folder / f"{name}.csv")
        if rows:
            lines += ["", f"## {title}", "", *markdown(list(rows[0]), [list(row.values()) for row in rows])]
    return "\n".join([*lines, ""])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table of lines."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def put(text: str, readme: Path) -> None:
    """Replaces what stands between the two marks.

    Raises:
        SystemExit: they are not there, in this order.
    """
    before, found, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise SystemExit(f"error: expected {BEGIN} and {END} in {readme}, got none")
    with atomic_write(readme) as temporary:
        Path(temporary).write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def draw(picture: Callable[[Any, Sequence[Row]], None], rows: Sequence[Row], file: Path) -> None:
    """A picture in a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    picture(figure, rows)
    save(figure, file)


def roofline(figure: Any, ops: Sequence[Row]) -> None:
    """Operations a byte against TFLOP/s for what multiplies matrices, and the share of a copy's speed for the rest."""
    left, right = figure.subplots(1, 2)
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
        left.plot(xs, roof, color="black", label=f"{copy:.0f} GB/s, {rate:.3g} TFLOP/s")
        for at, op in enumerate(dict.fromkeys(row["op"] for row in multiplying)):
            here = [row for row in multiplying if row["op"] == op]
            points = zip(*((row["flops"] / row["bytes"], row["tflop_per_s"]) for row in here), strict=True)
            left.plot(*points, "os"[at // 10], label=op)  # there are ten colours
        left.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s", title=f"batch {batch:.0f}")
        left.legend(fontsize=7)
    moved = sorted((row for row in best.values() if not row["flops"]), key=lambda row: row["of_copy"])
    right.barh([f"{row['op']} {row['tower']}" for row in moved], [row["of_copy"] for row in moved])
    right.axvline(1, color="black")
    right.set(xlabel=f"share of a copy's {copy:.0f} GB/s", title=f"no products, batch {batch:.0f}")
    right.tick_params(axis="y", labelsize=6)


def panels(figure: Any, towers: Sequence[Row]) -> None:
    """η of every method's fastest way by batch, a panel for each tower."""
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
