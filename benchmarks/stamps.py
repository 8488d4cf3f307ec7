"""Measure how exact the client's time stamps of arriving tokens are, and what an event costs it.

    python benchmarks/stamps.py [--streams 1000] [--seconds 5] [--json FILE]

A server process sends 20 events a second on each stream and writes the time into each event,
just before it sends it. Lag is the client's stamp minus that time, on one clock of one machine, so
it contains the server's own way to the kernel. Four trials: stamps of the kernel and of user space,
each with a client that only reads, and with 64 streams and a client that is blocked for 200 ms of
every 300 ms. Bytes that arrive while the client is blocked are merged into one read and have the
stamp of the last. So lag is that of the last event of each read, and ``lag_all`` that of every
event; the read with the end of a stream is left out of the former.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from batchbench.batching.remote.events import Reply, client_lag, parse
from batchbench.batching.remote.exchange import Address, Exchange, Outgoing, Wait
from batchbench.batching.remote.wire import exchange

PERIOD_NS = 50_000_000
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"Connection: close\r\n\r\n"
)


def chunk(text: str) -> bytes:
    """Return an event in a chunk of an HTTP body."""
    data = f"data: {text}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def serve(streams: int, events: int) -> None:
    """Serve one trial: wait for all requests, then send the events of all streams in turn."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    print(listener.getsockname()[1], flush=True)
    selector = selectors.DefaultSelector()
    connections = []
    for _ in range(streams):
        one, _ = listener.accept()
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(one, selectors.EVENT_READ)
        connections.append(one)
    for one in connections:
        while b"\r\n\r\n" not in one.recv(65536):
            pass
        one.sendall(HEAD)
    template = chunk(json.dumps({"choices": [{"index": 0, "text": " " + "9" * 18}]}))
    before, after = template.split(b"9" * 18)
    begun = time.monotonic_ns() + PERIOD_NS
    for i in range(streams * events):
        due = begun + i * PERIOD_NS // streams
        ahead = due - time.monotonic_ns()
        if ahead > 100_000:
            time.sleep(ahead / 1e9)
        connections[i % streams].send(before + b"%018d" % time.monotonic_ns() + after)
    usage = {"choices": [], "usage": {"completion_tokens": events}}
    end = chunk(json.dumps(usage)) + chunk("[DONE]") + b"0\r\n\r\n"
    for one in connections:
        one.sendall(end)
        one.close()
    print(time.process_time(), flush=True)


class AtOnce:
    """A feed of requests that are all sent at the start."""

    def __init__(self, streams: int) -> None:
        self._left = streams

    def next(self, now_ns: int, in_flight: int) -> Outgoing | Wait | None:
        if not self._left:
            return None
        self._left -= 1
        return Outgoing(self._left, now_ns, b'{"stream": true}', "/v1/completions")


class Blocking:
    """A watcher that blocks the client for 200 ms of every 300 ms."""

    def __init__(self) -> None:
        self._until = time.monotonic_ns()

    def __call__(self, _: Exchange) -> None:
        if time.monotonic_ns() - self._until > 100_000_000:
            time.sleep(0.2)
            self._until = time.monotonic_ns()


def figures(values: list[int]) -> dict[str, float]:
    """Return the median, the 99th percentile and the largest value, in milliseconds."""
    p50, p99, most = np.percentile(np.array(values) / 1e6, (50, 99, 100))
    return {"p50": round(p50, 3), "p99": round(p99, 3), "max": round(most, 3)}


def lags(exchanges: list[Exchange], replies: list[Reply]) -> tuple[list[int], list[int]]:
    """Return the lag of the last event of each read, and of every event, in nanoseconds."""
    last, every = [], []
    for one, reply in zip(exchanges, replies, strict=True):
        of_read = {}
        for piece in reply.chunks:
            lag = piece.time_ns - int(piece.text)
            of_read[piece.read] = lag
            every.append(lag)
        of_read.pop(len(one.reads) - 1, None)
        last.extend(of_read.values())
    return last, every


def trial(streams: int, seconds: float, *, kernel: bool, blocked: bool) -> dict[str, Any]:
    """Run one trial and return its figures."""
    events = int(seconds * 1e9 / PERIOD_NS)
    command = [sys.executable, __file__, "--serve", str(streams), str(events)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = Address.parse(f"http://127.0.0.1:{int(server.stdout.readline())}")
        watch = Blocking() if blocked else None
        begun, wall = time.process_time(), time.monotonic()
        exchanges = exchange(address, AtOnce(streams), watch, kernel_stamps=kernel)
        cost, wall = time.process_time() - begun, time.monotonic() - wall
        server_cost = float(server.stdout.readline())
    begun = time.process_time()
    replies = [parse(one, events) for one in exchanges]
    parsing = time.process_time() - begun
    failures = [reply.failure.text for reply in replies if reply.failure is not None]
    assert not failures, failures[:3]
    last, every = lags(exchanges, replies)
    lag = client_lag(exchanges, replies)
    return {
        "streams": streams,
        "events": len(every),
        "stamps": "kernel" if kernel else "user space",
        "client_blocked": blocked,
        "wall_s": round(wall, 2),
        "lag_ms": figures(last),
        "lag_all_ms": figures(every),
        "merged_share": round(lag.merged_share, 4),
        "kernel_share": round(lag.kernel_share, 4),
        "loop_lag_p50_ms": round(lag.loop_p50_ns / 1e6, 3),
        "loop_lag_p99_ms": round(lag.loop_p99_ns / 1e6, 3),
        "late_p99_ms": round(lag.late_p99_ns / 1e6, 3),
        "client_us_per_event": round(cost / len(every) * 1e6, 1),
        "parse_us_per_event": round(parsing / len(every) * 1e6, 1),
        "server_us_per_event": round(server_cost / len(every) * 1e6, 1),
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    """Run the trials and print them; write them to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if args.serve:
        serve(*args.serve)
        return
    plan = [(args.streams, False), (64, True)]
    trials = []
    for streams, blocked in plan:
        for kernel in (True, False):
            found = trial(streams, args.seconds, kernel=kernel, blocked=blocked)
            trials.append(found)
            print(json.dumps(found))
    if args.json:
        machine = {"cpus": os.cpu_count(), "system": platform.platform()}
        result = {"command": " ".join(["python", *sys.argv]), **machine, "trials": trials}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
