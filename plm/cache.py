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

    Rows lie prompt by prompt. Prompts of equal length that have equally many rows are attended to in one call; none is
    padded, so a text does not depend on what else is in the batch.
    """

    def __init__(self, batch: Packed, rows_per_prompt: int, scale: float) -> None:
        self.lengths, self.scale = batch.lengths, scale
        self.counts = [rows_per_prompt] * len(batch)
        self.blocks: list[list[tuple[Tensor, Tensor]]] = []  # for each layer and run of equal lengths, [count, h, t, d]

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Take the next layer's keys and values ``[n, h, d]``."""
        shapes = runs(self.lengths)
        sizes = [count * length for count, length in shapes]
        laid = [
            [piece.unflatten(0, shape).transpose(1, 2).contiguous() for piece, shape in zip(parts, shapes, strict=True)]
            for parts in (keys.split(sizes), values.split(sizes))
        ]
        self.blocks.append(list(zip(*laid, strict=True)))
        self._arrange()

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attend with the newest token of each text: ``[r, h, d] -> [r, h, d]``."""
        mixed = []
        for piece, (count, block, some) in zip(q.split(self.sizes), self.calls, strict=True):
            keys, values = self.blocks[layer][block]
            queries = piece.unflatten(0, (-1, count)).transpose(1, 2)  # [prompts, h, rows of each, d]
            out = F.scaled_dot_product_attention(queries, keys[some], values[some], scale=self.scale)
            mixed.append(out.transpose(1, 2).flatten(0, 1))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in ascending order of their prompts."""
        prompts = torch.repeat_interleave(torch.tensor(self.counts))[rows.cpu()]
        self.counts = torch.bincount(prompts, minlength=len(self.counts)).tolist()
        self._arrange()

    def _arrange(self) -> None:
        """Plan the calls: (rows per prompt, block, prompts within the block) for each run of prompts alike."""
        self.calls: list[tuple[int, int, slice]] = []
        starts = [0, *accumulate(count for count, _ in runs(self.lengths))]
        for block, (start, stop) in enumerate(pairwise(starts)):
            for count, group in groupby(range(start, stop), key=self.counts.__getitem__):
                members = list(group)
                if count:
                    self.calls.append((count, block, slice(members[0] - start, members[-1] + 1 - start)))
        self.sizes = [count * (some.stop - some.start) for count, _, some in self.calls]
