"""LoRA on a patched tower: fine-tune with the tokens that inference will see, then merge the adapters.

    python examples/lora.py
    python examples/lora.py photos/ --model ViT-B-16 --pretrained openai --r 13 --steps 500

The folder has one sub-folder per class. Without arguments the bundled CLIP learns to name drawn scenes.
"""

import argparse
from pathlib import Path

import open_clip
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn.functional import cross_entropy

import clipkernels as ck
from clipkernels.data import scenes
from clipkernels.images import Reader, images_below


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER")
    parser.add_argument("--model", help="a name that open_clip.list_models() has")
    parser.add_argument("--pretrained", help="a tag of its weights, or a checkpoint file")
    parser.add_argument("--r", type=int, default=4, help="tokens that ToMe merges per block")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.model:
        model, _, preprocess = open_clip.create_model_and_transforms(arguments.model, pretrained=arguments.pretrained)
        tokenizer = open_clip.get_tokenizer(arguments.model)
    else:
        model, preprocess, tokenizer = ck.bundled()
    pixels, drawn = scenes.draw(256, seed=7)
    names, pictures = [scenes.CLASSES[label] for label in drawn], list(map(Image.fromarray, pixels))
    if arguments.folder:
        paths = images_below(arguments.folder).paths
        names, pictures = [Path(path).parent.name for path in paths], list(map(Reader().read, paths))
    classes = sorted(set(names))
    images, labels = torch.stack([*map(preprocess, pictures)]), torch.tensor([*map(classes.index, names)])
    text = ck.support.class_embeddings(model, tokenizer, ck.support.photo(classes))

    ck.patch(model, ck.ToMe(r=arguments.r))
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=r"visual\..*\.c_(fc|proj)"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    for step in range(arguments.steps):
        batch = torch.randint(len(images), (32,))
        logits = 100 * adapted.encode_image(images[batch], normalize=True) @ text.T
        loss = cross_entropy(logits, labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss:.3f}")
    print("merged; still patched with", ck.method_of(adapted.merge_and_unload()))


if __name__ == "__main__":
    main()
