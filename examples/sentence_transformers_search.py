"""Search images by text with a CLIP of sentence-transformers whose image tower is reduced.

    python examples/sentence_transformers_search.py
    python examples/sentence_transformers_search.py photos/*.jpg --model clip-ViT-B-16 --query "a cat" --keep 0.7

Without arguments a tiny CLIP with random weights searches drawn scenes: its answers mean nothing.
"""

import argparse
import json
import tempfile
from pathlib import Path

from PIL import Image
from sentence_transformers import SentenceTransformer, util
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

import clipkernels as ck
from clipkernels.data import scenes
from clipkernels.images import Reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--model", help="a name on the hub, or a folder")
    parser.add_argument("--query", default="red star")
    parser.add_argument("--keep", type=float, default=0.7, help="share of the patches that EViT keeps per step")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model = SentenceTransformer(arguments.model or tiny_clip(Path(folder)), device="cpu")
    ck.patch(model, ck.EViT(keep=arguments.keep))  # the SentenceTransformer itself

    names = arguments.images or [scenes.CLASSES[label] for label in scenes.draw(16, seed=7).labels]
    pictures = [Reader().read(path) for path in arguments.images]
    pictures = pictures or [Image.fromarray(pixels) for pixels in scenes.draw(16, seed=7).images]
    hits = util.semantic_search(model.encode([arguments.query]), model.encode(pictures), top_k=3)
    for hit in hits[0]:
        print(f"{hit['score']:.3f} {names[hit['corpus_id']]}")


def tiny_clip(folder: Path) -> str:
    """Write a CLIP with random weights and a tokenizer of single letters; return its folder."""
    size = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 4}
    text = {**size, "vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 63}
    config = CLIPConfig(vision_config={**size, "image_size": 64, "patch_size": 8}, text_config=text)
    CLIPModel(config).save_pretrained(folder)
    letters = [chr(code) for code in range(97, 123)]
    tokens = ["<|startoftext|>", "<|pad|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)} | {"<|endoftext|>": 63}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    images = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
