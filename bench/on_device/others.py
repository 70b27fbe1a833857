"""Contests of parts and of writing: attention with T5's bias, ProGen2's decoding, a block of ESMFold's trunk."""

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from cuda_peers import varlen
from measuring import Contest, Missing, Settings, Workload
from torch import Tensor

import plm
from on_device import twins
from on_device.contests import DTYPES, errors, guarded, scoped, torch_alone
from on_device.encoders import device_workload
from on_device.networks import converted, fold_config
from plm.esmfold.trunk import Block
from plm_kernels import RelativeBias, attention, reference
from plm_weights import import_weights
from plm_weights.esmfold import trunk_rows

HEADS, HEAD_SIZE, REACH = 16, 64, 128  # of Ankh3-large


# Attention with a relative bias


def t5_attention(settings: Settings, length: int, tokens: int) -> Contest:
    """q, k, v of one layer to what attention makes of them, scores unscaled, against a bias that is written out."""
    heads, length, tokens = (2, 16, 32) if settings.quick else (HEADS, length, tokens)
    device, count = settings.device, tokens // length
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16
    told = str(dtype).removeprefix("torch.")
    table = torch.randn(heads, 2 * REACH + 1, generator=generator).to(device)
    bias = RelativeBias(table)
    packed = torch.randn(count * length, 3, heads, HEAD_SIZE, generator=generator).to(device, dtype)
    packed[:, :2] *= HEAD_SIZE**-0.25
    offsets = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)
    written = bias.dense(length).to(dtype)[None]

    def rectangles(qkv: Tensor) -> list[Tensor]:
        return [x.unflatten(0, (-1, length)).transpose(1, 2) for x in qkv.unbind(1)]

    def sdpa(qkv: Tensor, mask: Tensor) -> list[Tensor]:
        mixed = F.scaled_dot_product_attention(*rectangles(qkv), mask, scale=1.0)
        return [mixed.transpose(1, 2).flatten(0, 1)]

    def as_transformers(qkv: Tensor) -> list[Tensor]:
        """The bias and the mask of pads as one tensor ``[b, h, t, t]``, anew in every layer (transformers 5.15 on)."""
        seen = torch.ones(count, 1, 1, length, dtype=torch.bool, device=device)
        return sdpa(qkv, torch.where(seen, written, torch.finfo(dtype).min))

    def ours(qkv: Tensor) -> list[Tensor]:
        return [attention(*qkv.unbind(1), offsets, scale=1.0, bias=bias, max_length=length)]

    def no_bias() -> Callable[[Tensor], list[Tensor]]:
        if settings.device == "cpu":
            raise Missing("torch's varlen attention is for CUDA")
        return lambda qkv: [varlen(*qkv.unbind(1), offsets, length, 1.0)]

    def truth(qkv: Tensor) -> list[Tensor]:
        q, k, v = qkv.double().unbind(1)
        return [reference.attention(q, k, v, offsets, scale=1.0, bias=RelativeBias(table.double()))]

    found = errors(packed, truth)

    def judged(runs: Any) -> dict[str, float]:
        return found({name: run for name, run in runs.items() if "no bias" not in name})

    builds: dict[str, Callable[[], Any]] = {
        "plm": lambda: ours,
        "SDPA with the bias at hand": lambda: lambda qkv: sdpa(qkv, written),
        "SDPA as transformers' T5 does": lambda: as_transformers,
        "torch's varlen, no bias at all": no_bias,
    }
    return Contest(
        {name: guarded(packed, build, told) for name, build in builds.items()}, packed, count * length,
        4.0 * length * tokens * heads * HEAD_SIZE, judged, notes={"heads": heads, "head": HEAD_SIZE, "batch": count},
    )  # fmt: skip


def t5_workload(length: int) -> Workload:
    prepare = functools.partial(t5_attention, length=length, tokens=32_768)
    what = f"attention alone with T5's bias, {32_768 // length} x {length} tokens, 16 heads of 64"
    return device_workload(f"T5 attention {length}", what, prepare, budget=4.0)


# Writing


def decoding(settings: Settings, size: str, texts: int, tokens: int, peer_too: bool) -> Contest:
    """Samples of one prompt of 16 tokens, none of which may end. ``bytes``: what every step reads at least."""
    dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16
    told = str(dtype).removeprefix("torch.")
    theirs, net = twins.progen2(size, settings.device, dtype, settings.quick)
    prompt_tokens, texts, tokens = (4, 2, 8) if settings.quick else (16, texts, tokens)
    generator = torch.Generator().manual_seed(1)
    prompt = [3, *torch.randint(5, 25, (prompt_tokens - 1,), generator=generator).tolist()]

    def writer(graphs: bool = True) -> Callable[[Sequence[int]], list[Tensor]]:
        own = twins.wrapped(net, "progen2", f"progen2-{size}")  # each with graphs of its own

        def write(given: Sequence[int]) -> list[Tensor]:
            (found,) = plm.generate(
                own, [given], num_samples=texts, min_length=tokens, max_length=tokens, likelihood=False, seed=0,
                cuda_graphs=graphs, max_tokens=texts * tokens,
            )  # fmt: skip
            return [sample.log_probs for sample in found]

        return write

    def peer() -> Callable[[Any], Any]:
        hub = twins.present(theirs)
        from transformers import GenerationConfig

        how = GenerationConfig(
            min_length=tokens, max_length=tokens, eos_token_id=2, pad_token_id=0, suppress_tokens=[2, 3, 4],
            use_cache=True, do_sample=True, top_k=0, num_return_sequences=texts,
        )  # fmt: skip
        ids = torch.tensor([prompt], device=settings.device)
        return lambda given: hub.generate(ids, how, attention_mask=torch.ones_like(ids))

    new = tokens - prompt_tokens
    per_token = 2 * net.config.layers * net.config.channels * dtype.itemsize  # of keys and values
    weights = sum(x.numel() for name, x in net.named_parameters() if "embed" not in name) * dtype.itemsize
    read = new * weights + texts * per_token * sum(range(prompt_tokens, tokens))
    builds: dict[str, Callable[[], Any]] = {"plm": writer}
    if settings.device != "cpu":
        builds["plm, no graphs"] = lambda: writer(graphs=False)
    if settings.device != "cpu" and texts == 1:
        builds["plm, PyTorch alone"] = lambda: scoped(writer(), torch_alone)
    if peer_too:
        builds["transformers GPT-J"] = peer
    contestants = {name: guarded(prompt, build, told, float(read)) for name, build in builds.items()}
    return Contest(
        contestants, prompt, float(texts * new), notes={"texts": texts, "tokens": tokens, "prompt": prompt_tokens}
    )


