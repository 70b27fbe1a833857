"""What is known of a published model before its files are here: enough to refuse what it cannot do."""

from dataclasses import replace
from pathlib import Path

from plm.families import BY_NAME
from plm.loading import ORIGINAL, Model, Origin
from plm.outline import outlines
from plm_weights import UnknownModelError
from plm_weights.registry import find


def preview(source: str) -> Model | None:
    """A model without weights, as the registry tells it; None for a folder, a file or what the registry does not know.

    Its network has the shapes and options of the published one, and its tensors are on ``meta``.
    """
    if Path(source).expanduser().exists():
        return None
    try:
        row = find(source.partition(":")[2] if source.startswith(ORIGINAL) else source)
    except UnknownModelError:
        return None
    if row.config is None or row.folder is not None:
        return None
    family = BY_NAME[row.family]
    config = family.config(**row.config)
    with outlines():
        net = family.network(config).eval()
    tokenizer = family.tokenizer(config)
    if row.pairs is False:
        tokenizer = replace(tokenizer, separator=None)
    return Model(net, tokenizer, Origin(row.name, row.family, row.name, None, (), row.licence, row.citation))
