"""How much arithmetic a protein takes, so that progress can be told before anything was timed."""

from plm.esmfold.config import Config


def operations(config: Config, length: int, passes: int) -> int:
    """Additions and multiplications in the matrix products of stem and trunk, for ``length`` residues and linkers.

    The structure module and the heads are left out: together about 2 % as published.
    """
    c, p = config.channels, config.pair
    # Two multiplications of triangles with 6 products of pairs by weights each, two attentions with 5, a transition
    # with 8, and one for what residues tell pairs.
    pairs = 2 * (2 * 6 + 2 * 5 + 8 + 1) * p**2 + 2 * p * (c // config.head_size) + 4 * c
    triangles = 2 * (2 * 1 + 2 * 2) * p  # a product each, and two for each attention
    residues = 2 * (5 + 8) * c**2  # attention and transition
    block = triangles * length**3 + pairs * length**2 + residues * length
    width = int(config.stem["channels"])
    hidden = int(config.stem["feed_forward"])
    stem = int(config.stem["layers"]) * 2 * (4 * width + 2 * hidden) * width * length
    return passes * config.blocks * block + stem
