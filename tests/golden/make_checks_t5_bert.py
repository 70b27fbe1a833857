"""Writes what others published of the T5 and BERT families, as the values that ``plm verify`` compares with.

    python tests/golden/make_checks_t5_bert.py FOLDER

FOLDER holds, as ``tensors/*`` and ``*.json``, what was published: of Synthyra/FastPLMs tests/goldens/ankh*.safetensors,
of sacdallago/bio_embeddings test-data/reference-embeddings/prottrans_*.npz and test-data/mutagenesis/probabilities.csv,
the numbers printed in the notebooks of agemagician/ProtTrans, and the requests and responses printed in the
documentation of BioLM/py-biolm.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[2] / "weights" / "plm_weights" / "checks"
COLUMNS = list(range(8))
PROTBERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWXUBZO")
FASTPLMS = (
    "MPAGFRQVCKAFMAEPMFNTATQHEYHCCTPTRMYINTPVNRAFGCFDGPIIFGWPPEREI",
    "MYPNQTSFAHGFWVHQIWLGFNGNVIFYM",
    "MCADPSKCIYMYV",
)
ANKH = ("ankh-base", "ankh-large", "ankh2-large", "ankh3-large", "ankh3-xl")
# registry name: stem of the .npz, hub id in the notebooks, layers, tokens before the first residue
PROTTRANS: dict[str, tuple[str, str, int, int]] = {
    "prott5-xl-u50": ("prottrans_t5_xl_u50", "Rostlab/prot_t5_xl_uniref50", 24, 0),
    "prott5-xl-half": ("prottrans_t5_xl_u50", "", 24, 0),
    "prott5-xl-bfd": ("prottrans_t5_bfd", "Rostlab/prot_t5_xl_bfd", 24, 0),
    "protbert": ("", "Rostlab/prot_bert", 30, 1),
    "protbert-bfd": ("prottrans_bert_bfd", "Rostlab/prot_bert_bfd", 30, 1),
}

Check = dict[str, Any]


def numbers(matrix: Any) -> list[list[float]]:
    return [[float(f"{value:.7g}") for value in row] for row in np.asarray(matrix, dtype=np.float64)]


def check(what: str, sequence: str, rows: list[int], columns: list[int], expected: Any, **more: Any) -> Check:
    return {"what": what, **more, "sequence": sequence, "rows": rows, "columns": columns, "expected": numbers(expected)}


def embeddings(sequence: str, residues: Any, layer: int, before: int) -> list[Check]:
    """Some rows of a matrix ``[t, c]`` of residues, and their mean."""
    rows = [0, 1, 2, len(sequence) - 1]
    picked = residues[rows][:, COLUMNS]
    return [
        check("hidden", sequence, [before + row for row in rows], COLUMNS, picked, layer=layer),
        check("mean", sequence, [0], COLUMNS, residues.mean(0, keepdims=True)[:, COLUMNS], layer=layer),
    ]


def block(source: str, licence: str, absolute: float, relative: float, because: str, checks: list[Check]) -> Check:
    about = {"source": source, "licence": licence, "absolute": absolute, "relative": relative, "because": because}
    return {**about, "checks": checks}


def ankh(folder: Path, name: str) -> list[Check]:
    """bfloat16 of the ankh package. The allowed difference is a share of the model's own root mean square."""
    stem = name.replace("-", "_")
    tensors = load_file(folder / "tensors" / f"{stem}.safetensors")
    hidden, mask = tensors["output__last_hidden_state"].float().numpy(), tensors["residue_mask"].numpy()
    typical = float(np.sqrt((hidden[mask] ** 2).mean()))
    checks = [
        one
        for row, (sequence, inside) in enumerate(zip(FASTPLMS, mask, strict=True))
        for one in embeddings(sequence, hidden[row][inside], 48, 0)
    ]
    source = f"ankh 1.10 in bfloat16, Synthyra/FastPLMs tests/goldens/{stem}.safetensors"
    twin = "of the root mean square; twice the error of a random twin, 48 layers deep, in bfloat16 by transformers"
    return [
        block(
            source,
            "Apache-2.0, of weights under CC BY-NC-SA 4.0",
            float(f"{share * typical:.2g}"),
            0.05,
            f"{share} {twin}",
            [one for one in checks if one["what"] == what],
        )
        for what, share in (("hidden", 0.3), ("mean", 0.1))
    ]


