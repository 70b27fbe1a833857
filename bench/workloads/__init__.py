"""What is measured: a file per task, and in each a table of workloads. Who takes part is in `bench/peers`."""

from measuring import Workload

from workloads import embedding

WORKLOADS: tuple[Workload, ...] = (*embedding.WORKLOADS,)
