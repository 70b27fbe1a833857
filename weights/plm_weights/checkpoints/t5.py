"""The rows of the T5 family: Ankh, ProtT5, ProstT5 and IgT5.

``parameters`` is the sum over the shapes that follow from ``config``: the embedding once, a head of its own apart.
"""

from plm_weights.checkpoints import ANTIBODY_LICENCE, KENLAY, PROTTRANS, RARE, Checkpoint, File, spellings

_NON_COMMERCIAL = "CC BY-NC-SA 4.0 (non-commercial)"
_ANKH = "Elnaggar et al. 2023, arXiv:2301.06568, doi:10.48550/arXiv.2301.06568"
_ANKH3 = "Alsamkary et al. 2025, arXiv:2505.20052, doi:10.48550/arXiv.2505.20052"
_PROSTT5 = "Heinzinger et al. 2024, NAR Genomics and Bioinformatics 6, lqae150, doi:10.1093/nargab/lqae150"

_BIN = "pytorch_model.bin"
_TOKENIZER = (File("tokenizer.json"), File("tokenizer_config.json"), File("special_tokens_map.json"))
_PIECES = File("spiece.model", None, ("f2b5e1bbd110b71ca9b2878e1fcd3265610076ecc97bd696e8a745c9bacc54e0",))


def _ankh(
    name: str,
    hub: str,
    revision: str,
    sizes: tuple[int, int, int],
    parameters: int,
    weights: tuple[File, ...],
    *,
    vocabulary: int = 144,
    activation: str = "gated-silu",
    citation: str = _ANKH,
    aliases: tuple[str, ...] = (),
    header: str | None = None,
    note: str = "",
) -> Checkpoint:
    """A checkpoint of so many channels, heads and hidden units. All are 48 and 24 layers deep, with an untied head."""
    channels, heads, feed_forward = sizes
    hub = f"ElnaggarLab/{hub}"
    return Checkpoint(
        name=name,
        family="t5",
        licence=_NON_COMMERCIAL,
        citation=citation,
        aliases=spellings(name, hub, *aliases),
        note=note,
        parameters=parameters,
        config={
            "vocabulary": vocabulary,
            "layers": 48,
            "decoder_layers": 24,
            "channels": channels,
            "heads": heads,
            "head_size": 64,
            "feed_forward": feed_forward,
            "activation": activation,
            "buckets": 64,
            "max_distance": 128,
            "norm_eps": 1e-6,
            "tied": False,
        },
        hub=hub,
        revision=revision,
        files=(File("config.json"), *weights, *_TOKENIZER),
        header=header or name,
        pairs=False,
    )


def _prott5(
    name: str,
    hub: str,
    revision: str,
    weights: tuple[File, ...],
    *,
    parameters: int = 2_818_830_336,
    vocabulary: int = 128,
    decoder_layers: int = 24,
    licence: str = "AFL-3.0",
    citation: str = PROTTRANS,
    tokenizer: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    header: str | None = None,
    note: str = RARE,
    pairs: bool = False,
) -> Checkpoint:
    """ProtT5-XL, or a model that started from its weights: T5-3B with a vocabulary of residues."""
    return Checkpoint(
        name=name,
        family="t5",
        licence=licence,
        citation=citation,
        aliases=spellings(name, hub, *aliases),
        note=note,
        parameters=parameters,
        config={
            "vocabulary": vocabulary,
            "layers": 24,
            "decoder_layers": decoder_layers,
            "channels": 1024,
            "heads": 32,
            "head_size": 128,
            "feed_forward": 16384,
            "activation": "relu",
            "buckets": 32,
            "max_distance": 128,
            "norm_eps": 1e-6,
            "tied": True,
        },
        hub=hub,
        revision=revision,
        files=(
            File("config.json"),
            *weights,
            *map(File, ("spiece.model", "tokenizer_config.json", "special_tokens_map.json", *tokenizer)),
        ),
        header=header or name,
        pairs=pairs,
    )


def _prostt5(name: str, hub: str, revision: str, note: str) -> Checkpoint:
    """ProtT5 and 22 tokens more: a lower-case letter for each state of 3Di, and two that ask for a translation."""
    return _prott5(
        name,
        hub,
        revision,
        (File(_BIN),),
        parameters=2_818_852_864,
        vocabulary=150,
        licence="MIT",
        citation=_PROSTT5,
        tokenizer=("added_tokens.json",),
        note=f"residues in upper case, 3Di in lower; {RARE}{note}",
    )


def _igt5(name: str, hub: str, revision: str, note: str, *, pairs: bool, aliases: tuple[str, ...] = ()) -> Checkpoint:
    shards = tuple(File(f"model-0000{i}-of-00003.safetensors") for i in (1, 2, 3))
    return _prott5(
        name,
        hub,
        revision,
        (File("model.safetensors.index.json"), *shards),
        licence=ANTIBODY_LICENCE,
        citation=KENLAY,
        tokenizer=("added_tokens.json",),
        aliases=aliases,
        header="igt5",
        note=note,
        pairs=pairs,
    )


