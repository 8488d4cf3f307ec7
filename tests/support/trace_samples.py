"""Traces of several tests: a small one of each format, and a function to read one."""

from __future__ import annotations

import json
from pathlib import Path

from batchbench.workloads.prompts import byte_tokens
from batchbench.workloads.traces import Trace, read_trace

AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""

AZURE_2024 = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00.017335+00:00,2399,6
2024-05-10 02:00:01+02:00,76,15
"""

BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,276,693,API log
"""

MOONCAKE = """\
{"timestamp": 0, "input_length": 1100, "output_length": 500, "hash_ids": [0, 1, 2]}
{"timestamp": 3052, "input_length": 1000, "output_length": 490, "hash_ids": [0, 14]}
{"timestamp": 3052, "input_length": 700, "output_length": 794, "hash_ids": [28, 1]}
"""

SHAREGPT = json.dumps(
    [
        {
            "id": "QWJhYvA_0",
            "conversations": [
                {"from": "human", "value": "Why is the sky blue?"},
                {"from": "gpt", "value": "It scatters."},
                {"from": "human", "value": "And red?"},
                {"from": "gpt", "value": "Later."},
            ],
        },
        {
            "id": "i6IyJda_0",
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Größe?"},
                {"from": "gpt", "value": "1,80 m"},
            ],
        },
    ],
    indent=2,
    ensure_ascii=False,
)

OWN = """\
{"due_ns": 0, "output_tokens": 10, "prompt_ids": [464, 2068]}
{"due_ns": 1500000000, "output_tokens": 3, "prompt_ids": [7, 8, 9]}
"""

SAMPLES = {
    "azure": (AZURE, [374, 396, 879], [44, 109, 55], [0, 4_314_579_000, 4_541_877_000]),
    "azure 2024": (AZURE_2024, [2162, 2399, 76], [5, 6, 15], [0, 7_405_000, 990_070_000]),
    "burstgpt": (BURSTGPT, [472, 1087, 417], [18, 230, 276], [0, 40_500_000_000, 113 * 10**9]),
    "mooncake": (MOONCAKE, [1100, 1000, 700], [500, 490, 794], [0, 3_052 * 10**6, 3_052 * 10**6]),
    "sharegpt": (SHAREGPT, [20, 8], [12, 6], None),
    "batchbench": (OWN, [2, 3], [10, 3], [0, 1_500_000_000]),
}


def write(file: Path, content: str | bytes) -> Path:
    """Write this content to the file; return the file."""
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def read(file: Path, **more: object) -> Trace:
    """Read a trace with a token for each byte of a text."""
    return read_trace(file, byte_tokens, **more)  # type: ignore[arg-type]
