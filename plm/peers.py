"""The libraries that checkpoints were published for: what each computes from the files on a few sequences.

A library gets the ids that our network gets, reads the files by itself, and computes on the CPU.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from plm.esmfold import config as esmfold_config
from plm.esmfold.chains import read_chains
from plm.esmfold.model import ESMFold
from plm.esmfold.residues import LETTERS
from plm.families import Config, Network
from plm.loading import Opened
from plm.models import bert, esm, progen2, proteinbert, t5
from plm.packing import Packed
from plm_weights import Row

Outputs = dict[str, Tensor]
"""From the name of an output to its rows ``[n, ...]``, one per packed token, or ``[b, ...]``, one per sequence."""

# With what stands around a sequence, unusual residues and hidden ones; one residue last.
SMOKE = {
    "esm": (  # those of transformers' own conversion test come first (convert_esm.py)
        "MKTVRQERLKSIVRILERSKEPVSGAQLAEELSVSRQVIVQDIAYLRSLGYNIVATPRGYVLAGG",
        "MKTVRQERLKSI<mask>RILERSKEPVSGAQLAEELS<mask>SRQVIVQDIAYLRSLGYN<mask>VATPRGYVLA",
        "MXBUZOACDEFGHIKLNPQRSTVWY",
        "M",
    ),
    "bert": (
        "EVQLVESGGGLVQPGGSLRL|DIQMTQSPSSLSASVGD",
        "MKTVRQERLKSI<mask>RILERSKEPVS<mask>AQLAEELS",
        "MXBUZOACDEFGHIKLNPQRSTVWY",
        "M",
    ),
    "t5": (
        "MKTVRQERLKSIVRILERSKEPVSGAQLAEELSVSRQVIVQDIAYLRSLGYNIVATPRGYVLAGG" * 3,  # reaches every bias
        "MKTVRQERLKSI<extra_id_0>RILERSKEPVS<extra_id_1>AQLAEELS",
        "MXBUZOACDEFGHIKLNPQRSTVWY",
        "M",
    ),
    "progen2": (  # from N to C, from C to N, and without an end
        "1MKTVRQERLKSIVRILERSKEPVSGAQLAEELSVSRQVIVQDI2",
        "2GGALVYGRPTAVINYGLSRL1",
        "1MXBUZOACDEFGHIKLNPQRSTVWY",
        "1",
    ),
    "proteinbert": (
        "MKTVRQERLKSIVRILERSKEPVSGAQLAEELSVSRQVIVQDIAYLRSLGYNIVATPRGYVLAGG",
        "MKTVRQERLKSIMRILERSKEPVSYAQLAEELS",
        "MXBUZOACDEFGHIKLNPQRSTVWY",
        "M",
    ),
    "esmfold": ("MKTVRQERLKSIVRILERSKEPVSG", "MXACDEFGHIKLNPQRSTVWY"),
}
PADDING = {"esm": 1, "bert": 0, "t5": 0, "progen2": 0, "proteinbert": proteinbert.PAD, "esmfold": 0}
WRITTEN = 24  # tokens of the decoder's input, at most


@dataclass(frozen=True)
class Question:
    """One batch, for a T5 that has a decoder what its decoder reads, and for a ProteinBERT what is known of each
    sequence ``[b, a]``."""

    batch: Packed
    decoder: Packed | None
    padding: int
    annotations: Tensor | None = None


def question_for(opened: Opened) -> Question:
    """What a checkpoint is asked. A letter that it does not know becomes one unknown token."""
    family, config = opened.family.name, opened.config
    tokenizer = opened.tokenizer()
    unknown = "error" if tokenizer.unknown is None else "each"
    batch = Packed.from_ids([tokenizer.encode(text, unknown=unknown) for text in SMOKE[family]])
    decoder = None
    if isinstance(config, t5.Config) and config.decoder_layers:
        decoder = Packed.from_ids([[t5.START, *row[: WRITTEN - 1].tolist()] for row in batch.split(batch.tokens)])
    annotations = None
    if isinstance(config, proteinbert.Config):  # of the first sequence all, of the next every second, and so on
        of_each = [torch.arange(config.annotations) % (i + 1) == 0 for i in range(len(batch))]
        annotations = torch.stack(of_each).float()
    return Question(batch, decoder, PADDING[family], annotations)


@torch.inference_mode()
def ours(net: Network, question: Question) -> Outputs:
    """What our network computes, in its dtype and on its device; the hidden states of a T5 are the encoder's.

    A ProteinBERT gets pads up to the longest sequence, and tells its states and outputs as its authors' code lines them
    up.
    """
    device = net.embed.weight.device
    batch = question.batch.to(device)
    if isinstance(net, ESMFold):
        proteins = ["".join(map(LETTERS.__getitem__, row.tolist())) for row in batch.split(batch.tokens)]
        found = list(net.fold([read_chains(protein) for protein in proteins]))
        outputs = {
            "positions": torch.cat([one.positions for one in found]),
            "pLDDT": torch.cat([one.plddt for one in found]),
            "aligned errors": torch.cat([one.pae.flatten() for one in found]),
        }
        # One number per protein, of the same head: too few to tell what half precision loses from chance.
        precise = net.embed.weight.dtype.itemsize > 2
        return outputs | ({"pTM": torch.tensor([one.ptm for one in found])} if precise else {})
    if isinstance(net, proteinbert.ProteinBERT) and question.annotations is not None:
        both = net.represent(batch, annotations=question.annotations.to(device), pad_to=batch.max_length)
        return {"local representations": both.hidden, "global representations": both.global_}
    if question.decoder is not None:
        out = net(batch, decoder=question.decoder.to(device))
        return {"hidden states": out.encoder_hidden, "logits": out.logits}
    if isinstance(net, t5.T5) or net.lm_head is None:
        return {"hidden states": net.encode(batch).hidden}
    return {"logits": net(batch).logits}


@torch.inference_mode()
def theirs(opened: Opened, question: Question, dtype: torch.dtype) -> tuple[str, Outputs] | None:
    """The library that the files were published for, and what it computes; None if it is not there to read them."""
    if opened.layout == "plm":
        return None
    if isinstance(opened.config, proteinbert.Config):
        if not (installed("protein-bert") and (installed("tensorflow") or installed("tensorflow-cpu"))):
            return None
        states = protein_bert(opened, opened.config, question, dtype)
        return ("protein-bert", states) if states else None
    name, ask = ("fair-esm", fair_esm) if opened.layout == "fair" else ("transformers", transformers)
    if isinstance(opened.config, esmfold_config.Config):
        if opened.layout != "hub":  # the authors' own code needs openfold and OmegaConf
            return None
        ask = folding
    if not installed(name):
        return None
    if isinstance(opened.config, progen2.Config):
        return f"GPT-J of {name}", gptj(opened, opened.config, question, dtype)
    found = ask(opened, question, dtype)
    return (name, found) if found else None


def installed(distribution: str) -> bool:
    """Whether a distribution is installed; asked by its own name, as several install a module called esm."""
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def padded(question: Question) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[b, t]``, for libraries that pad."""
    return question.batch.pad(question.batch.tokens, question.padding), mask_of(question.batch)


