"""Contests of encoders: what a device does with prepared batches, and what users see, from strings to vectors."""

import functools
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from arithmetic import flops
from inputs import lengths, protein, proteins
from measuring import Contest, Contestant, Missing, Settings, Workload
from torch import Tensor, nn

import plm
from on_device import twins
from on_device.contests import (
    DTYPES,
    by_length,
    errors,
    esme_run,
    exact,
    faesm_run,
    guarded,
    hub_forward,
    in_file_order,
    packed_run,
    padded_run,
    scoped,
    settings_of,
)
from on_device.networks import converted
from plm.encoder_graphs import graphs_off
from plm.models.proteinbert import Config as ProteinBERTConfig
from plm.models.proteinbert import ProteinBERT

RESIDUES = {"esm": range(4, 24), "t5": range(8, 28), "bert": range(5, 25)}
PROBE = (350, 117, 64)  # tokens of what is compared with float64
SIZE = 32  # rows in a padded batch
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


def rows(tokens: Sequence[int], family: str, settings: Settings) -> list[Tensor]:
    shorter = [min(t, 12 + i % 5) for i, t in enumerate(tokens[:3])] if settings.quick else tokens
    return twins.rows_of(shorter, RESIDUES[family], settings.device)


# On prepared batches


def on_device(
    settings: Settings,
    twin: Callable[[str, bool], tuple[Any, nn.Module]],
    family: str,
    tokens: Sequence[int],
    dtype: str,
    who: str,
    size: int = SIZE,
) -> Contest:
    """Rows of tokens on the device to mean vectors on the device. ``who``: letters, see `CONTESTANTS`."""
    theirs, whole = twin(settings.device, settings.quick)
    net = converted(whole, DTYPES[dtype])
    inputs, probe = rows(tokens, family, settings), rows(PROBE, family, settings)

    @functools.cache
    def peer(dtype: str) -> Any:
        return twins.in_dtype(theirs, DTYPES[dtype])

    def hub(dtype: str, groups: Callable[[Sequence[int], int], Any]) -> Any:
        return padded_run(hub_forward(peer(dtype)), lambda lengths: groups(lengths, size))

    own = settings_of(lambda: packed_run(net))
    every: dict[str, tuple[str, Callable[[], Any], str]] = {
        "p": ("plm", own["plm"], dtype),
        "k": ("plm, PyTorch alone", own["plm, PyTorch alone"], dtype),
        "b": ("plm, batch-invariant", own["plm, batch-invariant"], dtype),
        "f": ("plm float32", lambda: packed_run(whole), "float32"),
        "t": ("transformers tuned", lambda: hub(dtype, by_length), dtype),
        "c": ("transformers common", lambda: hub(dtype, in_file_order), dtype),
        "d": ("transformers default", lambda: hub("float32", in_file_order), "float32"),
        "F": ("algorithm of FAESM on torch's varlen", lambda: faesm_run(net), dtype),
        "E": ("algorithm of ESME on torch's varlen", lambda: esme_run(net), dtype),
        "e": ("fair-esm sorted", lambda: fair(whole, dtype, size, settings), dtype),
    }
    contestants = {every[x][0]: guarded(probe, every[x][1], every[x][2]) for x in who}
    counted = [len(row) for row in inputs]
    return Contest(
        contestants, inputs, sum(counted), flops(whole.config, counted), errors(probe, exact(whole)),
        notes={"sequences": len(inputs), "batch of peers": size, "from": "tokens on the device", "to": "means there"},
    )  # fmt: skip


CONTESTANTS = (
    "p plm, k on PyTorch alone, b batch-invariant, f float32; t, c, d transformers; F FAESM, E ESME, e fair-esm"
)


def fair(net: Any, dtype: str, size: int, settings: Settings) -> Any:
    """fair-esm's class with our weights, on sorted batches."""
    try:
        from peers.esm import fair_model

        theirs, _ = fair_model(converted(net, torch.float32).cpu(), dtype)
    except ImportError as error:
        raise Missing(f"fair-esm is not installed ({error})") from None
    theirs, layers = theirs.to(settings.device), net.config.layers
    return padded_run(
        lambda ids, mask: theirs(ids, repr_layers=[layers])["representations"][layers],
        lambda lengths: by_length(lengths, size),
    )


