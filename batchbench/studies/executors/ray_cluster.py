"""Jobs on a Ray cluster: one actor on each device, which keeps its model from job to job.

There are only actors: a task beside them would wait for ever, since they hold all processors.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batchbench import version
from batchbench.batching.progress import Watch
from batchbench.errors import IncompleteError, UsageError, reason_in_short
from batchbench.studies.executors.jobs import Ended, Executor, Job, Lost, Needs, Worker, unlike

PATIENCE_S = 300.0
"""Seconds without any device after which a study gives up; a node may join until then."""

_LOOK_S = 1.0
"""Seconds between two looks at the nodes of the cluster."""

_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Settings of a Ray that starts here: no statistics for its makers, and their next default."""


@dataclass
class _Device:
    """An actor on a node: the key of its job, and its answer that is still to come."""

    node: str
    name: str
    options: Mapping[str, Any]
    actor: Any
    ref: Any
    job: str | None = None
    ready: bool = False


class RayCluster(Executor):
    """Runs jobs on all devices of a Ray cluster, those of nodes that join later included.

    ``address`` is ``auto`` or ``ray://HOST:PORT``; None starts Ray on this machine.

    Raises:
        UsageError: there is no such cluster.
    """

    def __init__(self, address: str | None, watch: Watch, needs: Needs) -> None:
        self._watch, self._needs, self._like = watch, needs, needs.like
        self._devices: list[_Device] = []
        self._known: set[str] = set()  # nodes that are alive, by their ids
        self._refused: dict[str, str] = {}  # the reasons, by the ids of nodes
        self._looked_at, self._had_devices_at, self._served = 0.0, time.monotonic(), False
        self._closing = ExitStack()
        # Ray prints the logs of a node that dies on standard output.
        self._closing.enter_context(redirect_stdout(StringIO()))
        try:
            self._connect(address)
        except BaseException:
            self.close()
            raise

    def _connect(self, address: str | None) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        package = str(Path(version.__file__).parent)
        own = {"include_dashboard": False} if address is None else {}
        handler = signal.getsignal(signal.SIGTERM)  # which Ray replaces
        self._closing.callback(ray.shutdown)
        try:
            ray.init(
                address=address or "local",
                runtime_env={"py_modules": [package], "excludes": ["__pycache__"]},
                log_to_driver=False,
                logging_level="ERROR",
                **own,
            )
        except (ConnectionError, RayError, RuntimeError, ValueError) as error:
            where = f"--ray-address {address}" if address else "--executor ray"
            raise UsageError(
                f"{where}: {reason_in_short(error)}; start a cluster with ray start --head, or "
                "drop --ray-address"
            ) from error
        finally:
            signal.signal(signal.SIGTERM, handler)

    @property
    def free(self) -> int:
        return sum(device.ready and device.job is None for device in self._devices)

    @property
    def running(self) -> Mapping[str, str]:
        return {device.job: device.name for device in self._devices if device.job}

    @property
    def machines(self) -> int:
        return len({device.node for device in self._devices if device.ready})

    def submit(self, job: Job) -> None:
        device = next(d for d in self._devices if d.ready and d.job is None)
        device.job, device.ref = job.key, device.actor.run.remote(job)

    def wait(self) -> Sequence[Ended]:
        if self._devices:
            self._had_devices_at = time.monotonic()
        dead = list(self._look()) if time.monotonic() - self._looked_at > _LOOK_S else []
        waited = {device.ref: device for device in self._devices if device.ref is not None}
        if not waited:
            self._check()
            time.sleep(0 if dead else _LOOK_S / 4)
            return dead
        answered, _ = ray.wait(list(waited), timeout=0 if dead else _LOOK_S)
        return [*dead, *(end for ref in answered for end in self._end(waited[ref]))]

    def _look(self) -> Iterator[Ended]:
        """Start actors on nodes that joined; yield the jobs of nodes that are dead."""
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for device in [d for d in self._devices if d.node not in alive]:
            yield from self._lose(device, "its node died")
        for key in alive.keys() - self._known:
            for options in self._devices_of(alive[key]["Resources"]):
                self._start(key, alive[key]["NodeManagerHostname"], options)
        self._known, self._looked_at = set(alive), time.monotonic()

    def _devices_of(self, resources: Mapping[str, float]) -> Iterator[dict[str, Any]]:
        """Yield the resources of each actor of a node."""
        cores, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        if self._needs.timed and self._needs.gpus and gpus:
            yield from ({"num_gpus": 1, "num_cpus": cores // gpus} for _ in range(gpus))
        elif cores:
            yield from [{"num_cpus": cores}] if self._needs.timed else [{"num_cpus": 1}] * cores

    def _start(self, node: str, name: str, options: Mapping[str, Any]) -> None:
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        kind = ray.remote(max_restarts=0, max_task_retries=0, **options)(Worker)
        actor = kind.options(scheduling_strategy=place).remote(os.getcwd(), timed=self._needs.timed)
        self._devices.append(_Device(node, name, options, actor, actor.about.remote()))

    def _end(self, device: _Device) -> Iterator[Ended]:
        """Take a device's answer; yield the end of its job."""
        try:
            answer = ray.get(device.ref)
        except RayError as error:
            if isinstance(error, RayTaskError) and device.job is not None:
                raise
            yield from self._lose(device, reason_in_short(str(error).strip().splitlines()[-1]))
            return
        job, device.job, device.ref = device.job, None, None
        if job is not None:
            self._served = True
            yield answer
        elif reason := unlike(self._like, answer):
            hint = "" if "batchbench" in reason else "; --any-hardware uses it"
            self._drop(device)
            self._refuse(device, f"{reason}{hint}")
        else:
            device.ready = True
            self._like = answer if self._needs.same else self._like

    def _lose(self, device: _Device, reason: str) -> Iterator[Ended]:
        """Drop a device that died, and start another if its node is alive; yield its job."""
        self._drop(device)
        if device.job is not None:
            self._watch.note(f"{device.name} is lost; what it ran runs again elsewhere ({reason})")
            self._start(device.node, device.name, device.options)
            yield Ended(device.job, Lost(reason), device.name)
        elif any(node["NodeID"] == device.node and node["Alive"] for node in ray.nodes()):
            self._refuse(device, reason)

    def _drop(self, device: _Device) -> None:
        ray.kill(device.actor)
        self._devices.remove(device)

    def _refuse(self, device: _Device, reason: str) -> None:
        self._refused[device.node] = reason
        self._watch.note(f"{device.name} is not used: {reason}")

    def _check(self) -> None:
        """Raise an error if there is no device, and none can be expected."""
        if self._devices:
            return
        if self._refused and not self._served:
            reason = next(iter(self._refused.values()))
            raise UsageError(f"--executor ray: no node can be used: {reason}")
        if time.monotonic() - self._had_devices_at > PATIENCE_S:
            raise IncompleteError(
                f"--executor ray: no node for {PATIENCE_S:g} s; the same command continues from "
                "what is kept"
            )

    def close(self) -> None:
        self._closing.close()
