"""What a decoder remembers while it writes: its own keys and values, and those of the prompts it looks at.

Both belong to the caller, are allocated once, and drop rows that are finished. Letters: r rows (texts being written),
h heads, d head size, t tokens, l layers.
"""

from itertools import accumulate, groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from plm.packing import Packed
from plm_kernels import runs

STEP = 64  # prompts are remembered in multiples of so many tokens


class Cache:
    """Keys and values of the tokens written so far: each ``[l, r, h, capacity, d]``, filled up to ``length``.

    All rows have the same length: they began together.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], scale: float, like: Tensor) -> None:
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        _, self.rows, _, self.capacity, _ = shape
        self.scale, self.length = scale, 0

    def attend(self, layer: int, bias: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the newest token's k and v ``[r, h, d]``, then attend with its q to all that is there: ``[r, h, d]``.

        ``bias`` is ``[h, length + 1]``, added to the scaled logits.
        """
        here = slice(self.length + 1)
        keys, values = self.keys[layer, : self.rows], self.values[layer, : self.rows]
        keys[:, :, self.length], values[:, :, self.length] = k, v
        mask = bias[None, :, None] if q.device.type == "cpu" else bias[None, :, None].to(q.dtype)
        keys, values = keys[:, :, here], values[:, :, here]
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, mask, scale=self.scale)[:, :, 0]

    def advance(self) -> None:
        """All layers have the newest token."""
        self.length += 1

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order: fewer where texts are finished, others where beams were chosen."""
        here = slice(self.length)
        for store in (self.keys, self.values):
            store[:, : len(rows), :, here] = store[:, rows, :, here]
        self.rows = len(rows)


class Memory:
    """Keys and values of encoded prompts, computed once and shared by all texts that are written to a prompt.

    Rows lie prompt by prompt. A prompt is padded to a multiple of ``STEP`` tokens, also when it is alone: prompts of
    one padded length with equally many rows are attended to in one call, and a text does not depend on the others.
    """

    def __init__(self, batch: Packed, rows_per_prompt: int, scale: float, like: Tensor) -> None:
        self.lengths, self.scale = batch.lengths, scale
        self.counts = [rows_per_prompt] * len(batch)
        self.runs = runs(-(-length // STEP) * STEP for length in batch.lengths)
        self.blocks: list[list[tuple[Tensor, Tensor]]] = []  # for each layer and run of padded lengths, [p, h, t, d]
        self.masks: list[Tensor] = []  # for each run, [p, 1, 1, t]: 0 for a token, -inf for padding
        precise = torch.promote_types(like.dtype, torch.float32) if like.device.type == "cpu" else like.dtype
        places = torch.arange(max(length for _, length in self.runs))
        padding = torch.tensor(batch.lengths)[:, None] <= places
        for some, (_, length) in zip(padding.split([count for count, _ in self.runs]), self.runs, strict=True):
            mask = torch.zeros(some.shape, dtype=precise).masked_fill(some, -torch.inf)
            self.masks.append(mask[:, None, None, :length].to(like.device))
        self._arrange()

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Take the next layer's keys and values ``[n, h, d]``."""
        pairs = zip(keys.split(self.lengths), values.split(self.lengths), strict=True)
        blocks = []
        for count, length in self.runs:
            stores = [keys.new_zeros(count, *keys.shape[1:2], length, keys.shape[2]) for _ in range(2)]
            for i in range(count):
                for store, piece in zip(stores, next(pairs), strict=True):
                    store[i, :, : len(piece)] = piece.transpose(0, 1)
            blocks.append((stores[0], stores[1]))
        self.blocks.append(blocks)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attend with the newest token of each text: ``[r, h, d] -> [r, h, d]``."""
        mixed = []
        for piece, (count, run, some) in zip(q.split(self.sizes), self.calls, strict=True):
            keys, values = self.blocks[layer][run]
            queries = piece.unflatten(0, (-1, count)).transpose(1, 2)  # [prompts, h, rows of each, d]
            mask = self.masks[run][some]
            out = F.scaled_dot_product_attention(queries, keys[some], values[some], mask, scale=self.scale)
            mixed.append(out.transpose(1, 2).flatten(0, 1))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in ascending order of their prompts."""
        prompts = torch.repeat_interleave(torch.tensor(self.counts))[rows.cpu()]
        self.counts = torch.bincount(prompts, minlength=len(self.counts)).tolist()
        self._arrange()

    def _arrange(self) -> None:
        """Plan the calls: (rows per prompt, run, prompts within the run) for prompts alike that lie side by side."""
        self.calls: list[tuple[int, int, slice]] = []
        starts = [0, *accumulate(count for count, _ in self.runs)]
        for run, (start, stop) in enumerate(pairwise(starts)):
            for count, group in groupby(range(start, stop), key=self.counts.__getitem__):
                members = list(group)
                if count:
                    self.calls.append((count, run, slice(members[0] - start, members[-1] + 1 - start)))
        self.sizes = [count * (some.stop - some.start) for count, _, some in self.calls]
