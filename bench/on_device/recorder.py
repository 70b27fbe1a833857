"""A plugin of pytest that writes the outcome of every test down as soon as it is known, by the file it is in.

JUnit's XML comes at the end of a run alone; this leaves what is known of a run that is stopped. Environment variables:
``PLM_OUTCOMES``, the file to write to, and ``PLM_TESTS_PER_FILE``, how many tests of each file are run (0: all).
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For rehearsals: of each file the first tests alone."""
    most = int(os.environ.get("PLM_TESTS_PER_FILE", "0"))
    seen: Counter[Path] = Counter()
    if most:
        for item in items:
            seen[item.path] += 1
            if seen[item.path] > most:
                item.add_marker(pytest.mark.skip(reason="a rehearsal runs a few tests of each file"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """How many tests each file has, so that those which were not reached can be told."""
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":  # of several processes the first
        for path, count in Counter(str(item.path) for item in session.items).items():
            note(path, "collected", count=count)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The call's outcome, or that of what it needed and could not have."""
    if report.when != "call" and report.passed:
        return
    reason = ""
    if report.failed:
        reason = str(report.longrepr).strip().splitlines()[-1][:300]
    elif report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
    if "PYTEST_XDIST_WORKER" not in os.environ:  # the process that hands the tests out has this report as well
        note(report.nodeid, report.outcome, reason=reason, seconds=round(report.duration, 3))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot even be read has failed."""
    if report.failed:
        note(report.nodeid, "failed", reason=str(report.longrepr).strip().splitlines()[-1][:300], seconds=0.0)


def note(test: str, outcome: str, **told: object) -> None:
    with Path(os.environ["PLM_OUTCOMES"]).open("a") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, **told}) + "\n")
