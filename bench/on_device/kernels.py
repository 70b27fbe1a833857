"""Are the kernels right on this device: their own tests, and whole networks at published widths with and without them.

A network passes if Triton's kernels bring it no farther from float64 than twice what torch's own do.
"""

import os
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from on_device.job import Fact, Job, read_facts
from on_device.launches import Launches, watched
from on_device.networks import CASES, Case, converted
from plm_kernels import backends

TESTS = Path(__file__).parents[2] / "tests"
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def run(job: Job) -> None:
    """Networks and tests at once, if there are several processes: the first has the tests."""
    modules = {path.rpartition(".")[2] for path in backends.KERNELS.values()}
    if not backends.triton_available():
        job.tell("check", "Triton", ok=False, error="not installed: no kernel can run")
    elif job.parts == 1 or job.part:
        networks(job)
    if job.part == 0:
        job.tell("kernels", "picks", **backends.picks())
        job.tell("kernels", "modules", names=sorted(modules))
        test_files(job, modules)


def networks(job: Job) -> None:
    """The most important dtype first."""
    if not job.on_gpu:
        import kernel_device  # noqa: F401  # of the tests: it mends what Triton's interpreter lacks
    launched: Launches = {}
    # Without a GPU products in bfloat16 are interpreted wrongly (tests/kernel_device.py).
    dtypes = DTYPES if job.on_gpu else DTYPES[1:]
    pairs = [(case, dtype) for dtype in dtypes for case in CASES if case.float16 or dtype != torch.float16]
    for case, dtype in pairs if job.parts == 1 else pairs[job.part - 1 :: job.parts - 1]:
        name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
        job.attempt("network", name, lambda c=case, d=dtype, n=name: network(job, c, d, n, launched))
    for name, found in launched.items():
        job.tell("kernel", name, **found)


# Networks


def network(job: Job, case: Case, dtype: torch.dtype, name: str, launched: Launches) -> None:
    """One family in one dtype: with Triton's kernels and torch's own, against its float64."""
    whole, rows = case.network(job.quick, job.device), case.rows(job.quick, job.device)
    truth = results(converted(whole, torch.float64), case, rows, "torch")
    net = converted(whole, dtype)
    with warnings.catch_warnings(record=True) as said, watched() as found:
        warnings.simplefilter("always")
        ours = results(net, case, rows, "auto" if job.on_gpu else "triton")
    add(launched, found)
    error, floor = relative(ours, truth), relative(results(net, case, rows, "torch"), truth)
    fell = [str(each.message) for each in said if issubclass(each.category, backends.KernelWarning)]
    fell += ["no kernel ran"] if job.on_gpu and not found else []
    # The noise floor: torch's own error in this dtype; at least a unit in the last place.
    ok = error <= 2 * max(floor, torch.finfo(dtype).eps) and not fell
    told = {"error": "; ".join(fell)} if fell else {}
    job.tell("network", name, ok=ok, error_of=error, torchs_error=floor, kernels=sorted(found), **told)


def results(net: Any, case: Case, rows: Sequence[Tensor], choice: backends.Backend) -> list[Tensor]:
    with torch.inference_mode(), backends.prefer(choice):
        return case.run(net, rows)


def relative(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Root mean square error relative to that of the truth; a NaN is infinitely wrong."""
    difference = torch.cat([(x.double() - y.double()).flatten() for x, y in zip(found, truth, strict=True)])
    error = difference.norm() / torch.cat([y.double().flatten() for y in truth]).norm()
    return float(error.nan_to_num(torch.inf))


def add(total: Launches, found: Launches) -> None:
    for name, entry in found.items():
        into = total.setdefault(name, {"launches": 0})
        for key, value in entry.items():
            into[key] = into.get(key, 0) + value if key == "launches" else max(into.get(key, 0), value)


# Tests


def test_files(job: Job, modules: set[str]) -> None:
    """Run tests/test_gpu_*.py and count by file; each kernel's module must have a file."""
    files = sorted(TESTS.glob("test_gpu_*.py"))
    tested = [path.stem.removeprefix("test_gpu_") for path in files]
    for name in sorted(modules):
        if not any(
            f"{name}_".startswith(f"{each}_") for each in tested
        ):  # attention's are attention_backward's as well
            job.tell("tests", name, ok=False, error=f"there is no tests/test_gpu_{name}.py")
    if not files:
        return
    if find_spec("pytest") is None:
        job.tell("check", "pytest", ok=False, error="not installed: the kernels' own tests were not run")
        return
    with TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.jsonl"
        run_tests(job, files, outcomes)
        count(job, files, read_facts(outcomes))


def run_tests(job: Job, files: Sequence[Path], outcomes: Path) -> None:
    """Run them, until they end or the time does."""
    command = [sys.executable, "-m", "pytest", *map(str, files), "-p", "on_device.recorder", "-p", "no:cacheprovider"]
    command += ["--no-header", "--tb=short", "-q", "--continue-on-collection-errors"]
    # Other versions of what is installed warn of other things. But a kernel that falls back to PyTorch is an error.
    command += ["-W", "default", "-W", "error::plm_kernels.backends.KernelWarning"]
    if find_spec("plm.recording") is not None:
        command += ["-W", "error::plm.recording.GraphWarning"]
    if job.on_gpu and find_spec("xdist") is not None and cores() > 2:
        command += ["-p", "xdist.plugin", "-n", str(min(8, cores() - 1))]  # compiling is most of the work
    # Plugins that happen to be installed stay out.
    settings = {"PLM_OUTCOMES": str(outcomes), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    settings["PLM_TESTS_PER_FILE"] = "2" if job.quick else "0"
    process = subprocess.Popen(command, env={**os.environ, **settings}, cwd=TESTS.parent)
    try:
        process.wait(max(1, job.left() - 3))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count(job: Job, files: Sequence[Path], outcomes: Sequence[Fact]) -> None:
    """A fact per file."""
    ran: defaultdict[str, list[Fact]] = defaultdict(list)
    wanted: Counter[str] = Counter()
    for each in outcomes:
        file = Path(each["test"].partition("::")[0]).stem
        if each["outcome"] == "collected":
            wanted[file] += each["count"]
        else:
            ran[file].append(each)
    for file in (path.stem for path in files):
        found = {each["test"]: each for each in ran[file]}.values()
        counts = Counter(each["outcome"] for each in found)
        failures = [f"{each['test']}: {each['reason']}" for each in found if each["outcome"] == "failed"]
        reasons = {each["reason"] for each in found if each["outcome"] == "skipped"}
        whole = len(found) >= wanted[file] > 0
        ok: bool | None = whole and not failures and counts["passed"] > 0
        if whole and counts["skipped"] == len(found) and not job.on_gpu:
            ok = None  # its tests are for a GPU alone
        job.tell(
            "tests", file.removeprefix("test_gpu_"), ok=ok,
            passed=counts["passed"], failed=counts["failed"], skipped=counts["skipped"], tests=wanted[file],
            seconds=sum(each["seconds"] for each in found), failures=failures[:10], reasons=sorted(reasons)[:5],
            **({} if whole else {"error": "not all of its tests were run in time"}),
        )  # fmt: skip
