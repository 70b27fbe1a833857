"""The published vocabularies as literal tables, each with its source, and the tokenizers that use them."""

from collections.abc import Sequence
from dataclasses import replace

from plm.tokens import Task, Tokenizer


def _sentinels(count: int) -> tuple[str, ...]:
    """Tokens that stand for hidden spans. T5 numbers them from the end: ``<extra_id_0>`` is the last."""
    return tuple(f"<extra_id_{i}>" for i in reversed(range(count)))


# facebookresearch/esm@2b36991, esm/data.py and constants.py; the same for ESM-1b, ESM-1v and ESM-2
ESM = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>")

# vocab.txt of Rostlab/prot_bert and prot_bert_bfd, which IgBert kept
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWXUBZO")

_T5 = ("<pad>", "</s>", "<unk>")
_T5_RESIDUES = "ALGVSREDTIPKFQNYMHWCXBOUZ"
_T5_PIECES = (*_T5, *_T5_RESIDUES)

# spiece.model of Rostlab/prot_t5_xl_uniref50, of which IgT5 is a descendant
PROTT5 = (*_T5_PIECES, *_sentinels(100))

# added_tokens.json of Rostlab/ProstT5: Foldseek's 3Di states in lower case, in the order of the residues
_STATES = "algvsredtipkfqnymhwc"
PROSTT5 = (*PROTT5, *_STATES, "<fold2AA>", "<AA2fold>")

# tokenizer.json of ElnaggarLab/ankh-base, ankh-large and ankh2-ext2
ANKH = (*_T5_PIECES, *_sentinels(116))

# ElnaggarLab/ankh3-large and ankh3-xl, from published token ids. Nobody published which of the task prefixes have the
# ids 3 to 6, and which of the rare letters X, U, B, Z and O the ids 27 to 30: see `plm.tokens.UNCONFIRMED`.
ANKH3 = (
    *_T5,
    *(f"<id_{i}>" for i in range(3, 7)),
    *"LAGSVERTIDPKNFQYHMCW",
    *(f"?{i}" for i in range(27, 31)),
    *_sentinels(225),
)

# tokenizer.json of salesforce/progen: there is no J, and models have spare rows behind the last token
PROGEN2 = ("<|pad|>", "<|bos|>", "<|eos|>", "1", "2", *"ABCDEFGHIKLMNOPQRSTUVWXYZ")

# nadavbra/protein_bert@83198c9, proteinbert/tokenization.py: there is no B, J, O and Z
PROTEINBERT = (*"ACDEFGHIKLMNPQRSTUVWXY", "<OTHER>", "<START>", "<END>", "<PAD>")

# vocab.txt of facebook/esmfold_v1: AlphaFold's order of residues, and tokens for which the network has no rows
ESMFOLD = (*"ARNDCQEGHILKMFPSTWYVX", "<pad>", "<mask>", "<cls>", "<sep>", "<eos>")

_RARE = "UZOB"

_ANKH3_TASKS = {"nlu": Task("[NLU]"), "s2s": Task("[S2S]")}
_TAKE_RESIDUES = "Lower case are 3Di states, for task='fold2aa'; residues are upper case."
_TAKE_STATES = "Foldseek writes 3Di states in upper case: call .lower() on them. Residues are for task='aa2fold'."
_PROSTT5_TASKS = {
    "aa2fold": Task("<AA2fold>", _T5_RESIDUES, _TAKE_RESIDUES),
    "fold2aa": Task("<fold2AA>", _STATES, _TAKE_STATES),
}


def esm_tokenizer() -> Tokenizer:
    """The tokenizer of ESM-1b, ESM-1v and ESM-2."""
    return Tokenizer(ESM, start="<cls>", end="<eos>", unknown="<unk>", mask="<mask>")


def bert_tokenizer() -> Tokenizer:
    """The tokenizer of ProtBert, ProtBert-BFD, IgBert and IgBert_unpaired."""
    return Tokenizer(
        BERT, start="[CLS]", end="[SEP]", unknown="[UNK]", mask="[MASK]", separator="[SEP]", rare=_RARE, words=True
    )


def progen2_tokenizer() -> Tokenizer:
    """The tokenizer of ProGen2: texts bring their terminals along, "1" at the N-terminus and "2" at the C-terminus."""
    return Tokenizer(PROGEN2, start="1", end="2", unknown=None, framed=False, extensible=True)


def proteinbert_tokenizer() -> Tokenizer:
    """The tokenizer of ProteinBERT, which has no mask: in pre-training noise took its place."""
    return Tokenizer(PROTEINBERT, start="<START>", end="<END>", unknown="<OTHER>")


def esmfold_tokenizer() -> Tokenizer:
    """The tokenizer of ESMFold's trunk, which puts nothing around a protein; `plm.esmfold.chains` reads chains."""
    return Tokenizer(ESMFOLD, end="<eos>", unknown="X", framed=False)


def prott5_tokenizer() -> Tokenizer:
    """The tokenizer of ProtT5 and IgT5, which puts ``</s>`` between the chains of a pair."""
    return Tokenizer(PROTT5, "</s>", "<unk>", separator="</s>", rare=_RARE, words=True, pieces=True)


def prostt5_tokenizer() -> Tokenizer:
    """The tokenizer of ProstT5. Upper case are residues, lower case 3Di states; the tasks translate between them."""
    return Tokenizer(PROSTT5, "</s>", "<unk>", tasks=_PROSTT5_TASKS, rare=_RARE, words=True, pieces=True)


def ankh_tokenizer() -> Tokenizer:
    """The tokenizer of Ankh base, Ankh large and Ankh2."""
    return Tokenizer(ANKH, "</s>", "<unk>", pieces=True)


def ankh3_tokenizer() -> Tokenizer:
    """The tokenizer of Ankh3 large and xl. Its tasks need the checkpoint's own vocabulary file: see ``checked``."""
    return Tokenizer(ANKH3, "</s>", "<unk>", tasks=_ANKH3_TASKS, pieces=True)


def t5_tokenizer(size: int) -> Tokenizer:
    """The tokenizer of a T5 with ``size`` tokens; where nobody published one, a guess: Ankh's pieces, and sentinels."""
    for make in (prott5_tokenizer, ankh_tokenizer, prostt5_tokenizer, ankh3_tokenizer):
        if len((tokenizer := make()).vocabulary) == size:
            return tokenizer
    rest = size - len(_T5_PIECES) if size <= 256 else 0  # ids of sequences are bytes
    return replace(ankh_tokenizer(), vocabulary=(*_T5_PIECES, *_sentinels(rest))[:size], guessed=True)


def told_tokenizer(size: int, pieces: Sequence[str]) -> Tokenizer:
    """The tokenizer of a T5 with ``size`` tokens that nobody published, from its own file (see ``checked``).

    Ids that the file leaves out are sentinels, numbered from the end as T5 does.
    """
    vocabulary = [piece.removeprefix("▁") or piece for piece in pieces]
    vocabulary += [""] * (size - len(pieces))
    vocabulary = [text or f"<extra_id_{size - 1 - i}>" for i, text in enumerate(vocabulary)]
    marked = any(piece.startswith("▁") and len(piece) == 2 for piece in pieces)
    tasks = {name: task for name, task in (_ANKH3_TASKS | _PROSTT5_TASKS).items() if task.prefix in vocabulary}
    return Tokenizer(tuple(vocabulary), "</s>", "<unk>", tasks=tasks, words=marked, pieces=True)
