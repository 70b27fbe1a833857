"""Published shapes with random weights, made on the device: in transformers' classes, and in ours through our key maps.

Where transformers is not installed, or fails, ours are filled at random all the same, and the peers are missing.
"""

import copy
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from measuring import Missing
from torch import Tensor, nn

from on_device.job import describe, forget
from on_device.networks import fill
from plm.families import BY_NAME
from plm.loading import Model, Origin
from plm.models import bert, esm, t5
from plm.models import progen2 as model
from plm_weights import import_weights
from plm_weights.registry import find


def origin(name: str, family: str) -> Origin:
    return Origin(name, family, "random weights", None, (), "", "")


def wrapped(net: nn.Module, family: str, name: str) -> Model:
    """What the verbs take."""
    return Model(net.eval(), BY_NAME[family].tokenizer(net.config), origin(name, family))


def ours(theirs: Any, family: str, settings: Mapping[str, Any]) -> nn.Module:
    """Our network with the weights of one of transformers, on the same device."""
    row = BY_NAME[family]
    stored = {name: x for name, x in theirs.state_dict().items() if usable(name)}
    config = row.config(**row.read_config("hub", settings, Stored(stored)))
    with torch.device("meta"):
        net = row.network(config)
    computed = row.computed(stored, config)
    wanted = {name: x for name, x in net.state_dict().items() if name not in computed}
    state = import_weights(row.key_map(stored, config), stored, wanted)
    device = next(iter(stored.values())).device
    net.load_state_dict({name: x.clone().to(device) for name, x in (state | computed).items()}, assign=True)
    return net.requires_grad_(False).eval()


class Stored(dict[str, Tensor]):
    """Tensors in memory, as `Family.read_config` looks at a file's."""

    @property
    def meta(self) -> "Stored":
        return self


def usable(name: str) -> bool:
    """Frequencies are set to the published ones on both sides, and an encoder has no other head."""
    return "inv_freq" not in name and "contact_head" not in name and "position_ids" not in name


def pair(
    both: Callable[[], tuple[Any, nn.Module]], alone: Callable[[], nn.Module], device: str
) -> tuple[Any, nn.Module]:
    """A peer and ours with its weights. Where anything of the peer's fails: why it is missing, and ours with others."""
    try:
        return both()
    except Exception as error:  # another version fails in its own way
        missing = lost(error)
    with torch.device("meta"):
        net = alone()
    net = net.to_empty(device=device).requires_grad_(False).eval()
    fill(net)
    return missing, net


def lost(error: Exception) -> Missing:
    """Why a peer is missing."""
    if isinstance(error, ImportError):
        return Missing(f"transformers is not installed ({error})")
    traceback.print_exc()
    forget(error)
    return Missing(f"transformers' network could not be made: {describe(error)}")


def present(theirs: Any) -> Any:
    """The peer.

    Raises: Missing, with the reason, if there is none.
    """
    if isinstance(theirs, Missing):
        raise Missing(str(theirs))
    return theirs


# ESM-2


def esm_config(name: str, quick: bool, head: bool) -> esm.Config:
    row = find(name)
    assert row.config is not None
    if quick:
        return esm.Config(2, 64, 4, 256, None, False, True, 1e-5, lm_head=head)
    return esm.Config(**{**row.config, "lm_head": head, "contact_head": False})  # type: ignore[arg-type]


def esm2(name: str, device: str, quick: bool, *, head: bool = False) -> tuple[Any, nn.Module]:
    """transformers' encoder (or why it is missing) and ours, in float32; ``head``: with the one for residues."""
    config = esm_config(name, quick, head)
    return pair(lambda: both_esm2(config, device, head), lambda: esm.ESM(config), device)


def both_esm2(config: esm.Config, device: str, head: bool) -> tuple[Any, nn.Module]:
    from transformers import EsmConfig, EsmForMaskedLM, EsmModel

    settings = EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=config.channels, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, intermediate_size=config.feed_forward, position_embedding_type="rotary",
        token_dropout=True, layer_norm_eps=1e-5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        theirs = EsmForMaskedLM(settings) if head else EsmModel(settings, add_pooling_layer=False)
    theirs.requires_grad_(False).eval()
    frequencies = esm.default_frequencies(config.head_size)
    for buffer_name, buffer in theirs.named_buffers():
        if buffer_name.endswith("inv_freq"):
            buffer.copy_(frequencies)
    return theirs, ours(theirs, "esm", settings.to_dict())


def in_dtype(theirs: Any, dtype: torch.dtype) -> Any:
    """A copy of a peer, as ``from_pretrained(dtype=...)`` gives it: rotary frequencies stay in float32."""
    kept = {name: x.clone() for name, x in present(theirs).named_buffers() if name.endswith("inv_freq")}
    copied = copy.deepcopy(theirs).to(dtype)
    for name, x in copied.named_buffers():
        if name in kept:
            x.data = kept[name]
    return copied


