"""bench/device.py, rehearsed on a CPU: the driver, what each phase tells, and what happens when things go wrong."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import benches
import device
import pytest
import torch
from measuring import Contest, Contestant, Settings, Workload
from on_device import kernels, parity, report, suite
from on_device.contests import guarded, wrong
from on_device.encoders import ankh3, w1, w4
from on_device.job import Job, read_facts
from on_device.launches import watched
from on_device.networks import CASES, SHORT, converted
from on_device.others import t5_workload, w5

from plm_kernels import backends

COMMAND = [sys.executable, str(benches.BENCH / "device.py"), "--device", "cpu", "--quick"]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job("test", "cpu", True, time.time() + 600, tmp_path / "facts.jsonl")


def facts(job: Job) -> list[dict[str, Any]]:
    return read_facts(job.lines)


# The driver


def test_arguments() -> None:
    args = device.parse(["--output", "there", "--only", "suite", "kernels"])
    assert args.only == ["kernels", "suite"] and args.device == "cuda"  # in the order of the phases
    with pytest.raises(SystemExit) as stopped:
        device.parse(["--output", "there", "--device", "cpu"])  # published sizes would take hours
    assert stopped.value.code == 2


def test_shares_of_the_time() -> None:
    """All of it is given away, and what a phase leaves goes to those after it."""
    names = [*device.SHARES]
    left = 500.0
    for name in names:
        mine = device.share(name, names, left)
        assert 0 < mine <= left
        left -= mine
    assert left == pytest.approx(0)
    assert device.share("suite", names, 500) == 500


def test_a_run(tmp_path: Path) -> None:
    run = subprocess.run([*COMMAND, "--output", str(tmp_path), "--only", "environment"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "device.json").read_text())
    assert found["phases"] == {"environment": "complete"} and found["passed"]
    assert {"packages", "python", "copy", "launch"} <= {fact["name"] for fact in found["facts"]}
    assert "rehearsal" in (tmp_path / "device.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device.json", "device.md", "environment.log"]


def test_a_run_that_is_stopped_leaves_what_it_found(tmp_path: Path) -> None:
    process = subprocess.Popen([*COMMAND, "--output", str(tmp_path), "--only", "parity"], stdout=subprocess.DEVNULL)
    until = time.time() + 120
    while not (seen := found_in(tmp_path)) and time.time() < until:
        time.sleep(0.1)
    assert seen, "no fact within two minutes"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1
    found = json.loads((tmp_path / "device.json").read_text())
    assert found["phases"] == {"parity": "interrupted"} and not found["passed"] and found["facts"]
    assert "interrupted" in (tmp_path / "device.md").read_text()


def found_in(folder: Path) -> list[Any]:
    path = folder / "device.json"
    return json.loads(path.read_text())["facts"] if path.exists() else []  # always whole


def test_no_time_left(tmp_path: Path) -> None:
    run = subprocess.run([*COMMAND, "--output", str(tmp_path), "--minutes", "0.1"], capture_output=True, text=True)
    assert run.returncode == 1
    states = json.loads((tmp_path / "device.json").read_text())["phases"]
    assert "complete" not in states.values() and states["suite"] in ("no time left", "out of time")


# The report


def test_passed_only_if_everything_was_checked() -> None:
    good, bad = ({"kind": "tests", "name": "x", "ok": ok, "phase": "kernels", "at": 0} for ok in (True, False))
    done = {"kernels": "complete"}
    assert report.passed([good], done)
    assert not report.passed([good, bad], done)
    assert not report.passed([good], {"kernels": "out of time"})
    assert not report.passed([], done)  # nothing was checked
    assert report.passed([], {"environment": "complete"})  # nothing was to be


def test_kernels_of_several_processes_are_added() -> None:
    one = {"kind": "kernel", "name": "norms.norm", "launches": 2, "registers": 40}
    other = {"kind": "kernel", "name": "norms.norm", "launches": 3, "registers": 32}
    modules = {"kind": "kernels", "name": "modules", "names": ["gates", "norms"]}
    kernel, rest = report.merged([one, other, modules])
    assert (kernel["launches"], kernel["registers"]) == (5, 40)
    assert rest["names"] == "gates"  # which no network has met


def test_torn_lines_are_left_out(job: Job) -> None:
    job.tell("check", "one", value=float("nan"))
    with job.lines.open("a") as file:
        file.write('{"kind": "che')
    (fact,) = facts(job)
    assert fact["value"] == "nan"


# The phases


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a whole network is asked to run on, the last one last."""
    asked = ["auto"]

    @contextmanager
    def prefer(backend: str) -> Iterator[None]:
        asked.append(backend)
        yield
        asked.append("auto")

    monkeypatch.setattr(backends, "prefer", prefer, raising=False)
    return asked


