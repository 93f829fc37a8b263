"""torchao's int8 weights in a reduced image tower: less memory from the one, fewer operations from the other.

    python examples/torchao_int8.py
    python examples/torchao_int8.py photos/*.jpg --model ViT-B-16 --pretrained openai --r 13

Without arguments the bundled CLIP embeds scenes that are drawn here.
"""

import argparse
import io

import open_clip
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import clipkernels as ck
from clipkernels.data import scenes
from clipkernels.images import Reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--model", help="a name that open_clip.list_models() has")
    parser.add_argument("--pretrained", help="a tag of its weights, or a checkpoint file")
    parser.add_argument("--r", type=int, default=4, help="tokens that ToMe merges per block")
    arguments = parser.parse_args()

    if arguments.model:
        model, _, preprocess = open_clip.create_model_and_transforms(arguments.model, pretrained=arguments.pretrained)
    else:
        model, preprocess, _ = ck.bundled()
    model.eval()
    pictures = [Reader().read(path) for path in arguments.images]
    pictures = pictures or [Image.fromarray(pixels) for pixels in scenes.draw(8, seed=7).images]
    images = torch.stack([preprocess(picture) for picture in pictures])

    with torch.no_grad():
        dense, before = model.encode_image(images), mebibytes(model.visual)
        quantize_(model.visual, Int8WeightOnlyConfig())  # every nn.Linear; before or after ck.patch
        quantized = model.encode_image(images)
        ck.patch(model, ck.ToMe(r=arguments.r))
        reduced = model.encode_image(images)

    print(f"image tower: {before:.2f} MiB, {mebibytes(model.visual):.2f} MiB in int8")
    print(f"least cosine to the dense fp32 embedding: int8 {cosine_similarity(dense, quantized).min():.4f}, ", end="")
    print(f"int8 and merged {cosine_similarity(dense, reduced).min():.4f}")


def mebibytes(module: torch.nn.Module) -> float:
    """Return the size of a module's saved weights."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.tell() / 2**20


if __name__ == "__main__":
    main()
