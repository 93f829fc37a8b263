"""Peak memory of a process that serves an exported graph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = {
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
session.run(None, {session.get_inputs()[0].name: images})
""",
    "openvino": """
import openvino
openvino.compile_model(openvino.Core().read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": hint})(images)
""",
    "pt2": """
import torch
with torch.no_grad():
    torch.export.load(file).module()(torch.from_numpy(images))
""",
}
BEGIN = (
    "import sys, numpy\nfile, hint, *shape = sys.argv[1:]\nimages = numpy.zeros([*map(int, shape)], numpy.float32)\n"
)
END = """
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
"""
SECONDS = 600


def peak_memory(runtime: str, file: Path, hint: str, shape: tuple[int, ...]) -> int | None:
    """The peak resident bytes of a new process that loads a graph and runs one batch; None where it cannot be known.

    Args:
        runtime: onnx, openvino or pt2.
        file: the graph.
        hint: OpenVINO's precision of the products that are not quantised.
        shape: of the batch.
    """
    command = [sys.executable, "-c", BEGIN + SCRIPTS[runtime] + END, str(file), hint, *map(str, shape)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
        return 1024 * int(result.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
