"""Reckon, on paper, a large sweep on a cluster, and the clients that load a cluster of servers.

    python benchmarks/cluster_model.py [--cells 1000] [--devices 64] [--minutes 5] [--rate 1e6]

The sweep is simulated event by event: each device serves one cell at a time, and one driver hands
out cells and keeps results, which takes it a fixed time a cell (``overhead_ms_per_cell`` of
``benchmarks/results/clusters/speed.json``). Durations of cells are log-normal, since a grid has
small and large batches; devices fail at random, and a failure costs the cell that was being served.

The clients are estimated from the processor time that a request and an output token cost a client.
The time of a request is measured here, against a server process on this machine. The time of a
token that arrives in a chunk of its own is taken from ``benchmarks/results/stamps.json``.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import random
import resource
import socket
from pathlib import Path
from typing import Any

from batchbench.batching.remote.exchange import Address, Outgoing, Wait
from batchbench.batching.remote.wire import exchange

ALL_RESULTS = Path(__file__).parent / "results"

RESULTS = ALL_RESULTS / "clusters"

SIGMA = 0.8
"""Spread of the durations: the longest of a thousand takes about twelve times the median."""

BUSY = 0.5
"""Share of a processor's time that a client may use: beyond it, requests leave late."""


def sweep_s(
    cells: int, devices: int, mean_s: float, driver_s: float, hours_to_failure: float, seed: int = 0
) -> dict[str, float]:
    """Return the duration of a sweep in seconds, and the share of it that the driver is busy.

    Args:
        mean_s: mean duration of a cell.
        driver_s: time of the driver for a cell.
        hours_to_failure: mean hours of a device until it fails; it is back five minutes later.
    """
    chance = random.Random(seed)
    waiting = [chance.lognormvariate(math.log(mean_s) - SIGMA**2 / 2, SIGMA) for _ in range(cells)]
    longest, work = max(waiting), sum(waiting)
    free = [(0.0, device) for device in range(devices)]  # heap of the times at which each is free
    driver_free = busy = end = lost = 0.0
    while waiting:
        at, device = heapq.heappop(free)
        begin = max(at, driver_free) + driver_s
        driver_free, busy = begin, busy + driver_s
        seconds = waiting.pop()
        fails = chance.expovariate(1 / (3600 * hours_to_failure))
        if fails < seconds:
            waiting.append(seconds)
            lost += fails
            heapq.heappush(free, (begin + fails + 300, device))
            continue
        end = max(end, begin + seconds)
        heapq.heappush(free, (begin + seconds, device))
    return {
        "hours": end / 3600,
        "ideal_hours": max(work / devices, longest) / 3600,
        "driver_busy": busy / end,
        "device_hours_lost": lost / 3600,
    }


class Steady:
    """A feed that keeps some requests in flight until a number was sent."""

    def __init__(self, requests: int, in_flight: int) -> None:
        self._left, self._most = requests, in_flight

    def next(self, now_ns: int, in_flight: int) -> Outgoing | Wait | None:
        if not self._left:
            return None
        if in_flight >= self._most:
            return Wait()
        self._left -= 1
        return Outgoing(self._left, now_ns, b'{"prompt": [1], "stream": true}', "/v1/completions")


def serve(listener: socket.socket) -> None:
    """Answer each request with a stream of one token."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    event = b'data: {"choices": [{"index": 0, "text": " a"}]}\n\n'
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.recv(65536)
            connection.sendall(head + event)


def client_s(requests: int) -> float:
    """Return the processor time of the client for a request with one output token."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    if not (child := os.fork()):
        serve(listener)
    try:
        address = Address.parse(f"http://127.0.0.1:{listener.getsockname()[1]}")
        exchange(address, Steady(50, 4))
        before = resource.getrusage(resource.RUSAGE_SELF)
        exchange(address, Steady(requests, 4))
        after = resource.getrusage(resource.RUSAGE_SELF)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        listener.close()
    spent = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return spent / requests


def clients(rate: float) -> dict[str, Any]:
    """Return how many processors of clients offer ``rate`` requests a second."""
    one = min(client_s(1000) for _ in range(3))
    stamps = json.loads((ALL_RESULTS / "stamps.json").read_text(encoding="utf-8"))
    token_s = stamps["trials"][0]["client_us_per_event"] / 1e6
    found: dict[str, Any] = {"request_us": one * 1e6, "token_us": token_s * 1e6}
    for tokens in (1, 21, 256):
        each = one + (tokens - 1) * token_s
        found[f"clients_for_{tokens}_tokens"] = math.ceil(rate * each / BUSY)
        found[f"requests_per_s_of_a_client_{tokens}_tokens"] = round(BUSY / each)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5.0, help="mean duration of a cell")
    parser.add_argument("--rate", type=float, default=1e6, help="requests a second")
    options = parser.parse_args()
    speed = json.loads((RESULTS / "speed.json").read_text(encoding="utf-8"))
    driver_s = speed["overhead_ms_per_cell"] / 1000
    rows = {
        f"{cells} cells of {minutes:g} min on {devices} devices": sweep_s(
            cells, devices, 60 * minutes, driver_s, hours_to_failure=200.0
        )
        for cells, devices, minutes in (
            (options.cells, 1, options.minutes),
            (options.cells, options.devices, options.minutes),
            (10 * options.cells, 16 * options.devices, options.minutes),
            (10 * options.cells, options.devices, 0.01 * options.minutes),
        )
    }
    result = {
        "driver_ms_per_cell": 1000 * driver_s,
        "sweeps": rows,
        "devices_that_bind_the_driver": math.floor(60 * options.minutes / driver_s),
        "rate": options.rate,
        "clients": clients(options.rate),
    }
    text = json.dumps(result, indent=2)
    (RESULTS / "model.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
