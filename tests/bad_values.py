"""Values of wrong types and of impossible sizes, for tests of the checks of arguments."""

import numpy as np
import torch
from torch import nn


def nested():
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)


BAD = {
    "None": lambda: None,
    "a list": lambda: [1.0, 2.0],
    "a tuple": lambda: (torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 4)),
    "a str": lambda: "every",
    "a long str": lambda: "line\n" * 100,
    "bytes": lambda: b"cls",
    "a dict": lambda: {"x": 1},
    "numpy": lambda: np.ones((2, 9, 16), np.float32),
    "a module": lambda: nn.LayerNorm(16),
    "a type": lambda: torch.Tensor,
    "sparse": lambda: torch.ones(2, 9, 16).to_sparse(),
    "nested": nested,
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(2, 9, 16), 0.1, 0, torch.quint8),
    "complex": lambda: torch.ones(2, 9, 16, dtype=torch.complex64),
    "a tensor of no axis": lambda: torch.tensor(1.0),
    "True": lambda: True,
    "1.5": lambda: 1.5,
    "-1": lambda: -1,
    "NaN": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "a huge int": lambda: 10**5000,
    "a complex number": lambda: 1j,
}
