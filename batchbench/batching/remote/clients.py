"""Several clients that load one server together, each with a part of the requests.

This process, the driver, deals the requests of a trial out in turns, so that all together they
arrive as from one client. Clients connect to the driver, start at a common time, and send back
their replies. Each times its requests on its own clock, so latencies hold whatever it says. Its
offset from the driver's clock is measured by round trips before and after a trial, as in NTP.
"""

from __future__ import annotations

import pickle
import platform
import secrets
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from batchbench import version
from batchbench.batching.progress import Progress, Watch
from batchbench.batching.remote.events import ClientLag
from batchbench.batching.remote.outcome import FailedRequest, FailedTrial, TrialFailed
from batchbench.batching.remote.serve import Played, Served
from batchbench.errors import BatchbenchError, IncompleteError, UsageError
from batchbench.workloads import Request, Workload
from batchbench.workloads.request import Ints, Ragged

ROUND_TRIPS = 50
"""Readings of a client's clock, of which the quickest counts."""

LEAD_NS = 500_000_000
"""Time between the word to start and the start, in which clients prepare their requests."""

_REPORT_NS = 500_000_000
"""Time between two reports of a client's progress."""

_CONNECT_S, SILENCE_S = 5.0, 60.0
"""Longest waits for a connection, and for an answer that a client gives at once."""

LOST = "client_lost"
"""The kind of failure of the requests of a client that was lost in a trial."""

T = TypeVar("T")


@dataclass(frozen=True)
class Meeting:
    """The place where clients find the driver, and the secret by which it knows them."""

    hosts: tuple[str, ...]
    port: int
    secret: bytes


Start = Callable[[Callable[[], None], int], AbstractContextManager[Callable[[], None]]]
"""Calls a function, which can be pickled, in so many processes at once, and ends them in the end.

It yields a function to call while the clients are waited for; it raises an error if one has ended.
"""


Part = Callable[..., Played]
"""Serves a client's part of a trial, given the watch and the time of the start on its clock."""


def _body_of(bodies: Sequence[bytes], workload: Workload, request: Request) -> bytes:
    return bodies[request.index]


# The client


def join(meeting: Meeting) -> None:
    """Be a client until the driver hangs up.

    It answers None with its time, and a part with None when it is ready. It answers the time of the
    start with the requests that it has served.
    """
    with _connection(meeting) as driver, suppress(EOFError, OSError):
        driver.send((version.__version__, platform.node()))
        while True:
            message = driver.recv()
            if message is None:
                driver.send(time.perf_counter_ns())
            elif callable(message):
                part = message
                driver.send(None)
            else:
                driver.send(_answer(part, message, _Reports(driver)))


def _connection(meeting: Meeting) -> Connection:
    reason: OSError | None = None
    for host in meeting.hosts:
        try:
            raw = socket.create_connection((host, meeting.port), _CONNECT_S)
        except OSError as error:
            reason = error
            continue
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.setblocking(True)
        raw.sendall(meeting.secret)
        return Connection(raw.detach())
    places = ", ".join(f"{host}:{meeting.port}" for host in meeting.hosts)
    raise UsageError(f"--clients: a client on {platform.node()} cannot reach {places} ({reason})")


def _answer(part: Part, zero_ns: int, watch: Watch) -> Played | Exception:
    try:
        return part(watch, zero_ns=zero_ns)
    except BatchbenchError as error:
        return error
    except Exception as error:  # its class need not be known to the driver
        return RuntimeError("".join(traceback.format_exception(error)))


class _Reports(Watch):
    def __init__(self, driver: Connection) -> None:
        self._driver, self._next_ns = driver, 0

    def progressed(self, progress: Progress) -> None:
        if progress.now_ns >= self._next_ns:
            self._next_ns = progress.now_ns + _REPORT_NS
            self._driver.send(progress)


# The driver