def mask_of(batch: Packed) -> Tensor:
    """Where the rows ``[b, t]`` have tokens."""
    return batch.pad(torch.ones_like(batch.tokens)).bool()


def transformers(opened: Opened, question: Question, dtype: torch.dtype) -> Outputs | None:
    """None if it does not find all of its weights in these files."""
    import transformers as library

    name, options = class_for(opened.config)
    net = load_transformers(getattr(library, name), opened, dtype, options)
    if net is None:
        return None
    ids, mask = padded(question)
    given = {"input_ids": ids, "attention_mask": mask.long()}
    if (decoder := question.decoder) is not None:
        out = net(**given, decoder_input_ids=decoder.pad(decoder.tokens), use_cache=False)
        return {"hidden states": out.encoder_last_hidden_state[mask], "logits": out.logits[mask_of(decoder)]}
    out = net(**given)
    return {"logits": out.logits[mask]} if "logits" in out else {"hidden states": out.last_hidden_state[mask]}


def class_for(config: Config) -> tuple[str, dict[str, bool]]:
    """A class by its own name, as ProtBert's config.json does not tell the Auto classes what it is of."""
    match config:
        case t5.Config(decoder_layers=0):
            return "T5EncoderModel", {}
        case t5.Config():
            return "T5ForConditionalGeneration", {}
        case bert.Config(lm_head=True):
            return "BertForMaskedLM", {}
        case bert.Config():
            return "BertModel", {"add_pooling_layer": False}
        case esm.Config(lm_head=True):
            return "EsmForMaskedLM", {}
    return "EsmModel", {"add_pooling_layer": False}


def load_transformers(kind: type[Any], opened: Opened, dtype: torch.dtype, options: dict[str, bool]) -> Any:
    """One of its classes with the weights of these very files, or None."""
    from transformers.utils import logging

    file = opened.tensors.files[0]
    if file.name.partition(".")[0] not in ("model", "pytorch_model"):  # it looks for these
        return None
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # it reports heads that a checkpoint does not have
    logging.disable_progress_bar()
    try:
        net, found = kind.from_pretrained(
            file.parent,
            dtype=dtype,
            use_safetensors=file.name.startswith("model."),
            output_loading_info=True,
            **options,
        )
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    # What it does not find is random. It finds nothing behind a prefix such as "module."; contacts are not asked for.
    return None if any("contact_head" not in name for name in found["missing_keys"]) else net.eval()


