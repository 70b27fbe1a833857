"""What a run found, as JSON for programs and Markdown for people, and whether it passed."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import reporting

from on_device.job import Fact

State = Mapping[str, str]
VERDICTS = {True: "ok", False: "FAILED", None: "-"}


def write(folder: Path, facts: Sequence[Fact], state: State, settings: Mapping[str, Any]) -> None:
    """``device.json`` and ``device.md``, each replaced whole."""
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "settings": dict(settings),
        "phases": dict(state),
        "passed": passed(facts, state),
        "facts": [*facts],
    }
    reporting.write(folder / "device.json", json.dumps(found, indent=1) + "\n")
    reporting.write(folder / "device.md", markdown(facts, state, settings))


def passed(facts: Sequence[Fact], state: State) -> bool:
    """Every phase came to its end, no check failed, and something was checked unless only measures were asked for."""
    checks = [fact["ok"] for fact in facts if fact.get("ok") is not None]
    asked = {"kernels", "parity"} & state.keys()
    return all(x == "complete" for x in state.values()) and all(checks) and (bool(checks) or not asked)


def line(fact: Fact) -> str:
    """A fact while it passes by."""
    if "result" in fact:
        rows = fact["result"]["contestants"]
        about = {name: f"{1e3 * row['median']:,.1f} ms" for name, row in rows.items()}
        return f"{VERDICTS[fact.get('ok')]:6s} race: {fact['name']} ({', '.join(f'{k} {v}' for k, v in about.items())})"
    about = {k: v for k, v in fact.items() if k not in ("phase", "at", "kind", "name", "ok")}
    told = ", ".join(f"{k} {short(v)}" for k, v in about.items())
    return f"{VERDICTS[fact.get('ok')]:6s} {fact['kind']}: {fact['name']}" + (f" ({told})" if told else "")


def short(x: Any, most: int = 90) -> str:
    if isinstance(x, bool) or not isinstance(x, int | float):
        text = str(x)
        return text if len(text) <= most else text[: most - 1] + "…"
    return f"{x:,}" if isinstance(x, int) else f"{x:.3g}"


def summary(facts: Sequence[Fact], state: State) -> str:
    """A few lines for the end of the log."""
    checks = [fact for fact in facts if fact.get("ok") is not None]
    wrong = [fact for fact in checks if not fact["ok"]]
    lines = [f"{name}: {how}" for name, how in state.items()]
    lines += [f"{len(checks)} checks, {len(wrong)} failed"]
    lines += [f"  {fact['kind']}: {fact['name']}: {short(fact.get('error', 'see device.json'), 200)}" for fact in wrong]
    lines += [
        f"target {fact['name']}: {fact['found']} ({fact['wanted']})" for fact in facts if fact["kind"] == "target"
    ]
    return "\n".join([*lines, "PASSED" if passed(facts, state) else "NOT PASSED"])


# Markdown

Cells = Callable[[Fact], Sequence[Any]]


def markdown(facts: Sequence[Fact], state: State, settings: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = ["# What a device run found\n"]
    if settings["quick"]:
        parts.append("**A rehearsal at tiny sizes: no number below is a measurement.**\n")
    parts.append(f"```\n{summary(facts, state)}\n```\n")
    for title, kinds, header, cells in SECTIONS:
        chosen = [fact for fact in merged(facts) if fact["kind"] in kinds]
        if chosen:
            parts.append(f"## {title}\n\n{table(header, [cells(fact) for fact in chosen])}")
    races = [fact for fact in facts if fact["kind"] == "race" and "result" in fact]
    parts += [f"## {fact['name']}\n\n{race(fact['result'])}\n" for fact in races]
    return "\n".join(parts)


def merged(facts: Sequence[Fact]) -> list[Fact]:
    """Facts about kernels from several processes as one each, and which no network has met."""
    rest = [fact for fact in facts if fact["kind"] not in ("kernel", "kernels")]
    kernels: dict[str, Fact] = {}
    for fact in facts:
        if fact["kind"] == "kernel":
            one = kernels.setdefault(fact["name"], {**fact, "launches": 0})
            for key in ("registers", "spills", "shared"):
                if key in fact:
                    one[key] = max(one.get(key, 0), fact[key])
            one["launches"] += fact["launches"]
    about = {fact["name"]: fact for fact in facts if fact["kind"] == "kernels"}
    seen = {name.partition(".")[0] for name in kernels}
    if "modules" in about:
        unseen = [name for name in about["modules"]["names"] if name not in seen]
        about["modules"] = {"kind": "kernels", "name": "met in no network", "names": ", ".join(unseen) or "none"}
    return [*rest, *kernels.values(), *about.values()]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *[[short(x, 400).replace("|", "\\|") for x in row] for row in rows]]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def verdict(fact: Fact) -> str:
    if "refused" in fact:
        return "refused, as it should be" if fact.get("ok") else "refused"
    return {True: "passed", False: f"**failed** {fact.get('error', '')}", None: fact.get("error", "")}[fact.get("ok")]


def get(*names: str) -> Callable[[Fact], list[Any]]:
    return lambda fact: [fact.get(name, "") for name in names]


def told(fact: Fact) -> str:
    about = {k: v for k, v in fact.items() if k not in ("phase", "at", "kind", "name", "ok")}
    return ", ".join(f"{k} {short(v)}" for k, v in about.items())


SECTIONS: tuple[tuple[str, tuple[str, ...], tuple[str, ...], Cells], ...] = (
    (
        "Targets",
        ("target",),
        ("target", "wanted", "found", "what holds it back"),
        get("name", "wanted", "found", "why"),
    ),
    ("Machine", ("machine", "ceiling"), ("what", "found"), lambda f: [f["name"], told(f)]),
    ("Checks", ("check",), ("check", "verdict"), lambda f: [f["name"], verdict(f)]),
    (
        "Tests of kernels",
        ("tests",),
        ("file", "verdict", "passed", "failed", "skipped", "why"),
        lambda f: [
            f["name"],
            verdict(f),
            *get("passed", "failed", "skipped")(f),
            f.get("failures") or f.get("reasons", ""),
        ],
    ),
    (
        "Whole networks, Triton's kernels against torch's (relative errors against float64)",
        ("network",),
        ("network", "verdict", "error", "torch's error", "kernels that ran"),
        lambda f: [f["name"], verdict(f), *get("error_of", "torchs_error")(f), ", ".join(f.get("kernels", ()))],
    ),
    (
        "Kernels as compiled",
        ("kernel", "kernels"),
        ("kernel", "launches", "registers", "spills", "shared bytes", "more"),
        lambda f: [
            f["name"],
            *get("launches", "registers", "spills", "shared")(f),
            told(f) if f["kind"] == "kernels" else "",
        ],
    ),
    (
        "Stored truths of the originals (errors against their float64)",
        ("parity",),
        ("checkpoint, dtype", "verdict", "error", "ours on a CPU", "the original's, float32", "times that"),
        lambda f: [f["name"], verdict(f), *get("error_of", "on_cpu", "originals_float32", "of_originals")(f)],
    ),
    (
        "Alone against in a batch",
        ("invariance",),
        ("network", "verdict", "moved by (relative RMS)", "same bits"),
        lambda f: [f["name"], verdict(f), *get("moved", "same_bits")(f)],
    ),
    ("Not run, or missing", ("missing",), ("what", "why"), get("name", "why")),
    ("Warnings", ("warning",), ("while", "warning"), get("name", "why")),
    (
        "Where the time goes (profiles)",
        ("profile",),
        ("what", "on the device", "kernels by share"),
        lambda f: [f["name"], f"{f.get('busy', 0):.0%} busy" if "busy" in f else "", f.get("kernels", "")],
    ),
)


# Contests


def race(result: Mapping[str, Any]) -> str:
    """One contest as Markdown."""
    unit, ceiling = result["unit"], ", ".join(f"{k} {v:.3g}/s" for k, v in result["ceiling"].items())
    lines = [
        f"{result['what']}. {result['rounds']} rounds; ceiling {ceiling or 'none'}; {dict(result['notes'])}\n",
        f"| who | dtype | median | {unit}/s | of the ceiling | peak MiB | error | plm is … times as fast |",
        "|---|---|---|---|---|---|---|---|",
    ]
    own = result["contestants"].get("plm")
    for who, row in result["contestants"].items():
        ratio = times(who, row, own, result["rounds"]) if own else ""
        lines.append("| " + " | ".join([who, row["dtype"], *cells(row), ratio]) + " |")
    lines += [f"| {who} | | missing: {why} | | | | | |" for who, why in result["missing"].items()]
    return "\n".join(lines)


def cells(row: Mapping[str, Any]) -> Sequence[str]:
    share = "" if row["of_ceiling"] is None else f"{row['of_ceiling']:.0%}"
    memory = "" if row.get("peak_mib") is None else f"{row['peak_mib']:,.0f}"
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    return [f"{1e3 * row['median']:,.2f} ms", f"{row['speed']:,.0f}", share, memory, error]


def times(who: str, row: Mapping[str, Any], own: Mapping[str, Any], rounds: int) -> str:
    """How many times as fast ours is, as the CPU suite tells it. Of other settings of ours the bare ratio."""
    if interval := own["ratios"].get(who):
        return reporting.told(interval, row["dtype"] == own["dtype"], rounds)
    return "" if row is own else f"({row['median'] / own['median']:.2f})"