# The others


def ankh3(device: str, quick: bool) -> tuple[Any, nn.Module]:
    """Ankh3-large's encoder: 48 layers of 1,536 channels, 16 heads of 64, a gated feed-forward of 3,840."""
    c, h, f, layers = (64, 2, 96, 2) if quick else (1536, 16, 3840, 48)
    config = t5.Config(256, layers, 0, c, h, 64, f, "gated-silu", buckets=64)
    return pair(lambda: both_ankh3((c, h, f, layers), device), lambda: t5.T5(config), device)


def both_ankh3(sizes: Sequence[int], device: str) -> tuple[Any, nn.Module]:
    from transformers import T5Config, T5EncoderModel

    settings = {
        "vocab_size": 256, "d_model": sizes[0], "d_kv": 64, "num_heads": sizes[1], "d_ff": sizes[2],
        "num_layers": sizes[3], "feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 64,
        "dropout_rate": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        theirs = T5EncoderModel(T5Config(**settings, attn_implementation="sdpa")).requires_grad_(False).eval()
    return theirs, ours(theirs, "t5", {**settings, "tie_word_embeddings": True, "architectures": ["T5EncoderModel"]})


def igbert(device: str, quick: bool) -> tuple[Any, nn.Module]:
    """IgBert: 30 layers of 1,024 channels, 16 heads."""
    c, h, f, layers = (64, 2, 128, 2) if quick else (1024, 16, 4096, 30)
    config = bert.Config(30, layers, c, h, f, 40000, 2, lm_head=False)
    return pair(lambda: both_igbert((c, h, f, layers), device), lambda: bert.BERT(config), device)


def both_igbert(sizes: Sequence[int], device: str) -> tuple[Any, nn.Module]:
    from transformers import BertConfig, BertModel

    c, h, f, layers = sizes
    settings = {
        "vocab_size": 30, "hidden_size": c, "num_hidden_layers": layers, "num_attention_heads": h,
        "intermediate_size": f, "max_position_embeddings": 40000, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        config = BertConfig(**settings, attn_implementation="sdpa")
        theirs = BertModel(config, add_pooling_layer=False).requires_grad_(False).eval()
    return theirs, ours(theirs, "bert", settings)


PROGEN2 = {"small": (12, 1024, 16, 32), "base": (27, 1536, 16, 48)}


def progen2(name: str, device: str, dtype: torch.dtype, quick: bool) -> tuple[Any, nn.Module]:
    """GPT-J, which has ProGen2's architecture, and ours with the same weights, both in ``dtype``."""
    layers, c, heads, turned = sizes = (2, 64, 8, 4) if quick else PROGEN2[name]
    config = model.Config(32, 32, layers, c, heads, turned, 4 * c, 2048)
    theirs, net = pair(lambda: both_progen2(sizes, device), lambda: model.ProGen2(config), device)
    return (theirs if isinstance(theirs, Missing) else theirs.to(dtype)), net.to(dtype)


def both_progen2(shape: Sequence[int], device: str) -> tuple[Any, nn.Module]:
    from transformers import GPTJConfig, GPTJForCausalLM

    layers, c, heads, turned = shape
    sizes = {
        "n_layer": layers, "n_embd": c, "n_head": heads, "rotary_dim": turned, "n_positions": 2048, "vocab_size": 32,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        theirs = GPTJForCausalLM(GPTJConfig(**sizes)).requires_grad_(False).eval()
    return theirs, ours(ProGen2Names(theirs), "progen2", {**sizes, "model_type": "progen"})


class ProGen2Names:
    """GPT-J's weights as the authors store them: one projection of eight shards, each with its q, then v, then k.

    salesforce/progen@c27a419, progen2/models/progen/modeling_progen.py.
    """

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def state_dict(self) -> dict[str, Tensor]:
        state, found = self.theirs.state_dict(), {}
        for name, x in state.items():
            if name.endswith("q_proj.weight"):
                parts = [x, *(state[name.replace("q_proj", other)] for other in ("v_proj", "k_proj"))]
                shards = torch.stack([part.reshape(8, -1, x.shape[1]) for part in parts], 1)
                found[name.replace("q_proj", "qkv_proj")] = shards.reshape(-1, x.shape[1])
            elif not name.endswith(("v_proj.weight", "k_proj.weight", "embed_positions")):
                found[name] = x
        return found


def rows_of(lengths: Sequence[int], letters: range, device: str) -> list[Tensor]:
    """Random tokens of so many sequences."""
    generator = torch.Generator().manual_seed(1)
    low, high = letters.start, letters.stop
    return [torch.randint(low, high, (length,), generator=generator).to(device) for length in lengths]