@dataclass(eq=False)
class _Client:
    name: str
    node: str
    connection: Connection
    gone: bool = False

    def hear(self, within_s: float = SILENCE_S) -> Any:
        """Return the next message; raise an OSError or EOFError if none will come."""
        if not self.connection.poll(within_s):
            raise TimeoutError
        return self.connection.recv()

    def ask(self, message: object) -> Any:
        self.connection.send(message)
        return self.hear()

    def clock(self) -> tuple[int, int]:
        """Return the offset of its clock from ours, and the largest error of it, in ns."""
        readings = []
        for _ in range(ROUND_TRIPS):
            before = time.perf_counter_ns()
            theirs = self.ask(None)
            after = time.perf_counter_ns()
            readings.append((after - before, theirs - (before + after) // 2))
        trip, offset = min(readings)
        return offset, (trip + 1) // 2


class Clients:
    """Clients that have come, ready to share trials.

    Args:
        start: starts them on other machines; None starts processes on this one.

    Raises:
        BatchbenchError: a client ended before it came.
    """

    def __init__(self, count: int, start: Start | None, watch: Watch) -> None:
        hosts = ("127.0.0.1",) if start is None else _own_hosts()
        with ExitStack() as stack:
            address = (hosts[0] if start is None else "", 0)
            listener = stack.enter_context(socket.create_server(address, backlog=count))
            listener.settimeout(0.2)
            meeting = Meeting(hosts, listener.getsockname()[1], secrets.token_bytes(32))
            look = stack.enter_context((start or processes)(partial(join, meeting), count))
            stack.callback(listener.close)  # so that those who wait at the door leave
            self._clients: list[_Client] = []
            while (here := len(self._clients)) < count:
                watch.phase(f"waiting for clients ({here} of {count} are here)")
                while (connection := _accepted(listener, meeting.secret)) is None:
                    look()
                client = _Client("", "", stack.enter_context(connection))
                theirs, client.node = client.hear()
                client.name = f"client {here + 1} of {count} on {client.node}"
                if theirs != version.__version__:
                    raise UsageError(
                        f"--clients: {client.node} has batchbench {theirs}, not "
                        f"{version.__version__}"
                    )
                self._clients.append(client)
            self._closing = stack.pop_all()

    @property
    def nodes(self) -> tuple[str, ...]:
        """The machine of each client."""
        return tuple(client.node for client in self._clients)

    def close(self) -> None:
        """Hang up, and end the clients."""
        self._closing.close()

    def play(self, served: Served, workload: Workload, watch: Watch, trial: int) -> Played:
        """Let the clients serve a trial, each its part, and put together what came back.

        Of n clients, client c serves the requests c, c + n, c + 2n and so on.

        Raises:
            TrialFailed: a request failed, or a client was lost.
            OutOfTimeError: the time for trials is up.
        """
        bodies = [served.body(workload, request) for request in workload]
        before = self._ask_all(_Client.clock)

        def part_of(client: _Client) -> Part:
            rows, until_ns = self._rows(client, workload), served.until_ns
            own = replace(
                served,
                share=None,
                body=partial(_body_of, [bodies[i] for i in rows]),
                until_ns=until_ns and until_ns + before[client][0],
            )
            return partial(own.play, _taken(workload, np.array(rows)), trial=trial)

        self._ask_all(lambda client: client.ask(part_of(client)))
        answers = dict[_Client, Played | Exception]()
        if not any(client.gone for client in self._clients):
            zero_ns = time.perf_counter_ns() + LEAD_NS
            self._ask_all(lambda client: client.connection.send(zero_ns + before[client][0]))
            # Something arrives, or a request fails, before a client is silent for so long.
            patience_s = SILENCE_S + served.address.timeout_s + int(workload.due_ns.max()) / 1e9
            answers = self._answers(watch, patience_s)
        after = self._ask_all(_Client.clock)
        self._check(answers, served, workload, trial)
        played = [answer for answer in answers.values() if isinstance(answer, Played)]
        parts = []
        for client, one in zip(answers, played, strict=True):
            (offset_ns, error_ns), (end_ns, end_error_ns) = before[client], after[client]
            parts.append(
                {
                    "node": client.node,
                    "requests": len(one.replies),
                    "late_p99_ns": one.lag.late_p99_ns,
                    # Of its clock from ours when the trial began, and its error until the end.
                    "offset_ns": offset_ns,
                    "within_ns": max(error_ns, end_error_ns) + abs(end_ns - offset_ns),
                }
            )
        return _merged(played, parts, workload)

    def _rows(self, client: _Client, workload: Workload) -> range:
        return range(self._clients.index(client), len(workload), len(self._clients))

    def _check(
        self,
        answers: Mapping[_Client, Played | Exception],
        served: Served,
        workload: Workload,
        trial: int,
    ) -> None:
        """Raise TrialFailed if requests failed at any client, or a client's other error."""
        failed, is_usage = list[FailedRequest](), True
        for client in self._clients:
            answer, rows = answers.get(client), self._rows(client, workload)
            if client.gone:
                text = f"{client.name} was lost: its process or its connection has ended"
                failed += [
                    FailedRequest(
                        request=i, kind=LOST, phase="with its client", text=text, status=None
                    )
                    for i in rows
                ]
                is_usage = False
            elif isinstance(answer, TrialFailed):
                failed += [
                    {**one, "request": rows[one["request"]]} for one in answer.failed["failed"]
                ]
                is_usage = is_usage and answer.is_usage
            elif isinstance(answer, Exception):
                raise answer
        if failed:
            told = FailedTrial(
                strategy=served.name, trial=trial, requests=len(workload), failed=failed
            )
            raise TrialFailed(told, is_usage=is_usage)

    def _ask_all(self, ask: Callable[[_Client], T]) -> dict[_Client, T]:
        """Ask each client that is left."""
        answers = dict[_Client, T]()
        for client in self._clients:
            try:
                if not client.gone:
                    answers[client] = ask(client)
            except (OSError, EOFError):
                client.gone = True
        return answers

    def _answers(self, watch: Watch, patience_s: float) -> dict[_Client, Played | Exception]:
        """Wait for the end of a trial at each client; report their progress together."""
        answers = dict[_Client, Played | Exception]()
        reports = dict[_Client, Progress]()
        while pending := [c for c in self._clients if not c.gone and c not in answers]:
            ready = wait([client.connection for client in pending], patience_s)
            for client in (c for c in pending if c.connection in ready or not ready):
                try:
                    message = client.hear(0)
                except (OSError, EOFError):
                    client.gone = True
                    continue
                if not isinstance(message, Progress):
                    answers[client] = message
                    continue
                reports[client] = message
                sums = {
                    name: sum(getattr(report, name) for report in reports.values())
                    for name in ("requests", "done", "tokens", "slots_in_use")
                }
                now_ns = max(report.now_ns for report in reports.values())
                watch.progressed(replace(message, **sums, now_ns=now_ns))
        return {client: answers[client] for client in self._clients if client in answers}


def _taken(workload: Workload, rows: Ints) -> Workload:
    """Return a workload of these requests."""
    prompts = Ragged(workload.prompt_ids, workload.prompt_offsets).take(rows)
    return replace(
        workload,
        prompt_ids=prompts.values,
        prompt_offsets=prompts.offsets,
        output_tokens=workload.output_tokens[rows],
        due_ns=workload.due_ns[rows],
    )


def _merged(
    played: Sequence[Played], parts: Sequence[Mapping[str, Any]], workload: Workload
) -> Played:
    """Return the parts of a trial as one; the client's own part is that of the worst client."""
    places = [divmod(i, len(played)) for i in range(len(workload))]
    lags = [part.lag for part in played]
    worst = {f.name: max(getattr(lag, f.name) for lag in lags) for f in fields(ClientLag)}
    return Played(
        [replace(played[c].replies[k], index=i) for i, (k, c) in enumerate(places)],
        [played[c].times_ns[k] for k, c in places],
        [played[c].sent_ns[k] for k, c in places],
        workload.due_ns,
        ClientLag(**{**worst, "kernel_share": min(lag.kernel_share for lag in lags)}),
        parts,
    )


def _accepted(listener: socket.socket, secret: bytes) -> Connection | None:
    """Return the connection of a client that knows the secret, if one comes."""
    try:
        raw, _ = listener.accept()
        raw.settimeout(_CONNECT_S)
        known = secrets.compare_digest(raw.recv(len(secret)), secret)
    except OSError:
        return None
    if not known:
        raw.close()
        return None
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # a machine that vanishes is noticed after 25 s
            raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    raw.setblocking(True)
    return Connection(raw.detach())


def _own_hosts() -> tuple[str, ...]:
    """Return the addresses at which other machines may find this one."""
    found = [one for several in psutil.net_if_addrs().values() for one in several]
    hosts = [one.address for one in found if one.family is socket.AF_INET]
    outside = [host for host in hosts if not host.startswith("127.")]
    return tuple(outside or hosts or ["127.0.0.1"])


_CODE = "import pickle, sys; sys.path.insert(0, {!r}); pickle.load(sys.stdin.buffer)()"


@contextmanager
def processes(
    join: Callable[[], None], count: int, before: str = ""
) -> Iterator[Callable[[], None]]:
    """Start clients as processes of this machine, which run the code ``before`` first."""
    program = before + _CODE.format(str(Path(version.__file__).parents[1]))
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    children = list[subprocess.Popen[bytes]]()

    def look() -> None:
        for i, child in enumerate(children, 1):
            if child.poll() is not None:
                raise IncompleteError(f"--clients: process {i} ended with {child.returncode}")

    try:
        for _ in range(count):
            words = [sys.executable, "-c", program]
            children.append(subprocess.Popen(words, stdin=pipe, stdout=null, stderr=null))
            stdin = children[-1].stdin
            assert stdin is not None
            with stdin:
                stdin.write(pickle.dumps(join))
        yield look
    finally:
        for child in children:
            child.kill()
            child.wait()
