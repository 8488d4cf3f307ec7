"""The bench of a server: the same workload, served in waves and continuously."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np

from batchbench.batching.batcher import Batcher, Strategy
from batchbench.batching.bench import GRACE, Bench, check_context, check_pair_time, in_turn
from batchbench.batching.engines.simulated import SimulatedEngine
from batchbench.batching.experiment import Experiment
from batchbench.batching.machine import environment
from batchbench.batching.models import (
    ModelCache,
    ModelSpec,
    Tokenizer,
    encoder,
    find_model,
    find_tokenizer,
)
from batchbench.batching.progress import Watch
from batchbench.batching.recording import Recording
from batchbench.batching.remote.clients import Clients, Start
from batchbench.batching.remote.dialects import Dialect, body_for, discover
from batchbench.batching.remote.exchange import FailureKind
from batchbench.batching.remote.outcome import (
    Agreement,
    Comparison,
    Output,
    ServerFacts,
    TrialFailed,
)
from batchbench.batching.remote.serve import Attempt, Served
from batchbench.batching.remote.spec import CHAT, SERVED_MODEL, TargetSpec
from batchbench.batching.trials import WarmUp, beginning, settle
from batchbench.batching.verification import NOT_VERIFIED, Verification, verify
from batchbench.errors import UsageError, shown
from batchbench.workloads import Request, Workload, WorkloadSpec, make_workload

SAFE_VOCABULARY = 32_000
"""Token ids that nearly every model has; used if no folder says how many there are."""

WARM_UP_TOKENS = 12

_LONGEST_NAME = 255

_DTYPES = ("float32", "bfloat16", "float16")

_MOST_FAILED = 2
"""Failed rounds in a row after which no more are tried."""


class RemoteBench(Bench):
    """A server, found and asked for its facts.

    Raises:
        UsageError: it cannot be reached, has no such model, or cannot take the workload.
    """

    def __init__(
        self,
        experiment: Experiment,
        watch: Watch,
        models: ModelCache | None = None,
        start: Start | None = None,
    ) -> None:
        super().__init__(experiment, watch)
        assert experiment.target is not None
        self._target, self._models = experiment.target, models or ModelCache()
        self._address = self._target.address
        self._dialect = discover(self._target.setup_address)
        self._name = served_model(experiment.model.model, self._dialect)
        self._folder = _folder_of(self._target)
        self._tokenizer = find_tokenizer(self._folder)
        self._comparison = Comparison(experiment.serving.strategies)
        self._counts: dict[str, list[Attempt]] = {n: [] for n in experiment.serving.strategies}
        self._outputs: dict[int, Sequence[Output]] = {}  # by id of the recording
        self._until_ns: int | None = None
        self._start_clients = start
        self._clients: Clients | None = None  # from the warm-up on
        self.workload = self.make(experiment.workload)
        self.model = {"name": self._name or "unnamed model", "load_format": None, "note": ""}
        self.model |= dict.fromkeys(("device", "dtype", "parameters"))
        self.environment = environment()
        if self._dialect.length_field is None and not self.workload.stop_at_eos:
            watch.note(
                f"a {self._dialect.name} server cannot be told to go on after an end token, and a "
                "shorter output counts as failed; --stop-at-eos takes outputs as they come"
            )
        count = self._target.clients
        if count > 1 and not self.strategy("continuous").clients_share(self.workload):
            raise UsageError(
                f"--clients {count}: all requests are there at the start, so there is no rate to "
                "share; give --request-rate, or drop --clients"
            )
        if len(self.workload) < count:
            raise UsageError(f"--clients {count}: more than requests; raise --queue-size")

    def close(self) -> None:
        if self._clients is not None:
            self._clients.close()

    def make(self, spec: WorkloadSpec) -> Workload:
        """Make a workload; a request that the server says it cannot take is a usage error."""
        context, tokenizer = self._dialect.context, self._tokenizer
        workload = make_workload(
            spec,
            batch_size=self.experiment.serving.batch_size,
            vocab_size=_vocabulary_of(self._folder),
            encode=encoder(tokenizer, chat=spec.chat_template),
            context=context,
            note=self._watch.note,
        )
        self._check_sampling(workload)
        check_context(workload, context, "the server", ", or start it with a longer context")
        return workload

    def _check_sampling(self, workload: Workload) -> None:
        """Raise UsageError if the server cannot draw tokens as the workload says."""
        how, dialect = workload.sampling, self._dialect
        if how is None:
            return
        if self._target.verify_model is not None:
            raise UsageError(
                "--verify-model: sampled outputs cannot be checked, since a server draws them from "
                "random numbers of its own; drop it, or give --temperature 0"
            )
        if how.top_k and not dialect.top_k:
            raise UsageError(
                f"--top-k {how.top_k}: requests to this {dialect.name} server have no such field; "
                "drop it, or give one of the server's own with --extra-body"
            )
        if workload.stop_at_eos and dialect.length_field == "generation_config":
            raise UsageError(
                f"--temperature {how.temperature:g}: this {dialect.name} server samples only with "
                "settings that replace the model's end-of-sequence token; drop --stop-at-eos"
            )

    def strategy(self, name: str) -> Served:
        """Return the strategy of this name, *static* or *continuous*."""
        return Served(
            name,
            self.experiment.serving.batch_size,
            self._address,
            self._target.endpoint,
            self._dialect,
            self._body,
            self._until_ns,
            None if self._clients is None else self._clients.play,
        )

    def _body(self, workload: Workload, request: Request) -> bytes:
        ids = workload.prompt(request.index).tolist()
        as_ids = self._dialect.prompt_ids and self._target.endpoint != CHAT
        prompt = ids if as_ids or self._tokenizer is None else self._tokenizer.decode(ids)
        return body_for(
            self._dialect,
            self._target.endpoint,
            self._name,
            prompt,
            request.output_tokens,
            ignore_eos=not workload.stop_at_eos,
            extra_body=self._target.extra,
            drawn=workload.stream(request.index),
        )

    def within(self, limit: float | None) -> Self:
        """Return the same bench, whose trials raise OutOfTimeError when the time is up."""
        if limit is None:
            return self
        other = self.on(self.workload)
        other._until_ns = time.perf_counter_ns() + round(GRACE * limit * 1e9)
        return other

    def warm_up(self, *, most: int = 10) -> WarmUp:
        """Start the clients, and serve a short piece until its latency settles.

        It has as many requests at once as a trial; this process sends them.

        Raises:
            TrialFailed: a request failed.
            UsageError: the server refuses the requests.
        """
        count, serving = self._target.clients, self.experiment.serving
        # In a sweep over clients, one client is elsewhere too, unless waves are compared with it.
        elsewhere = self._start_clients is not None and serving.strategies == ("continuous",)
        if count > 1 or elsewhere:
            self._clients = Clients(count, self._start_clients, self._watch)
        self._watch.phase("warming up")
        began = time.monotonic()
        piece = beginning(self.workload, serving.batch_size, output_tokens=WARM_UP_TOKENS)
        recordings = list[Recording]()

        def latency_ns() -> float:
            """Serve the piece; a server may send several tokens at once, so not the time of one."""
            recordings.append(self.strategy("continuous").serve(piece, Watch()))
            return float(np.median(recordings[-1].last_token_ns - recordings[-1].requests.due_ns))

        try:
            warm_up = settle(latency_ns, most, began)
        except TrialFailed as error:
            if error.is_usage:
                text = error.failed["failed"][0]["text"]
                raise UsageError(f"--target: {text}") from error
            raise TrialFailed(error.failed, is_usage=False, where="the warm-up") from error
        return replace(warm_up, step_ns=round(token_ns(recordings[-1])))

    def check_time(self, warm_up: WarmUp) -> None:
        """Raise UsageError if one pair of trials takes longer than ``--max-time``."""
        limit, step_ns = self.experiment.trials.max_time, warm_up.step_ns
        if limit is None or step_ns is None or self.workload.stop_at_eos:
            return
        serving, engine = self.experiment.serving, SimulatedEngine(step_ns)
        batchers = [Batcher(name, engine, serving.batch_size) for name in serving.strategies]
        served = [batcher.serve(self.workload, Watch()) for batcher in batchers]
        check_pair_time(limit, sum(recording.duration_ns for recording in served) / 1e9)

    def rounds(self) -> Iterator[list[Recording]]:
        """Serve the workload once under every strategy in each round, in alternating order.

        A round in which a request fails is no round; two of them in a row end the run.

        Raises:
            TrialFailed: no round was finished.
            UsageError: no round was finished, and the server would refuse the requests again.
        """
        strategies = [self.strategy(name) for name in self.experiment.serving.strategies]
        planned, finished, failed = self.experiment.trials.trials, 0, 0
        first: TrialFailed | None = None
        for number in range(planned):
            attempts = dict[str, Attempt]()
            try:
                for strategy in in_turn(strategies, number):
                    self._watch.trial_begins(strategy.name, number, planned)
                    attempt = strategy.attempt(self.workload, self._watch, finished)
                    self._watch.trial_ends(strategy.name, number, attempt.recording.duration_ns)
                    attempts[strategy.name] = attempt
            except TrialFailed as error:
                failed, first = failed + 1, first or error
                self.failures.append({**error.failed, "trial": number})
                last = number + 1 == planned or failed == _MOST_FAILED
                if not finished and (last or error.is_usage):
                    one = first.failed["failed"][0]
                    # A server that refuses connections has answered the warm-up.
                    if first.is_usage and one["kind"] != FailureKind.REFUSED:
                        text = f"--target: request {one['request']}: {one['text']}"
                        raise UsageError(text) from error
                    raise first from error
                if failed == _MOST_FAILED:
                    return
                continue
            failed, finished = 0, finished + 1
            self._keep(attempts)
            yield [attempts[strategy.name].recording for strategy in strategies]

    def _keep(self, attempts: Mapping[str, Attempt]) -> None:
        """Keep what a round told beside its recordings."""
        outputs: dict[str, Sequence[Output]] = {}
        for name, attempt in attempts.items():
            self._counts[name].append(replace(attempt, replies=()))
            outputs[name] = [Output(r.token_ids, r.text) for r in attempt.replies]
            if self._target.verify_model is not None or not attempt.recording.header.trial:
                self._outputs[id(attempt.recording)] = outputs[name]
        self._comparison.add(outputs)

    def observe(self, strategy: Strategy, trial: int) -> Recording:
        """Serve one trial."""
        return strategy.serve(self.workload, self._watch, trial=trial)

    def verify(
        self, recordings: Sequence[Recording], chosen: Sequence[int] | None = None
    ) -> Verification:
        """Check greedy outputs whose ids are known against the model of ``--verify-model``."""
        folder, limit = self._target.verify_model, self.experiment.trials.verify_limit
        if folder is None or (limit == 0 and chosen is None) or not recordings:
            return NOT_VERIFIED
        self._watch.phase("verifying")
        told = [with_ids(r, self._outputs.get(id(r), ()), self._tokenizer) for r in recordings]
        unknown = set[int]().union(*(unread for _, unread in told))
        requests = range(len(self.workload)) if chosen is None else chosen
        checked = [request for request in requests if request not in unknown]
        if len(checked) < len(requests):
            self._watch.note(
                f"--verify-model: {len(requests) - len(checked):,} of {len(requests):,} requests "
                "cannot be checked: the server tells no token ids, and their texts do not give "
                "them back exactly"
            )
        if chosen is None and limit is not None and limit < len(checked):
            places = np.linspace(0, len(checked) - 1, limit).round().astype(int)
            checked = [checked[i] for i in np.unique(places)]
        if not checked:
            return NOT_VERIFIED
        from batchbench.batching.engines.torch.reference import TeacherForced

        # The model has the number format of its files, as it does on most servers.
        config = find_model(ModelSpec(str(folder)), weights=False).config
        dtype = config.get("dtype") or config.get("torch_dtype")
        spec = ModelSpec(str(folder), "pretrained", dtype=dtype if dtype in _DTYPES else "auto")
        source = self._models.find(spec, weights=True)
        reference = TeacherForced(self._models.load(source, spec, self.workload.seed))
        readable = [recording for recording, _ in told]
        return verify(self.workload, readable, reference, source.eos_token_ids, None, checked)

    def texts(self, recording: Recording) -> list[tuple[str, str]] | None:
        """Return the prompt and the output of each request; None without a tokenizer."""
        outputs, tokenizer = self._outputs.get(id(recording)), self._tokenizer
        if tokenizer is None or outputs is None:
            return None
        prompts = [self.workload.prompt(i).tolist() for i in range(len(self.workload))]
        texts = [output.text for output in outputs]
        return [(tokenizer.decode(p), text) for p, text in zip(prompts, texts, strict=True)]

    def server(self) -> ServerFacts:
        """Return the server's facts and its own counts of each finished trial."""
        done = self._counts
        before = [attempt.before for attempt in chain(*done.values())]
        running = [b["running"] + b.get("waiting", 0) for b in before if "running" in b]
        return ServerFacts(
            name=self._dialect.name,
            version=self._dialect.version,
            slots=self._dialect.slots,
            passes={name: [a.passes for a in of] for name, of in done.items()},
            cached_tokens={name: [a.cached_tokens for a in of] for name, of in done.items()},
            running_before=max(running, default=None),
            prompt_cache_off=self._dialect.prompt_cache_off or None,
            clients=() if self._clients is None else self._clients.nodes,
        )

    def agreement(self) -> Agreement | None:
        """Compare the outputs of the strategies in the finished rounds."""
        return self._comparison.agreement()


