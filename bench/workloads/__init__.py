"""What is measured: a file per task, and in each a table of workloads. Who takes part is in `bench/peers`."""

from measuring import Workload

from workloads import antibodies, embedding, folding, pairs, proteinbert, scoring, start, t5, writing

TABLES = (embedding, t5, scoring, pairs, writing, folding, proteinbert, start, antibodies)
WORKLOADS: tuple[Workload, ...] = tuple(
    sorted((row for file in TABLES for row in file.WORKLOADS), key=lambda row: row.name.split()[0])
)
