"""Errors of measured latencies against a server whose send times are known.

    python benchmarks/client_limits.py [--quick] [--output FILE]

A process of its own streams events at even intervals, as a decoding model does, and writes its
clock into each. The client of batchbench receives them undisturbed, or blocked for part of the
time; with kernel stamps, or with its own. Each row has the figures that a run knows about its
client, and the error of the measured TTFT and ITL. The limits beyond which a run is suspect come
from this table (docs/servers.md).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from heapq import heappop, heappush
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from batchbench.batching.remote.events import Reply, client_lag, parse
from batchbench.batching.remote.exchange import Address, Exchange, Outgoing, Wait
from batchbench.batching.remote.wire import exchange

TOKENS = 60

BODY = b"{}"

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def serve(pipe: Connection, rate: float) -> None:
    """Stream TOKENS events to each connection, ``rate`` a second, until the pipe closes."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    listener.setblocking(False)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(pipe, selectors.EVENT_READ)
    pipe.send(listener.getsockname()[1])
    draw = random.Random(0)
    due: list[tuple[int, int, int, socket.socket]] = []
    count = 0
    while True:
        wait_s = max(0.0, (due[0][0] - time.monotonic_ns()) / 1e9) if due else None
        for key, _ in selector.select(wait_s):
            if key.fileobj is pipe:
                return
            if key.fileobj is listener:
                raw, _ = listener.accept()
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(raw, selectors.EVENT_READ)
                continue
            assert isinstance(key.fileobj, socket.socket)
            if not key.fileobj.recv(1 << 16).endswith(BODY):
                continue  # the body comes by itself
            selector.unregister(key.fileobj)
            count += 1
            first = time.monotonic_ns() + int(draw.uniform(0.5, 1.5) * 1e9 / rate)
            heappush(due, (first, count, 0, key.fileobj))
        while due and due[0][0] <= time.monotonic_ns():
            _, number, token, raw = heappop(due)
            raw.sendall((HEAD if token == 0 else b"") + _event(token))
            if token + 1 < TOKENS:
                gap = int(draw.uniform(0.98, 1.02) * 1e9 / rate)
                heappush(due, (time.monotonic_ns() + gap, number, token + 1, raw))
            else:
                raw.close()


def _event(token: int) -> bytes:
    finish = '"length"' if token + 1 == TOKENS else "null"
    choice = f'{{"index":0,"text":" {time.monotonic_ns()}","finish_reason":{finish}}}'
    text = f'data: {{"object":"text_completion","choices":[{choice}],'
    text += f'"usage":{{"completion_tokens":{token + 1},"prompt_tokens":1}}}}\n\n'
    if token + 1 == TOKENS:
        text += "data: [DONE]\n\n"
    chunk = f"{len(text):x}\r\n{text}\r\n".encode()
    return chunk + (b"0\r\n\r\n" if token + 1 == TOKENS else b"")


