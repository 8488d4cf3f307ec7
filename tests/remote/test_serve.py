"""Strategies on a server: when requests are sent, and the recordings that come of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from support.schedules import FIVE, MS, Core, Job, Schedule
from support.servers import Manner
from support.wired import experiment, most_in_flight, wired

from batchbench.batching.batcher import Batcher
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.progress import Progress, Watch
from batchbench.batching.recording import Recording
from batchbench.batching.remote.bench import RemoteBench
from batchbench.batching.remote.outcome import TrialFailed
from batchbench.batching.session import conduct
from batchbench.batching.verification import NOT_VERIFIED
from batchbench.reports.validity import audit
from batchbench.workloads import Workload

STRATEGIES = ("static", "continuous")


def serve(name: str, workload: Workload, slots: int = 8) -> Recording:
    """Serve a workload once on the fake server."""
    bench = RemoteBench(experiment(batch_size=slots), Watch())
    return bench.strategy(name).serve(workload, Watch())


def odd(requests: int = 20, **settings: object) -> Workload:
    """A workload of unequal requests."""
    prompts = [list(range(1, 2 + i % 5)) for i in range(requests)]
    outputs = [1 + 7 * i % 13 for i in range(requests)]
    return Workload.of("odd", prompts, outputs, **settings)  # type: ignore[arg-type]


def test_the_servers_own_passes_are_those_of_our_two_policies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The notebook's queue in waves of 8 takes 400 passes, and 130 or a few more continuously."""
    wired(monkeypatch)
    outcome = conduct(experiment(), Watch())
    assert outcome.server is not None
    steps = {
        name: Batcher(name, SimulatedEngine(), 8, prefill="mixed")
        .serve(outcome.workload, Watch())
        .num_steps
        for name in STRATEGIES
    }
    assert steps == {"static": 400, "continuous": 130}
    assert outcome.server.passes["static"] == [400, 400]
    # Each request that joins travels to the server, while the others take a pass.
    assert all(130 <= passes <= 145 for passes in outcome.server.passes["continuous"])


