"""What the contests on a device have in common: batches made beforehand, contestants in every setting, errors told.

A contestant that fails is listed with its reason; it never ends the contest. Rows of tokens go in, and one mean vector
per row comes out, so that all can be compared with float64.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from cuda_peers import ESME, FAESM, Flash, by_reference, padded, varlen
from measuring import BOUNDS, Contestant, Missing, Run, relative
from torch import Tensor, nn

from on_device.job import describe, forget
from on_device.networks import converted
from plm.packing import Packed, batches
from plm_kernels import batch_invariant
from plm_kernels.backends import prefer

MAX_TOKENS = 65_536  # in a packed batch, as plm.embed has them on CUDA
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
Rows = Sequence[Tensor]
Means = list[Tensor]
Grouping = Callable[[Sequence[int]], Sequence[Sequence[int]]]
Scope = Callable[[], AbstractContextManager[Any]]


def guarded(probe: Any, build: Callable[[], Run], dtype: str, bytes: float | None = None) -> Contestant:
    """A contestant that is tried on a few inputs when it is built, and is missing if that fails."""

    def tried() -> Run:
        try:
            run = build()
            with torch.inference_mode():
                run(probe)
        except (Missing, ImportError):
            raise
        except Exception as error:
            reason = describe(error)
            forget(error)
            raise Missing(reason) from None
        return run

    return Contestant(tried, dtype, bytes)


def errors(probe: Any, truth: Callable[[Any], Sequence[Tensor]]) -> Callable[[Mapping[str, Run]], dict[str, float]]:
    """Everyone's error on a few inputs against float64. Nobody is turned away for it: `wrong` judges."""

    def found(runs: Mapping[str, Run]) -> dict[str, float]:
        with torch.inference_mode():
            expected = truth(probe)
            return {name: relative(run(probe), expected) for name, run in runs.items()}

    return found


def wrong(result: Mapping[str, Any]) -> list[str]:
    """Ours whose errors only a mistake explains, or which could not run."""
    rows = result["contestants"]
    off = [
        f"{name} is off by {row['error']:.2g}"
        for name, row in rows.items()
        if name.startswith("plm") and row["error"] is not None and not row["error"] < BOUNDS[row["dtype"]]
    ]
    return off + [f"{name}: {why}" for name, why in result["missing"].items() if name.startswith("plm")]


def kept(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What ``make`` made of the same inputs before: batches are prepared once, and not timed."""
    seen: dict[int, tuple[Any, Any]] = {}

    def get(inputs: Any) -> Any:
        if id(inputs) not in seen:
            seen[id(inputs)] = (inputs, make(inputs))  # held, so that no other inputs get this id
        return seen[id(inputs)][1]

    return get


def settings_of(own: Callable[[], Run]) -> dict[str, Callable[[], Run]]:
    """The same work of ours as it is, on PyTorch's kernels alone, and with the same bits in any batch."""
    return {
        "plm": own,
        "plm, PyTorch alone": lambda: scoped(own(), torch_alone),
        "plm, batch-invariant": lambda: scoped(own(), batch_invariant),
    }


def scoped(run: Run, scope: Scope) -> Run:
    def inside(inputs: Any) -> Any:
        with scope():
            return run(inputs)

    return inside


def torch_alone() -> AbstractContextManager[None]:
    """A scope without Triton's kernels."""
    return prefer("torch")


# Runs on rows of tokens


def encode(net: Any, batch: Packed) -> Tensor:
    return net.encode(batch).hidden  # type: ignore[no-any-return]


def packed_run(net: nn.Module, forward: Callable[[Any, Packed], Tensor] = encode) -> Run:
    """Ours: packed batches, longest first."""

    @kept
    def prepared(rows: Rows) -> tuple[list[Packed], Tensor]:
        groups = list(batches([len(row) for row in rows], MAX_TOKENS))
        made = [Packed.from_ids([rows[i].cpu() for i in some], device=rows[0].device) for some in groups]
        for batch in made:
            _ = batch.sequence  # which is worked out once
        return made, inverse(groups).to(rows[0].device)

    def run(rows: Rows) -> Means:
        made, order = prepared(rows)
        return [torch.cat([segment_means(forward(net, x), x.sequence, x.offsets) for x in made])[order]]

    return run


def segment_means(hidden: Tensor, sequence: Tensor, offsets: Tensor) -> Tensor:
    """``[n, c]`` to the mean of each sequence ``[b, c]``."""
    sums = torch.zeros(len(offsets) - 1, hidden.shape[-1], device=hidden.device, dtype=precise(hidden))
    return sums.index_add_(0, sequence, hidden.to(sums.dtype)) / offsets.diff()[:, None]


def precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def inverse(groups: Sequence[Sequence[int]]) -> Tensor:
    """Where each input is found in the groups laid end to end."""
    return torch.tensor([i for some in groups for i in some]).argsort()


def padded_run(forward: Callable[[Tensor, Tensor], Tensor], groups_of: Grouping) -> Run:
    """Theirs: padded batches, ids and mask ``[b, t]`` to ``[b, t, c]``. ``groups_of`` lengths: who goes together."""

    @kept
    def prepared(rows: Rows) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        groups = groups_of([len(row) for row in rows])
        return [padded([rows[i] for i in some]) for some in groups], inverse(groups).to(rows[0].device)

    def run(rows: Rows) -> Means:
        made, order = prepared(rows)
        means = []
        for ids, mask in made:
            hidden, weights = forward(ids, mask), mask[..., None]
            means.append((hidden.to(precise(hidden)) * weights).sum(1) / weights.sum(1))
        return [torch.cat(means)[order]]

    return run


def in_file_order(lengths: Sequence[int], size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, len(lengths)))) for start in range(0, len(lengths), size)]


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + size] for start in range(0, len(order), size)]


def hub_forward(theirs: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda ids, mask: theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state


def flash_on(net: Any) -> Flash:
    return varlen if net.embed.weight.is_cuda else by_reference


def faesm_run(net: Any) -> Run:
    """Sorted batches of as many real tokens as ours: the best that its algorithm can be given."""
    return padded_run(FAESM(net, flash_on(net)).eval(), lambda lengths: list(batches(lengths, MAX_TOKENS)))


def esme_run(net: Any) -> Run:
    """Packed batches as ours."""
    peer = ESME(net, flash_on(net)).eval()
    return packed_run(peer, lambda peer, batch: peer(batch.tokens, batch.offsets, batch.max_length))


def exact(net: nn.Module) -> Callable[[Rows], Means]:
    """Means in float64, of a copy that lives as long as it is needed."""

    def truth(rows: Rows) -> Means:
        return packed_run(converted(net, torch.float64))(rows)

    return truth
