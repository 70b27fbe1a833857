"""Results of the suite: kept in a file that is valid at any moment, compared with targets, and written as Markdown."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLAIM = 1.05  # the least lower bound of an interval from which on we say that we are faster
FEWEST = 3  # rounds, without which an interval says nothing
BUSY = 0.05  # share of the processors from which on other programs are mentioned
LEGEND = f"""Ratios are times as fast: medians over rounds with 95 % intervals. ~ is no claim to be faster: that takes
an interval from {CLAIM} on, of at least {FEWEST} rounds. Parentheses are other dtypes. How: bench/README.md."""
Results = dict[str, Any]
"""``{"machine": {...}, "date": ..., "workloads": {name: each}}`` with what `measure` gives, "failed" or "pending"."""


@dataclass(frozen=True)
class Target:
    """What a workload was to reach: a ratio to another contestant, or a share of the ceiling if there is no other."""

    workload: str
    ours: str
    other: str | None
    least: float


TARGETS = (
    Target("W1 esm2-8m bfloat16", "plm bfloat16", "transformers tuned", 4.0),
    Target("W1 esm2-150m float32", "plm float32", "transformers tuned", 1.8),
    Target("W1 esm2-150m bfloat16", "plm bfloat16", "transformers tuned", 3.0),
    Target("W1 esm2-150m bfloat16", "plm bfloat16", "transformers common", 4.5),
    Target("W1 esm2-150m bfloat16", "plm bfloat16", None, 0.45),
    Target("W1 esm2-650m bfloat16", "plm bfloat16", None, 0.50),
    Target("W2 ankh3-shaped 2048 bfloat16", "plm bfloat16", "transformers tuned", 3.0),
    Target("W5 progen2-small batch-1", "plm bfloat16", None, 0.60),
    *(
        Target(f"antibodies {model} {threads}", "plm bfloat16", "esm-cpp int8", 2.0)
        for model in ("esm2-8m", "esm2-150m", "esm2-650m")
        for threads in ("one-thread", "all-threads")
    ),
)
"""Of issue and protocol, on two cores of a CPU: `bench/README.md` says how a miss is reported."""


def reached(result: Mapping[str, Any], target: Target) -> tuple[float, float] | None:
    """The median, by which a target counts, and the lower bound of its interval; a share of the ceiling has none.

    None if it was not measured.
    """
    found = result.get("contestants", {}).get(target.ours)
    if found is None:
        return None
    if target.other is None:
        share = found["of_ceiling"]
        return None if share is None else (share, share)
    interval = found["ratios"].get(target.other)
    return None if interval is None else (interval[0], interval[1])


def missed(result: Mapping[str, Any]) -> list[Target]:
    """The targets of a workload that its result does not reach."""
    mine = [target for target in TARGETS if target.workload == result["workload"]]
    return [target for target in mine if (found := reached(result, target)) and found[0] < target.least]


def verdicts(results: Results) -> str:
    """A line for each target."""
    lines = ["| target | wanted | measured | |", "|---|---|---|---|"]
    for target in (each for each in TARGETS if each.workload in results["workloads"]):
        found = reached(results["workloads"][target.workload], target)
        form = "{:.2f} times" if target.other else "{:.0%}"
        what = f"{target.workload}: {target.ours}, " + (f"of {target.other}" if target.other else "of the ceiling")
        measured = form.format(found[0]) if found else ""
        verdict = judged(*found, target.least) if found else "not measured"
        lines.append(f"| {what} | {form.format(target.least)} | {measured} | {verdict} |")
    return "\n".join(lines)


def judged(median: float, low: float, least: float) -> str:
    """Whether a target is met, which its median decides."""
    if median < least:
        return f"**missed** by {1 - median / least:.0%}"
    return "met" + below(low, least)


def below(low: float, least: float) -> str:
    """A remark where the lower bound of an interval does not reach a target."""
    return " (interval reaches below)" if low < least else ""


def told(interval: Sequence[float], same: bool, rounds: int) -> str:
    """A ratio with its interval; "~" where it is no claim, in parentheses where the dtypes differ."""
    middle, low, high = interval
    text = f"{'' if low >= CLAIM and rounds >= FEWEST else '~'}{middle:.2f} [{low:.2f}, {high:.2f}]"
    return text if same else f"({text})"


def section(result: Mapping[str, Any]) -> str:
    """One workload: a line per contestant, a column of ratios for each of ours."""
    rows, rounds = result["contestants"], result["rounds"]
    ours = [name for name, each in rows.items() if each["ratios"]]
    head = ["", "time", f"{result['unit']}/s", "of ceiling", "peak", "error", *(f"{name} is" for name in ours)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, each in rows.items():
        label = name if name.endswith(each["dtype"]) else f"{name}, {each['dtype']}"
        taken = f"{each['median']:.3f} s"
        speed = f"{each['speed']:,.0f}" if each["speed"] >= 100 else f"{each['speed']:.2f}"
        share = "" if each["of_ceiling"] is None else f"{each['of_ceiling']:.0%}"
        memory = "" if each["peak_mib"] is None else f"{each['peak_mib']:,.0f} MiB"
        error = "" if each["error"] is None else f"{each['error']:.0e}"
        known = [(rows[who]["ratios"].get(name), rows[who]["dtype"] == each["dtype"]) for who in ours]
        ratios = [told(interval, same, rounds) if interval else "" for interval, same in known]
        lines.append(f"| {' | '.join([label, taken, speed, share, memory, error, *ratios])} |")
    notes = [
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in result["notes"].items()
    ]
    notes += [f"{result['threads']} threads", f"{rounds} rounds"]
    notes += [f"other programs had {result['others']:.0%} of the processors"] if result["others"] > BUSY else []
    notes += [
        f"{what} {speed / 1e9:,.1f} GB/s" if what in ("read", "copy") else f"{what} {speed / 1e9:,.0f} GFLOP/s"
        for what, speed in result["ceiling"].items()
    ]
    text = [f"### {result['workload']}", "", f"{capital(result['what'])}. {capital('; '.join(notes))}.", "", *lines]
    absent = [f"{name} ({reason})" for name, reason in result["missing"].items()]
    text += ["", f"Not taking part: {', '.join(absent)}."] if absent else []
    for name, shares in result["profile"].items():
        text += ["", f"Where the time of {name} goes: {', '.join(f'{what} {share:.0%}' for what, share in shares)}."]
    return "\n".join(text)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def table(results: Results) -> str:
    """All results as Markdown."""
    machine, workloads = results["machine"], results["workloads"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "transformers", "fair-esm") if machine.get(name)
    )
    what = machine["gpu"] if results["device"] == "cuda" else f"{machine['cpu']}, {machine['cores']} cores"
    special = [
        each for each in machine["flags"] if each.startswith(("amx", "avx512_bf16", "avx512_vnni", "sve", "bf16"))
    ]
    done = {name: each for name, each in workloads.items() if "contestants" in each}
    head = [results["date"], f"commit {machine['commit']}", versions, f"Python {machine['python']}", " ".join(special)]
    text = [f"# {what}", "", f"{'; '.join(filter(None, head))}.", ""]
    text += ["A rehearsal with tiny models: the numbers mean nothing.", ""] if results["quick"] else []
    text += [LEGEND, ""]
    text += [part for each in done.values() for part in (section(each), "")]
    if any(target.workload in done for target in TARGETS) and not results["quick"]:
        text += ["### Targets", "", verdicts(results), ""]
    failed = {name: each["failed"] for name, each in workloads.items() if "failed" in each}
    text += [f"- {name} failed: {why.splitlines()[0]}" for name, why in failed.items()]
    text += [f"- {name} was not run" for name, each in workloads.items() if "pending" in each]
    return "\n".join(text).rstrip() + "\n"


def save(results: Results, path: Path) -> None:
    """``path`` as .json and .md. Whoever interrupts this finds the files of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
    write(path.with_suffix(".md"), table(results))


def write(path: Path, text: str) -> None:
    """A file of which at any time the old or the new one is there, whole."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".part", delete=False) as file:
        try:
            file.write(text)
            file.close()
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def load(path: Path) -> Results | None:
    """What was saved, or None."""
    file = path.with_suffix(".json")
    return json.loads(file.read_text()) if file.exists() else None