@pytest.mark.parametrize("kind", FIVE)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_request_gets_its_tokens_in_order(
    monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    wired(monkeypatch, FIVE[kind])
    workload = odd()
    recording = serve(name, workload)
    assert not recording.has_steps
    assert recording.requests.output_tokens.tolist() == workload.output_tokens.tolist()
    assert (recording.requests.due_ns == 0).all()
    assert (recording.admitted_ns >= 0).all()
    assert (recording.first_token_ns > recording.admitted_ns).all()
    warm_up = RemoteBench(experiment(), Watch()).warm_up(most=2)
    assert audit(workload, {name: [recording]}, NOT_VERIFIED, warm_up, None) == []


def test_token_times_are_those_at_which_the_server_sent_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    delay = 3 * MS
    network = wired(monkeypatch, Schedule(delay_ns=delay), Manner(client_lag_ns=50 * MS))
    recording = serve("continuous", odd())
    sent = {job.key: job.times_ns for job in network.server.jobs}
    order = [exchange.index for exchange in network.trials[-1]]
    for place, request in enumerate(order):
        begin, end = recording.token_offsets[request : request + 2]
        times = recording.token_ends_ns
        assert times is not None
        assert (times[begin:end] - delay).tolist() == sent[place]


@pytest.mark.parametrize("slots", [1, 3, 8, 64])
def test_a_wave_begins_when_the_last_one_has_ended(
    monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    network = wired(monkeypatch)
    serve("static", odd(), slots)
    exchanges = network.trials[-1]
    waves = [exchanges[i : i + slots] for i in range(0, 20, slots)]
    assert [len(wave) for wave in waves[:-1]] == [slots] * (len(waves) - 1)
    for wave in waves:
        assert len({exchange.sent_ns for exchange in wave}) == 1
    for wave, then in itertools.pairwise(waves):
        assert then[0].sent_ns == max(exchange.ended_ns for exchange in wave)
    assert [exchange.index for exchange in exchanges] == list(range(20))


@pytest.mark.parametrize("slots", [1, 3, 8, 64])
def test_continuous_keeps_as_many_in_flight_as_there_are_slots(
    monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    network = wired(monkeypatch)
    serve("continuous", odd(), slots)
    exchanges = network.trials[-1]
    assert most_in_flight(exchanges) == min(slots, 20)
    ends = sorted(exchange.ended_ns for exchange in exchanges)
    sent = [exchange.sent_ns for exchange in exchanges]
    assert sent == [0] * min(slots, 20) + ends[: max(0, 20 - slots)]


ARRIVALS = (0, 0, 5, 5, 5, 90, 200, 200, 201, 900)


def timed(times: Sequence[int] = ARRIVALS) -> Workload:
    """A workload whose requests arrive at times of their own."""
    return Workload.of(
        "timed", [[1, 2]] * len(times), [10] * len(times), due_ns=[t * MS for t in times]
    )


def test_timed_arrivals_are_sent_when_they_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    network = wired(monkeypatch)
    recording = serve("continuous", timed(), slots=2)
    assert recording.requests.due_ns.tolist() == [t * MS for t in ARRIVALS]
    assert recording.admitted_ns.tolist() == recording.requests.due_ns.tolist()
    assert most_in_flight(network.trials[-1]) > 2


@pytest.mark.parametrize(("slots", "sizes"), [(4, [2, 4, 3, 1]), (2, [2, 2, 2, 2, 1, 1])])
def test_waves_take_those_that_have_arrived(
    monkeypatch: pytest.MonkeyPatch, slots: int, sizes: list[int]
) -> None:
    network = wired(monkeypatch)
    recording = serve("static", timed(), slots)
    due, sent = recording.requests.due_ns, recording.admitted_ns
    assert (sent >= due).all()
    waves = [list(wave) for _, wave in itertools.groupby(network.trials[-1], lambda e: e.sent_ns)]
    assert [len(wave) for wave in waves] == sizes
    for wave, then in itertools.pairwise(waves):
        assert then[0].sent_ns >= max(exchange.ended_ns for exchange in wave)


def test_a_closed_loop_sends_when_a_request_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    network = wired(monkeypatch)
    workload = odd(max_concurrency=3)
    recording = serve("continuous", workload, slots=8)
    assert most_in_flight(network.trials[-1]) == 3
    ends = sorted(exchange.ended_ns for exchange in network.trials[-1])
    assert recording.requests.due_ns.tolist() == [0, 0, 0, *ends[:17]]
    assert recording.admitted_ns.tolist() == recording.requests.due_ns.tolist()


def test_tokens_of_one_chunk_share_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    wired(monkeypatch, manner=Manner("vllm", per_chunk=4))
    workload = Workload.of("one", [[1, 2]], [10])
    recording = serve("continuous", workload)
    assert recording.token_ends_ns is not None
    counts = np.unique(recording.token_ends_ns, return_counts=True)[1]
    assert counts.tolist() == [4, 4, 2]


def test_texts_that_may_end_early_are_taken_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """This server ends each text when prompt and output have 14 tokens."""
    network = wired(monkeypatch, Schedule(context=14), Manner("openai"))
    workload = odd(stop_at_eos=True)
    recording = serve("continuous", workload)
    lengths = np.minimum(workload.output_tokens, 14 - workload.prompt_tokens)
    assert (lengths < workload.output_tokens).any()
    assert recording.requests.output_tokens.tolist() == lengths.tolist()
    assert all("ignore_eos" not in body for body in network.bodies)
    serve("continuous", Workload.of("one", [[1]], [5]))
    assert network.bodies[-1]["ignore_eos"] is True


def test_more_tokens_than_asked_for_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    wired(monkeypatch, manner=Manner("vllm"))
    arrive = Core.arrive

    def generous(core: Core, ns: int, job: Job) -> None:
        job.asked += 1
        arrive(core, ns, job)

    monkeypatch.setattr(Core, "arrive", generous)
    for early in (False, True):
        with pytest.raises(TrialFailed, match=r"produced 6 (output )?tokens.* 5") as raised:
            serve("continuous", Workload.of("one", [[1]], [5], stop_at_eos=early))
        assert raised.value.failed["failed"][0]["kind"] == "usage_differs"


class Listener(Watch):
    """Keeps what it is told of trials."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.done = 0

    def trial_begins(self, strategy: str, trial: int, trials: int) -> None:
        self.order.append(f"{strategy[0]}{trial}")

    def progressed(self, progress: Progress) -> None:
        assert 0 <= progress.slots_in_use <= progress.slots
        self.done = max(self.done, progress.done)


def test_trials_alternate_after_a_warm_up_at_the_same_concurrency(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, watch = wired(monkeypatch), Listener()
    outcome = conduct(experiment(trials=3, batch_size=5, queue_size=20), watch)
    assert watch.order == ["s0", "c0", "c1", "s1", "s2", "c2"]
    assert outcome.warm_up.settled
    assert outcome.warm_up.rounds == 2
    assert network.in_flight == [5] * 8
    assert watch.done > 10
    trials = outcome.recordings["static"]
    assert [trial.header.trial for trial in trials] == [0, 1, 2]
    # On the integer clock all trials of a strategy are the same.
    assert len({trial.duration_ns for trial in trials}) == 1
