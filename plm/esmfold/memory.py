"""How much memory a protein takes, and how many rows of its pairs to work on at a time.

What a block allocates, counted by hand; a test compares it with what a process is seen to take. Letters: l residues
(linkers are some), r rows, c channels, p channels of a pair.
"""

from plm.esmfold.model import ESMFold
from plm.esmfold.pair import PRODUCT_ROWS

# On a CPU a block of 256 residues takes the same time with 8 to 64 rows and a third more with 128, when nothing else
# runs; beside other programs few rows are slow. 16 MiB are 32 rows there, and most tensors a quarter of it.
WIDEST = 16 << 20  # bytes of the widest tensor of some rows
PER_ROW = 9  # tensors [r, l, p] of triangle attention: norm, q, k, v, mixed, the same in order, gate, gated, out
LARGEST = 2**31 - 1  # numbers in a tensor: some kernels count with 32 bits (facebookresearch/esm#641)


def needed(net: ESMFold, length: int, rows: int) -> int:
    """Bytes that folding takes at its peak, beside the weights: what stays, and what is made of some rows."""
    pair, size = net.config.pair, net.embed.weight.element_size()
    product = max(rows, min(length, PRODUCT_ROWS))  # of a triangle multiplication; twice as much is kept by allocators
    return at_rest(net, length) + length * pair * size * (3 * product + PER_ROW * rows)


def at_rest(net: ESMFold, length: int) -> int:
    """Bytes that are held however few the rows: the most of what the trunk and the structure module hold."""
    config, size = net.config, net.embed.weight.element_size()
    structure, wide = config.structure, net.to_structure.weight.element_size()
    bias = config.channels // config.head_size
    trunk = wide * config.pair + size * (2 * config.pair + bias)  # pairs, and both sides of all triangles
    module = wide * (config.pair + 2 * structure.pair + 6 * structure.heads)  # pairs, its own, normed; attention
    bins = 2 * 8  # of distances, int64, before and after
    residues = size * 16 * config.channels  # states, and a feed-forward
    return length**2 * (max(trunk, module) + bins) + length * residues


def rows_within(net: ESMFold, length: int, available: int | None, wanted: int | None = None) -> int:
    """How many rows to take at a time, at least one: what fits into ``available`` bytes (None: no limit), and on a CPU
    into its caches; or, if that fits, as many as are ``wanted``."""
    config, size = net.config, net.embed.weight.element_size()
    widest = length * 4 * config.pair  # numbers of a row, in the feed-forward of pairs
    attention = length**2 * (config.pair // config.pair_head_size)  # the same in triangle attention, if written out
    rows = min(length, LARGEST // max(widest, attention))
    if wanted is not None:
        rows = min(rows, wanted)
    elif net.embed.weight.device.type == "cpu":
        rows = min(rows, WIDEST // (widest * size))
    while rows > 1 and available is not None and needed(net, length, rows) > available:
        rows //= 2
    return max(1, rows)
