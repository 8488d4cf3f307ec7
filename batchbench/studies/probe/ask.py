"""Ask a server: send the requests of each round and keep what came back."""

from __future__ import annotations

import json
import math
import secrets
import time
from dataclasses import dataclass, replace

import numpy as np

from batchbench.batching.progress import Watch
from batchbench.batching.remote import wire
from batchbench.batching.remote.bench import served_model
from batchbench.batching.remote.dialects import (
    Counts,
    Dialect,
    body_for,
    discover,
    growth_of,
    read_counts,
)
from batchbench.batching.remote.events import Reply, client_lag, parse, response_of
from batchbench.batching.remote.exchange import (
    Address,
    Exchange,
    Failure,
    FailureKind,
)
from batchbench.batching.remote.spec import CHAT, TargetSpec
from batchbench.errors import UsageError
from batchbench.studies.probe.judge import Verdict, judge
from batchbench.studies.probe.observations import Observations, Role, Round, Server, Stream
from batchbench.studies.probe.script import Player, Script, next_script

NO_ROOM = (429, 503)  # statuses of a server that has no room for a request
OTHERS_TOKENS = 1.05  # the server may count this multiple of the tokens that the probe received
MOST_HIDDEN = 0.25
"""Share of requests without a visible token, above which they are why the probe can't tell."""

_PHASES = {
    Role.ALONE: "one request alone",
    Role.LONG: "short requests while a long one is running",
    Role.PAIR: "pairs of requests",
    Role.BURST: "many requests at once",
}


@dataclass(frozen=True)
class Findings:
    """A finished probe."""

    target: str  # the server's address, without its key
    model: str | None
    dialect: Dialect
    observations: Observations
    verdict: Verdict
    failures: tuple[str, ...]  # apart from requests that were refused or stopped
    took_s: float


def probe(target: TargetSpec, model: str, max_time_s: float, watch: Watch) -> Findings:
    """Probe a server for at most ``max_time_s`` seconds.

    Raises:
        UsageError: it cannot be reached, has no such model, or does not answer the first request.
    """
    began = time.perf_counter_ns()
    asker = _Asker(target, model, began + int(max_time_s * 1e9))
    before = read_counts(asker.address, asker.dialect)
    seen = Observations((), asker.server)
    random = np.random.default_rng(0)  # the server's clock is not known: any moment is random
    phase = None
    while True:
        left = asker.until_ns - time.perf_counter_ns()
        script = next_script(seen, left, random)
        if script is None:
            break
        role = script.opening[0][0]
        if role is not phase:
            watch.phase(_PHASES[role])
            phase = role
        round = asker.play(script)
        if not seen.rounds and asker.first is not None:  # the first request of all had no answer
            if asker.first.kind is FailureKind.STOPPED:
                raise UsageError(
                    f"--max-time {max_time_s:g}: is over before the first answer; give more time"
                )
            raise UsageError(f"{asker.address}: {asker.first.text}")
        seen = Observations((*seen.rounds, round), seen.server, asker.lag_ns)
        if any(s.failure for s in round.streams):
            break
    after = read_counts(asker.address, asker.dialect)
    server = asker.counted(before, after, seen)
    seen = replace(seen, server=server, ended=asker.ended(seen, max_time_s))
    return Findings(
        target=str(asker.address),
        model=asker.model,
        dialect=asker.dialect,
        observations=seen,
        verdict=judge(seen),
        failures=tuple(dict.fromkeys(asker.failures)),
        took_s=(time.perf_counter_ns() - began) / 1e9,
    )


