"""Zero-shot classification with an open_clip model, dense and with a reduced image tower.

    python examples/open_clip_zero_shot.py
    python examples/open_clip_zero_shot.py *.jpg --classes cat dog ship --model ViT-B-16 --pretrained openai --r 13

Without arguments the bundled CLIP names coloured shapes that are drawn here.
"""

import argparse

import open_clip
import torch
from PIL import Image

import clipkernels as ck
from clipkernels.data import scenes
from clipkernels.images import Reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--model", help="a name that open_clip.list_models() has")
    parser.add_argument("--pretrained", help="a tag of its weights, or a checkpoint file")
    parser.add_argument("--classes", nargs="+", default=scenes.CLASSES)
    parser.add_argument("--r", type=int, default=4, help="tokens that ToMe merges per block")
    arguments = parser.parse_args()

    if arguments.model:
        model, _, preprocess = open_clip.create_model_and_transforms(arguments.model, pretrained=arguments.pretrained)
        tokenizer = open_clip.get_tokenizer(arguments.model)
    else:
        model, preprocess, tokenizer = ck.bundled()
    model.eval()

    names = arguments.images or [f"a drawn {scenes.CLASSES[label]}" for label in scenes.draw(8, seed=7).labels]
    pictures = [Reader().read(path) for path in arguments.images]
    pictures = pictures or [Image.fromarray(pixels) for pixels in scenes.draw(8, seed=7).images]
    images = torch.stack([preprocess(picture) for picture in pictures])
    classifier = ck.Classifier(model, tokenizer, arguments.classes, templates=["a photo of a {}."])

    with torch.no_grad():  # softmax, or sigmoids for a model such as SigLIP
        dense = classifier.probabilities(classifier(images))
        ck.patch(model, ck.ToMe(r=arguments.r))
        reduced = classifier.probabilities(classifier(images))

    tower = ck.tower_of(model)
    plan = ck.ToMe(r=arguments.r).plan(tower.num_tokens, len(tower.blocks), tower.prefix)
    print(f"{plan.tokens[0]} tokens enter, {plan.tokens[-1]} leave")
    for name, before, after in zip(names, dense, reduced, strict=True):
        guesses = [f"{arguments.classes[row.argmax()]} ({row.max():.0%})" for row in (before, after)]
        print(f"{name}: dense {guesses[0]}, reduced {guesses[1]}")


if __name__ == "__main__":
    main()