def served_model(asked: str, dialect: Dialect) -> str | None:
    """Return the name of the model that requests name; None if the server has no names.

    Raises:
        UsageError: the server has no model of the name asked for, or several and none was named,
            or the name cannot be shown as it is.
    """
    names, found = dialect.served_models, asked
    listed = ", ".join(shown(name) for name in names[:10])
    if asked == SERVED_MODEL and asked not in names:
        if not names:
            return None
        if len(names) > 1:
            raise UsageError(f"--model: the server has several; name one of {listed}")
        found = names[0]
    elif names and asked not in names:
        raise UsageError(f"--model {shown(asked)}: the server has no such model; it has {listed}")
    if shown(found, _LONGEST_NAME) != found:
        raise UsageError(
            f"--model {shown(found)}: start the server with a name for its model of at most "
            f"{_LONGEST_NAME} printable characters"
        )
    return found


def token_ns(recording: Recording) -> float:
    """Return the median time per token after the first, or with it if they come together."""
    r = recording.requests
    last, several = recording.last_token_ns, r.output_tokens > 1
    each = (last - recording.first_token_ns)[several] / (r.output_tokens[several] - 1)
    typical = float(np.median(each)) if len(each) else 0.0
    return typical or float(np.median((last - r.due_ns) / r.output_tokens))


