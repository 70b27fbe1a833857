"""Writes what others published of ProGen2, as the values that ``plm verify`` compares with.

    python tests/golden/make_checks_progen2.py FOLDER

FOLDER holds, as ``progen2_*.json``, the requests and responses printed in the documentation of BioLM/py-biolm. The
cross-entropies are those which the authors' own scripts assert (salesforce/progen@c27a419, progen2/sample.py and
likelihood.py).
"""

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "weights" / "plm_weights" / "checks"

UNIREF = (
    "2GFLPFRGADEGLAAREAATLAARGTAARAYREDSWAVPVPRGLLGDLTARVAALGAASPPPADPLAVTLDLHHVTAEVALTTVLDAATLVHGQTRVLSAEDAAEAATAAAAA"
    "TEAYLERLQDFVLFMSASVRVWRRGNAAGATGPEWDQWYTVADRDALGSAPTHLAVLGRQADALCHFVLDRVAWGTCGTPLWSGDEDLGNVVATFAGYADRLATAPRDLIM1"
)
OAS = (
    "1EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMHWVRQAPWKGLEYVSAISSNGGSTYYANSVKGRFTISRDNSKNTLYLQMGSLRAEDMAVYYCARDESGYSYGWGYYFD"
    "YWGQGTLVTVSS2"
)
BFD90 = (
    "1TAPRSTRASGSEGSRPPGIPAKGRRCLPSRAGSVTPRFRHARQGTATVAKEQGRKLIASNRKARHDYHIEDTFEAGLVLTGTEVKSLRMGRASLIDGYAVFYGEELWLEGVHI"
    "PEYLNGNWTNHTPRRRRKLLLNRSELTKLAHKTSESGHTIVPLALYFKDGRAKVEIAVAKGKKAYDKRHALRERQDQREV2"
)
# registry name: text, cross-entropy
ASSERTED = {
    "progen2-small": (UNIREF, 2.4),
    "progen2-medium": (UNIREF, 1.9),
    "progen2-oas": (OAS, 0.3),
    "progen2-base": (UNIREF, 1.9),
    "progen2-large": (UNIREF, 1.8),
    "progen2-bfd90": (BFD90, 1.3),
    "progen2-xlarge": (UNIREF, 1.0),
}
HOSTED = ("progen2-medium", "progen2-oas", "progen2-large", "progen2-bfd90")
# Of ll_mean: more than twice the 8e-4 by which float16 moves that of a random network, 27 layers deep.
PER_RESIDUE = 2e-3

Check = dict[str, Any]


def check(what: str, sequence: str, expected: float) -> Check:
    return {"what": what, "sequence": sequence, "rows": [0], "columns": [0], "expected": [[float(f"{expected:.7g}")]]}


def block(source: str, licence: str, absolute: float, because: str, checks: list[Check]) -> Check:
    about = {"source": source, "licence": licence, "absolute": absolute, "relative": 0.0, "because": because}
    return {**about, "checks": checks}


def asserted(name: str) -> Check:
    return block(
        "asserted by salesforce/progen@c27a419 progen2/sample.py, for float16 and float32",
        "BSD-3-Clause",
        0.1,
        "what the authors' assertion allows",
        [check("causal_nll", *ASSERTED[name])],
    )


def hosted(folder: Path, name: str) -> list[Check]:
    """The service scores "1", the residues and "2" in both directions (BioLM/biolm-hub models/progen2/app.py)."""
    (record,) = json.loads((folder / f"{name.replace('-', '_')}.json").read_text())["records"]
    (samples,) = record["response"]["results"]
    longest = max(len(sample["sequence"]) for sample in samples)
    assert all(abs(s["ll_sum"] / s["ll_mean"] - len(s["sequence"])) < 1e-4 for s in samples)  # terminals do not count
    source = f"hosted BioLM API, BioLM/py-biolm@57722da docs/model-docs/{name}"
    because = "float32 by its code on an unknown machine; over twice what float16 does to a random twin, 27 layers deep"
    return [
        block(
            source,
            "Apache-2.0",
            absolute,
            because + more,
            [check(what, sample["sequence"], sample[what]) for sample in samples],
        )
        for what, absolute, more in (
            ("ll_mean", PER_RESIDUE, ""),
            ("ll_sum", round(PER_RESIDUE * longest, 2), f", times {longest} residues"),
        )
    ]


def document(blocks: list[Check]) -> str:
    """One check per line."""
    parts = []
    for each in blocks:
        checks = ",\n   ".join(json.dumps(one) for one in each.pop("checks"))
        parts.append(f'  {json.dumps(each)[:-1]},\n  "checks": [\n   {checks}]}}')
    return "[\n" + ",\n".join(parts) + "\n]\n"


if __name__ == "__main__":
    for name in ASSERTED:
        more = hosted(Path(sys.argv[1]), name) if name in HOSTED else []
        (FOLDER / f"{name}.json").write_text(document([asserted(name), *more]))
