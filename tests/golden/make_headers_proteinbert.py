"""Writes the header of ProteinBERT: its weights in the order of Keras, and under the names of a SavedModel.

    python tests/golden/make_headers_proteinbert.py

Keras orders layers by their depth in the graph, and so the annotations come before the embedding of the letters; the
shapes are Keras' own. The layers below follow create_model of nadavbra/protein_bert@83198c9; the lists of weights that
the original itself printed for models of other sizes are in proteinbert/*/names.json, and `layers` gives the same.
"""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "weights" / "plm_weights" / "headers"

# name: blocks, local and global channels, heads, key size, kernel, vocabulary, annotations
HEADERS = {"proteinbert": (6, 128, 512, 4, 64, 9, 26, 8943)}

Layer = tuple[str, dict[str, list[int]]]


def dense(name: str, inputs: int, outputs: int) -> Layer:
    return name, {"kernel": [inputs, outputs], "bias": [outputs]}


def norm(name: str, channels: int) -> Layer:
    return name, {"gamma": [channels], "beta": [channels]}


def layers(
    blocks: int, c: int, g: int, heads: int, key: int, kernel: int, vocabulary: int, annotations: int
) -> list[Layer]:
    """Every layer that has weights, by its name in the original, with the shapes of its weights."""
    found = [dense("dense-global-input", annotations, g), ("embedding-seq-input", {"embeddings": [vocabulary, c]})]
    convolution = {"kernel": [kernel, c, c], "bias": [c]}
    attention = {"Wq": [heads, g, key], "Wk": [heads, c, key], "Wv": [heads, c, g // heads]}
    for block in range(1, blocks + 1):
        found += [
            dense(f"global-to-seq-dense-block{block}", g, c),
            (f"narrow-conv-block{block}", convolution),
            (f"wide-conv-block{block}", convolution),
            norm(f"seq-merge1-norm-block{block}", c),
            dense(f"seq-dense-block{block}", c, c),
            norm(f"seq-merge2-norm-block{block}", c),
            dense(f"global-dense1-block{block}", g, g),
            (f"global-attention-block{block}", attention),
            norm(f"global-merge1-norm-block{block}", g),
            dense(f"global-dense2-block{block}", g, g),
            norm(f"global-merge2-norm-block{block}", g),
        ]
    return [*found, dense("output-seq", c, vocabulary), dense("output-annotations", g, annotations)]


def document(name: str) -> str:
    """The text of the header file."""
    found = layers(*HEADERS[name])
    shapes = [shape for _, weights in found for shape in weights.values()]
    pickled = {f"{place:03d}": shape for place, shape in enumerate(shapes)}
    saved = {
        f"layer_with_weights-{number}/{weight}/.ATTRIBUTES/VARIABLE_VALUE": shape
        for number, (_, weights) in enumerate(found)
        for weight, shape in weights.items()
    }
    forms = {"hub": {"F32": saved}, "original": {"F32": pickled}}
    text = json.dumps({"layers": HEADERS[name][0], **forms}, separators=(",", ":"))
    return re.sub(r'(?<=[{\]]),?(?=")', lambda comma: f"{comma[0]}\n", text) + "\n"  # one tensor per line


if __name__ == "__main__":
    for name in HEADERS:
        (FOLDER / f"{name}.json").write_text(document(name))
