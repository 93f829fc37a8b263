"""A method of your own: a plan of steps, without a line about tensors.

    python examples/own_method.py
    python examples/own_method.py photo.jpg --model ViT-B-16 --pretrained openai --block 3 --keep 60

`Once` drops patches in a single block: it keeps the ones that CLS attends to most. The map shows the patches that
survive. Without arguments the bundled CLIP looks at a drawn scene.
"""

import argparse
from dataclasses import dataclass

import open_clip
import torch
from PIL import Image

import clipkernels as ck
from clipkernels.data import scenes
from clipkernels.images import Reader


@dataclass(frozen=True)
class Once:
    """Keep `keep` patches after the attention of one block, for the rest of the tower."""

    block: int
    keep: int

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> ck.Plan:
        steps: list[ck.Prune | None] = [None] * blocks
        steps[self.block] = ck.Prune(min(self.keep, tokens - prefix), fuse=False)
        return ck.Plan(tuple(steps), tokens, prefix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", metavar="IMAGE")
    parser.add_argument("--model", help="a name that open_clip.list_models() has")
    parser.add_argument("--pretrained", help="a tag of its weights, or a checkpoint file")
    parser.add_argument("--block", type=int, default=2)
    parser.add_argument("--keep", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.model:
        model, _, preprocess = open_clip.create_model_and_transforms(arguments.model, pretrained=arguments.pretrained)
    else:
        model, preprocess, _ = ck.bundled()
    picture = Image.fromarray(scenes.draw(1, seed=7).images[0])
    if arguments.image:
        picture = Reader().read(arguments.image)
    ck.patch(model.eval(), Once(arguments.block, arguments.keep))
    with torch.no_grad():
        encoded = ck.encode_image(model, preprocess(picture)[None], source=True)
    survives = encoded.source[0, -1] >= 0  # (P,): the row of each patch after the last step, -1 where it is dropped
    print(f"{int(survives.sum())} of {len(survives)} patches survive (#):")
    for row in survives.view(round(len(survives) ** 0.5), -1):
        print(" ".join("#" if patch else "." for patch in row))


if __name__ == "__main__":
    main()