class AllAtOnce:
    """A feed of requests that are due at even distances within a second."""

    def __init__(self, streams: int) -> None:
        began = time.monotonic_ns() + 50_000_000
        self._left = [
            Outgoing(i, began + i * 1_000_000_000 // streams, BODY, "/v1/completions")
            for i in reversed(range(streams))
        ]

    def next(self, now_ns: int, in_flight: int) -> Outgoing | Wait | None:
        if not self._left:
            return None
        if self._left[-1].due_ns > now_ns:
            return Wait(self._left[-1].due_ns)
        return self._left.pop()


@dataclass(frozen=True)
class Row:
    """One trial: the client's figures, and the relative errors of the metrics in percent."""

    streams: int
    kernel: bool
    blocked: str
    kernel_share: float
    merged_share: float
    lag_p99_ms: float
    late_p99_ms: float
    stamp_error_p99_ms: float
    itl_p50_ms: float
    ttft_p50_ms: float
    itl_p50: float
    itl_p99: float
    ttft_p50: float
    ttft_p99: float


def trial(streams: int, rate: float, kernel: bool, busy_ms: float, period_ms: float) -> Row:
    """Measure one combination; the client computes ``busy_ms`` of each ``period_ms``."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=serve, args=(theirs, rate))
    process.start()
    address = Address.parse(f"http://127.0.0.1:{ours.recv()}")
    free_ns = 0

    def watch(_: Exchange) -> None:
        nonlocal free_ns
        now = time.monotonic_ns()
        if busy_ms and now > free_ns + (period_ms - busy_ms) * 1e6:
            while time.monotonic_ns() < now + busy_ms * 1e6:
                pass
            free_ns = time.monotonic_ns()

    exchanges = exchange(address, AllAtOnce(streams), watch, kernel_stamps=kernel)
    ours.close()
    theirs.close()
    process.terminate()
    process.join()
    replies = [parse(one, TOKENS) for one in exchanges]
    failures = [reply.failure for reply in replies if reply.failure]
    assert not failures, failures[0]
    return row_of(exchanges, replies, streams, kernel, f"{busy_ms:g} of {period_ms:g} ms")


def row_of(
    exchanges: Sequence[Exchange],
    replies: Sequence[Reply],
    streams: int,
    kernel: bool,
    blocked: str,
) -> Row:
    """Compare the client's times with those in the events.

    The true TTFT begins when the request was sent: a request that is sent late is the client's
    own fault, and its TTFT counts from the time at which it was due.
    """
    due = {"seen": [e.due_ns for e in exchanges], "true": [e.sent_ns for e in exchanges]}
    seen = np.array([r.token_times_ns for r in replies])
    sent = np.array([[int(n) for n in re.findall(r"\d+", r.text)] for r in replies])
    lag = client_lag(exchanges, replies)
    metrics = {}
    for name, times in (("true", sent), ("seen", seen)):
        itl, ttft = np.diff(times) / 1e6, (times[:, 0] - due[name]) / 1e6
        metrics[name] = [np.percentile(v, p) for v in (itl, ttft) for p in (50, 99)]
    errors = [100 * (s / t - 1) for s, t in zip(metrics["seen"], metrics["true"], strict=True)]
    return Row(
        streams,
        kernel,
        blocked,
        round(lag.kernel_share, 4),
        round(lag.merged_share, 4),
        round(lag.loop_p99_ns / 1e6, 3),
        round(lag.late_p99_ns / 1e6, 3),
        round(float(np.percentile(np.abs(seen - sent), 99)) / 1e6, 3),
        round(float(metrics["true"][0]), 2),
        round(float(metrics["true"][2]), 2),
        *(round(float(error), 2) for error in errors),
    )


BLOCKS = ((0, 1), (2, 20), (10, 50), (20, 100), (60, 1000), (200, 300))

COLUMNS = "streams kernel blocked         kernel% merged%   lag99  late99  error99 | "
COLUMNS += "ITL50 %  ITL99 %  TTFT50 %  TTFT99 %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    counts = [(64, 20.0)] if options.quick else [(16, 20.0), (64, 20.0)]
    rows = []
    print(COLUMNS)
    for streams, rate in counts:
        for busy, period in BLOCKS[::3] if options.quick else BLOCKS:
            for kernel in (True, False):
                row = trial(streams, rate, kernel, busy, period)
                rows.append(row)
                print(
                    f"{row.streams:7} {'yes' if kernel else 'no':6} {row.blocked:15}"
                    f"{100 * row.kernel_share:8.1f}{100 * row.merged_share:8.2f}"
                    f"{row.lag_p99_ms:8.2f}{row.late_p99_ms:8.2f}{row.stamp_error_p99_ms:9.3f} |"
                    f"{row.itl_p50:8.2f}{row.itl_p99:9.2f}{row.ttft_p50:10.2f}{row.ttft_p99:10.2f}",
                    flush=True,
                )
    if options.output:
        data = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "tokens": TOKENS}
        data["rows"] = [asdict(row) for row in rows]
        options.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