def folding(opened: Opened, question: Question, dtype: torch.dtype) -> Outputs | None:
    """transformers' ESMFold, protein by protein, as it tells one pTM of all that it is given together.

    It takes all weights in one dtype, the language model's too.
    """
    import transformers as library

    net = load_transformers(library.EsmForProteinFolding, opened, dtype, {})
    if net is None:
        return None
    found = [net(row[None]) for row in question.batch.split(question.batch.tokens)]
    return {
        "positions": torch.cat([one.positions[-1, 0] for one in found]).float(),
        "pLDDT": torch.cat([one.plddt[0] for one in found]).float(),
        "aligned errors": torch.cat([one.predicted_aligned_error[0].flatten() for one in found]).float(),
        "pTM": torch.stack([one.ptm for one in found]).float(),
    }


def gptj(opened: Opened, config: progen2.Config, question: Question, dtype: torch.dtype) -> Outputs:
    """transformers has no ProGen2, but its block is that of GPT-J: the same tensors, but for the fused projection.

    In each of its 8 shards are queries, values and keys, in this order (salesforce/progen@c27a419, modeling_progen.py).
    GPT-J has one size for embedding and head, so the smaller of the two is filled up with zeros.
    """
    import transformers as library

    settings: dict[str, Any] = {
        "vocab_size": max(config.vocabulary, config.outputs),
        "n_positions": question.batch.max_length,
        "n_embd": config.channels,
        "n_layer": config.layers,
        "n_head": config.heads,
        "rotary_dim": config.rotated,
        "n_inner": config.feed_forward,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    net: Any = library.GPTJForCausalLM(library.GPTJConfig(**settings))
    for name, theirs in net.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            fused = opened.tensors[re.sub("[qkv]_proj", "qkv_proj", name)]
            kind = "qvk".index(name[-len("q_proj.weight")])
            theirs.copy_(fused.unflatten(0, (8, 3, -1))[:, kind].flatten(0, 1))
        else:
            stored = opened.tensors[name]
            theirs.zero_()[: len(stored)].copy_(stored)
    ids, mask = padded(question)
    logits: Tensor = net.to(dtype).eval()(input_ids=ids, attention_mask=mask.long()).logits
    return {"logits": logits[mask][:, : config.outputs]}


def fair_esm(opened: Opened, question: Question, dtype: torch.dtype) -> Outputs | None:
    """Through fair-esm's own loader, which reads the architecture off the file's name: it is given one that fits.

    None of its models is without a language-model head.
    """
    import argparse

    from esm.pretrained import load_model_and_alphabet_core

    config = opened.config
    assert isinstance(config, esm.Config)
    if not config.lm_head:
        return None
    path, *regression = opened.tensors.files
    ids, mask = padded(question)
    with torch.serialization.safe_globals([argparse.Namespace]):
        model, *contacts = (torch.load(file, map_location="cpu", weights_only=True) for file in (path, *regression))
    name = "esm2" if config.learned_positions is None else "esm1b" if config.norm_before else "esm1v"
    net, _ = load_model_and_alphabet_core(f"{name}_any", model, contacts[0] if contacts else None)
    return {"logits": net.to(dtype).eval()(ids)["logits"][mask]}


def protein_bert(opened: Opened, config: proteinbert.Config, question: Question, dtype: torch.dtype) -> Outputs | None:
    """The original on Keras, which is given the files' arrays in their own order: that of its ``set_weights``.

    It pads all sequences to the longest. None of its models has another epsilon than Keras' own.
    """
    import tensorflow
    from proteinbert.conv_and_global_attention_model import create_model, get_model_with_hidden_layers_as_outputs

    if config.norm_eps != 1e-3:
        return None
    with suppress(RuntimeError):  # too late where it has run before
        tensorflow.config.set_visible_devices([], "GPU")  # of which it would take all memory
    keras = tensorflow.keras
    ids, mask = padded(question)
    policy = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(str(dtype).removeprefix("torch."))  # in which each of its layers is made
    sizes = {
        "vocab_size": config.vocabulary,
        "n_annotations": config.annotations,
        "d_hidden_seq": config.channels,
        "d_hidden_global": config.global_channels,
        "n_blocks": config.layers,
        "n_heads": config.heads,
        "d_key": config.key_size,
        "conv_kernel_size": config.kernel,
        "wide_conv_dilation_rate": config.dilation,
    }
    assert question.annotations is not None
    try:
        with tensorflow.device("CPU"):
            net = create_model(ids.shape[1], **sizes)
            net.set_weights([opened.tensors[str(row.source)].numpy() for row in opened.rows if isinstance(row, Row)])
            given = [ids.int().numpy(), question.annotations.numpy()]
            local, both = get_model_with_hidden_layers_as_outputs(net)(given, training=False)
    finally:
        keras.mixed_precision.set_global_policy(policy)
    return {
        "local representations": torch.tensor(local.numpy().astype("float32"))[mask],
        "global representations": torch.tensor(both.numpy().astype("float32")),
    }
