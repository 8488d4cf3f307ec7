"""The requests per second that one and two client processes offer to a server, on this machine.

    python benchmarks/clients.py [--times 3]

Four server processes answer each request at once with a prepared response of eight tokens, so that
a request takes them less time than a client. Rates rise by steps of a fifth. A rate is offered if
all is over, in one of three attempts, after at most 1.1 times the time that its arrivals take.
Turns of one and of two clients alternate; the result is the median over turns. At an easy rate,
the rate in the merged recording must be the sum of the clients' own rates. Writes
``benchmarks/results/clusters/clients.json``; exit code 1 if the rates do not add up.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import sys
from multiprocessing import get_context
from pathlib import Path

from batchbench.batching.experiment import Experiment
from batchbench.batching.machine import environment
from batchbench.batching.progress import Watch
from batchbench.batching.session import conduct
from batchbench.reports.served import clients_of

RESULT = Path(__file__).parent / "results" / "clusters" / "clients.json"

TOKENS, SERVERS = 8, 4

FIRST, STEP, SECONDS, KEEPS_UP, ATTEMPTS = 1500.0, 1.2, 1.5, 1.1, 3

EASY, ADDS_UP = 200.0, 0.02


def serve(listener: socket.socket) -> None:
    """Answer every request in turn, with what is prepared."""
    events = [{"choices": [{"index": 0, "text": "a"}]}] * TOKENS
    usage = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": TOKENS}}
    lines = [*map(json.dumps, [*events, usage]), "[DONE]"]
    stream = "".join(f"data: {line}\n\n" for line in lines)
    models = json.dumps({"object": "list", "data": [{"id": "prepared", "object": "model"}]})

    def response(body: str, kind: str, status: str = "200 OK") -> bytes:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        return (head + body).encode()

    answers = {
        b"POST": response(stream, "text/event-stream"),
        b"GET /v1/models": response(models, "application/json"),
    }
    unknown = response("{}", "application/json", "404 Not Found")
    while True:
        connection, _ = listener.accept()
        with connection:
            data = connection.recv(1 << 16)
            found = [answer for start, answer in answers.items() if data.startswith(start)]
            connection.sendall(found[0] if found else unknown)


def trial(url: str, clients: int, rate: float) -> dict[str, float]:
    """Return requests per second, and the rates at which requests were sent."""
    requests = round(rate * SECONDS)
    experiment = Experiment.of(
        {
            "target": url,
            "clients": clients,
            "strategy": "continuous",
            "arrivals": "constant",
            "request_rate": rate,
            "queue_size": requests,
            "output_tokens": str(TOKENS),
            "prompt_tokens": "4",
            "trials": 1,
            "verify": "none",
        }
    )
    outcome = conduct(experiment, Watch())
    (recording,) = outcome.recordings["continuous"]
    found = {"requests_per_s": requests / recording.duration_ns * 1e9}
    if (own := clients_of(outcome.recordings)) is not None:
        found["merged"] = own["rate"] or 0.0
        found["sum"] = sum(client["rate"] or 0.0 for client in own["each"])
    print(clients, found, file=sys.stderr, flush=True)
    return found


def offered(url: str, clients: int) -> float:
    """Return the highest rate before the first that is not offered."""
    rate = FIRST
    while any(
        trial(url, clients, rate)["requests_per_s"] > rate / KEEPS_UP for _ in range(ATTEMPTS)
    ):
        rate *= STEP
    return rate / STEP


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a socket for each request
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        if hasattr(socket, "TCP_DEFER_ACCEPT"):  # one request that is late holds up no other
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        make = get_context("fork").Process
        servers = [make(target=serve, args=(listener,), daemon=True) for _ in range(SERVERS)]
        for server in servers:
            server.start()
        turns: dict[int, list[float]] = {1: [], 2: []}
        for number in range(options.times):
            for clients in (1, 2) if number % 2 == 0 else (2, 1):
                turns[clients].append(offered(url, clients))
        easy = trial(url, 2, EASY)
        for server in servers:
            server.kill()
            server.join()
    rates = {clients: statistics.median(of) for clients, of in turns.items()}
    off = abs(easy["sum"] / easy["merged"] - 1)
    result = {
        "one": round(rates[1]),
        "two": round(rates[2]),
        "ratio": round(rates[2] / rates[1], 2),
        "merged": round(easy["merged"], 2),
        "sum": round(easy["sum"], 2),
        "processors": os.cpu_count(),
        "turns": turns,
    }
    facts = {k: v for k, v in environment().items() if k != "hostname"}
    RESULT.write_text(json.dumps({**result, "environment": facts}, indent=2) + "\n", "utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "turns"}))
    return int(off > ADDS_UP)


if __name__ == "__main__":
    sys.exit(main())
