"""Train the small bundled CLIP: contrastively, on captions of photographs, digits and scenes.

    python -m bench.studies.tiny_clip --photos cifar10-train.tar.gz --val cifar10-val.tar.gz --compile --out tiny_clip
    python -m bench.studies.tiny_clip --photos train_folder --val val_folder --resume --out tiny_clip

Photographs come from a folder (or .tar.gz) with one sub-folder per class, or from torchvision with --cifar10 DIR. The
loss is CLIP's symmetric cross-entropy over the distinct captions of a batch; a caption is correct for every image that
it is true of. The temperature follows a schedule to CLIP's final 1/100 and stays there.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import tarfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, log_softmax, normalize
from tqdm import tqdm

from clipkernels.data import digits, scenes
from clipkernels.data.tokenizer import ByteTokenizer

PHOTO_TEMPLATES = (
    "a photo of a {}.",
    "a small photo of a {}.",
    "a blurry photo of a {}.",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a photo of the large {}.",
    "a photo of the small {}.",
    "{}.",
)
SHARE = {"photo": 168, "digit": 40, "scene": 48}
HELD_OUT_SEED = 1_000_000
ANY = -1


class Caption(NamedTuple):
    """A text and its claims about an image: a kind and two attributes, ANY for an attribute that is not mentioned."""

    kind: int
    first: int
    second: int
    text: str


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    photos, classes = read_photos(arguments, train=True)
    held_out, same = read_photos(arguments, train=False)
    if same != classes:
        raise SystemExit(
            f"error: expected --val with the classes of --photos ({', '.join(classes)}), got {', '.join(same)}"
        )
    config = json.loads(files("clipkernels.data").joinpath("tiny_clip.json").read_text())
    torch.manual_seed(arguments.seed)
    model = open_clip.CLIP(**config["model_cfg"]).to(arguments.device)
    tokenizer = ByteTokenizer(model.context_length)
    optimizer = torch.optim.AdamW(groups(model), lr=arguments.lr, betas=(0.9, 0.98), foreach=True)
    state, step = arguments.out / "training.safetensors", 0
    if arguments.resume and state.exists():
        step = restore(model, optimizer, state)
    arguments.out.mkdir(parents=True, exist_ok=True)
    embed = torch.compile(embed_images) if arguments.compile else embed_images
    bar = tqdm(range(step, arguments.steps), initial=step, total=arguments.steps, mininterval=20)
    for step in bar:
        images, captions, matches = batch(photos, classes, step, arguments.seed)
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * schedule(step, arguments.steps)
        scale = math.exp(math.log(14) + min(1, 2 * step / arguments.steps) * math.log(100 / 14))
        with torch.autocast(arguments.device, torch.bfloat16):
            visual = embed(model.visual, prepare(images, step, arguments.seed).to(arguments.device))
            with sdpa_kernel(SDPBackend.MATH):
                text = model.encode_text(tokenizer(captions).to(arguments.device))
        logits = scale * normalize(visual.float(), dim=-1) @ normalize(text.float(), dim=-1).T
        loss = contrastive(logits, matches.to(arguments.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % arguments.every == 0 or step + 1 == arguments.steps:
            save(model, optimizer, state, step + 1)
            figures = evaluate(model, tokenizer, held_out, classes)
            line = {"step": step + 1, "loss": round(loss.item(), 3), **{k: round(v, 2) for k, v in figures.items()}}
            bar.write(json.dumps(line))
            with (arguments.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
    write(
        {name: tensor.half().contiguous() for name, tensor in model.state_dict().items() if name != "attn_mask"},
        arguments.out / "tiny_clip.safetensors",
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="training photographs: folder or .tar.gz, one folder per class")
    parser.add_argument("--val", type=Path, help="validation photographs: folder or .tar.gz, one folder per class")
    parser.add_argument("--cifar10", type=Path, help="use torchvision's CIFAR-10, downloaded to this folder")
    parser.add_argument("--steps", type=int, default=5000, help="training steps; default %(default)s")
    parser.add_argument("--lr", type=float, default=1.2e-3, help="peak learning rate; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="weights, batches and augmentation; default %(default)s")
    parser.add_argument(
        "--every", type=int, default=500, help="steps between checkpoints and evaluations; default %(default)s"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="compile the image tower (20 %% faster on a CPU)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="weights, checkpoint and log")
    arguments = parser.parse_args()
    if arguments.cifar10 is None and (arguments.photos is None or arguments.val is None):
        parser.error("expected --photos with --val, or --cifar10")
    if arguments.steps >= HELD_OUT_SEED:
        parser.error(
            f"expected --steps below {HELD_OUT_SEED}, because higher seeds are held out, got {arguments.steps}"
        )
    return arguments


def read_photos(arguments: argparse.Namespace, train: bool) -> tuple[scenes.Images, list[str]]:
    """Return all photographs at 32×32, and the class names in label order."""
    if arguments.cifar10 is not None:
        from torchvision.datasets import CIFAR10

        data = CIFAR10(arguments.cifar10, train=train, download=True)
        return scenes.Images(data.data, np.asarray(data.targets)), data.classes
    return read(arguments.photos if train else arguments.val)


def read(source: Path) -> tuple[scenes.Images, list[str]]:
    """Return the photographs of a folder or .tar.gz with one sub-folder per class, at 32×32, and the class names."""
    photos: list[tuple[str, np.ndarray]] = []
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            photos.append((path.parent.name, decode(path.read_bytes())))
    else:
        with tarfile.open(source) as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None:
                    photos.append((Path(member.name).parent.name, decode(file.read())))
    classes = sorted({name for name, _ in photos})
    labels = np.asarray([classes.index(name) for name, _ in photos])
    return scenes.Images(np.stack([image for _, image in photos]), labels), classes


def sample_shots(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Return the indices of `shots` random images of each class, given the labels (n,)."""
    order = torch.from_numpy(np.random.default_rng([seed, 2]).permutation(len(labels)))
    ordered = labels[order]
    return torch.cat([order[ordered == k][:shots] for k in ordered.unique().tolist()])


