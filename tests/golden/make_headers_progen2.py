"""Writes the headers of ProGen2 from transformers' GPT-J, built on ``meta``.

    python tests/golden/make_headers_progen2.py

The two have the same block and name its tensors alike, but for three of them: ProGen2 stores queries, values and keys
as one. Its authors' files hold the causal masks as well, which the hub's ports once held and have left out since.
``{i}`` in a name stands for each layer.
"""

import json
import re
from pathlib import Path

import torch
import transformers

FOLDER = Path(__file__).parents[2] / "weights" / "plm_weights" / "headers"

# name: layers, channels, heads, rotated channels, positions, vocabulary, dtype of the authors' file, of the hub's port.
# The authors' dtypes are confirmed by the sizes of their files, and so are the masks: once for all layers. Of the
# ports, float32 of small and base and float16 of large is; not confirmed are oas and xlarge.
HEADERS = {
    "progen2-small": (12, 1024, 16, 32, 1024, 32, "F32", "F32"),
    "progen2-medium": (27, 1536, 16, 48, 1024, 32, "F32", "F32"),
    "progen2-oas": (27, 1536, 16, 48, 1024, 32, "F16", "F16"),
    "progen2-base": (27, 1536, 16, 48, 2048, 32, "F16", "F32"),
    "progen2-large": (32, 2560, 32, 64, 1024, 51200, "F16", "F16"),
    "progen2-xlarge": (32, 4096, 16, 64, 1024, 32, "F16", "F16"),
}

Shapes = dict[str, list[int]]


def shapes(layers: int, channels: int, heads: int, rotated: int, positions: int, vocabulary: int) -> Shapes:
    """Every trained tensor, the layers folded into one."""
    config = transformers.GPTJConfig(
        n_layer=layers,
        n_embd=channels,
        n_head=heads,
        rotary_dim=rotated,
        n_positions=positions,
        vocab_size=vocabulary,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        state = transformers.GPTJForCausalLM(config).state_dict()
    found: Shapes = {}
    for name, tensor in state.items():
        name, shape = re.sub(r"\.h\.\d+\.", ".h.{i}.", name), [*tensor.shape]
        if name.endswith("attn.q_proj.weight"):
            name, shape = name.replace("q_proj", "qkv_proj"), [3 * channels, channels]
        elif name.endswith(("attn.k_proj.weight", "attn.v_proj.weight")):
            continue
        found[name] = shape
    return found


def document(name: str) -> str:
    """The text of one header file."""
    *sizes, dtype, port = HEADERS[name]
    layers, positions = sizes[0], sizes[4]
    trained = shapes(*sizes)
    attention = "transformer.h.{i}.attn"
    # The dtype of what the mask puts into its place is not confirmed where the weights are float16.
    original = {
        dtype: trained | {f"{attention}.masked_bias": []},
        "BOOL": {f"{attention}.bias": [1, 1, positions, positions]},
    }
    text = json.dumps({"layers": layers, "hub": {port: trained}, "original": original}, separators=(",", ":"))
    return re.sub(r'(?<=[{\]]),?(?=")', lambda comma: f"{comma[0]}\n", text) + "\n"  # one tensor per line


if __name__ == "__main__":
    for name in HEADERS:
        (FOLDER / f"{name}.json").write_text(document(name))
