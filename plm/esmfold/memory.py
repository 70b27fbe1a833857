"""How much memory a protein takes, and how many rows of pairs to work on at a time.

Letters: l residues, r rows, p channels of a pair.
"""

from plm.esmfold.model import ESMFold

CACHE = 8 << 20  # bytes of a tensor that stays in a CPU's caches, and far from where glibc asks the system for memory
LARGEST = 2**31 - 1  # numbers in a tensor that every kernel counts with 32 bits


def needed(net: ESMFold, length: int, rows: int) -> int:
    """Bytes that folding a protein takes at its peak beside the weights, roughly: what stays, and what rows take."""
    return at_rest(net, length) + rows * per_row(net, length)


def at_rest(net: ESMFold, length: int) -> int:
    """Bytes that are held whatever the rows: the larger of what the trunk and the structure module hold."""
    config, size = net.config, net.embed.weight.element_size()
    structure, wide = config.structure, net.to_structure_pair.weight.element_size()
    trunk = size * (3 * config.pair + config.channels // config.head_size)  # pairs, and two sides of a triangle
    module = size * config.pair + wide * (2 * structure.pair + 6 * structure.heads)  # pairs, theirs and normed; logits
    per_residue = size * 16 * config.channels
    return length**2 * (max(trunk, module) + 16) + length * per_residue  # 16: two tables of bins


def per_row(net: ESMFold, length: int) -> int:
    """Bytes of temporaries for each row that is worked on at a time."""
    return length * net.config.pair * net.embed.weight.element_size() * 10


def rows_within(net: ESMFold, length: int, bytes: int | None) -> int:
    """How many rows fit, at least one; ``bytes`` None is no limit."""
    weight, config = net.embed.weight, net.config
    widest = 4 * config.pair * length  # of a row: what the transition makes of it
    rows = LARGEST // max(widest, length**2 * config.pair // config.pair_head_size)
    if weight.device.type == "cpu":
        rows = min(rows, CACHE // (widest * weight.element_size()))
    if bytes is not None:
        rows = min(rows, (bytes - at_rest(net, length)) // per_row(net, length))
    return max(1, rows)