def decode(data: bytes) -> np.ndarray:
    """Return the pixels of an encoded image, (32,32,3) uint8."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image if image.size == (32, 32) else image.resize((32, 32), Image.Resampling.BICUBIC))


def batch(photos: scenes.Images, classes: Sequence[str], step: int, seed: int) -> tuple[np.ndarray, list[str], Tensor]:
    """Return images (256,32,32,3), the distinct captions drawn for them, and the matches (256, captions), boolean."""
    rng = np.random.default_rng([seed, step])
    per_epoch = len(photos.labels) // SHARE["photo"]
    order = np.random.default_rng([seed, 7, step // per_epoch]).permutation(len(photos.labels))
    pick = order[step % per_epoch * SHARE["photo"] :][: SHARE["photo"]]
    draw_seed = seed * 10 * HELD_OUT_SEED + step
    digit = digits.draw(SHARE["digit"], draw_seed, held_out=False)
    scene = scenes.draw(SHARE["scene"], draw_seed)
    images = np.concatenate([photos.images[pick], digit.images, scene.images])
    shapes = len(scenes.SHAPES)
    facts = np.concatenate(
        [
            np.stack([np.full(len(pick), 0), photos.labels[pick], np.zeros_like(pick)], 1),
            np.stack([np.full(len(digit.labels), 1), digit.labels, np.zeros_like(digit.labels)], 1),
            np.stack([np.full(len(scene.labels), 2), scene.labels // shapes, scene.labels % shapes], 1),
        ]
    )
    # Only two templates per kind and step, to keep the text tower cheap. Over the run every template meets every class.
    templates = {kind: rng.integers(len(t), size=2) for kind, t in enumerate(ALL_TEMPLATES)}
    captions = {caption(tuple(fact), templates[fact[0]], rng, classes) for fact in facts.tolist()}
    ordered = sorted(captions)
    claims = np.asarray([c[:3] for c in ordered])
    matches = ((claims[None] == facts[:, None]) | (claims[None] == ANY)).all(-1)
    return images, [c.text for c in ordered], torch.from_numpy(matches)


ALL_TEMPLATES = (PHOTO_TEMPLATES, digits.TEMPLATES, scenes.TEMPLATES)


def caption(
    fact: tuple[int, int, int], templates: np.ndarray, rng: np.random.Generator, classes: Sequence[str]
) -> Caption:
    """Return a random caption of an image's kind and attributes, in one of two templates of that kind."""
    kind, first, second = fact
    template = ALL_TEMPLATES[kind][templates[rng.integers(2)]]
    if kind == 0:
        return Caption(kind, first, second, template.format(classes[first]))
    if kind == 1:
        return Caption(kind, first, second, template.format(digits.CLASSES[first] if rng.random() < 0.5 else first))
    colour, shape = list(scenes.COLOURS)[first], list(scenes.SHAPES)[second]
    draw = rng.random()
    if draw < 0.15:
        return Caption(kind, first, ANY, template.format(f"{colour} shape"))
    if draw < 0.3:
        return Caption(kind, ANY, second, template.format(shape))
    return Caption(kind, first, second, template.format(f"{colour} {shape}"))


