"""W2 and W6 for a T5: Ankh3-large's encoder at one length after the other, and completion as on its model card.

The twin is as wide as Ankh3-large and less deep: all layers cost the same, so that ratios and shares stay. Token ids
in, so that no tokenizer is timed.
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from arithmetic import flops
from measuring import Contest, Contestant, Run, Settings, Workload, against, relative
from peers.t5 import FULL_WIDTH, config_of, contestant, prompts, run_generate, run_own, twins
from torch import Tensor

from plm.packing import Packed

PEERS = ("transformers eager", "transformers tuned")


def sizes(settings: Settings, layers: int, decoder_layers: int) -> tuple[int, int, int]:
    """Width, encoder layers, decoder layers."""
    if settings.quick:
        return 192, 2, min(decoder_layers, 2)
    return (FULL_WIDTH, 48, 24) if settings.full else (FULL_WIDTH, layers, decoder_layers)


def encoder(settings: Settings, dtype: str, length: int, batch: int) -> Contest:
    """``batch`` sequences of ``length`` tokens: transformers takes all at once, plm its own batches."""
    shape = sizes(settings, 4, 1)
    length = min(length, 40) if settings.quick else length
    theirs = cache(lambda: twins(getattr(torch, dtype), *shape)[0])

    def build(way: str) -> Run:
        theirs_, ours = (theirs(), None) if way in PEERS else (None, twins(getattr(torch, dtype), *shape)[1])
        return lambda ids: contestant(way, theirs_, ours, ids)()  # type: ignore[arg-type]

    def exact(ids: Tensor) -> Tensor:
        return contestant("plm", None, twins(torch.float64, *shape)[1], ids)()

    ids = torch.randint(3, 23, (batch, length), generator=torch.Generator().manual_seed(0))
    everyone = {way: Contestant(partial(build, way), dtype) for way in PEERS}
    everyone[f"plm {dtype}"] = Contestant(partial(build, "plm"), dtype)
    return Contest(
        contestants=everyone,
        inputs=ids,
        units=ids.numel(),
        flops=flops(config_of(*shape), [length] * batch),
        errors=against(ids[:1, :64], exact, everyone),
        notes={"layers": shape[1], "channels": shape[0], "sequences": batch, "tokens each": length},
    )


class HubWriter:
    def __init__(self, model: Any, new: int) -> None:
        self.model, self.new = model, new

    def __call__(self, rows: list[list[int]]) -> Tensor:
        return run_generate(self.model, rows, self.new)[:, 1:]

    def log_probs(self, row: list[int], written: Tensor) -> Tensor:
        """Of written ids ``[t]``, which follow the start token."""
        ids = torch.cat([torch.zeros(1, dtype=torch.long), written])
        logits = self.model(input_ids=torch.tensor([row]), decoder_input_ids=ids[None, :-1]).logits[0].double()
        return logits.log_softmax(-1).gather(-1, written[:, None])[:, 0]


class OwnWriter(HubWriter):
    def __call__(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor([sample.ids[1:] for sample in run_own(self.model, rows, self.new)])

    def log_probs(self, row: list[int], written: Tensor) -> Tensor:
        ids = torch.cat([torch.zeros(1, dtype=torch.long), written])
        logits = self.model.net(Packed.from_ids([row]), decoder=Packed.from_ids([ids[:-1]])).logits.double()
        return logits.log_softmax(-1).gather(-1, written[:, None])[:, 0]


def completion(settings: Settings, batch: int) -> Contest:
    """Greedy, the end banned; prompts of 64 to 128 residues are encoded within the time."""
    shape = sizes(settings, 4, 4)
    new = 8 if settings.quick else 64
    rows = prompts(batch, 128)

    def build(kind: str, dtype: str) -> HubWriter:
        theirs, ours = twins(getattr(torch, dtype), *shape)
        return HubWriter(theirs, new) if kind == "transformers" else OwnWriter(ours, new)

    def errors(runs: Mapping[str, Run]) -> dict[str, float]:
        """Log-probabilities of the text that plm writes in float32, which transformers has to write as well."""
        written = {name: run(rows) for name, run in runs.items()}  # and so all are warm
        assert torch.equal(written["transformers float32"], written["plm float32"]), "the texts differ"
        text = written["plm float32"][0]
        exact = build("plm", "float64").log_probs(rows[0], text)
        return {name: relative([run.log_probs(rows[0], text)], [exact]) for name, run in runs.items()}  # type: ignore[attr-defined]

    names = [(kind, dtype) for kind in ("transformers", "plm") for dtype in ("float32", "bfloat16")]
    decoder = shape[2] * weights_of_layer(shape[0]) + 256 * shape[0]
    return Contest(
        contestants={
            f"{kind} {dtype}": Contestant(
                partial(build, kind, dtype), dtype, new * decoder * (4 if dtype == "float32" else 2)
            )
            for kind, dtype in names
        },
        inputs=rows,
        units=batch * new,
        errors=errors,
        notes={"encoder layers": shape[1], "decoder layers": shape[2], "channels": shape[0], "new tokens": new},
    )


def weights_of_layer(width: int) -> int:
    """Numbers of a decoder layer that a step reads: not the projections to keys and values of the encoder's states."""
    config = config_of(width, 1, 1)
    inner = config.heads * config.head_size
    return 6 * width * inner + 3 * width * config.feed_forward


WORKLOADS = (
    *(
        Workload(
            f"W2 ankh3-shaped {length} {dtype}",
            f"hidden states of {batch} x {length} tokens from an encoder of Ankh3-large's width",
            partial(encoder, dtype=dtype, length=length, batch=batch),
            unit="tokens",
            minutes=0.9 if length == 2048 else 0.6,
            memory=(length, dtype) == (2048, "bfloat16"),
        )
        for length, batch, dtype in (
            (256, 8, "bfloat16"),
            (1024, 2, "bfloat16"),
            (2048, 1, "float32"),
            (2048, 1, "bfloat16"),
        )
    ),
    *(
        Workload(
            f"W6 ankh3-shaped batch-{batch}",
            f"completion: {batch} prompts of up to 128 residues, 64 new tokens each, greedy",
            partial(completion, batch=batch),
            unit="tokens",
            ceiling="read",
            minutes=1.0,
        )
        for batch in (1, 16)
    ),
)