class _Asker:
    """The connection to a server, and the failures of its requests."""

    def __init__(self, target: TargetSpec, model: str, until_ns: int) -> None:
        self.address: Address = target.address
        self.dialect = discover(self.address)
        self.model = served_model(model, self.dialect)
        self.until_ns, self.lag_ns = until_ns, 0
        self.failures: list[str] = []
        self.server = Server(slots=self.dialect.slots, context=self.dialect.context)
        self._endpoint, self._extra, self._number = target.endpoint, target.extra, 0
        self.first: Failure | None = None

    def play(self, script: Script) -> Round:
        """Send the requests of a round; return them with their tokens."""
        player = Player(script, self._body, self._endpoint)
        exchanges = wire.exchange(self.address, player, until_ns=self.until_ns)
        done = self.dialect.ends_with_done
        replies = [parse(one, None, ends_with_done=done) for one in exchanges]
        self.lag_ns = max(self.lag_ns, client_lag(exchanges, replies).stamp_error_p99_ns)
        each = zip(player.sent, exchanges, replies, strict=True)
        return Round([self._stream(*sent, one, reply) for sent, one, reply in each])

    def _stream(self, role: Role, tokens: int, one: Exchange, reply: Reply) -> Stream:
        """Return one request; a failure that leaves its tokens known is none."""
        failure, times, hidden = reply.failure, tuple(reply.token_times_ns.tolist()), 0
        kind = None if failure is None else failure.kind
        if kind is FailureKind.NOT_SSE:
            times = _whole_answer(one, tokens)
        elif kind is FailureKind.ZERO_TOKENS and not times:
            hidden = reply.usage_output or 0
        forgiven = (FailureKind.NOT_SSE, FailureKind.NO_USAGE, FailureKind.ZERO_TOKENS)
        if kind in forgiven and (times or hidden):
            failure = None
        self.first = self.first or failure
        refused = failure is not None and failure.status in NO_ROOM
        text = "" if failure is None or refused else failure.text
        if text and kind is not FailureKind.STOPPED:
            self.failures.append(text)
        return Stream(role, tokens, one.sent_ns, times, refused, text, hidden)

    def _body(self, tokens: int) -> bytes:
        """Return a request for so many tokens; no two prompts are the same."""
        self._number += 1
        prompt: str | list[int] = (
            f"{secrets.randbelow(10**6)} {self._number}: count on from this number, one number "
            "per line, and do not stop."
        )
        if self.dialect.prompt_ids and self.dialect.name != "openai" and self._endpoint != CHAT:
            # Ids work without a tokenizer, and nearly every model has these.
            prompt = [300 + self._number % 600, *(300 + secrets.randbelow(600) for _ in range(7))]
        return body_for(
            self.dialect, self._endpoint, self.model, prompt, tokens, extra_body=self._extra
        )

    def ended(self, seen: Observations, max_time_s: float) -> str:
        """Return why the probe ended before it had seen enough; empty if it did not."""
        if self.failures:
            return f"the probe ended when a request failed ({self.failures[0]})"
        streams = seen.streams
        hidden = sum(bool(s.hidden) for s in streams)
        if MOST_HIDDEN * len(streams) < hidden:
            return (
                f"{hidden} of {len(streams)} requests showed no token, though the server counts "
                "some"
            )
        stopped = any(s.failure for s in streams)
        if stopped or next_script(seen, math.inf, np.random.default_rng(0)):
            return f"its time was over, so try --max-time {3 * max_time_s:g}"
        return ""

    def counted(self, before: Counts, after: Counts, seen: Observations) -> Server:
        """Return the server's own statements, with what it counted from before to after."""
        if not before:
            return self.server
        others, grown = (
            before.get("running", 0) + before.get("waiting", 0),
            growth_of(before, after),
        )
        if not after:
            return replace(self.server, others=others)
        tokens = sum(len(s.times_ns) + s.hidden for s in seen.streams)
        if all(s.answered or s.refused or s.hidden for s in seen.streams):
            others += after.get("running", 0) + after.get("waiting", 0)
            foreign = grown.get("output_tokens", 0) > OTHERS_TOKENS * tokens + 20
            others = max(others, int(foreign))
        return replace(self.server, others=others, passes=grown.get("passes"), tokens=tokens)


def _whole_answer(one: Exchange, asked: int) -> tuple[int, ...]:
    """Return the times of tokens of a server that ignores ``"stream": true``."""
    try:
        data = json.loads(response_of(one).body)
        found = data["choices"] and data.get("usage", {}).get("completion_tokens", asked)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ()
    return (one.reads[-1].stamp_ns,) * found if type(found) is int else ()
