"""Features of a timm ViT, dense and with merged tokens, and the time that merging saves.

    python examples/timm_features.py
    python examples/timm_features.py photos/*.jpg --model vit_base_patch16_clip_224.openai --pretrained --r 13

Without arguments a ViT-Ti/16 with random weights runs on pictures that are drawn here. Speed does not depend on the
weights; the cosines do.
"""

import argparse
import time
from statistics import median

import timm
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

import clipkernels as ck
from clipkernels.data import scenes
from clipkernels.images import Reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--pretrained", action="store_true", help="download the weights that the model's name has")
    parser.add_argument("--r", type=int, default=13, help="tokens that ToMe merges per block")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    model = timm.create_model(arguments.model, pretrained=arguments.pretrained, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pictures = [Reader().read(path) for path in arguments.images]
    pictures = pictures or [Image.fromarray(pixels) for pixels in scenes.draw(4, seed=7).images]
    images = torch.stack([transform(picture) for picture in pictures])

    dense, before = run(model, images, arguments.rounds)
    ck.patch(model, ck.ToMe(r=arguments.r))
    merged, after = run(model, images, arguments.rounds)
    print(f"features {tuple(merged.shape)}, cosines {[round(c, 4) for c in cosine_similarity(dense, merged).tolist()]}")
    print(f"{1e3 * before:.0f} ms dense, {1e3 * after:.0f} ms merged: ×{before / after:.2f}")


@torch.no_grad()
def run(model: torch.nn.Module, images: torch.Tensor, rounds: int) -> tuple[torch.Tensor, float]:
    """Return the features of images, and the median seconds of a forward; `clipkernels bench` measures better."""
    features, seconds = model(images), []
    for _ in range(rounds):
        start = time.perf_counter()
        model(images)
        seconds.append(time.perf_counter() - start)
    return features, median(seconds)


if __name__ == "__main__":
    main()