ROWS: tuple[Checkpoint, ...] = (
    _ankh(
        "ankh-base",
        "ankh-base",
        "d99cb6b966530dfc2ae96bc69d9255c2a07308b0",
        (768, 12, 3072),
        736_453_632,
        (File(_BIN, 2_946_066_741, ("9b2a886374f0ff4a893f4e7a989deed76bb2458c8998bd5202ea8e97d92ddcc3",)),),
        activation="gated-gelu",
    ),
    _ankh(
        "ankh-large",
        "ankh-large",
        "74b371dbfa3ee0a05d32ae74df0c2e0b82d6b9a6",
        (1536, 16, 3840),
        1_878_705_152,
        (File(_BIN, None, ("517b6e8b279dedcb477af240b35c46bd6eb3307723eb281e60d4b2c8a87b889b",)),),
        activation="gated-gelu",
    ),
    _ankh(
        "ankh2-large",
        "ankh2-ext2",
        "aa9b9fa72288c47d9f618ce80c011e24b54e17a8",
        (1536, 16, 3840),
        1_878_705_152,
        (File(_BIN, None, ("2df583f28f111276ee22a7b76007f4297e9a69766d60bccd9c8d7169c06ac606",)),),
        aliases=("ankh2",),
        header="ankh-large",
    ),
    _ankh(
        "ankh3-large",
        "ankh3-large",
        "2be091622e8a393f0ef21735070084123c874b6e",
        (1536, 16, 3840),
        1_879_049_216,
        (File(_BIN, None, ("26321a345e07a25b21c6c41b651c4db91b420892e52c0dcbc55bd7a8f510f95b",)), _PIECES),
        vocabulary=256,
        citation=_ANKH3,
        note="task nlu or s2s puts its prefix before the residues",
    ),
    _ankh(
        "ankh3-xl",
        "ankh3-xl",
        "e00113df5c95ef71df7ea3f5a73d56bd00e473a4",
        (2560, 32, 6720),
        5_730_907_136,
        (
            File("pytorch_model.bin.index.json"),
            File(
                "pytorch_model-00001-of-00003.bin",
                None,
                ("2c9793cbee16697cd4149debe07d3a27143e280f6e970fa46042aae820fea981",),
            ),
            File(
                "pytorch_model-00002-of-00003.bin",
                None,
                ("31c5a860e414513c829ae52affb0970d7cef2c0545df2d6e1338b6806ab7174b",),
            ),
            File(
                "pytorch_model-00003-of-00003.bin",
                None,
                ("055a853bdd3623db95a637935aa299427e837cd8ea69fc04708b0262508bec75",),
            ),
            _PIECES,
        ),
        vocabulary=256,
        citation=_ANKH3,
        note="task nlu or s2s puts its prefix before the residues",
    ),
    _prott5(
        "prott5-xl-u50",
        "Rostlab/prot_t5_xl_uniref50",
        "973be27c52ee6474de9c945952a8008aeb2a1a73",
        (File(_BIN, 11_275_562_628),),
        aliases=("prott5", "prott5-xl", "prott5-xl-uniref50", "prottrans_t5_xl_u50"),
    ),
    _prott5(
        "prott5-xl-bfd",
        "Rostlab/prot_t5_xl_bfd",
        "7ae1d5c1d148d6c65c7e294cc72807e5b454fdb7",
        (File(_BIN, 11_275_562_268),),
        aliases=("prottrans_t5_bfd",),
    ),
    _prott5(
        "prott5-xl-half",
        "Rostlab/prot_t5_xl_half_uniref50-enc",
        "94a6abc029ae13029317b140b7424e012bf8dfbf",
        (File(_BIN, 2_416_373_051, ("7f51ba885541c7dc569d46b796af57cc7a2ba7945107dced4f19d1b5ec091157",)),),
        parameters=1_208_141_824,
        decoder_layers=0,
        aliases=("prott5-half",),
        note=f"the encoder of prott5-xl-u50, stored in float16; {RARE}",
    ),
    _prostt5("prostt5", "Rostlab/ProstT5", "d7d097d5bf9a993ab8f68488b4681d6ca70db9e5", ""),
    _prostt5("prostt5-fp16", "Rostlab/ProstT5_fp16", "07a6547d51de603f1be84fd9f2db4680ee535a86", "; stored in float16"),
    _igt5(
        "igt5",
        "Exscientia/IgT5",
        "5db9442f2c732b23bf329d6069b432ce783ba016",
        "antibody pairs, heavy|light",
        pairs=True,
        aliases=("igt5-paired",),
    ),
    _igt5(
        "igt5-unpaired",
        "Exscientia/IgT5_unpaired",
        "324edf161b2e4f94e651b95fee08dfb8d4a0fc0f",
        "single antibody chains",
        pairs=False,
    ),
)
