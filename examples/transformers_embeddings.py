"""Image embeddings of a CLIP or SigLIP from transformers, dense and with a reduced image tower.

    python examples/transformers_embeddings.py
    python examples/transformers_embeddings.py photos/*.jpg --model openai/clip-vit-base-patch16 --keep 0.7

Without arguments a small CLIP with random weights embeds pictures that are drawn here: the cosines then say nothing
about trained weights.
"""

import argparse

import torch
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor, AutoModel, CLIPConfig, CLIPImageProcessor, CLIPModel

import clipkernels as ck
from clipkernels.data import scenes
from clipkernels.images import Reader

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--model", help="a folder, or a name on the hub")
    parser.add_argument("--keep", type=float, default=0.7, help="share of the patches that EViT keeps per step")
    arguments = parser.parse_args()

    if arguments.model:
        model = AutoModel.from_pretrained(arguments.model)
        processor = AutoImageProcessor.from_pretrained(arguments.model)
    else:
        vision = {**SMALL, "image_size": 64, "patch_size": 8}
        text = {**SMALL, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 63}
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text))
        processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    model.eval()

    pictures = [Reader().read(path) for path in arguments.images]
    pictures = pictures or [Image.fromarray(pixels) for pixels in scenes.draw(8, seed=7).images]
    inputs = processor(images=pictures, return_tensors="pt")

    with torch.no_grad():
        dense = embed(model, inputs)
        with ck.patched(model, ck.EViT(keep=arguments.keep)):  # undone at the end of the block
            reduced = embed(model, inputs)

    print(f"embeddings {tuple(reduced.shape)}, cosines between dense and reduced:")
    print(" ".join(f"{cosine:.4f}" for cosine in cosine_similarity(dense, reduced)))


def embed(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    features = model.get_image_features(**inputs)
    return features if isinstance(features, torch.Tensor) else features.pooler_output  # transformers 4, transformers 5


if __name__ == "__main__":
    main()