def test_a_network(job: Job, choice: list[str]) -> None:
    kernels.network(job, CASES[2], torch.float32, "esm", {})
    (fact,) = facts(job)
    assert fact["ok"] and {"torch", "triton"} <= {*choice}


def test_a_network_with_a_wrong_kernel(job: Job, choice: list[str]) -> None:
    right = CASES[2]

    def run(net: Any, rows: Any) -> Any:
        found = right.run(net, rows)
        return [x * (1.001 if choice[-1] == "triton" else 1) for x in found]

    kernels.network(job, replace(right, run=run), torch.float32, "esm", {})
    assert facts(job)[0]["ok"] is False


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_networks_run_in_float64_and_give_a_row_each(case: Any) -> None:
    net = converted(case.network(True, "cpu"), torch.float64)
    with torch.inference_mode():
        found = case.run(net, case.rows(True, "cpu"))
    assert len(found) == (len(SHORT) if case.batched else 1)
    assert all(x.dtype == torch.float64 and x.isfinite().all() for x in found)


def test_test_files(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passed, failed, unreadable and missing; a kernel that falls back has failed, other warnings are none of ours."""
    (tmp_path / "test_gpu_good.py").write_text("def test_a(): pass\ndef test_b(): pass\ndef test_c(): assert False\n")
    (tmp_path / "test_gpu_bad.py").write_text("def test_a(): pass\ndef test_b(): assert 1 == 2\n")
    (tmp_path / "test_gpu_torn.py").write_text("import nothing_of_this_name\n")
    warn = "import warnings\nfrom plm_kernels.backends import KernelWarning\n"
    warn += (
        "def test_a(): warnings.warn('old', DeprecationWarning)\ndef test_b(): warnings.warn('fell', KernelWarning)\n"
    )
    (tmp_path / "test_gpu_warn.py").write_text(warn)
    monkeypatch.setattr(kernels, "TESTS", tmp_path)
    monkeypatch.setenv("PYTHONPATH", device.environment("cpu")["PYTHONPATH"])
    kernels.test_files(job, {"good", "absent"})
    found = {fact["name"]: fact for fact in facts(job)}
    assert (
        found["good"]["ok"] and found["good"]["passed"] == 2 and found["good"]["skipped"] == 1
    )  # a rehearsal runs two
    assert not found["bad"]["ok"] and "1 == 2" in found["bad"]["failures"][0]
    assert found["warn"]["passed"] == 1 and "KernelWarning: fell" in found["warn"]["failures"][0]
    assert not found["torn"]["ok"] and "nothing_of_this_name" in str(found["torn"]["failures"])
    assert not found["absent"]["ok"] and "test_gpu_absent.py" in found["absent"]["error"]


def test_launches_are_counted() -> None:
    triton = pytest.importorskip("triton")
    import triton.language as tl

    @triton.jit
    def double(x, n: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, n)
        tl.store(x + at, 2 * tl.load(x + at))

    double.fn.__module__ = "plm_kernels.gpu.double"
    x = torch.ones(16, device="cuda" if torch.cuda.is_available() else "cpu")
    with watched() as found:
        double[(1,)](x, 16)
    double[(1,)](x, 16)  # out of the scope
    assert found["double.double"]["launches"] == 1 and x.eq(4).all()


def test_parity(job: Job) -> None:
    case = next(case for case in parity.masked_models() if case.name == "esm2_tiny")
    parity.parity(job, case, "float32")
    parity.parity(job, replace(case, truth={name: [1.5 * x[0]] for name, x in case.truth.items()}), "float64")
    good, other = facts(job)
    assert good["ok"] and good["of_originals"] < 2
    # The floor is this device's own error on the CPU, so a truth that both miss is told by its size alone.
    assert other["error_of"] > 0.1


def test_parity_sees_a_device_that_is_off(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    original = parity.outputs

    def outputs(case: parity.Case, where: str, dtype: str) -> parity.Outputs:
        found = original(case, "cpu", dtype)
        return found if where == "cpu" else {name: [1.00001 * x for x in each] for name, each in found.items()}

    monkeypatch.setattr(parity, "outputs", outputs)
    case = next(case for case in parity.masked_models() if case.name == "esm2_tiny")
    parity.parity(replace(job, device="cuda"), case, "float32")
    assert facts(job)[0]["ok"] is False


def test_a_t5_in_float16_is_refused(job: Job) -> None:
    parity.parity(job, parity.t5s()[0], "float16")
    (fact,) = facts(job)
    assert fact["ok"] and "float16" in fact["refused"]


def test_alone_and_in_a_batch(job: Job) -> None:
    parity.invariance(job, CASES[2])
    assert facts(job)[0]["same_bits"]


SETTINGS = Settings(device="cpu", quick=True, rounds=1)


def test_a_contest(job: Job) -> None:
    suite.contest(job, suite.Entry(t5_workload(512), 0), SETTINGS)
    fact = next(fact for fact in facts(job) if fact["kind"] == "race")
    assert fact["ok"] and fact["result"]["contestants"]["plm"]["error"] < 1e-5
    assert "SDPA with the bias at hand" in report.race(fact["result"])
    assert any(fact["kind"] == "missing" and "varlen" in fact["name"] for fact in facts(job))


def test_what_fails_is_listed_and_ours_is_a_fault(job: Job) -> None:
    def fail() -> Any:
        raise RuntimeError("no such kernel\nand more")

    builds: dict[str, Any] = {"plm": fail, "peer": fail, "other": lambda: lambda given: [given]}
    probe = torch.ones(3)
    contestants: dict[str, Contestant] = {name: guarded(probe, build, "float32") for name, build in builds.items()}
    workload = Workload("test", "a test", lambda settings: Contest(contestants, probe, 3.0), ceiling=None)
    suite.contest(job, suite.Entry(workload, 0), SETTINGS)
    fact = next(fact for fact in facts(job) if fact["kind"] == "race")
    assert fact["ok"] is False and "no such kernel" in fact["error"] and "peer" not in fact["error"]
    assert fact["result"]["missing"]["peer"] == "RuntimeError: no such kernel"


def test_errors_that_only_a_mistake_explains() -> None:
    row = {"dtype": "bfloat16", "error": 0.2}
    assert wrong({"contestants": {"plm": row}, "missing": {}}) == ["plm is off by 0.2"]
    assert not wrong({"contestants": {"theirs": row, "plm": {**row, "error": 0.01}}, "missing": {}})
    assert wrong({"contestants": {"plm": {**row, "error": float("nan")}}, "missing": {}})


@pytest.mark.parametrize(("speed", "reached"), [(32_000.0, True), (16_000.0, False)])
def test_targets(job: Job, speed: float, reached: bool) -> None:
    target = suite.Target("W5 progen2-base 64x512", "speed", 32_000)
    suite.judge(
        job, target, {"contestants": {"plm": {"speed": speed}}, "unit": "tokens"}, {"busy": 0.5, "kernels": "x"}
    )
    (fact,) = facts(job)
    assert fact["reached"] is reached
    assert ("missed by a factor of 2.00" in fact["found"]) is not reached
    assert ("busy 50%" in fact["why"]) is not reached


@pytest.mark.parametrize(
    ("interval", "found"),
    [
        ([2.2, 2.1, 2.3], "2.20, reached"),
        ([2.2, 1.9, 2.3], "2.20, reached (interval reaches below)"),
        ([1.6, 1.5, 2.1], "1.60, missed by a factor of 1.25"),
    ],
)
def test_a_target_counts_by_the_median(job: Job, interval: list[float], found: str) -> None:
    row = {"ratios": {"peer": interval}}
    suite.judge(job, suite.Target("x", "peer", 2.0), {"contestants": {"plm": row}, "unit": "tokens"}, {})
    assert facts(job)[0]["found"] == found


@pytest.mark.parametrize(
    ("dtype", "rounds", "told"),
    [
        ("bfloat16", 3, "1.20 [1.10, 1.30]"),
        ("bfloat16", 2, "~1.20 [1.10, 1.30]"),
        ("float32", 3, "(1.20 [1.10, 1.30])"),
    ],
)
def test_ratios_are_told_as_by_the_other_suite(dtype: str, rounds: int, told: str) -> None:
    own = {"dtype": "bfloat16", "median": 1.0, "ratios": {"peer": [1.2, 1.1, 1.3]}}
    assert report.times("peer", {"dtype": dtype, "median": 1.2}, own, rounds) == told
    assert report.times("plm, no graphs", {"dtype": "bfloat16", "median": 1.5}, own, rounds) == "(1.50)"
    assert report.times("plm", own, own, rounds) == ""


def test_a_profile_says_how_busy_the_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "once", lambda work: 2.0)
    monkeypatch.setattr(suite, "operations", lambda work, device: [("mm", 0.9, 4), ("norm", 0.1, 2), ("host", 0.0, 9)])
    assert suite.profile(lambda: None) == {
        "busy": 0.5,
        "kernels": "mm 90% (4x); norm 10% (2x); host 0% (9x)",
        "launches": 6,
    }


def test_targets_are_of_workloads_that_are_run() -> None:
    assert {target.workload for target in suite.TARGETS} <= {entry.workload.name for entry in suite.SUITE}


def test_what_has_a_target_fits_into_nine_minutes() -> None:
    """By the suite's own estimates, which once summed to almost twice its share: half of it was never begun."""
    assert sum(device.SHARES.values()) + device.WRITING <= 60 * device.parse([]).minutes
    seconds = [sum(entry.seconds for entry in entries) for entries in (suite.SUITE, suite.REST)]
    assert seconds[0] + suite.STARTING <= device.SHARES["suite"]
    assert seconds[1] + suite.STARTING <= 60 * device.parse([]).minutes - device.WRITING


def test_workloads_by_words() -> None:
    names = [entry.workload.name for entry in (*suite.SUITE, *suite.REST)]
    assert len({*names}) == len(names)
    assert suite.asked([]) == ([*suite.SUITE], [*suite.REST])
    assert suite.asked(["rest"]) == ([*suite.REST], [])
    some, left_out = suite.asked(["W7", "rest"])
    assert not left_out and len(some) == len({each.workload.name for each in some}) == len(suite.REST) + 2
    assert suite.unknown(["W7", "rest", "esm2-8m", "W77"]) == ["W77"]
    args = device.parse(["--only", "suite", "--workloads", "W5", "esm2-8m"])
    assert args.workloads == ["W5", "esm2-8m"]


@torch.no_grad()  # which the phase turns off for its process
def test_a_workload_that_is_not_there_is_a_fault(job: Job) -> None:
    suite.run(replace(job, workloads=["W77"]))
    (fact,) = facts(job)
    assert fact["ok"] is False and "no workload" in fact["error"]


def test_without_transformers_ours_runs_alone(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    entries = [suite.Entry(w1("esm2-8m", 3, "pt"), 0), suite.Entry(w5("small", 1, 64), 0)]
    entries += [suite.Entry(ankh3("8", [8], 8, "pt"), 0), suite.Entry(w4(2), 0)]
    for entry in entries:
        suite.contest(job, entry, SETTINGS)
    races = [fact for fact in facts(job) if fact["kind"] == "race"]
    assert len(races) == len(entries) and all(fact["ok"] for fact in races)
    for fact in races:
        assert "plm" in fact["result"]["contestants"]
        assert any("transformers" in who for who in fact["result"]["missing"])


def test_transformers_that_fails_costs_the_peer_alone(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that wants other arguments, say: also of ESMFold's block, which has its weights by then."""
    transformers = pytest.importorskip("transformers")
    from on_device import others

    def fail(*args: object, **kwargs: object) -> None:
        raise TypeError("unexpected keyword")

    monkeypatch.setattr(transformers, "EsmConfig", fail)
    monkeypatch.setattr(others, "hub_block", fail)
    for workload in (w1("esm2-8m", 3, "pt"), others.w7(64, "float32")):
        suite.contest(job, suite.Entry(workload, 0), SETTINGS)
    races = [fact for fact in facts(job) if fact["kind"] == "race"]
    assert len(races) == 2 and all(fact["ok"] for fact in races)
    for fact in races:
        assert any("plm" in who for who in fact["result"]["contestants"])
        reasons = [why for who, why in fact["result"]["missing"].items() if "transformers" in who]
        assert reasons and all("TypeError: unexpected keyword" in why for why in reasons)
