"""Exported folders, run without torch: images and texts to embeddings with numpy, Pillow, tokenizers and a runtime.

from clipkernels.runtime import Runtime   # from runtime import Runtime, with an exported folder on the path

runtime = Runtime("out/")
runtime.encode_image(["photo.jpg"])       # (1,E)
runtime.encode_text(["a cat", "a dog"])   # (2,E)
"""

from clipkernels.runtime.encoders import Runtime

__all__ = ["Runtime"]
