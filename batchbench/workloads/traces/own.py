"""Our own trace: a workload as JSON lines, written and read without loss.

The first line tells what the workload is, ``{"batchbench_workload": 1, "name": …, "digest": …}``;
each other one is a request, ``{"due_ns": 0, "output_tokens": 10, "prompt_ids": [464, …]}``. A file
written by hand may leave the first line out, and have ``prompt_tokens`` in the place of
``prompt_ids``; the prompts are then made up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, MutableMapping
from typing import Any, BinaryIO

from batchbench.errors import UsageError
from batchbench.workloads.request import Workload
from batchbench.workloads.traces.objects import read_objects
from batchbench.workloads.traces.rows import (
    BadRow,
    Row,
    WrongError,
    nanoseconds_of,
    shown,
    tokens_of,
)

VERSION = 1


def write_workload(workload: Workload) -> Iterator[str]:
    """The workload's lines, each with its end."""
    about = {
        "batchbench_workload": VERSION,
        "name": workload.name,
        "seed": workload.seed,
        "requests": len(workload),
        "stop_at_eos": workload.stop_at_eos,
        "max_concurrency": workload.max_concurrency,
        "digest": workload.digest,
    }
    yield json.dumps(about, ensure_ascii=False) + "\n"
    for request in workload:
        row = {
            "due_ns": request.due_ns,
            "output_tokens": request.output_tokens,
            "prompt_ids": workload.prompt(request.index).tolist(),
        }
        yield json.dumps(row, separators=(",", ":")) + "\n"


def read_own(
    content: BinaryIO, head: bytes, where: str, about: MutableMapping[str, Any]
) -> Iterator[Row | BadRow]:
    """Yield the requests; add the content of the first line to ``about``.

    Raises:
        UsageError: the first line is of another version, or damaged.
    """
    with_ids: bool | None = None
    for place, found in read_objects(content, head):
        if isinstance(found, BadRow):
            yield found
            continue
        try:
            if place.number == 1 and "batchbench_workload" in found:
                about.update(_about(found, where))
                continue
            row = _request(found)
            if with_ids is not None and with_ids != (row.ids is not None):
                raise WrongError("has prompt_ids, or lacks them, unlike the requests before it")
            with_ids = row.ids is not None
            yield row
        except WrongError as error:
            yield error.at(place)


def _about(found: dict[str, Any], where: str) -> dict[str, Any]:
    if found["batchbench_workload"] != VERSION:
        raise UsageError(
            f"{where}: line 1: is of version {shown(found['batchbench_workload'])}, this "
            f"batchbench reads {VERSION}; save it again"
        )
    most, stop = found.get("max_concurrency"), found.get("stop_at_eos", False)
    if type(stop) is not bool or not (most is None or (type(most) is int and 1 <= most <= 10**8)):
        raise UsageError(f"{where}: line 1: stop_at_eos or max_concurrency has a wrong value")
    if not isinstance(found.get("name", ""), str):
        raise UsageError(f"{where}: line 1: name must be a text")
    return found


def _request(found: dict[str, Any]) -> Row:
    ids = found.get("prompt_ids")
    if ids is not None and not (
        isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < 2**31 for i in ids)
    ):
        raise WrongError(f"prompt_ids is {shown(ids)}: must be a list of token ids")
    prompt_tokens = found.get("prompt_tokens") if ids is None else len(ids)
    return Row(
        prompt_tokens=tokens_of("prompt_tokens", prompt_tokens),
        output_tokens=tokens_of("output_tokens", found.get("output_tokens")),
        due_ns=nanoseconds_of("due_ns", found.get("due_ns", 0), 1),
        ids=ids,
    )
