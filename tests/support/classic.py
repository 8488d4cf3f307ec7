"""The classic workload, which most tests serve, and a warm-up that settled."""

from batchbench.batching.trials import WarmUp
from batchbench.workloads import Workload

CLASSIC = Workload.of("classic", [[7] * 7] * 32, [100 if i % 8 == 0 else 10 for i in range(32)])
"""A request of 100 output tokens in each batch of 8, the others of 10."""

SETTLED = WarmUp(3, True, 0.01, 10_000_000)
