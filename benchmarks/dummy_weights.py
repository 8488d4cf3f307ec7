"""Measure how varied and how chaotic dummy weights are, by the gain of their matrices.

    .venv/bin/python benchmarks/dummy_weights.py

Prints, for GPT-2 124M: distinct tokens among 100 generated greedily, and the share of next tokens
of 107 random ones on which bfloat16 and float64 agree. The gain in use is 2 (docs/log.md).
"""

import copy

import numpy as np
import torch

from batchbench.batching.models import ModelSpec, find_model
from batchbench.batching.models import loading as dummy
from batchbench.batching.models.loading import load_model


def main() -> None:
    spec = ModelSpec(model="gpt2", load_format="dummy", device="cpu", dtype="float32")
    ids = torch.from_numpy(np.random.Generator(np.random.Philox(0)).integers(0, 50257, (1, 107)))
    for gain in (1.0, 2.0, 3.0, 4.0):
        dummy._GAIN = gain
        model = load_model(find_model(spec), spec, seed=0).module
        with torch.inference_mode():
            said = model.generate(
                ids[:, :7], max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, 7:]
            low = copy.deepcopy(model).to(torch.bfloat16)(ids).logits.argmax(-1)
            high = model.double()(ids).logits.argmax(-1)
        agree = (low == high).float().mean().item()
        print(f"gain {gain:g}: {len(set(said.tolist()))}/100 distinct, bfloat16 agrees {agree:.0%}")


if __name__ == "__main__":
    main()
