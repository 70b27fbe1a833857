"""The original ESM models as tiny random twins: built and saved by transformers' and fair-esm's own code.

No key map of ours is at work here: each library names its tensors itself, and only random numbers are put in.
"""

import argparse
import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from parity import Outputs, unpad, unpad_contacts, unpad_maps
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fair-esm 2.0.0 is of 2022
    import esm as fair_esm
    import transformers

from plm.models.esm import MASK, PAD, VOCABULARY

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

ALPHABET = fair_esm.Alphabet.from_architecture("ESM-1b")


@dataclass(frozen=True)
class Twin:
    """Sizes of a model that runs in milliseconds, and the seed of its weights."""

    family: Literal["esm1b", "esm1v", "esm2"]
    layers: int
    channels: int
    heads: int
    feed_forward: int
    token_dropout: bool = True
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.family}-{self.layers}x{self.heads}x{self.channels // self.heads}-dropout{self.token_dropout:d}"


def hub_twin(twin: Twin, kind: type[Any] = transformers.EsmForMaskedLM, **settings: Any) -> Any:
    """One of transformers' ESM classes with random weights, in the form that gives attention maps."""
    config = transformers.EsmConfig(
        vocab_size=VOCABULARY,
        hidden_size=twin.channels,
        num_hidden_layers=twin.layers,
        num_attention_heads=twin.heads,
        intermediate_size=twin.feed_forward,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-5,
        pad_token_id=PAD,
        mask_token_id=MASK,
        position_embedding_type="rotary" if twin.family == "esm2" else "absolute",
        max_position_embeddings=1026,
        emb_layer_norm_before=twin.family == "esm1b",
        token_dropout=twin.token_dropout,
        attn_implementation="eager",
        **settings,
    )
    return randomise(kind(config), twin.seed).eval()


def fair_twin(twin: Twin) -> Any:
    """fair-esm's ESM2 or ProteinBertModel with random weights."""
    if twin.family == "esm2":
        assert twin.feed_forward == 4 * twin.channels, "fair-esm fixes the feed-forward size of ESM-2"
        model = fair_esm.ESM2(twin.layers, twin.channels, twin.heads, ALPHABET, twin.token_dropout)
    else:
        arguments = {name.removeprefix("encoder_"): value for name, value in fair_arguments(twin).items()}
        arguments["emb_layer_norm_before"] = twin.family == "esm1b"
        model = fair_esm.ProteinBertModel(argparse.Namespace(**arguments), ALPHABET)
    return randomise(model, twin.seed).eval()


def fair_arguments(twin: Twin) -> dict[str, object]:
    """The arguments that fair-esm's files store."""
    return {
        "arch": "roberta_large",
        "encoder_layers": twin.layers,
        "encoder_embed_dim": twin.channels,
        "encoder_ffn_embed_dim": twin.feed_forward,
        "encoder_attention_heads": twin.heads,
        "max_positions": 1024,
        "token_dropout": twin.token_dropout,
    }


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter so that each one matters: no norm is the identity, no bias is zero, no pair is alike.

    The rotary frequencies become other numbers than any formula gives, so that they can only come from the file.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("regression.weight"):
            noise *= 6 * (torch.rand(noise.shape, generator=generator) < 0.7)  # sparse, as the published ones
        elif "norm" in name.lower() and name.endswith("weight"):
            noise = 1 + 0.2 * noise
        elif noise.dim() == 1:
            noise *= 0.2
        else:
            noise *= 0.7 if "embed" in name else 1.4 / math.sqrt(noise.shape[1])
        parameter.copy_(noise)
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.mul_(1.1)
    return model


def save_fair(model: nn.Module, twin: Twin, folder: Path) -> Path:
    """What fair-esm publishes: weights and arguments, and (not for ESM-1v) the contact regression in its own file."""
    state = model.state_dict()
    regression = {name: state.pop(name) for name in list(state) if name.startswith("contact_head.")}
    named = {f"encoder.{'' if k.startswith('lm_head') else 'sentence_encoder.'}{k}": v for k, v in state.items()}
    arguments = argparse.Namespace(**fair_arguments(twin))
    told = {"args": None, "cfg": {"model": arguments}} if twin.family == "esm2" else {"args": arguments}
    path = folder / f"{twin.family}_twin.pt"
    torch.save({**told, "model": named}, path)
    if twin.family != "esm1v":
        torch.save({"model": regression}, path.with_name(f"{path.stem}-contact-regression.pt"))
    return path


def load_fair(path: Path) -> Any:
    """What fair-esm makes of a file."""
    # fair-esm 2.0.0 is older than torch.load's refusal of foreign classes, and warns that ESM-1v has no contacts.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Regression weights not found")
        model, _ = fair_esm.pretrained.load_model_and_alphabet_local(str(path))
    return model.eval()


class CleanFloat64(TorchFunctionMode):
    """Gives the originals float64 wherever they ask for float32 by name: softmax, rotary angles, the share of masks."""

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(x: object) -> object:
            return torch.float64 if x is torch.float32 else x

        call = Tensor.double if call is Tensor.float else call
        return call(*map(wide, args), **{name: wide(x) for name, x in (kwargs or {}).items()})


def in_float64(model: Any) -> Any:
    """A float64 copy, without the cosines that fair-esm remembers from a float32 run."""
    copied = copy.deepcopy(model).double()
    for module in copied.modules():
        if hasattr(module, "_cos_cached"):
            module._seq_len_cached = module._cos_cached = module._sin_cached = None
    return copied


def pad(rows: Sequence[Sequence[int]], side: Literal["left", "right"] = "right") -> tuple[Tensor, Tensor]:
    """Ids and attention mask ``[b, t]``."""
    ids = [torch.tensor(row) for row in rows]
    padded = nn.utils.rnn.pad_sequence(ids, True, PAD, side)
    return padded, nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], True, 0, side)


@torch.no_grad()
def run_hub(model: Any, ids: Tensor, mask: Tensor) -> Outputs:
    """All that one of transformers' classes gives, without padding (contacts: if that is on the right)."""
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    keep = mask.bool()
    found = {f"hidden_states.{i}": unpad(x, keep) for i, x in enumerate(out.hidden_states)}
    found["attentions"] = unpad_maps(torch.stack(out.attentions, 1), keep)
    match model:
        case transformers.EsmForMaskedLM():
            found["logits"] = unpad(out.logits, keep)
            found["contacts"] = unpad_contacts(model.predict_contacts(ids, mask), keep)
        case transformers.EsmForSequenceClassification():
            found["sequence_logits"] = list(out.logits)
        case transformers.EsmForTokenClassification():
            found["token_logits"] = unpad(out.logits, keep)
        case transformers.EsmModel():
            found["pooled"] = list(out.pooler_output)
    return found


@torch.no_grad()
def run_fair(model: Any, ids: Tensor) -> Outputs:
    """All that fair-esm gives, without padding (which it finds by the id)."""
    out = model(ids, repr_layers=range(model.num_layers + 1), need_head_weights=True, return_contacts=True)
    keep = ids != PAD
    found = {f"hidden_states.{i}": unpad(x, keep) for i, x in out["representations"].items()}
    found["attentions"] = unpad_maps(out["attentions"], keep)
    found["logits"] = unpad(out["logits"], keep)
    found["contacts"] = unpad_contacts(out["contacts"], keep)
    return found
