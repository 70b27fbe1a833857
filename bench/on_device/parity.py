"""What the originals computed in float64 (tests/golden) against this device, in every dtype; and alone = in a batch.

A dtype passes if its error is at most three times the larger of two floors measured here and now or stored with the
truth: this library's own error in that dtype on the CPU, and the original's in float32. Errors are root mean squares
relative to the truth; where an original's was stored as its largest alone, the largest.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import plm
from on_device.job import Job, describe
from on_device.kernels import relative
from on_device.networks import CASES as NETWORKS
from on_device.networks import Case as Network
from on_device.networks import converted
from plm.packing import Packed
from plm_kernels import batch_invariant

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
DTYPES = ("float64", "float32", "bfloat16", "float16")
# Two float64 programs that add in another order differ by 3e-14 of the numbers at most (tests/test_parity_*.py).
EXACT = 1e-12
Outputs = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Case:
    """A stored checkpoint: what its original gives in float64, how far it is off in float32, and how ours is run."""

    family: str
    folder: Path
    truth: Outputs
    floor: float | None
    run: Callable[[plm.Model], Outputs]
    error: Callable[[Sequence[Tensor], Sequence[Tensor]], float] = relative
    dtypes: Sequence[str] = DTYPES
    called: str = ""

    @property
    def name(self) -> str:
        return self.called or self.folder.name


def run(job: Job) -> None:
    cases = [case for read in READERS for case in job.attempt("parity", read.__name__, read) or ()]
    for case, dtype in job.mine([(case, dtype) for dtype in DTYPES for case in cases if dtype in case.dtypes]):
        job.attempt("parity", f"{case.name}, {dtype}", lambda c=case, d=dtype: parity(job, c, d))
    for network in job.mine([network for network in NETWORKS if network.batched]):
        job.attempt("invariance", network.name, lambda network=network: invariance(job, network))


def parity(job: Job, case: Case, dtype: str) -> None:
    name = f"{case.name}, {dtype}"
    try:
        found = outputs(case, job.device, dtype)
    except ValueError as error:  # a T5 or an ESMFold in float16, which cannot hold its numbers
        job.tell("parity", name, family=case.family, refused=describe(error), ok=dtype == "float16")
        return
    on_cpu = case_error(case, outputs(case, "cpu", dtype))
    floor = max(on_cpu, EXACT, 0.0 if dtype == "float64" else case.floor or 0.0)
    error = case_error(case, found)
    job.tell(
        "parity", name, family=case.family, ok=error <= 3 * floor, error_of=error, on_cpu=on_cpu,
        originals_float32=case.floor, of_originals=error / case.floor if case.floor else None,
    )  # fmt: skip


def outputs(case: Case, device: str, dtype: str) -> Outputs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", plm.LicenceNotice.__mro__[1])
        model = plm.load(case.folder, device=device, dtype=dtype)
    with torch.inference_mode():
        return {name: [x.cpu() for x in found] for name, found in case.run(model).items()}


def case_error(case: Case, found: Outputs) -> float:
    """Of all outputs, the largest error."""
    return max(case.error(found[name], wanted) for name, wanted in case.truth.items())


def largest(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest error, in the unit of the output."""
    return max(float((x.double() - y).abs().max().nan_to_num(torch.inf)) for x, y in zip(found, truth, strict=True))


# The families


def packed(model: plm.Model, ids: Tensor, mask: Tensor) -> Packed:
    return Packed.from_padded(ids, mask).to(model.device)


def masked_models() -> list[Case]:
    """ESM and BERT: the last hidden states and the logits."""
    cases = []
    for folder in sorted([*(GOLDEN / "esm").iterdir(), *(GOLDEN / "bert").iterdir()]):
        expected = load_file(folder / "expected.safetensors")
        inputs = json.loads((folder / "inputs.json").read_text())
        ids, mask = (torch.tensor(inputs[key]) for key in ("input_ids", "attention_mask"))
        states = sorted(k for k in expected if k.startswith(("hidden_states.", "hidden_")) and k[-1].isdigit())
        keep = mask.bool()
        truth = {"hidden": [expected[states[-1]][keep]], "logits": [expected["logits"][keep]]}

        def run(model: plm.Model, ids: Tensor = ids, mask: Tensor = mask) -> Outputs:
            out = model.net(packed(model, ids, mask))
            return {"hidden": [out.hidden], "logits": [out.logits]}

        floor = relative([expected["logits_fp32"][keep]], truth["logits"])
        cases.append(Case(folder.parent.name, folder, truth, floor, run))
    return cases


