"""What is measured: a file per task, and in each a table of workloads. Who takes part is in `bench/peers`."""

from measuring import Workload

from workloads import antibodies, embedding, folding, pairs, proteinbert, scoring, start, t5, writing

TABLES = (embedding, antibodies, t5, scoring, pairs, writing, folding, proteinbert, start)


def place(row: Workload) -> str:
    """By number. The antibodies, with 6 of the 14 targets, follow W1: what comes last is dropped first."""
    return row.name.split()[0].replace("antibodies", "W1")


WORKLOADS: tuple[Workload, ...] = tuple(sorted((row for file in TABLES for row in file.WORKLOADS), key=place))