def swiss_prot(count: int, longest: int = 100_000) -> list[int]:
    """Tokens of so many proteins with Swiss-Prot's lengths, start and end included."""
    return [min(length, longest) + 2 for length in lengths("swiss_prot", count, 8)]


def esm2(name: str) -> Callable[[str, bool], tuple[Any, nn.Module]]:
    return lambda device, quick: twins.esm2(name, device, quick)


def device_workload(name: str, what: str, prepare: Callable[[Settings], Contest], **how: Any) -> Workload:
    return Workload(name, what, prepare, **{"unit": "tokens", "budget": 8.0, "rounds": 5, **how})


def w1(model: str, count: int, who: str, dtype: str = "bfloat16", **how: Any) -> Workload:
    prepare = functools.partial(
        on_device, twin=esm2(model), family="esm", tokens=swiss_prot(count), dtype=dtype, who=who, **how
    )
    told = "" if dtype == "bfloat16" else f" {dtype}"
    what = f"encode {count} proteins with Swiss-Prot's lengths, on the device"
    return device_workload(f"W1 {model} device-only{told} {count}", what, prepare)


def w2(model: str, shape: tuple[int, int], who: str = "ptF") -> Workload:
    tokens = [shape[1]] * shape[0]
    prepare = functools.partial(on_device, twin=esm2(model), family="esm", tokens=tokens, dtype="bfloat16", who=who)
    name = "{}x{}".format(*shape)
    return device_workload(f"W2 {model} {name}", f"encode {name} tokens: nothing to pad", prepare, budget=4.0)


def ankh3(name: str, tokens: Sequence[int], size: int, who: str) -> Workload:
    prepare = functools.partial(
        on_device, twin=twins.ankh3, family="t5", tokens=tokens, dtype="bfloat16", who=who, size=size
    )
    return device_workload(f"ankh3-large encoder {name}", f"encode {name} with the shape of Ankh3-large", prepare)


def w4(count: int) -> Workload:
    prepare = functools.partial(
        on_device, twin=twins.igbert, family="bert", tokens=[250] * count, dtype="bfloat16", who="pkt", size=64
    )
    return device_workload("W4 igbert pairs", f"encode {count} antibody pairs of 250 tokens", prepare)


# From strings to vectors


def strings(settings: Settings, model: str, count: int, peers: bool) -> Contest:
    """What users see: proteins in, mean vectors on the host out, tokenizing and copies included."""
    theirs, whole = twins.esm2(model, settings.device, settings.quick)
    net = converted(whole, torch.bfloat16)
    sequences = proteins("swiss_prot", 3 if settings.quick else count, 8)
    if settings.quick:
        sequences = [sequence[:20] for sequence in sequences]
    rng = Random(1)
    probe = [protein(min(length, 30) if settings.quick else length, rng) for length in PROBE]

    def embed() -> Callable[[Any], list[Tensor]]:
        own = twins.wrapped(net, "esm", model)  # each with graphs of its own
        return lambda given: plm.embed(own, given, pool="mean")

    def tuned() -> Callable[[Any], list[Tensor]]:
        from peers.esm import by_length, run_transformers, transformers_tokenizer

        peer, tokenizer = twins.in_dtype(theirs, torch.bfloat16), transformers_tokenizer()
        return lambda given: run_transformers(peer, tokenizer, given, by_length(given), SIZE)

    own_settings = settings_of(embed)
    own_settings["plm, no graphs"] = lambda: scoped(embed(), graphs_off)
    contestants = {name: guarded(probe, build, "bfloat16") for name, build in own_settings.items()}
    if peers:
        contestants["transformers tuned"] = guarded(probe, tuned, "bfloat16")
    counted = [len(sequence) + 2 for sequence in sequences]

    def truth(given: Sequence[str]) -> list[Tensor]:
        return plm.embed(twins.wrapped(converted(whole, torch.float64), "esm", model), given, pool="mean")

    return Contest(
        contestants, sequences, sum(map(len, sequences)), flops(whole.config, counted), errors(probe, truth),
        notes={"proteins": len(sequences), "from": "strings", "to": "mean vectors on the host"},
    )  # fmt: skip


