"""The rows of the BERT family: IgBert and ProtBert, which share their configuration but for what heads were stored.

``parameters`` is the sum over the shapes that follow from ``config``, the tied head of the language model once.
"""

from plm_weights.checkpoints import ANTIBODY_LICENCE, KENLAY, PROTTRANS, RARE, Checkpoint, File, spellings


def _bert(
    name: str,
    hub: str,
    revision: str,
    weights: File,
    *,
    antibody: bool,
    note: str,
    aliases: tuple[str, ...] = (),
    pairs: bool = False,
) -> Checkpoint:
    """IgBert was saved without pooler and without the head that tells whether two sequences belong together."""
    return Checkpoint(
        name=name,
        family="bert",
        licence=ANTIBODY_LICENCE if antibody else "AFL-3.0",
        citation=KENLAY if antibody else PROTTRANS,
        aliases=spellings(name, hub, *aliases),
        note=note,
        parameters=419_933_214 if antibody else 420_984_864,
        config={
            "vocabulary": 30,
            "layers": 30,
            "channels": 1024,
            "heads": 16,
            "feed_forward": 4096,
            "positions": 40000,
            "types": 2,
            "norm_eps": 1e-12,
            "lm_head": True,
            "pooler": not antibody,
            "relation_head": not antibody,
        },
        hub=hub,
        revision=revision,
        files=(
            File("config.json"),
            weights,
            File("vocab.txt", 81),
            File("tokenizer_config.json"),
            File("special_tokens_map.json"),
        ),
        header="igbert" if antibody else "protbert",
        pairs=pairs,
    )


ROWS: tuple[Checkpoint, ...] = (
    _bert(
        "igbert",
        "Exscientia/IgBert",
        "81a4abb8a4dac5cdcbefc28e5b331a82224c485d",
        File("model.safetensors", 1_679_791_776, ("e9bdc24c7a50bb303b75f8292eca8d47ddac39f00ef9802972ded38899db7740",)),
        antibody=True,
        note="antibody pairs, heavy|light",
        aliases=("igbert-paired",),
        pairs=True,
    ),
    _bert(
        "igbert-unpaired",
        "Exscientia/IgBert_unpaired",
        "53ed1be4a09fd30ef3f21ba0c8aae778ccdfff74",
        File("model.safetensors", 1_679_791_776, ("0073dac1e5cf24ceac37099715f8ecc9c27c87d0065a78bfec1ab75aae534e7b",)),
        antibody=True,
        note="single antibody chains",
    ),
    _bert(
        "protbert",
        "Rostlab/prot_bert",
        "7a894481acdc12202f0a415dd567f6cfdb698908",
        File("pytorch_model.bin", 1_684_058_277),
        antibody=False,
        note=RARE,
    ),
    _bert(
        "protbert-bfd",
        "Rostlab/prot_bert_bfd",
        "6c5c8a55a52ff08a664dfd584aa1773f125a0487",
        File("pytorch_model.bin"),
        antibody=False,
        note=RARE,
        aliases=("prottrans_bert_bfd",),
    ),
)