def w5(size: str, texts: int, tokens: int, peer: bool = True, **how: Any) -> Workload:
    prepare = functools.partial(decoding, size=size, texts=texts, tokens=tokens, peer_too=peer)
    what = f"{texts} samples of one prompt up to {tokens} tokens, none may end"
    return device_workload(f"W5 progen2-{size} {texts}x{tokens}", what, prepare, ceiling="read", **how)


# ESMFold


def fold_block(settings: Settings, length: int, dtype: str) -> Contest:
    """One block of the trunk at its published sizes, residues and pairs in and out."""
    config = fold_config(settings.quick)
    length = 9 if settings.quick else length
    with torch.device("meta"):
        whole = Block(config)
    whole = whole.to_empty(device=settings.device).requires_grad_(False).eval()
    twins.fill(whole)
    try:
        theirs = hub_block(whole, config, settings.device)
    except Exception as error:  # another version fails in its own way
        theirs = twins.lost(error)
        twins.fill(whole)  # it may have taken some of theirs
    net = converted(whole, DTYPES[dtype])
    generator = torch.Generator().manual_seed(1)
    shapes = ((length, config.channels), (length, length, config.pair))
    inputs = tuple(torch.randn(shape, generator=generator).to(settings.device) for shape in shapes)

    def ours(block: Any) -> Callable[[Any], list[Tensor]]:
        return lambda given: list(block(given[0].clone(), given[1].clone(), len(given[0])))

    def peer(chunk: int | None) -> Callable[[Any], list[Tensor]]:
        block = twins.in_dtype(theirs, DTYPES[dtype])

        def run(given: Any) -> list[Tensor]:
            s, z = (x.to(DTYPES[dtype]) for x in given)
            mask = torch.ones(1, len(s), dtype=s.dtype, device=s.device)
            return [x[0] for x in block(s[None], z[None], mask=mask, chunk_size=chunk)]

        return run

    def truth(given: Any) -> list[Tensor]:
        return ours(converted(whole, torch.float64))([x.double() for x in given])

    builds: dict[str, Callable[[], Any]] = {
        "plm": lambda: ours(net),
        "plm, PyTorch alone": lambda: scoped(ours(net), torch_alone),
        "transformers": lambda: peer(None),
        "transformers, chunk 64": lambda: peer(64),
    }
    c, p = config.channels, config.pair
    pairs = length**2 * (31 * 2 * p**2 + 64 * p) + 12 * p * length**3
    flops = pairs + 26 * c**2 * length + 4 * c * length**2
    contestants = {name: guarded(inputs, build, dtype) for name, build in builds.items()}
    return Contest(contestants, inputs, 1.0, float(flops), errors(inputs, truth), notes={"residues": length})


def hub_block(ours: Block, config: Any, device: str) -> Any:
    """transformers' block with random weights, which ours gets as well."""
    from transformers.models.esm.modeling_esmfold import EsmFoldTriangularSelfAttentionBlock

    sizes = {"sequence_state_dim": config.channels, "pairwise_state_dim": config.pair}
    heads = {"sequence_head_width": config.head_size, "pairwise_head_width": config.pair_head_size, "dropout": 0}
    with torch.device(device):
        theirs = EsmFoldTriangularSelfAttentionBlock(SimpleNamespace(**sizes, **heads)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in theirs.parameters():
        scale = 0.02 if weight.dim() == 1 else weight.shape[-1] ** -0.5
        weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    stored = {f"trunk.blocks.0.{name}": weight for name, weight in theirs.state_dict().items()}
    wanted = {f"blocks.0.{name}": weight for name, weight in ours.state_dict().items()}
    state = import_weights(trunk_rows(config.channels // config.head_size), stored, wanted)
    ours.load_state_dict({name.removeprefix("blocks.0."): weight.clone() for name, weight in state.items()})
    return theirs


def w7(length: int, dtype: str) -> Workload:
    prepare = functools.partial(fold_block, length=length, dtype=dtype)
    what = f"one block of ESMFold's trunk, {length} residues, {dtype}"
    return device_workload(f"W7 esmfold block {length} {dtype}", what, prepare, unit="blocks", budget=4.0)
