"""Study recovery: a reduced tower distilled to its own dense embeddings, searched in an index of the original ones.

    python -m bench.studies.recover --pool cifar10-train.tar.gz --images cifar10-val.tar.gz --work towers --out r.csv
    python -m bench.studies.recover … --method "EViT(keep=0.7)" --seeds 1 --epochs 1    # a part of it

EViT(keep=0.7), and ToMe and TCA at the executed GMACs that come closest to its. The bundled CLIP is trained on the
photographs of the pool, whose labels are not read, and reported on the images. A query is a photograph encoded by the
reduced tower; the index holds the dense embeddings of all photographs by the original weights, and the right answer is
the photograph itself. The bundled CLIP was trained on CIFAR-10's training photographs, so a pool of those is not new to
it.

A row per seed, then the mean over seeds. `low` is the lower end of the 95 % bootstrap interval of R@1: photographs are
drawn anew, each with its mean over the seeds. Towers are saved in --work as they are finished, and a killed run goes on
within a seed. `--rerun` trains the first tower again, and says if the bits of its weights are the same.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich import print
from torch import Tensor, nn
from torch.nn.functional import normalize

import clipkernels as ck
from bench.result_files import header_of, write
from bench.studies.bootstrap import interval
from bench.studies.tiny_clip import read
from clipkernels.artefacts.header import read_header
from clipkernels.measure.timing import gmacs_for, plan_for
from clipkernels.support import photo

FIGURES = ("recall_at_1", "accuracy", "cosine", "cosine_p1")


class Photos(Sequence[Tensor]):
    """Photographs (n,32,32,3) uint8, each preprocessed when it is read."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.preprocess = pixels, ck.bundled()[1]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Any) -> Any:
        return self.preprocess(Image.fromarray(self.pixels[index]))


class Judged(NamedTuple):
    """Of n photographs: true where the query finds itself, true where the class is right, and the cosines."""

    found: Tensor
    correct: Tensor
    cosines: Tensor

    def figures(self) -> dict[str, float]:
        """Return the figures of a row."""
        values = (
            float(self.found.double().mean()),
            float(self.correct.double().mean()),
            float(self.cosines.double().mean()),
            float(np.percentile(self.cosines.double().numpy(), 1)),
        )
        return dict(zip(FIGURES, values, strict=True))


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    photos, classes = read(arguments.images)
    pixels, labels = photos.images[: arguments.limit], torch.from_numpy(photos.labels[: arguments.limit])
    images, model = torch.stack(list(Photos(pixels))), ck.bundled()[0]
    text = ck.support.class_embeddings(model, ck.bundled()[2], photo(classes))
    index = embed(model, images)
    pool = Photos(read(arguments.pool)[0].images[: arguments.photos])
    header = header_of(arguments, "photos", "limit", "seeds", "epochs", "batch_size", "lr", "held_out", "threads")
    rows: list[dict[str, Any]] = [row("dense", "", judge(index, index, text, labels), {})]
    for number, (name, method) in enumerate(methods(arguments.method).items()):
        rows.append(row(name, "as it comes", judge(embed(ck.patch(model, method), images), index, text, labels), {}))
        ck.unpatch(model)
        towers = [trained(name, method, seed, pool, arguments) for seed in range(arguments.seeds)]
        judged = []
        for seed, (tower, report) in enumerate(towers):
            judged.append(judge(embed(tower, images), index, text, labels))
            rows.append(row(name, str(seed), judged[-1], report))
            print(rows[-1])
        rows.append(mean(name, judged, [report for _, report in towers]))
        print(rows[-1])
        if arguments.rerun and not number:
            again = trained(name, method, 0, pool, arguments, "rerun")[1]
            rows.append({**rows[-1 - arguments.seeds], "seed": "0 again", "sha256": again["sha256"]})
            print("bit-identical rerun:", again["sha256"] == towers[0][1]["sha256"])
        if arguments.out:
            write(rows, header, arguments.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True, metavar="DIR|FILE.tar.gz", help="photographs to train on")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR|FILE.tar.gz", help="a sub-folder per class")
    parser.add_argument("--photos", type=int, default=50000, help="photographs of the pool; default %(default)s")
    parser.add_argument("--limit", type=int, default=5000, help="photographs of the images; default %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--epochs", type=int, default=1, help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="default %(default)s")
    parser.add_argument("--lr", type=float, default=2e-4, help="default %(default)s")
    parser.add_argument("--held-out", type=int, default=1000, help="photographs of the pool; default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default %(default)s")
    parser.add_argument("--method", help="one of the three; all by default")
    parser.add_argument("--rerun", action="store_true", help="train the first tower twice and compare the bits")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="the towers")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="the rows; FILE.json adds the environment")
    return parser.parse_args()


