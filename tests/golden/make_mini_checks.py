"""Write what transformers computes with plm-mini, as the values that `plm verify plm-mini` compares with.

    PYTHONPATH=tests python tests/golden/make_mini_checks.py

transformers runs in float64 with its float32 casts lifted, so the numbers owe nothing to this library. Run it when the
weights of plm-mini change.
"""

import json
from pathlib import Path

import torch
from oracle_esm import CleanFloat64, in_float64, transformers
from torch import Tensor

import plm_weights
from plm.vocabularies import esm_tokenizer

FOLDER = Path(plm_weights.__file__).parent
SEQUENCES = ("MKTVRQERLKSIVRILERSKEPVSGAQLAEELSV", "ACD<mask>FGHIKLMNPQRSTVWYXBUZO")
COLUMNS = list(range(4, 24))


def values(model: object, sequence: str) -> dict[str, Tensor]:
    ids = torch.tensor([esm_tokenizer().encode(sequence)])
    with torch.no_grad(), CleanFloat64():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    return {"logits": out.logits[0], **{f"hidden {i}": x[0] for i, x in enumerate(out.hidden_states)}}


def main() -> None:
    settings = {"attn_implementation": "eager", "dtype": torch.float32}
    model = in_float64(transformers.EsmForMaskedLM.from_pretrained(FOLDER / "plm_mini", **settings).eval())
    checks = []
    for sequence in SEQUENCES:
        for name, matrix in values(model, sequence).items():
            what, *layer = name.split()
            rows, columns = [1, 2, 3, 4, len(matrix) - 2], COLUMNS if what == "logits" else COLUMNS[:8]
            numbers = [[float(f"{x:.7g}") for x in row] for row in matrix[rows][:, columns].tolist()]
            at = {"layer": int(layer[0])} if layer else {}
            checks.append(
                {"what": what, **at, "sequence": sequence, "rows": rows, "columns": columns, "expected": numbers}
            )
    block = {
        "source": f"transformers {transformers.__version__}, EsmForMaskedLM in float64",
        "licence": "MIT",
        "absolute": 1e-4,
        "relative": 1e-5,
        "because": "float32 of either library is within 2e-5 of these",
        "checks": checks,
    }
    lines = ",\n   ".join(json.dumps(check) for check in block.pop("checks"))
    text = f'[\n  {json.dumps(block)[:-1]},\n  "checks": [\n   {lines}]}}\n]\n'
    (FOLDER / "checks" / "plm-mini.json").write_text(text)


if __name__ == "__main__":
    main()
