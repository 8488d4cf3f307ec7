"""Dummy weights: the right shapes with seeded random values, bit-equal on any machine.

The time of a step does not depend on the values of the weights, so a machine that has none can
still measure. But the values must be such that the text varies: GPT-2's own initialisation says
one token for ever, and every comparison of outputs would pass.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

_EMBEDDING, _POSITION, _GAIN = 0.1, 0.2, 2.0
"""Spread of token and of position embeddings, and what a matrix multiplies the size of its input
by. With tied embeddings a small gain repeats the input token for ever; a large one is chaotic: at
4, rounding to bfloat16 changes two thirds of all next tokens, at 2 one in ten (docs/log.md)."""


@torch.no_grad()
def fill_with_dummy_weights(model: nn.Module, seed: int) -> None:
    """Overwrite all parameters: norms with 1 and 0, biases with 0, the rest at random."""
    filled = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if id(parameter) in filled:  # tied to one that came before
                continue
            filled.add(id(parameter))
            if "norm" in type(module).__name__.lower():
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif parameter.ndim < 2:
                parameter.zero_()
            else:
                values = uniform(name, seed, parameter.numel(), _spread(module, path, parameter))
                parameter.copy_(torch.from_numpy(values).view(parameter.shape))


def _spread(module: nn.Module, path: str, parameter: nn.Parameter) -> float:
    """Standard deviation of a matrix's values."""
    if isinstance(module, nn.Embedding):
        return _POSITION if path.endswith("wpe") else _EMBEDDING
    inputs_first = type(module).__name__ == "Conv1D"  # transformers': [inputs, outputs]
    return _GAIN / math.sqrt(parameter.shape[0 if inputs_first else -1])


def uniform(name: str, seed: int, count: int, spread: float) -> NDArray[np.float32]:
    """``count`` float32 values of standard deviation ``spread``, uniform and centred.

    Drawn as 16-bit integers from Philox, whose stream is fixed by its definition (Salmon et al.,
    SC 2011), and scaled by one rounding of one product each: the same bits everywhere. The name of
    a parameter is part of its key, so that the order of parameters does not matter.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw((count + 3) // 4)
    integers = raw.astype("<u8").view("<i2")[:count]
    values = integers.astype(np.float32)
    values += np.float32(0.5)
    values *= np.float32(spread * math.sqrt(3.0) / 32768.0)
    return values
