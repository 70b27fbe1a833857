"""How much arithmetic an encoder needs: the numerator of its share of the ceiling."""

from collections.abc import Sequence

from plm.models import bert, esm, t5


def flops(config: esm.Config | bert.Config | t5.Config, tokens: Sequence[int]) -> float:
    """Multiplications and additions of the layers, on sequences of so many tokens.

    Two for each weight of the matrices and each token; and for attention 4 t per token and channel of the heads. A T5
    has a gated feed-forward, of three matrices, and heads whose channels need not add up to those of the layer.
    """
    inner, matrices = (config.heads * config.head_size, 3) if isinstance(config, t5.Config) else (config.channels, 2)
    weights = (4 * inner + matrices * config.feed_forward) * config.channels
    return config.layers * sum(t * 2 * weights + 4 * t * t * inner for t in tokens)
