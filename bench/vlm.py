"""Time the prefill of a small LLaVA with random weights, by the image tokens in its prompt.

    python -m bench.vlm --image-size 336 --rounds 12 --out vlm-b16-336.csv
    python -m bench.vlm --layers 2 --width 64 --heads 2 --rounds 2      # a model that is timed in seconds

The tower is a CLIP ViT-B/16, the language model a Llama of 0.1 B parameters: 12 blocks of width 768. A prefill is one
image and a prompt through tower, projector and language model, with a cache, and the logits of the last token. Every
variant shares the weights, and runs once per round in random order; ratios are of the same round. The host's own model
and `Dense()` with a hand-over are the dense variants; speed-ups are against the faster one.

GMACs are those that run: of the tower all blocks, because LLaVA's read the next to last and the host runs them all, and
of the language model its products with weights, attention over the prompt, and the last token's logits.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import print
from rich.table import Table

import clipkernels as ck
from bench.result_files import header_of, write
from clipkernels.measure.timing import Times, gmacs_for, measure, plan_for
from clipkernels.methods import Method

IMAGE = 31999
HOST, DENSE = "dense (host)", "Dense()"
KEEPS = (0.75, 0.5, 0.25, 0.1)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    names = ("image_size", "words", "width", "layers", "heads", "rounds", "threads", "precision")
    header = header_of(arguments, *names)
    model = build(arguments)
    methods = methods_for(arguments)
    values = prompt(model, arguments)
    runs: dict[str, Callable[[], object]] = {HOST: runner(model, values)}
    counts = {HOST: ck.tower_of(model).num_tokens - 1}
    costs = {HOST: gmacs(model, ck.Dense(), counts[HOST], arguments)}
    for name, method in methods.items():
        variant = ck.patch(shared_copy(model), method, hand_over=True)
        runs[name], counts[name] = runner(variant, values), ck.vlm.image_tokens(variant)
        costs[name] = gmacs(model, method, counts[name], arguments)
    times = measure(runs, arguments.rounds, warmup=2)
    rows = [row(name, times, counts, costs) for name in runs]
    print(draw(rows))
    if arguments.out:
        write(rows, header, arguments.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=336, help="side of the image; default %(default)s")
    parser.add_argument("--words", type=int, default=40, help="tokens of text in the prompt; default %(default)s")
    parser.add_argument("--width", type=int, default=768, help="of tower and language model; default %(default)s")
    parser.add_argument("--layers", type=int, default=12, help="blocks of each; default %(default)s")
    parser.add_argument("--heads", type=int, default=12, help="of each; default %(default)s")
    parser.add_argument("--rounds", type=int, default=12, help="timed runs of each variant; default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="the rows; FILE.json adds the environment")
    return parser.parse_args()


def build(arguments: argparse.Namespace) -> Any:
    """A LLaVA with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": arguments.width, "num_hidden_layers": arguments.layers}
    sizes["num_attention_heads"] = arguments.heads
    vision = transformers.CLIPVisionConfig(
        **sizes, intermediate_size=4 * arguments.width, image_size=arguments.image_size, patch_size=16
    )
    text = transformers.LlamaConfig(**sizes, intermediate_size=inner(arguments), vocab_size=IMAGE + 1)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    return model.to(torch.bfloat16 if arguments.precision == "bf16" else torch.float32)


def inner(arguments: argparse.Namespace) -> int:
    """Width of the language model's MLP: the Llamas' 8/3, rounded to a multiple of 64."""
    return 64 * round(arguments.width * 8 / 3 / 64)


def methods_for(arguments: argparse.Namespace) -> dict[str, Method]:
    """The variants with a hand-over: the tower whole, at several shares, and methods whose steps shorten the tower."""
    methods: dict[str, Method] = {DENSE: ck.Dense()}
    methods |= {f"Select({keep:g})": ck.Select(keep) for keep in KEEPS}
    methods["Select(0.25), no groups"] = ck.Select(0.25, merge_rest=False)
    methods["EViT(0.7)"] = ck.EViT(0.7, fuse=False)
    methods["ToMe to half"] = ck.ToMe(half(arguments))
    methods["TCA(0.1)"] = ck.TCA(0.1)
    return methods


def half(arguments: argparse.Namespace) -> int:
    """Tokens for ToMe to merge in each block, so that about half are left."""
    return max(1, (arguments.image_size // 16) ** 2 // 2 // arguments.layers)


def shared_copy(model: Any) -> Any:
    """A copy of a model with the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def prompt(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """One image in a prompt."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(2, IMAGE, (arguments.words,), generator=generator)
    slots = torch.full((ck.tower_of(model).num_tokens - 1,), IMAGE)
    ids = torch.cat([words[:5], slots, words[5:]])[None]
    pixels = torch.randn(1, 3, arguments.image_size, arguments.image_size, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}


def runner(model: Any, values: dict[str, Any]) -> Callable[[], object]:
    """A function that runs a prefill."""

    @torch.no_grad()
    def run() -> object:
        return model(**values, use_cache=True, logits_to_keep=1).logits

    return run


def gmacs(model: Any, method: Method, image_tokens: int, arguments: argparse.Namespace) -> float:
    """Multiply-accumulates of a prefill, in 10⁹."""
    tower = ck.tower_of(model)
    width, tokens = arguments.width, image_tokens + arguments.words
    layer = tokens * (4 * width**2 + 3 * width * inner(arguments)) + 2 * tokens**2 * width
    language = arguments.layers * layer + width * (IMAGE + 1)
    projector = 2 * (tower.num_tokens - 1) * width**2
    return gmacs_for(tower, plan_for(tower, method)) + (language + projector) / 1e9


def row(name: str, times: Times, counts: dict[str, int], costs: dict[str, float]) -> dict[str, Any]:
    """The row of a variant."""
    baseline = times.fastest([HOST, DENSE])
    seconds, speedup = times.of(name), times.ratio(name, baseline)
    ideal = costs[HOST] / costs[name]
    return {
        "variant": name,
        "image_tokens": counts[name],
        "gmacs": round(costs[name], 2),
        "milliseconds": round(1e3 * seconds.median, 1),
        "speedup": round(speedup.median, 3),
        "speedup_p10": round(speedup.low, 3),
        "speedup_p90": round(speedup.high, 3),
        "ideal_speedup": round(ideal, 3),
        "efficiency": round(speedup.median / ideal, 3),
        "baseline": baseline,
    }


def draw(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "variant", "image tokens", "GMACs", "ms", "speed-up", "ideal", "η", title="prefill", title_justify="left"
    )
    for each in rows:
        band = f"×{each['speedup']:.2f} [{each['speedup_p10']:.2f}-{each['speedup_p90']:.2f}]"
        cells = (each["image_tokens"], each["gmacs"], each["milliseconds"], band)
        table.add_row(each["variant"], *map(str, cells), f"×{each['ideal_speedup']:.2f}", f"{each['efficiency']:.2f}")
    return table


if __name__ == "__main__":
    main()
