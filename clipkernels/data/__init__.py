"""The small bundled CLIP, the code that draws and loads its images, and depth maps of point clouds."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import as_file, files

import torch
from PIL import Image
from torch import Tensor, nn

from clipkernels.data.point_clouds import depth_maps
from clipkernels.data.tokenizer import ByteTokenizer

__all__ = ["ByteTokenizer", "Preprocess", "bundled", "depth_maps"]

Preprocess = Callable[[Image.Image], Tensor]


def bundled() -> tuple[nn.Module, Preprocess, ByteTokenizer]:
    """The bundled open_clip CLIP in eval mode, its preprocessing of a PIL image, and its tokenizer.

    32×32 images, patches of 4 (65 tokens), six blocks, width 128, joint embedding 128. The model lets everything run
    without a download; it does not replace published weights. MODEL_CARD.md describes its training.
    """
    import open_clip
    from open_clip.transform import image_transform
    from safetensors.torch import load_file

    folder = files("clipkernels.data")
    config = json.loads(folder.joinpath("tiny_clip.json").read_text())
    # The constructor draws random weights, which must not move the caller's generator.
    with torch.random.fork_rng(devices=[]):
        model = open_clip.CLIP(**config["model_cfg"])
    with as_file(folder.joinpath("tiny_clip.safetensors")) as path:
        weights = load_file(path)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    image_size = config["model_cfg"]["vision_cfg"]["image_size"]
    preprocess = image_transform(image_size, is_train=False, **config["preprocess_cfg"])
    return model.eval(), preprocess, ByteTokenizer(config["model_cfg"]["text_cfg"]["context_length"])
