"""Tiny random models of every vocabulary that writes or reads, as ``plm.load`` would give them."""

from dataclasses import replace

import torch
from oracle_bert import randomise as randomise_bert
from oracle_progen2 import randomise as randomise_progen2
from oracle_t5 import randomise as randomise_t5

import plm
from plm.loading import Origin
from plm.models import bert, progen2, proteinbert, t5
from plm.tokens import Tokenizer, checked
from plm.vocabularies import (
    ankh3_tokenizer,
    ankh_tokenizer,
    bert_tokenizer,
    progen2_tokenizer,
    prostt5_tokenizer,
    proteinbert_tokenizer,
    prott5_tokenizer,
)

# What an Ankh3 folder could say. The layout is published, the order within 3 to 6 and within 27 to 30 is not.
ANKH3_PIECES = ("<pad>", "</s>", "<unk>", "[NLU]", "[S2S]", "[NLG]", "[CLM]", *"LAGSVERTIDPKNFQYHMCW", *"XUBZ")
NLU, S2S = 3, 4
SMALL = t5.Config(256, 2, 2, 32, 4, 8, 48, "gated-silu", buckets=64, tied=False)


def origin(name: str) -> Origin:
    return Origin(name, "tiny", "nowhere", None, (), "none", "none")


def tiny_t5(name: str, tokenizer: Tokenizer, dtype: torch.dtype, config: t5.Config = SMALL, seed: int = 0) -> plm.Model:
    """A T5 with the tokenizer's vocabulary. Its end token is likely enough that some texts end by themselves."""
    net = t5.T5(replace(config, vocabulary=len(tokenizer.vocabulary))).requires_grad_(False)
    randomise_t5(net, seed)
    (net.embed if net.lm_head is None else net.lm_head).weight[t5.EOS] *= 2
    return plm.Model(net.to(dtype).eval(), tokenizer, origin(name))


def prott5(dtype: torch.dtype = torch.float32) -> plm.Model:
    """128 tokens; the head is the embedding."""
    return tiny_t5("prott5", prott5_tokenizer(), dtype, replace(SMALL, activation="relu", buckets=32, tied=True))


def ankh(dtype: torch.dtype = torch.float32, seed: int = 0) -> plm.Model:
    """144 tokens, no tasks."""
    return tiny_t5("ankh", ankh_tokenizer(), dtype, seed=seed)


def prostt5(dtype: torch.dtype = torch.float32) -> plm.Model:
    """150 tokens: residues and 3Di states."""
    return tiny_t5("prostt5", prostt5_tokenizer(), dtype, replace(SMALL, activation="relu", buckets=32, tied=True))


def ankh3(dtype: torch.dtype = torch.float32) -> plm.Model:
    """256 tokens, all of them known."""
    return tiny_t5("ankh3", checked(ankh3_tokenizer(), ANKH3_PIECES, "spiece.model"), dtype)


def ankh3_without_files(dtype: torch.dtype = torch.float32) -> plm.Model:
    """The same where nobody said which tokens ask for the tasks."""
    return tiny_t5("ankh3", ankh3_tokenizer(), dtype)


def encoder_alone() -> plm.Model:
    """ProtT5 without its decoder, as the half-precision checkpoint is."""
    config = replace(SMALL, decoder_layers=0, tied=True)
    return tiny_t5("prott5-encoder", prott5_tokenizer(), torch.float32, config)


def writing_progen2(
    dtype: torch.dtype = torch.float32, max_length: int = 200, vocabulary: int = 32, outputs: int = 32, seed: int = 0
) -> plm.Model:
    """A ProGen2 that reads as many tokens, with as many rows in its embedding and in its head. It ends most texts.

    Its feed-forward is a multiple of 64 wide, as all published ones: torch's tanh GELU rounds what is left over from
    its loop over so many numbers otherwise than the rest, so that else bits would depend on the number of rows.
    """
    config = progen2.Config(vocabulary, outputs, 2, 32, 4, 6, 64, max_length=max_length)
    net = progen2.ProGen2(config).requires_grad_(False)
    randomise_progen2(net, seed)
    return plm.Model(net.to(dtype).eval(), progen2_tokenizer(), origin("progen2"))


def igbert(dtype: torch.dtype = torch.float32, lm_head: bool = True, positions: int = 40) -> plm.Model:
    """30 tokens; takes pairs of chains."""
    net = bert.BERT(bert.Config(30, 2, 32, 4, 48, positions=positions, types=2, lm_head=lm_head)).requires_grad_(False)
    randomise_bert(net, 0)
    return plm.Model(net.to(dtype).eval(), bert_tokenizer(), origin("igbert"))


def progen2_model(dtype: torch.dtype = torch.float32, outputs: int = 32, max_length: int = 40) -> plm.Model:
    """30 tokens, and two residues less than ``max_length``."""
    net = progen2.ProGen2(progen2.Config(max(32, outputs), outputs, 2, 40, 8, 4, 64, max_length)).requires_grad_(False)
    randomise_progen2(net, 0)
    return plm.Model(net.to(dtype).eval(), progen2_tokenizer(), origin("progen2"))


PROTEINBERT = proteinbert.Config(26, 40, 3, 32, 64, 4, 16)


def proteinbert_model(
    dtype: torch.dtype = torch.float32, config: proteinbert.Config = PROTEINBERT, seed: int = 0
) -> plm.Model:
    """A ProteinBERT whose two tracks and pads all matter. Its padded lengths are the caller's choice."""
    net = proteinbert.ProteinBERT(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(noise if name == "embed.weight" else 1.4 * noise / parameter[0].numel() ** 0.5)
    return plm.Model(net.to(dtype).eval(), proteinbert_tokenizer(), origin("proteinbert"))