def methods(name: str | None) -> dict[str, ck.Method]:
    """Return EViT(0.7), and ToMe and TCA at the GMACs that come closest to its; one of them if it is named."""
    tower = ck.tower_of(ck.bundled()[0])

    def gmacs(method: ck.Method) -> float:
        return gmacs_for(tower, plan_for(tower, method))

    target = gmacs(ck.EViT(0.7))
    r = min(range(1, tower.num_tokens), key=lambda r: abs(gmacs(ck.ToMe(r)) - target))
    rate = min((n / 200 for n in range(4, 57)), key=lambda rate: abs(gmacs(ck.TCA(rate)) - target))
    chosen: dict[str, ck.Method] = {
        "EViT(keep=0.7)": ck.EViT(0.7),
        f"ToMe(r={r})": ck.ToMe(r),
        f"TCA(rate={rate})": ck.TCA(rate),
    }
    if name is not None and name not in chosen:
        raise SystemExit(f"error: expected --method {', '.join(chosen)}, got {name}")
    return {key: method for key, method in chosen.items() if name in (None, key)}


def trained(
    name: str, method: ck.Method, seed: int, pool: Photos, arguments: argparse.Namespace, again: str = ""
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a recovered tower, trained unless --work has it, and the report about its training."""
    options = {"epochs": arguments.epochs, "batch_size": arguments.batch_size, "lr": arguments.lr}
    key = sha256(repr((options, len(pool), arguments.held_out)).encode()).hexdigest()[:8]
    folder = arguments.work / f"{name.lower().replace('=', '-')}-{seed}-{key}{again}"
    if not folder.exists():
        model, start = ck.bundled()[0], time.process_time()
        state = folder.with_name(f"{folder.name}.state")
        result = ck.learn.recover(
            model, pool, method=method, held_out=arguments.held_out, seed=seed, state=state, **options
        )
        report = {
            "photographs": result.images,
            "steps": result.steps,
            "held_out_recall": result.after and result.after.recall_at_1,
            "cpu_seconds": round(time.process_time() - start, 1),  # without those of a run that was killed
            "sha256": digest_of(model),
        }
        ck.save(model, folder, fidelity=report)
        shutil.rmtree(state)
    return ck.load(folder).model, dict(read_header(folder).fidelity or {})


def digest_of(model: nn.Module) -> str:
    """Return the SHA-256 of all weights."""
    digest = sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Return the L2-normalised embeddings (n,E) of a model, patched or not."""
    return normalize(torch.cat([ck.encode_image(model, part).embedding for part in images.split(250)]))


def judge(reduced: Tensor, index: Tensor, text: Tensor, labels: Tensor) -> Judged:
    """Return what reduced embeddings (n,E) find in an index (n,E), and their classes."""
    similarity = reduced @ index.T
    found = (similarity <= similarity.diagonal()[:, None]).all(1)
    return Judged(found, (reduced @ text.T).argmax(1) == labels, (reduced * index).sum(1))


def row(name: str, seed: str, judged: Judged, report: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a tower."""
    tower, kind = ck.tower_of(ck.bundled()[0]), methods(None).get(name, ck.Dense())
    gmacs = round(gmacs_for(tower, plan_for(tower, kind)), 5)
    figures = {key: round(value, 5) for key, value in judged.figures().items()}
    keys = ("photographs", "steps", "held_out_recall", "cpu_seconds", "sha256")
    return {
        "method": name,
        "seed": seed,
        "gmacs": gmacs,
        **figures,
        "low": "",
        **{key: report.get(key) for key in keys},
    }


def mean(name: str, judged: Sequence[Judged], reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of the mean over seeds, with the lower end of the bootstrap interval of R@1."""
    every = [each.figures() for each in judged]
    found = torch.stack([each.found.double() for each in judged]).mean(0).numpy()
    first = row(name, "mean", judged[0], {})
    figures = {key: round(statistics.mean(figures[key] for figures in every), 5) for key in FIGURES}
    seconds = round(statistics.mean(report["cpu_seconds"] for report in reports), 1)
    return {**first, **figures, "low": round(float(interval(found)[0]), 5), "cpu_seconds": seconds}


if __name__ == "__main__":
    main()