def t5s() -> list[Case]:
    """The encoder's and the decoder's last states, and the logits."""
    cases = []
    for folder in sorted((GOLDEN / "t5").iterdir()):
        expected = load_file(folder / "expected.safetensors")
        inputs = json.loads((folder / "inputs.json").read_text())
        ids, mask = (torch.tensor(inputs[key]) for key in ("input_ids", "attention_mask"))
        last = max(k for k in expected if k.startswith("encoder_hidden_"))
        truth = {"encoder": [expected[last][mask.bool()]], "logits": list(expected["logits"])}
        starts = list(expected["decoder_input_ids"])

        def run(model: plm.Model, ids: Tensor = ids, mask: Tensor = mask, starts: Any = starts) -> Outputs:
            decoder = Packed.from_ids(starts, device=model.device)
            out = model.net(packed(model, ids, mask), decoder=decoder)
            return {"encoder": [out.encoder_hidden], "logits": decoder.split(out.logits)}

        cases.append(Case("t5", folder, truth, relative(list(expected["logits_fp32"]), truth["logits"]), run))
    return cases


def progen2s() -> list[Case]:
    """Logits; of the original's float64, those without its roundings to float32 (1.8e-7), where they are stored."""
    cases = []
    for folder in sorted((GOLDEN / "progen2").iterdir()):
        expected = load_file(folder / "expected.safetensors")
        rows = [each["ids"] for each in json.loads((folder / "inputs.json").read_text())["sequences"]]
        name = "logits_exact64" if "logits_exact64.0" in expected else "logits"
        wanted = [expected[f"{name}.{i}"] for i in range(len(rows))]

        def run(model: plm.Model, rows: Any = rows) -> Outputs:
            batch = Packed.from_ids(rows, device=model.device)
            return {"logits": batch.split(model.net(batch).logits)}

        floor = relative([expected[f"logits_fp32.{i}"] for i in range(len(rows))], wanted)
        cases.append(Case("progen2", folder, {"logits": wanted}, floor, run))
    return cases


def proteinberts() -> list[Case]:
    """Both concatenations of all states, padded as the original pads."""
    floors: Mapping[str, Any] = json.loads((GOLDEN / "proteinbert" / "float32_errors.json").read_text())
    folder = GOLDEN / "proteinbert" / "tiny_2blocks"
    inputs, expected = (load_file(folder / f"{name}.safetensors") for name in ("inputs", "expected"))
    names = ("seq_logits", "annotation_logits")
    truth = {name: [expected[name]] for name in names}

    def run(model: plm.Model) -> Outputs:
        annotations = inputs["annotations"].to(model.device, model.dtype)
        out = model.net(inputs["token_ids"].to(model.device), annotations)
        return {"seq_logits": [out.local_logits], "annotation_logits": [out.annotation_logits]}

    stored = floors["tiny_2blocks"]
    floor = max(stored[name]["rms"] / float(expected[name].square().mean().sqrt()) for name in names)
    return [Case("proteinbert", folder, truth, floor, run)]


def esmfolds() -> list[Case]:
    """Positions of all atoms in Ångström: the largest error. Two chains after two recycles as well, in full precision
    alone, because there random weights make of a rounding to bfloat16 more than an Ångström."""
    from plm.esmfold.chains import read_chains

    cases = []
    for name, run_name, recycles in (
        ("a_hub_layout", "single", 0),
        ("b_v5_layout_multimer", "batch", 0),
        ("b_v5_layout_multimer", "multimer", 2),
    ):
        folder = GOLDEN / "esmfold" / name
        about = json.loads((folder / "inputs.json").read_text())["runs"][run_name]
        expected = load_file(folder / "expected.safetensors")
        how = {"linker": about["linker"], "residue_gap": about["residue_index_offset"]} if "linker" in about else {}
        chains = [read_chains(text, **how) for text in about["sequences"]]
        stored = next(x for k, x in expected.items() if k.startswith(f"{run_name}/r{recycles}/positions"))[-1]
        measured = json.loads((folder / "meta.json").read_text())["runs"][run_name]["recycles"][str(recycles)]

        def run(model: plm.Model, chains: Any = chains, recycles: int = recycles) -> Outputs:
            return {"positions": [each.positions for each in model.net.fold(chains, recycles=recycles)]}

        truth = {"positions": [x[: each.length] for x, each in zip(stored, chains, strict=True)]}
        floor = measured["f32_vs_f64_max_abs"]["positions"]
        dtypes = DTYPES if recycles == 0 else DTYPES[:2]
        cases.append(Case("esmfold", folder, truth, floor, run, largest, dtypes, f"{name} {run_name}"))
    return cases


READERS = (masked_models, t5s, progen2s, proteinberts, esmfolds)


# Alone = in a batch


def invariance(job: Job, network: Network) -> None:
    """How far a sequence's numbers move when others are in the batch, at published widths, as it is and on demand."""
    dtype = torch.bfloat16 if job.on_gpu else torch.float32
    net, rows = converted(network.network(job.quick, job.device), dtype), network.rows(job.quick, job.device)
    for demanded in (False, True):
        name = f"{network.name}, {'batch_invariant' if demanded else 'as it is'}"
        with torch.inference_mode(), batch_invariant(demanded):
            together = network.run(net, rows)
            alone = [network.run(net, [row])[0] for row in rows[: len(together)]]
        distance = relative(together, alone)
        same = all(torch.equal(x, y) for x, y in zip(together, alone, strict=True))
        job.tell("invariance", name, moved=distance, same_bits=same, **({"ok": same} if demanded else {}))
