"""Commands against a server: options, errors, secrets, and whole runs on a fake server."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.program import Program
from support.program import here as here
from support.program import program as program
from support.schedules import MS, Schedule
from support.servers import Manner, serving
from support.wired import URL, wired

from batchbench.batching.experiment import Experiment
from batchbench.batching.remote import dialects
from batchbench.batching.remote.events import Response
from batchbench.batching.remote.spec import CHAT, OWN_ENGINE, TargetSpec
from batchbench.errors import UsageError
from batchbench.reports.result_file import load_data
from batchbench.settings import as_json, option_name, words_of
from batchbench.studies.sweep import report as sweep_report
from batchbench.studies.sweep.run import identity_of

CLASSIC = ("--batch-size", "8", "--queue-size", "32")

KEY = "sk-the-key-of-a-user"


def data_in(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


# Options


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--engine", "slots"], "--engine: is for our own engine, but --target measures a server"),
        (["--device", "cpu"], "--device: is for our own engine"),
        (["--dtype", "float32"], "--dtype: is for our own engine"),
        (["--prefill", "mixed"], "--prefill: is for our own engine"),
        (["--execution", "eager"], "--execution: is for our own engine"),
        (["--order", "fifo"], "--order: is for our own engine"),
        (["--max-wait", "5"], "--max-wait: is for our own engine"),
        (["--threads", "2"], "--threads: is for our own engine"),
        (["--load-format", "dummy"], "--load-format: is for our own engine"),
        (["--strategy", "static-fixed"], "--strategy static-fixed: a server schedules by itself"),
        (["--strategy", "generate_batch"], "--strategy generate_batch: a server schedules"),
        (["--verify", "3"], "--verify 3: --target checks outputs only with --verify-model"),
        (["--verify-model", "nowhere"], "--verify-model nowhere: no such folder"),
        (["--dry-run"], "--dry-run: estimates our own engine"),
        (["--extra-body", "{"], "--extra-body {: is not JSON"),
        (["--extra-body", "[1]"], "--extra-body [1]: must be a JSON object"),
        (["--extra-body", '{"stream": false}'], "stream is set by batchbench; remove it"),
        (
            ["--extra-body", '{"a": [{"api_key": "x"}], "stream": 1}'],
            '--extra-body: "api_key" looks like a secret and would be saved in the result; use '
            "--api-key",
        ),
        (["--endpoint", "/v2"], "--endpoint /v2: must be one of /v1/completions, /v1/chat/"),
        (["--timeout", "0"], "--timeout 0: must be at least 0.001"),
    ],
)
def test_options_that_do_not_go_with_a_server_are_named(
    program: Program, words: list[str], says: str
) -> None:
    said = program("run", "--target", URL, *words)
    assert said.code == 2
    assert says in said.error


@pytest.mark.parametrize("name", OWN_ENGINE)
def test_every_setting_of_our_own_engine_is_refused_even_at_its_default(name: str) -> None:
    own = getattr(Experiment(), "serving" if hasattr(Experiment().serving, name) else "model")
    with pytest.raises(UsageError, match=f"^{option_name(name)}: is for our own engine"):
        Experiment.of({"target": URL, name: getattr(own, name)})


@pytest.mark.parametrize("name", ["endpoint", "tokenizer", "extra_body", "timeout", "insecure"])
def test_options_of_a_server_need_one(name: str) -> None:
    values = {"endpoint": CHAT, "tokenizer": "x", "extra_body": "{}", "timeout": 1.0}
    with pytest.raises(UsageError, match=f"^{option_name(name)}: is for a server; add --target"):
        TargetSpec(**{name: values.get(name, True)})


@pytest.mark.parametrize("words", [["simulate"], ["ladder"], ["duet"], ["breakeven"]])
def test_commands_without_a_server_say_which_have_one(program: Program, words: list[str]) -> None:
    said = program(*words, "--target", URL)
    assert said.code == 2
    assert "measures no server; run, sweep, capacity and probe do" in said.error


def test_a_simulation_has_no_server(program: Program) -> None:
    said = program("sweep", "--simulated", "--target", URL)
    assert (said.code, "--target: a simulation has no server" in said.error) == (2, True)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("localhost:8000", "needs its scheme"),
        ("ftp://host", "begin the URL with http"),
        ("http://user:secret@host", "a URL with a password is not accepted"),
        ("http://host/v1/completions", "the path with --endpoint"),
        ("http://host?key=secret", "leave out everything from"),
    ],
)
def test_a_target_that_is_no_server_is_refused(program: Program, url: str, says: str) -> None:
    said = program("run", "--target", url)
    assert said.code == 2
    assert says in said.error


def test_an_alias_and_a_final_v1_mean_the_same_server() -> None:
    places = [TargetSpec(target=f"http://host:1{end}").address for end in ("", "/", "/v1", "/v1/")]
    assert len(set(map(str, places))) == 1


def test_a_preset_does_not_name_the_servers_model() -> None:
    assert Experiment.of({"target": URL}, preset="ci").model.model == "auto"
    assert Experiment.of({"target": URL, "model": "mine"}, preset="ci").model.model == "mine"


def test_an_experiment_on_a_server_is_restored_from_its_config_and_its_command() -> None:
    asked = Experiment.of({"target": URL, "extra_body": '{"top_k": 1}', "batch_size": 3})
    assert Experiment.from_config(asked.config()) == asked
    assert f"--target {URL}" in asked.command()
    assert """--extra-body '{"top_k": 1}'""" in asked.command()
    assert "--model" not in asked.command()


@pytest.mark.parametrize(
    "body",
    [
        {"api_key": "x"},
        {"a": {"b": [1, {"Authorization": ["Bearer x"]}]}},
        {"HF_TOKEN": "x"},
        {"client-secret": 7},
        {"openaiKey": "x"},
        {"password": 1234},
        {"auth_tokens": ["x"]},
    ],
)
def test_a_secret_in_the_body_is_refused_and_not_shown(body: dict[str, Any]) -> None:
    for end in ("", ', "stream": true', ", oops"):  # further faults do not show it
        text = json.dumps({**body, "of": "the user"})[:-1] + end + "}"
        with pytest.raises(UsageError, match=r"^--extra-body: ") as refused:
            TargetSpec(target=URL, extra_body=text)
        assert "the user" not in str(refused.value)


def test_fields_of_tokens_and_cache_keys_are_no_secrets() -> None:
    fields = {"stop_token_ids": [1, 2], "min_tokens": 3, "skip_special_tokens": False}
    more = {"prompt_cache_key": "x", "key": None, "monkey": True, "top_k": 1}
    assert TargetSpec(target=URL, extra_body=json.dumps(fields | more)).extra == fields | more


# Questions that cannot be asked


def test_a_model_that_is_not_there_is_refused_with_those_that_are(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired(monkeypatch)
    said = program("run", "--target", URL, "--model", "other", "--output", "out")
    assert said.code == 2
    assert said.error == (
        "batchbench: --model other: the server has no such model; it has fake-model"
    )
    assert not Path("out").exists()


def test_a_request_that_is_too_long_for_the_server_is_refused(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired(monkeypatch)
    said = program("run", "--target", URL, "--long-tokens", "5000", "--output", "out")
    assert said.code == 2
    assert "7 prompt + 5000 output tokens exceed the 4096 that the server takes" in said.error
    assert not Path("out").exists()


def test_chat_needs_prompts_of_text(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    wired(monkeypatch)
    said = program("run", "--target", URL, "--endpoint", CHAT, "--output", "out")
    assert said.code == 2
    assert "--tokenizer" in said.error
    assert not Path("out").exists()


def test_a_server_that_is_not_there_is_named(program: Program) -> None:
    with serving() as server:
        url = server.url
    said = program("run", "--target", url, "--output", "out")
    assert said.code == 2
    assert f"{url} refuses connections" in said.error
    assert not Path("out").exists()


# Secrets


def test_a_key_is_in_no_file_and_no_output(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from-before")
    wired(monkeypatch)
    said = program(
        *("run", "--target", URL, "--api-key", KEY, *CLASSIC, "--trials", "1", "--output", "out")
    )
    assert said.code == 0
    assert os.environ["OPENAI_API_KEY"] == KEY  # of this process alone
    texts = [said.out, said.err]
    texts += [file.read_bytes().decode("latin-1") for file in Path("out").rglob("*.*")]
    assert not any(KEY in text for text in texts)
    said = program("sweep", "--target", URL, "--api-key", KEY, "--trials", "1", "--output", "sweep")
    assert said.code == 0
    texts = [said.out, said.err]
    texts += [file.read_bytes().decode("latin-1") for file in Path("sweep").rglob("*.*")]
    assert not any(KEY in text for text in texts)


def test_a_spec_does_not_show_or_compare_its_key() -> None:
    spec = TargetSpec(target=URL, api_key=KEY)
    assert spec.key == KEY
    assert spec == TargetSpec(target=URL)
    shown = [repr(spec), str(as_json(spec)), str(words_of(spec, TargetSpec())), repr(spec.address)]
    assert not any(KEY in text for text in shown)
    assert spec.address.headers["Authorization"] == f"Bearer {KEY}"


def test_the_environment_gives_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert TargetSpec(target=URL).key == KEY
    monkeypatch.delenv("OPENAI_API_KEY")
    assert TargetSpec(target=URL).key is None


# Whole runs


def test_a_run_has_400_passes_in_waves_and_130_in_continuous(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired(monkeypatch)
    said = program("run", "--target", URL, *CLASSIC, "--output", "out")
    assert said.code == 0, said.err
    data = data_in(Path("out"))
    load_data(Path("out"))  # it is of its schema
    server = data["server"]
    assert server["name"] == "llama.cpp"
    assert server["passes"]["static"] == [400] * 4
    assert all(130 <= count <= 134 for count in server["passes"]["continuous"])
    assert server["stamps"] == "kernel"
    assert data["strategies"]["static"]["counters"] is None
    assert data["comparison"]["step_ratio_source"] == "server"
    assert data["comparison"]["step_ratio"] == pytest.approx(3.0, abs=0.1)
    assert data["agreement"]["same"] == 32
    assert data["failures"] == []
    assert data["prediction"] is None
    assert data["validity"] == {"status": "valid", "reasons": []}
    assert data["config"]["target"]["target"] == URL
    out = " ".join(said.out.split())
    assert "as fast as static batching in waves" in out
    assert "by the server's own count of forward passes: 3.0" in out
    assert "Both strategies gave the same output for 32/32 requests; run valid." in out
    assert f"Again: batchbench run --target {URL}" in out
    page = (Path("out") / "report.html").read_text(encoding="utf-8")
    assert "static (waves)" in page
    assert "Static batching in waves" in page


def test_a_served_result_is_reported_in_every_format(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired(monkeypatch)
    program("run", "--target", URL, *CLASSIC, "--output", "out")
    for form in ("html", "markdown", "github-bigger", "bencher", "pytest-benchmark"):
        assert program("report", "out", "--format", form).code == 0, form
    said = program("report", "out", "--json")
    assert json.loads(said.out)["server"]["slots"] == 8
    assert "static (waves)" in (Path("out") / "report.md").read_text(encoding="utf-8")


def test_a_model_without_a_name_is_called_so(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = wired(monkeypatch)

    def get(address: Any, path: str) -> Response:
        return Response(404, {}, [])

    monkeypatch.setattr(dialects, "get", get)
    said = program("run", "--target", URL, *CLASSIC, "--trials", "1", "--output", "out")
    assert said.code == 0, said.err
    assert "unnamed model · openai at 127.0.0.1:9 · 8 at once" in said.out
    assert not any("model" in body for body in network.bodies)


@pytest.mark.parametrize("per_chunk", [1, 2, 4])
def test_tokens_sent_together_leave_latency_over_unloaded_sensible(
    per_chunk: int, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired(monkeypatch, manner=Manner(per_chunk=per_chunk))
    said = program("run", "--target", URL, *CLASSIC, "--trials", "1", "--output", "out", "-v")
    assert "E2E ÷ unloaded" in said.out
    for strategy in data_in(Path("out"))["strategies"].values():
        longest = strategy["by_output_length"][-1]
        assert 0.9 < longest["mean_slowdown"] < 6


def test_output_that_comes_at_once_has_no_latency_over_unloaded(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired(monkeypatch, Schedule(buffered=True))
    said = program("run", "--target", URL, *CLASSIC, "--trials", "1", "--output", "out")
    assert said.code == 0, said.err
    out = " ".join(said.out.split())
    assert "each output came in one piece: ITL, TPOT and E2E ÷ unloaded are not known" in out
    assert "E2E ÷ unloaded," not in out
    warm_up = data_in(Path("out"))["warm_up"]
    assert warm_up["step_ns"] < 30 * MS  # a pass takes 10 to 15


def test_two_served_results_are_compared_and_put_side_by_side(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired(monkeypatch, Schedule(jitter=0.05, seed=1))
    program("run", "--target", URL, *CLASSIC, "--output", "base")
    wired(monkeypatch, Schedule(jitter=0.05, seed=2))
    program("run", "--target", URL, *CLASSIC, "--output", "new")
    said = program("compare", "base", "new")
    assert said.code == 0, said.out
    said = program("report", "base", "new")
    assert said.code == 0
    assert "static (waves)" in said.out
    wired(monkeypatch, Schedule(step_ns=60 * MS, jitter=0.05, seed=3))
    program("run", "--target", URL, *CLASSIC, "--output", "slower")
    gate = ("--fail-if", "output_throughput < -10%")
    assert program("compare", "base", "slower", *gate).code == 1
    assert program("compare", "base", "new", *gate).code == 0


def test_a_served_result_is_not_compared_with_our_own_engine(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired(monkeypatch)
    program("run", "--target", URL, *CLASSIC, "--output", "served")
    data = data_in(Path("served"))
    own = {k: v for k, v in data.items() if k not in ("server", "agreement", "failures")}
    Path("own").mkdir()
    Path("own/result.json").write_text(json.dumps(own), encoding="utf-8")
    said = program("compare", "own", "served")
    assert said.code == 2
    assert "served: was measured on a server, and own on our own engine" in said.error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["predict", "out", "--batch-size", "4"], "was measured on a server"),
        (["simulate", "--cost", "out"], "was measured on a server"),
        (["breakeven", "--cost", "out"], "was measured on a server"),
        (["watch", "out", "--gif", "x.gif"], "static and continuous schedule by themselves"),
    ],
)
def test_what_needs_steps_refuses_a_served_result(
    program: Program, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    wired(monkeypatch)
    program("run", "--target", URL, *CLASSIC, "--trials", "1", "--output", "out")
    said = program(*words)
    assert (said.code, says in said.error) == (2, True), said.err


def test_served_results_have_a_trend(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, step in enumerate((10, 10, 20)):
        wired(monkeypatch, Schedule(step_ns=step * MS, jitter=0.01, seed=i))
        program("run", "--target", URL, *CLASSIC, "--trials", "2", "--output", f"runs/{i}")
    said = program("trend", "runs", "--json")
    assert said.code == 0, said.err
    assert '"server": "llama.cpp"' in said.out
    assert '"server slots": 8' in said.out


def test_a_served_result_is_reproduced(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    wired(monkeypatch)
    program("run", "--target", URL, *CLASSIC, "--output", "out")
    said = program("reproduce", "out", "--json")
    assert said.code == 0, said.err
    found = {check["name"]: check["verdict"] for check in json.loads(said.out)["checks"]}
    assert found["workload"] == "agrees"
    assert found["forward passes, static (waves)"] == "agrees"
    assert "weights" not in found
    wired(monkeypatch, Schedule(slots=4))
    said = program("reproduce", "out", "--json")
    assert said.code == 0, said.err
    (slots,) = (d for d in json.loads(said.out)["environment"] if d["name"] == "server slots")
    assert (slots["recorded"], slots["here"]) == (8, 4)


def test_requests_that_fail_leave_the_finished_pairs_and_exit_1(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = wired(monkeypatch)
    network.breaks = {4: [5]}
    said = program("run", "--target", URL, *CLASSIC, "--output", "out")
    assert said.code == 1
    data = data_in(Path("out"))
    (failure,) = data["failures"]
    assert failure["failed"][0] | {"phase": ""} == {
        "request": 5,
        "kind": "reset",
        "phase": "",
        "text": "it broke",
        "status": None,
    }
    assert len(data["strategies"]["static"]["trials"]) == 3
    assert data["validity"]["status"] == "suspect"
    assert "1 of 32 requests failed in trial 2" in " ".join(said.out.split())


# Sweeps and capacity


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_report, "draw_sweep", lambda cells: ({}, {}))


@pytest.mark.usefixtures("without_pictures")
def test_a_sweep_over_batch_sizes_continues_and_never_mixes_servers(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("sweep", "--target", URL, "--batch-size", "2,8", "--trials", "2", "--output", "out")
    wired(monkeypatch)
    said = program(*words)
    assert said.code == 0, said.err
    first = sorted(Path("out/cells").iterdir())
    assert len(first) == 2
    network = wired(monkeypatch)
    assert program(*words).code == 0
    assert network.trials == []  # both cells are kept
    shown = program("report", "out")  # asks no server
    assert (shown.code, network.trials) == (0, []), shown.err
    assert "over 2 cells" in " ".join(shown.out.split())
    network = wired(monkeypatch, Schedule(slots=4))  # the same address, another server
    said = program(*words)
    assert network.trials
    assert len(sorted(Path("out/cells").iterdir())) == 4
    assert "the folder has 2 cells of other sweeps" in " ".join(said.out.split())


@pytest.mark.usefixtures("without_pictures")
def test_a_sweep_goes_over_several_servers(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired(monkeypatch)
    other = "http://127.0.0.1:10"
    said = program(
        *("sweep", "--target", URL, "--target", other, "--trials", "1", "--output", "out", "--json")
    )
    assert said.code == 0, said.err
    cells = json.loads(said.out)["cells"]
    assert [cell["options"]["target"] for cell in cells] == [URL, other]
    assert len({cell["digest"] for cell in cells}) == 2
    assert all(cell["server"]["name"] == "llama.cpp" for cell in cells)
    assert URL in (Path("out") / "sweep.csv").read_text(encoding="utf-8")


def test_a_sweep_stops_if_a_server_has_gone(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        url = server.url
    said = program("sweep", "--target", url, "--output", "out")
    assert said.code == 2
    assert "refuses connections" in said.error
    assert not Path("out").exists()


def test_a_dry_run_of_a_sweep_asks_no_server(program: Program) -> None:
    said = program("sweep", "--target", URL, "--batch-size", "2,8", "--dry-run")
    assert said.code == 0
    assert said.out.splitlines() == [
        "1  batch size 2: served by 127.0.0.1:9",
        "2  batch size 8: served by 127.0.0.1:9",
        "2 cells",
    ]


@pytest.mark.parametrize(
    "change", [{"version": "2"}, {"slots": 4}, {"context": 9}, {"served_models": ("b",)}]
)
def test_a_server_with_other_facts_is_another_server(change: dict[str, Any]) -> None:
    one = dialects.Dialect("vllm", "1", ("a",), 8, 4096)
    assert identity_of(one) != identity_of(replace(one, **change))


def test_the_capacity_of_a_server_is_found(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired(monkeypatch)
    said = program(
        *("capacity", "--target", URL, "--slo", "ttft:150", "--output-tokens", "20"),
        *("--queue-size", "60", "--slo-attainment", "80%", "--precision", "100%"),
        *("--max-trials", "1", "--output", "out"),
    )
    assert said.code == 0, said.err
    data = json.loads((Path("out") / "capacity.json").read_text(encoding="utf-8"))
    assert data["server"] == {"name": "llama.cpp", "version": None, "slots": 8}
    rates = {name: found["rate"] for name, found in data["strategies"].items()}
    assert rates["continuous"] > rates["static"] > 0
    assert "static batching in waves" in " ".join(said.out.split())


def test_a_real_server_on_a_port_is_run_whole(program: Program) -> None:
    with serving(Schedule(step_ns=MS, row_ns=0, prompt_ns=0), Manner("vllm")) as server:
        said = program("run", "--target", server.url, *CLASSIC, "--trials", "1", "--output", "out")
    assert said.code == 0, said.err
    data = data_in(Path("out"))
    assert (data["server"]["name"], data["server"]["version"]) == ("vllm", "0.0.fake")
    assert data["server"]["passes"]["static"][0] >= 400
    assert data["agreement"]["by"] == "token ids"
    assert data["agreement"]["same"] == 32