def _folder_of(target: TargetSpec) -> Path | None:
    """Return the place of the tokenizer: of ``--tokenizer``, else of ``--verify-model``."""
    if target.tokenizer is None:
        return target.verify_model
    folder = Path(target.tokenizer).expanduser()
    if not folder.is_dir():
        try:
            found = find_model(ModelSpec(target.tokenizer), weights=False).place
        except UsageError as error:
            raise UsageError(str(error).replace("--model", "--tokenizer")) from error
        if found is None:
            raise UsageError(f"--tokenizer {shown(target.tokenizer)}: give the folder of its files")
        folder = found
    if find_tokenizer(folder) is None:
        raise UsageError(f"--tokenizer {shown(folder)}: holds no tokenizer.json or vocab.json")
    return folder


def _vocabulary_of(folder: Path | None) -> int:
    if folder is None or not (folder.is_file() or (folder / "config.json").is_file()):
        return SAFE_VOCABULARY
    return find_model(ModelSpec(str(folder)), weights=False).vocab_size


# Checks against the model


def with_ids(
    recording: Recording, outputs: Sequence[Output], tokenizer: Tokenizer | None
) -> tuple[Recording, set[int]]:
    """Return a recording with token ids, and the requests whose ids are not known.

    A server that tells no ids leaves the text: it counts if the tokenizer turns it into as many
    tokens as the server produced, and these back into the same text.
    """
    if recording.tokens is not None:
        return recording, set()
    if tokenizer is None:
        return recording, set(range(len(outputs)))
    ids, unknown = list[Sequence[int]](), set[int]()
    for i, count in enumerate(recording.requests.output_tokens.tolist()):
        found, text = outputs[i]
        if found is None and "\ufffd" not in text:  # else other tokens give the same text
            encoded = tokenizer.encode(text)
            found = encoded if tokenizer.decode(encoded) == text else None
        if found is None or len(found) != count:
            unknown.add(i)
            found = [0] * count
        ids.append(found)
    return replace(recording, tokens=np.concatenate(ids).astype(np.int32)), unknown
