"""Answers that real servers gave, and servers that give them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from batchbench.batching.remote import dialects
from batchbench.batching.remote.events import Response
from batchbench.batching.remote.exchange import (
    Address,
    Exchange,
    Failure,
    FailureKind,
    Read,
    ServerError,
)

ADDRESS = Address.parse("http://127.0.0.1:1")

FOLDER = Path(__file__).parent.parent / "remote" / "answers"


@dataclass
class Answers:
    """A server that answers GETs from a table; ``asked`` has the paths in order."""

    table: Mapping[str, tuple[int, str]]
    asked: list[str] = field(default_factory=list)

    def get(self, address: Address, path: str) -> Response:
        self.asked.append(path)
        if path not in self.table:
            return response(404, '{"detail": "Not Found"}')
        status, body = self.table[path]
        if status == 0:
            raise ServerError(Failure(FailureKind.REFUSED, f"--target: {address} refuses"))
        return response(status, body)

    def install(self, patch: pytest.MonkeyPatch) -> Answers:
        """Let discovery and counters ask this server."""
        patch.setattr(dialects, "get", self.get)
        return self


def response(status: int, body: str) -> Response:
    """Return a whole response with this body."""
    return Response(status, {}, [(0, body.encode())])


def recorded(name: str) -> dict[str, Any]:
    """Return the answers of a server, as ``benchmarks/servers.py record`` writes them."""
    data: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return data


def answers_of(name: str) -> Answers:
    """Return a server that gives the recorded answers again."""
    gets = recorded(name)["gets"]
    return Answers({path: (answer["status"], answer["body"]) for path, answer in gets.items()})


def streamed(body: str) -> Exchange:
    """Return the exchange of a stream, each event of which came in a read of its own."""
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    head += f"Content-Length: {len(body.encode())}\r\n\r\n"
    parts = [head, *(f"{event}\n\n" for event in body.split("\n\n") if event)]
    reads = [Read(i, True, i, part.encode()) for i, part in enumerate(parts)]
    return Exchange(0, 0, 0, reads, len(reads))
