"""How fast this machine reads memory, measured on the spot."""

from __future__ import annotations

import torch

from batchbench.batching.caches import last_level_cache_bytes
from batchbench.batching.engines.torch.stopwatch import Work, median_s
from batchbench.batching.models.loading import free_bytes
from batchbench.batching.roofline import TIMES_THE_CACHE, Bandwidth

_LEAST_BYTES = 2**28  # also where the cache is small or its size is not told
_SHARE_OF_MEMORY = 0.5  # of what is free: no measurement is worth swapping for
_WIDTH = 1024


@torch.inference_mode()
def measure_bandwidth(device: torch.device, *, turns: int = 7) -> Bandwidth:
    """Read a buffer that no cache holds, with all threads, in several ways.

    Each way's figure is the median of its turns, and the fastest way's is taken: a slow one tells
    of its own arithmetic and not of the memory.
    """
    cache = cache_bytes(device)
    rows = max(1, -(-buffer_bytes(device) // (4 * _WIDTH)))
    buffer = torch.ones(rows, _WIDTH, device=device)
    vector, flat = torch.ones(_WIDTH, device=device), buffer.view(-1)
    ways: dict[str, Work] = {
        "sum": buffer.sum,
        "matrix × vector": lambda: buffer.mv(vector),
        "dot product with itself": lambda: flat.dot(flat),
    }
    size = buffer.numel() * buffer.element_size()
    speeds = {name: size / median_s(way, device, turns) for name, way in ways.items()}
    best = max(speeds, key=lambda name: speeds[name])
    threads = torch.get_num_threads() if device.type == "cpu" else None
    return Bandwidth(speeds[best], best, size, cache, turns, threads)


def buffer_bytes(device: torch.device) -> int:
    """Return the size of the buffer that is read."""
    wanted = max(TIMES_THE_CACHE * (cache_bytes(device) or 0), _LEAST_BYTES)
    return min(wanted, int(free_bytes(device) * _SHARE_OF_MEMORY))


def cache_bytes(device: torch.device) -> int | None:
    """Of the last level; None where the machine does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return last_level_cache_bytes()
