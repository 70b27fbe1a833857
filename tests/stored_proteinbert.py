"""What nadavbra/protein_bert itself computed from tiny random weights, and how our network is loaded and run on it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from parity import Outputs, differences, largest
from safetensors.torch import load_file
from torch import Tensor, nn

from plm.models.proteinbert import Config, ProteinBERT, pretraining_loss
from plm_weights import export_weights, import_weights, open_tensors
from plm_weights.proteinbert import key_map, published_rows, read_config, recognise

GOLDEN = Path(__file__).parent / "golden" / "proteinbert"
FINE = GOLDEN / "tiny_2blocks"
PADDED = GOLDEN / "padding_3blocks"
TUNED = GOLDEN / "finetune_heads"


class Case:
    """One stored checkpoint, or one group of inputs of it, with what it should give."""

    def __init__(self, folder: Path, group: str = "") -> None:
        self.folder = folder
        prefix = group and f"{group}."
        self.inputs, self.expected = (
            {name.removeprefix(prefix): x for name, x in load_file(folder / file).items() if name.startswith(prefix)}
            for file in ("inputs.safetensors", "expected.safetensors")
        )
        self.tokens, self.annotations = self.inputs["token_ids"], self.inputs["annotations"]
        told = json.loads((folder / "meta.json").read_text())["max_abs_deviation_of_original_in_float32_from_float64"]
        self.float32_errors = {name.removeprefix(prefix): x for name, x in told.items() if name.startswith(prefix)}

    def truth(self) -> Outputs:
        return {name: [x] for name, x in self.expected.items() if not name.startswith("loss.")}

    def weights(self) -> list[Tensor]:
        """In Keras' order and layout."""
        return list(keras_list(self.folder).values())

    def net(self, dtype: torch.dtype = torch.float64) -> ProteinBERT:
        return load(self.folder, dtype)

    def outputs(self, net: ProteinBERT) -> Outputs:
        """What is stored, of ours."""
        found = run_ours(net, self.tokens, self.annotations)
        return {name: found[name] for name in self.truth()}

    def error_of(self, net: ProteinBERT) -> float:
        """The largest error of any output."""
        return largest(differences(self.outputs(net), self.truth()))

    def error_with(self, wrong: Mapping[str, Tensor]) -> float:
        """The same of a checkpoint whose weights are ``wrong``, though it loads."""
        return self.error_of(build(wrong, settings(self.folder), torch.float64))


CASES = {"tiny": Case(FINE), **{group: Case(PADDED, group) for group in ("g0", "g1", "g2", "g3")}}


def keras_list(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder under the names "000", "001", ... in this order."""
    return dict(sorted(load_file(folder / "model.safetensors").items()))


def settings(folder: Path) -> dict[str, Any]:
    """The keywords of our configuration."""
    tensors = open_tensors(folder / "model.safetensors")
    assert recognise(tensors.meta) == "pickle"
    return read_config("pickle", tensors)


def load(folder: Path, dtype: torch.dtype) -> ProteinBERT:
    """Our network of a folder."""
    return build(open_tensors(folder / "model.safetensors"), settings(folder), dtype)


def build(tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> ProteinBERT:
    """Our network from weights "000", "001", ... in Keras' layout."""
    with torch.device("meta"):
        net = ProteinBERT(Config(**config))
    state = import_weights(key_map(tensors, config), tensors, net.state_dict())
    net.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return net.eval()


def numbered(weights: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{place:03d}": weight for place, weight in enumerate(weights)}


def with_changes(net: ProteinBERT, **changes: Any) -> ProteinBERT:
    """The same weights in a network of another configuration."""
    changed = ProteinBERT(replace(net.config, **changes)).to(net.embed.weight.dtype)
    changed.load_state_dict(net.state_dict())
    return changed.eval()


@torch.no_grad()
def run_ours(net: ProteinBERT, tokens: Tensor, annotations: Tensor) -> Outputs:
    """Every output and every step within the blocks, under the names of the stored truths."""
    found: dict[str, Tensor] = {}
    steps = {"narrow": "narrow_conv", "wide": "wide_conv", "to_local": "global_to_local"}
    steps |= {"global_dense1": "global_dense1", "attention": "attention_output"}
    hooks = [
        watch(block.get_submodule(name), found, f"block{b}.{stored}")
        for b, block in enumerate(net.blocks, start=1)
        for name, stored in steps.items()
    ]
    out = net(tokens, annotations.to(net.embed.weight.dtype), hidden_states=True, attentions=True)
    for hook in hooks:
        hook.remove()
    found |= {"embedding.local": out.local_states[0], "embedding.global": out.global_states[0]}
    for b in range(1, len(net.blocks) + 1):
        found |= {f"block{b}.local_mid": out.local_states[2 * b - 1], f"block{b}.local": out.local_states[2 * b]}
        found |= {f"block{b}.global_mid": out.global_states[2 * b - 1], f"block{b}.global": out.global_states[2 * b]}
        found[f"block{b}.attention_weights"] = out.attentions[b - 1]
    assert torch.equal(out.local, out.local_states[-1]) and torch.equal(out.global_, out.global_states[-1])
    found |= {"seq_logits": out.local_logits, "seq_probs": out.local_logits.softmax(-1)}
    found |= {"annotation_logits": out.annotation_logits, "annotation_probs": out.annotation_logits.sigmoid()}
    found["local_representations"] = out.local_representations
    found["global_representations"] = out.global_representations
    return {name: [x] for name, x in found.items()}


def watch(module: nn.Module, found: dict[str, Tensor], name: str) -> Any:
    def keep(module: nn.Module, inputs: object, output: Any) -> None:
        found[name] = output[0] if isinstance(output, tuple) else output

    return module.register_forward_hook(keep)


def losses_and_gradients(net: ProteinBERT, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The losses of pre-training, and the gradient of their sum by every weight in Keras' order and layout."""
    dtype = net.embed.weight.dtype
    targets = case.inputs["target_ids"], case.inputs["target_annotations"].to(dtype)
    total, letters, known = pretraining_loss(net(case.tokens, case.annotations.to(dtype)), *targets)
    total.backward()
    losses = {"total": total.detach(), "sequence": letters.detach(), "annotations": known.detach()}
    return losses, keras_gradients(net)


def keras_gradients(net: ProteinBERT) -> dict[str, Tensor]:
    """ "000", "001", ...; the key map is linear in the weights, so it turns gradients as well."""
    gradients = {name: x.grad for name, x in net.named_parameters()}
    assert all(x is not None for x in gradients.values())
    return export_weights(published_rows(vars(net.config)), gradients)
