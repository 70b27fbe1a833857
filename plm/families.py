"""The families: how to tell one by its files, what becomes of them, and how its sequences are written.

A row per family. What is here holds for loading and conversion; other verbs know nothing of families.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from plm import tokens, vocabularies
from plm.esmfold import config as esmfold_config
from plm.esmfold.model import FLOAT32_AT_LEAST, ESMFold
from plm.models import bert, esm, progen2, proteinbert, t5
from plm_weights import KeyMap, TensorSource, Tied, esmfold_files
from plm_weights import bert as published_bert
from plm_weights import esm as published_esm
from plm_weights import esmfold as published_esmfold
from plm_weights import progen2 as published_progen2
from plm_weights import proteinbert as published_proteinbert
from plm_weights import t5 as published_t5

Network = esm.ESM | bert.BERT | t5.T5 | progen2.ProGen2 | proteinbert.ProteinBERT
Config = esm.Config | bert.Config | t5.Config | progen2.Config | proteinbert.Config | esmfold_config.Config
State = dict[str, Tensor]
CONFIGURED = ("hub", "plm")  # layouts with a config.json beside the weights


@dataclass(frozen=True)
class Family:
    """One family. A ``layout`` is a way in which its files were published; "plm" is this library's own."""

    name: str
    network: Callable[[Any], Network]  # from its own config
    config: Callable[..., Config]
    layout: Callable[[Iterable[str]], str | None]  # from tensor names; None: another family's
    read_config: Callable[[str, Mapping[str, object], TensorSource], dict[str, Any]]  # layout, settings, tensors
    key_map: Callable[[Iterable[str], Any], KeyMap]
    hub_rows: Callable[[Any], KeyMap]  # from its config: the tensors that transformers 5 writes
    hub_files: Callable[[Mapping[str, Any], str], dict[str, str]]  # config, dtype: what transformers wants beside them
    original_rows: Callable[[Any], KeyMap]  # the tensors of the files that its authors published
    tokenizer: Callable[[Any], tokens.Tokenizer]
    # With what other files hold of the same model; from the layout and the tensors of the first.
    joined: Callable[[str, TensorSource], TensorSource] = lambda layout, tensors: tensors
    hub_extras: Callable[[], State] = dict  # what else transformers stores, which is no weight
    original_file: str = "pytorch_model.bin"  # what the authors' form is called, where it has a name of its own
    original_extras: Callable[[Any], State] = lambda config: {}  # what else their files hold, which is no weight
    no_hub: Callable[[Any], str | None] = lambda config: None  # why transformers could not read it
    no_original: Callable[[Any], str | None] = lambda config: None  # why their code could not read it
    told_tokenizer: Callable[[Any, Sequence[str]], tokens.Tokenizer] | None = (
        None  # from a file, where none is published
    )
    computed: Callable[[Iterable[str], Any], State] = lambda names, config: {}  # what files may leave out
    loaded: Callable[[str, State, Any], State] = lambda layout, state, config: state  # the original's rule on loading
    # Names of tensors, or of modules with all in them.
    always_float32: frozenset[str] = frozenset()
    float32_at_least: frozenset[str] = frozenset()
    halves: frozenset[str] = frozenset()  # kept in half precision where that is stored and float32 is asked for
    auto: torch.dtype | None = None  # what "auto" means on every device, where it is not float32 or bfloat16 by device
    no_float16: str | None = None  # why not
    no_8_bits: str | None = None
    no_mixed: str | None = None
    notice: Callable[[Any], str | None] = lambda config: None  # said when it is loaded


def esm_settings(layout: str, settings: Mapping[str, object], tensors: TensorSource) -> dict[str, Any]:
    if layout == "fair":
        return published_esm.fair_config(tensors.extras, tensors.meta)
    return published_esm.hub_config(settings, tensors.meta)


def esm_form(config: esm.Config) -> dict[str, Any]:
    """What its key maps want to know of it."""
    return {"rotary": config.learned_positions is None, "contact_head": config.contact_head}


def esm_frequencies(names: Iterable[str], config: esm.Config) -> State:
    if config.learned_positions is not None or published_esm.stores_frequencies(names):
        return {}
    return {"frequencies": esm.default_frequencies(config.head_size)}


def esm_loaded(layout: str, state: State, config: esm.Config) -> State:
    return esm.zero_mask_row(state, config) if layout == "fair" else state


def bert_original_rows(config: bert.Config) -> KeyMap:
    """``.bin`` files hold the embedding and the head's bias twice, which other forms need not."""
    rows = published_bert.hub_rows(asdict(config))
    copies = tuple(replace(row, optional=False) for row in rows if isinstance(row, Tied) and config.lm_head)
    return *(row for row in rows if not isinstance(row, Tied)), *copies


def t5_original_rows(config: t5.Config) -> KeyMap:
    """``.bin`` files hold the embedding once more for each stack, and for a tied head."""
    embeddings = published_t5.EMBEDDINGS if config.decoder_layers else published_t5.EMBEDDINGS[:2]
    return published_t5.hub_rows(asdict(config), embeddings=embeddings, copies=True)


def ankh_notice(config: t5.Config) -> str | None:
    """Only Ankh's vocabularies have these sizes, so weights of an unknown folder are told by them as well."""
    if config.vocabulary not in (len(vocabularies.ANKH), len(vocabularies.ANKH3)):
        return None
    return "Ankh's weights are published under CC BY-NC-SA 4.0: they may not be used commercially"


def esmfold_network(config: esmfold_config.Config) -> Any:
    return ESMFold(config, esm.ESM(esm.Config(**config.stem)))