def end_to_end(model: str, count: int, *, peers: bool = True, **how: Any) -> Workload:
    prepare = functools.partial(strings, model=model, count=count, peers=peers)
    what = f"embed {count} proteins with Swiss-Prot's lengths, strings in, mean vectors out"
    return device_workload(f"W1 {model} end-to-end {count}", what, prepare, unit="residues", **how)


def marginals(settings: Settings, length: int) -> Contest:
    """All single substitutions of one protein by masked marginals."""
    from plm.mutations import single_substitutions

    theirs, whole = twins.esm2("esm2-650m", settings.device, settings.quick, head=True)
    own = twins.wrapped(converted(whole, torch.bfloat16), "esm", "esm2-650m")
    length = 8 if settings.quick else length
    wild_type = protein(length, Random(2))
    names = single_substitutions(wild_type)
    letters = own.tokenizer.encode(AMINO_ACIDS)[1:-1]

    def ours(given: str) -> list[Tensor]:
        scores = plm.variants(own, given, single_substitutions(given), how="masked-marginals")
        return [torch.tensor(scores, dtype=torch.float64)]

    def peer() -> Callable[[str], list[Tensor]]:
        hub = twins.in_dtype(theirs, torch.bfloat16)

        def run(given: str) -> list[Tensor]:
            ids = torch.tensor(own.tokenizer.encode(given), device=settings.device)
            masked = ids.repeat(len(given), 1)
            place = torch.arange(len(given), device=settings.device)
            masked[place, place + 1] = 32
            logits = torch.cat([hub(input_ids=some).logits for some in masked.split(SIZE)])[place, place + 1]
            log_p = logits.float().log_softmax(-1).double()
            own_log_p = log_p.gather(1, ids[1:-1, None])
            table = dict(zip(AMINO_ACIDS, (log_p[:, letters] - own_log_p).cpu().T, strict=True))
            return [torch.stack([table[name[-1]][int(name[1:-1]) - 1] for name in single_substitutions(given)])]

        return run

    def truth(given: str) -> list[Tensor]:
        whole64 = twins.wrapped(converted(whole, torch.float64), "esm", "esm2-650m")
        found = plm.variants(whole64, given, single_substitutions(given), how="masked-marginals")
        return [torch.tensor(found, dtype=torch.float64)]

    probe = wild_type[:8]
    contestants = {
        "plm": guarded(probe, lambda: ours, "bfloat16"),
        "transformers batched": guarded(probe, peer, "bfloat16"),
    }
    counted = [length + 2] * length
    return Contest(
        contestants, wild_type, len(names), flops(whole.config, counted), errors(probe, truth),
        notes={"residues": length, "variants": len(names), "masked copies": length},
    )  # fmt: skip


def protein_bert(settings: Settings, count: int) -> Contest:
    """ProteinBERT's global vectors of proteins of real lengths, from strings."""
    sizes = (26, 40, 2, 32, 64, 4, 16) if settings.quick else (26, 8943, 6, 128, 512, 4, 64)
    config = ProteinBERTConfig(*sizes)
    with torch.device("meta"):
        net = ProteinBERT(config)
    net = net.to_empty(device=settings.device).requires_grad_(False).eval()
    twins.fill(net)
    sequences = [each[:510] for each in proteins("swiss_prot", 3 if settings.quick else count, 8)]
    sequences = [each[:20] for each in sequences] if settings.quick else sequences
    probe = sequences[:3]

    def embed(dtype: torch.dtype) -> Callable[[Any], list[Tensor]]:
        model = twins.wrapped(converted(net, dtype), "proteinbert", "proteinbert")
        return lambda given: plm.embed(model, given, pool="global")

    own = settings_of(lambda: embed(torch.bfloat16))
    contestants: dict[str, Contestant] = {
        name: guarded(probe, build, "bfloat16") for name, build in own.items() if "batch" not in name
    }
    contestants["plm float32"] = guarded(probe, lambda: embed(torch.float32), "float32")
    c, taps = config.channels, 2 * config.kernel * config.channels**2
    per_token = config.layers * 2 * (taps + c * c + c * config.heads * config.key_size + c * config.global_channels)
    tokens = sum(len(each) + 2 for each in sequences)
    return Contest(
        contestants, sequences, len(sequences), per_token * tokens, errors(probe, lambda x: embed(torch.float64)(x)),
        notes={"from": "strings", "to": "global vectors on the host", "peers": "the original is Keras: none here"},
    )  # fmt: skip