def prepare(images: np.ndarray, step: int, seed: int) -> Tensor:
    """Return augmented, normalised images (B,3,32,32): crop, flip of photographs, brightness, contrast, cutout."""
    rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    n, side = len(x), scenes.SIDE
    photo = torch.arange(n) < SHARE["photo"]
    reach = torch.where(photo, 4, 2)[:, None]
    offset = ((torch.rand(n, 2, generator=rng) * 2 - 1) * reach).round().long()
    rows = (torch.arange(side) + offset[:, :1]).clamp(0, side - 1)
    columns = (torch.arange(side) + offset[:, 1:]).clamp(0, side - 1)
    flip = (torch.rand(n, 1, generator=rng) < 0.5) & photo[:, None]
    columns = torch.where(flip, columns.flip(1), columns)
    x = x[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    brightness = 1 + 0.3 * (torch.rand(n, 1, 1, 1, generator=rng) - 0.5) * 2 * photo[:, None, None, None]
    contrast = 1 + 0.3 * (torch.rand(n, 1, 1, 1, generator=rng) - 0.5) * 2 * photo[:, None, None, None]
    mean = x.mean((1, 2, 3), keepdim=True)
    x = ((x - mean) * contrast + mean) * brightness
    half = torch.where(photo, 5, 3)[:, None]
    centre = torch.rand(n, 2, generator=rng) * side
    along = (torch.arange(side) - centre[:, :1]).abs() < half
    across = (torch.arange(side) - centre[:, 1:]).abs() < half
    hole = (along[:, :, None] & across[:, None, :])[:, None] & (torch.rand(n, 1, 1, 1, generator=rng) < 0.5)
    return standardise(torch.where(hole, mean, x))


def standardise(x: Tensor) -> Tensor:
    """Return images (B,3,S,S) in [0, 1] normalised by CLIP's mean and standard deviation."""
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    return (x - mean[:, None, None]) / std[:, None, None]


def embed_images(visual: torch.nn.Module, images: Tensor) -> Tensor:
    """Return the embeddings of images by the tower's own forward, with attention written out."""
    # SDPA's backward would take 40 % of a training step on a CPU at 65 tokens.
    x = visual._embeds(images)
    for block in visual.transformer.resblocks:
        mha = block.attn
        qkv = linear(block.ln_1(x), mha.in_proj_weight, mha.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, mha.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.mT * mha.head_dim**-0.5, -1) @ v
        x = x + mha.out_proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(x[:, 0]) @ visual.proj


def contrastive(logits: Tensor, matches: Tensor) -> Tensor:
    """Return the symmetric cross-entropy of logits (B,U). Targets are uniform over the matches of a row or column."""
    by_image, by_caption = matches.float(), matches.float().T
    image = -(log_softmax(logits, 1) * by_image / by_image.sum(1, keepdim=True)).sum(1).mean()
    text = -(log_softmax(logits.T, 1) * by_caption / by_caption.sum(1, keepdim=True)).sum(1).mean()
    return (image + text) / 2


def groups(model: torch.nn.Module) -> list[dict[str, object]]:
    """Return parameter groups with weight decay on matrices only."""
    parameters = [(name, p) for name, p in model.named_parameters() if name != "logit_scale"]
    decayed = [p for name, p in parameters if p.ndim > 1 and "embedding" not in name]
    rest = [p for name, p in parameters if not (p.ndim > 1 and "embedding" not in name)]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def schedule(step: int, steps: int, warmup: int = 300) -> float:
    """Return the factor of the learning rate: linear warm-up, then cosine decay to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def evaluate(
    model: open_clip.CLIP, tokenizer: ByteTokenizer, photos: scenes.Images, classes: Sequence[str]
) -> dict[str, float]:
    """Return zero-shot accuracy in percent per data set, with an ensemble of the data set's templates."""
    model.eval()
    sets = {
        "photographs": (photos, classes, PHOTO_TEMPLATES),
        "digits": (digits.draw(1798, HELD_OUT_SEED), digits.CLASSES, digits.TEMPLATES),
        "scenes seen": (scenes.draw(1000, HELD_OUT_SEED), scenes.CLASSES, scenes.TEMPLATES),
        "scenes unseen": (scenes.draw(1000, HELD_OUT_SEED, tuple(scenes.UNSEEN)), scenes.CLASSES, scenes.TEMPLATES),
    }
    device = next(model.parameters()).device
    figures = {}
    for name, (data, names, templates) in sets.items():
        prompts = [template.format(c) for c in names for template in templates]
        text = normalize(model.encode_text(tokenizer(prompts).to(device)), dim=-1)
        text = normalize(text.view(len(names), len(templates), -1).mean(1), dim=-1)
        right = 0
        for start in range(0, len(data.labels), 500):
            x = torch.from_numpy(data.images[start : start + 500]).permute(0, 3, 1, 2).float() / 255
            logits = normalize(model.encode_image(standardise(x).to(device)), dim=-1) @ text.T
            right += (logits.argmax(1).cpu().numpy() == data.labels[start : start + 500]).sum().item()
        figures[name] = 100 * right / len(data.labels)
    model.train()
    return figures


def save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path, step: int) -> None:
    """Write model, optimizer and number of steps to a checkpoint."""
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    for index, slot in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{key}": value.contiguous() for key, value in slot.items()}
    write(tensors | {"step": torch.tensor(step)}, path)


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> int:
    """Load model and optimizer from a checkpoint; return its number of steps."""
    tensors = load_file(path)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(tensors["step"])


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file atomically."""
    save_file(tensors, path.with_suffix(".partial"))
    path.with_suffix(".partial").chmod(0o644)
    os.replace(path.with_suffix(".partial"), path)


if __name__ == "__main__":
    main()