def esmfold_joined(layout: str, tensors: TensorSource) -> TensorSource:
    return esmfold_files.joined(tensors) if layout == "original" else tensors


def esmfold_settings(layout: str, settings: Mapping[str, object], tensors: TensorSource) -> dict[str, Any]:
    if layout == "original":
        return published_esmfold.original_config(tensors.extras)
    return published_esmfold.hub_config(settings, tensors.meta)


def esmfold_frequencies(names: Iterable[str], config: esmfold_config.Config) -> State:
    return {f"stem.{name}": x for name, x in esm_frequencies(names, esm.Config(**config.stem)).items()}


FAMILIES = (
    Family(
        name="esmfold",  # before esm, whose tensors it holds as well
        network=esmfold_network,
        config=esmfold_config.Config,
        layout=published_esmfold.recognise,
        joined=esmfold_joined,
        read_config=esmfold_settings,
        key_map=lambda names, config: published_esmfold.key_map(names, asdict(config)),
        hub_rows=lambda config: published_esmfold.hub_rows(asdict(config)),
        hub_files=published_esmfold.hub_files,
        hub_extras=published_esmfold.hub_extras,
        original_rows=lambda config: published_esmfold.original_rows(asdict(config)),
        no_original=lambda config: "the authors' file of an ESMFold holds objects of OmegaConf, which only that writes",
        tokenizer=lambda config: vocabularies.esmfold_tokenizer(),
        computed=esmfold_frequencies,
        always_float32=frozenset({"stem.frequencies"}),
        float32_at_least=frozenset(FLOAT32_AT_LEAST),
        halves=frozenset({"stem.blocks"}),
        auto=torch.float32,
        no_float16="products of pairs in the trunk of an ESMFold exceed 65,504, the largest float16, and turn into "
        "infinities (the language model stays in the float16 of its file when float32 is asked for)",
        no_8_bits="8 bits serve what writes token by token; what they do to structures is not known",
        no_mixed="an ESMFold mixes the two by itself: in bfloat16 its structure module and confidence stay in float32",
    ),
    Family(
        name="esm",
        network=esm.ESM,
        config=esm.Config,
        layout=published_esm.recognise,
        read_config=esm_settings,
        key_map=lambda names, config: published_esm.key_map(names, **esm_form(config)),
        hub_rows=lambda config: published_esm.hub_rows(**esm_form(config)),
        hub_files=published_esm.hub_files,
        original_rows=lambda config: published_esm.fair_rows(**esm_form(config)),
        tokenizer=lambda config: vocabularies.esm_tokenizer(),
        computed=esm_frequencies,
        loaded=esm_loaded,
        always_float32=frozenset({"frequencies"}),
    ),
    Family(
        name="bert",
        network=bert.BERT,
        config=bert.Config,
        layout=published_bert.recognise,
        read_config=lambda layout, settings, tensors: published_bert.hub_config(settings, tensors.meta),
        key_map=lambda names, config: published_bert.key_map(names, asdict(config)),
        hub_rows=lambda config: published_bert.hub_rows(asdict(config)),
        hub_files=published_bert.hub_files,
        original_rows=bert_original_rows,
        tokenizer=lambda config: vocabularies.bert_tokenizer(),
    ),
    Family(
        name="t5",
        network=t5.T5,
        config=t5.Config,
        layout=published_t5.recognise,
        read_config=lambda layout, settings, tensors: published_t5.hub_config(settings, tensors.meta),
        key_map=lambda names, config: published_t5.key_map(names, asdict(config)),
        hub_rows=lambda config: published_t5.hub_rows(asdict(config)),
        hub_files=published_t5.hub_files,
        original_rows=t5_original_rows,
        tokenizer=lambda config: vocabularies.t5_tokenizer(config.vocabulary),
        told_tokenizer=lambda config, pieces: vocabularies.told_tokenizer(config.vocabulary, pieces),
        float32_at_least=frozenset({"encoder.relative_bias.weight", "decoder.relative_bias.weight"}),
        no_float16="the residual stream of a T5 exceeds 65,504, the largest float16, and turns into infinities",
        notice=ankh_notice,
    ),
    Family(
        name="progen2",
        network=progen2.ProGen2,
        config=progen2.Config,
        layout=published_progen2.recognise,
        read_config=lambda layout, settings, tensors: published_progen2.hub_config(settings, tensors.meta),
        key_map=lambda names, config: published_progen2.key_map(names),
        hub_rows=lambda config: published_progen2.hub_rows(),
        hub_files=published_progen2.hub_files,
        original_rows=lambda config: published_progen2.hub_rows(),
        original_extras=lambda config: published_progen2.original_masks(asdict(config)),
        no_original=lambda config: published_progen2.no_original(asdict(config)),
        tokenizer=lambda config: vocabularies.progen2_tokenizer(),
    ),
    Family(
        name="proteinbert",
        network=proteinbert.ProteinBERT,
        config=proteinbert.Config,
        layout=published_proteinbert.recognise,
        read_config=lambda layout, settings, tensors: published_proteinbert.read_config(layout, tensors),
        key_map=lambda names, config: published_proteinbert.key_map(names, asdict(config)),
        hub_rows=lambda config: published_proteinbert.published_rows(asdict(config)),
        hub_files=lambda config, dtype: published_proteinbert.published_config(config),
        no_hub=lambda config: "transformers has no ProteinBERT",
        original_rows=lambda config: published_proteinbert.published_rows(asdict(config)),
        original_file="weights.pkl",
        tokenizer=lambda config: vocabularies.proteinbert_tokenizer(),
        no_mixed="a ProteinBERT spends its time on convolutions, which are in one dtype",
    ),
)
BY_NAME = {family.name: family for family in FAMILIES}