def prottrans(folder: Path, name: str) -> list[Check]:
    stem, hub, layer, before = PROTTRANS[name]
    blocks = []
    if stem:
        arrays = np.load(folder / "tensors" / f"{stem}.npz")
        # that project reads U, Z, O and B as X
        checks = [
            one
            for key, sequence in (("test_case 1", "PRXTEIN"), ("test_case 2", "SEQWENCE"))
            for one in embeddings(sequence, arrays[key], layer, before)
        ]
        source = f"sacdallago/bio_embeddings test-data/reference-embeddings/{stem}.npz"
        if name == "prott5-xl-half":
            source += ", of the float32 checkpoint"
            because = "ten times what float16 of all weights does to a random twin, 24 layers deep"
            blocks.append(block(source, "MIT", 0.006, 0.01, because, checks))
        else:
            because = "float32; that project asks 1e-5 and 1e-3 of its own machines"
            blocks.append(block(source, "MIT", 1e-4, 1e-3, because, checks))
    if hub:
        printed = json.loads((folder / "prottrans_values.json").read_text())["models"][hub]
        columns = [0, 1, 2, 1021, 1022, 1023]
        blocks.append(
            block(
                "printed in the embedding notebooks of agemagician/ProtTrans",
                "MIT",
                1e-3,
                1e-3,
                "float32 of 2020 to 2021 on a GPU that the notebooks do not name",
                [
                    check(
                        "hidden",
                        sequence,
                        [before + row for row in rows],
                        columns,
                        [row["first3"] + row["last3"] for row in printed[key]],
                        layer=layer,
                    )
                    for key, sequence, rows in (
                        ("seq0_rows (0,1,2,-3,-2,-1)", "AETCXAX", [0, 1, 2, 4, 5, 6]),
                        ("seq1_rows (all 5)", "SKTXP", [0, 1, 2, 3, 4]),
                    )
                ],
            )
        )
    if name == "protbert-bfd":
        blocks.append(mutagenesis(folder))
    return blocks


def mutagenesis(folder: Path) -> Check:
    """The rows of two peptides, MLIV and ILW: the id of each is the MD5 of its sequence."""
    peptides: dict[str, list[dict[str, str]]] = {}
    with (folder / "tensors" / "protbert_bfd_mutagenesis_probabilities.csv").open() as file:
        for row in csv.DictReader(file):
            peptides.setdefault(row["id"], []).append(row)
    columns = sorted(PROTBERT.index(letter) for letter in "FLSYXCWPHQRIMTNKVADEG")
    return block(
        "sacdallago/bio_embeddings test-data/mutagenesis/probabilities.csv",
        "MIT",
        1e-4,
        1e-3,
        "float32, as the embeddings of that project",
        [
            check(
                "masked_probabilities",
                "".join(row["wild_type_amino_acid"] for row in rows),
                [int(row["position"]) for row in rows],
                columns,
                [[float(row[PROTBERT[column]]) for column in columns] for row in rows],
            )
            for rows in peptides.values()
        ],
    )


def igbert(folder: Path, name: str) -> list[Check]:
    """The service averages and sums over every token but [CLS], the last [SEP] and [PAD], so the [SEP] between two
    chains counts (BioLM/biolm-hub@c79c489 models/igbert/app.py). The printed sum agrees: -34.7 for a common heavy and a
    light chain's first residues, but -11.4 for as many residues in the order of the alphabet, which have no [SEP].
    """
    page = "igbert-unpaired" if name == "igbert-unpaired" else "igbert-paired"
    predicted, encoded, _ = json.loads((folder / f"{page}.json").read_text())["records"]
    sums, embedded = [], []
    for item, result in zip(predicted["request"]["items"], predicted["response"]["results"], strict=True):
        sums.append(check("log_likelihood", text(item), [0], [0], [[result["log_prob"]]]))
    for item, result in zip(encoded["request"]["items"], encoded["response"]["results"], strict=True):
        mean = np.array([result["embeddings"]])
        if "residue_embeddings" in result:
            residues = np.array(result["residue_embeddings"])[1 : len(text(item)) + 1]
            assert np.abs(residues.mean(0) - mean).max() < 1e-6  # so the mean is over these very rows
            embedded += embeddings(text(item), residues, 30, 1)
        else:
            columns = list(range(64))
            embedded.append(check("mean", text(item), [0], columns, mean[:, columns], layer=30))
    source = f"hosted BioLM API, BioLM/py-biolm@57722da docs/model-docs/{page}"
    because = "the precision of the hosted run is not stated; its numbers look like float32"
    return [
        block(source, "Apache-2.0", 1e-3, 1e-3, because, embedded),
        block(source, "Apache-2.0", 0.02, 1e-3, f"{because}; a sum of 20 of them", sums),
    ]


def text(item: dict[str, str | None]) -> str:
    return item["sequence"] or f"{item['heavy']}|{item['light']}"


def document(blocks: list[Check]) -> str:
    """One check per line."""
    parts = []
    for each in blocks:
        checks = ",\n   ".join(json.dumps(one) for one in each.pop("checks"))
        parts.append(f'  {json.dumps(each)[:-1]},\n  "checks": [\n   {checks}]}}')
    return "[\n" + ",\n".join(parts) + "\n]\n"


if __name__ == "__main__":
    published = Path(sys.argv[1])
    for names, make in ((ANKH, ankh), (PROTTRANS, prottrans), (("igbert", "igbert-unpaired"), igbert)):
        for name in names:
            (FOLDER / f"{name}.json").write_text(document(make(published, name)))
