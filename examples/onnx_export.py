"""Export a reduced image tower to ONNX and run it in onnxruntime at another batch size.

    python examples/onnx_export.py
    python examples/onnx_export.py tower.onnx --model ViT-B-16 --pretrained openai --keep 0.7

Without arguments the bundled CLIP is exported. The graph has fixed token counts and a free
batch size. It needs onnxscript, onnxruntime and a torch newer than 2.6.
"""

import argparse
import tempfile
from pathlib import Path

import onnxruntime
import open_clip
import torch

import clipkernels as ck


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE.onnx", help="default: a temporary file")
    parser.add_argument("--model", help="a name that open_clip.list_models() has")
    parser.add_argument("--pretrained", help="a tag of its weights, or a checkpoint file")
    parser.add_argument("--keep", type=float, default=0.7, help="share of the patches that EViT keeps per step")
    arguments = parser.parse_args()

    if arguments.model:
        model, _, _ = open_clip.create_model_and_transforms(arguments.model, pretrained=arguments.pretrained)
    else:
        model, _, _ = ck.bundled()
    tower = ck.patch(model.eval(), ck.EViT(keep=arguments.keep)).visual
    height, width = ck.tower_of(model).image_size
    images = torch.randn(5, 3, height, width)

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = arguments.file or Path(folder) / "tower.onnx"
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        torch.onnx.export(tower, (images[:2],), file, dynamo=True, opset_version=20, dynamic_shapes=shapes)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        (embedding,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        difference = (torch.from_numpy(embedding) - tower(images)).abs().max()
    print(f"exported with batch 2, run with batch 5: embeddings {embedding.shape}")
    print(f"largest difference from PyTorch: {difference:.1e}")


if __name__ == "__main__":
    main()
