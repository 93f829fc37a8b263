"""LoRA on a patched tower: fine-tune with the tokens that inference will see, then merge the adapters.

    python examples/lora.py
    python examples/lora.py photos/ --model ViT-B-16 --pretrained openai --r 13 --steps 500

FOLDER has a sub-folder per class. Without it the bundled CLIP learns to name drawn scenes despite merged tokens.
"""

import argparse

import open_clip
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn.functional import cross_entropy
from torchvision.datasets import ImageFolder

import clipkernels as ck
from clipkernels.data import scenes
from clipkernels.images import Reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER")
    parser.add_argument("--model", help="a name that open_clip.list_models() has")
    parser.add_argument("--pretrained", help="a tag of its weights, or a checkpoint file")
    parser.add_argument("--r", type=int, default=8, help="tokens that ToMe merges per block")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, preprocess, tokenizer = ck.bundled()
    if arguments.model:
        model, _, preprocess = open_clip.create_model_and_transforms(arguments.model, pretrained=arguments.pretrained)
        tokenizer = open_clip.get_tokenizer(arguments.model)
    if arguments.folder:
        folder = ImageFolder(arguments.folder, preprocess, loader=Reader().read)
        classes, labels, images = folder.classes, torch.tensor(folder.targets), torch.stack([x for x, _ in folder])
    else:
        classes, (pixels, drawn) = scenes.CLASSES, scenes.draw(1024, seed=7)
        labels, images = torch.from_numpy(drawn), torch.stack([preprocess(Image.fromarray(scene)) for scene in pixels])
    text = ck.support.class_embeddings(model, tokenizer, ck.support.photo(classes))
    held_out, training = torch.randperm(len(images)).tensor_split([max(1, len(images) // 4)])
    ck.patch(model, ck.ToMe(r=arguments.r))
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=r"visual\..*\.c_(fc|proj)"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    before = adapted.encode_image(images[held_out], normalize=True) @ text.T
    for step, batch in enumerate(training[torch.randint(len(training), (arguments.steps, 32))]):
        loss = cross_entropy(100 * adapted.encode_image(images[batch], normalize=True) @ text.T, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss:.3f}")
    after = adapted.merge_and_unload().encode_image(images[held_out], normalize=True) @ text.T  # still patched
    for when, logits in (("before", before), ("after", after)):
        print(f"held-out accuracy {when}: {logits.argmax(-1).eq(labels[held_out]).float().mean():.1%}")


if __name__ == "__main__":
    main()
