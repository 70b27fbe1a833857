"""Contact maps: which residues of a protein are near each other in space, from attention maps."""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from plm import running
from plm.loading import Model
from plm.models.esm import ESM
from plm.packing import Packed, in_order


def contacts(model: Model, sequences: str | Iterable[str], *, max_tokens: int | None = None) -> list[Tensor]:
    """Probability that two residues' C-beta atoms are within 8 Å: one symmetric ``[L, L]`` tensor per sequence.

    Needs memory for a few ``[h, L, L]`` attention maps at a time, whatever the number of layers.

    Raises:
        ValueError: the checkpoint has no contact head (ESM-1v, plm-mini).
        InputError: as ``embed``.

    Source: Rao et al. 2020, "Transformer protein language models are unsupervised structure learners".
    """
    rows = running.encode(model, running.as_list(model, sequences))
    return in_order(contact_rows(model, rows, max_tokens=max_tokens), len(rows))


def contact_rows(model: Model, rows: Sequence[bytes], *, max_tokens: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """``contacts`` as a stream of (index, tensor) while batches finish, longest first."""
    net = predicting_contacts(model)

    def forward(batch: Packed, members: Sequence[int]) -> list[Tensor]:
        maps: list[Tensor] = net(batch, logits=False, contacts=True).contacts
        return maps

    return running.run(model, rows, forward, max_tokens=max_tokens)


def predicting_contacts(model: Model) -> ESM:
    """The network of a model that predicts contacts. Raises: ValueError for another."""
    if isinstance(model.net, ESM) and model.net.config.contact_head:
        return model.net
    raise ValueError(
        f"{model.checkpoint.name} has no contact head, so it predicts no contacts; use esm1b or esm2-8m to esm2-15b"
    )
