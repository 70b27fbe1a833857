"""The rows of the ESM family."""

from dataclasses import replace

from plm_weights.checkpoints import Checkpoint, File, spellings

_ORIGINALS = "https://dl.fbaipublicfiles.com/fair-esm"
_VOCABULARY = File("vocab.txt", 93, ("0b82cc0a7c7cf9e567b1e5892d793285b9fbae822c964ca48696f7db44598e03",))
_RIVES = "Rives et al. 2021, PNAS 118, e2016239118, doi:10.1073/pnas.2016239118"
_MEIER = "Meier et al. 2021, NeurIPS 34, doi:10.1101/2021.07.09.450648"
_LIN = "Lin et al. 2023, Science 379, 1123-1130, doi:10.1126/science.ade2574"

# What is known of each file. Names of originals are written without their stem.
_FILES = {
    "esm1b_t33_650M_UR50S": (
        File(".pt", 7_828_576_466),  # holds the optimizer's state too: 12 bytes per parameter
        File("-contact-regression.pt", 3_174, ("77193a8814f0db0b36a03aebb1a311adc6b4745f463c04839defc15407bbb28a",)),
    ),
    "esm2_t6_8M_UR50D": (
        _VOCABULARY,
        File("model.safetensors", 31_384_292, ("24c5fa474c48f3b754b86efe752d5f189d2bcd88190fa2270fc92b2ef3034189",)),
        File(".pt", 30_099_493, ("46f002a9870c9bdecd0ea887acb1f9a38a6b561e8f8bf8a6990b679b9d31b928",)),
        File("-contact-regression.pt", 1_511, ("8f7a4557d57713b97ba0e484303007efb7230d25299c0ac47a0a1b12a87bbb9d",)),
    ),
    "esm2_t12_35M_UR50D": (
        _VOCABULARY,
        File("model.safetensors", None, ("e35647818e0e064351d4531ed480d225a002567b4b2b93ad3a9246d753150fc0",)),
        File(".pt", 134_095_705, ("7f21e80e61d16a71735163ef555d3009afb0c98da74c48e29df08606973cc55e",)),
        File("-contact-regression.pt", 1_959, ("16641e05d830d0ce863dd152dbb8c2f3ddfa3c3ec2a66080152c8abad01d8585",)),
    ),
    "esm2_t30_150M_UR50D": (
        _VOCABULARY,
        File("model.safetensors", None, ("c3f1da8aea53bddd32c246c86168c23b9fd72341fb9db9a94436f855f5053566",)),
        File("pytorch_model.bin", 595_364_077, ("a88feb574b9f4e31c45762961d1b2ddba95796db86fb480d207b4d15e6ec8aab",)),
        File(".pt", 592_774_773, ("881c7176cf198ef8dec26a3c375d40eb58d0c33df95c22562ca6cc6d3f812c62",)),
        File("-contact-regression.pt", 3_431, ("6a604b96722ed052eef8a094ad90b275ba2e987d406315dbed0bdc6b3c4238a7",)),
    ),
    "esm2_t33_650M_UR50D": (
        _VOCABULARY,
        File("model.safetensors", 2_609_506_392, ("a08adabb949fa67ad3c14b509d04fd60368b35007b0095e3358f81200c4f4db0",)),
        File(  # two uploads are in circulation, of 2,604,537,549 and of 2,607,531,725 bytes
            ".pt",
            None,
            (
                "ea9d0522b335a8778dea6535a65301f10208dece28cd5865482b0b1fc446168c",
                "c89758ebab0cecd17aebf8fae7a3000f56cac3e544606e1f8780696c00b8cf16",
            ),
        ),
        File("-contact-regression.pt", 3_687, ("8ffe6edbd4173dc8d45c2cd5cb27d43aad77ec26b4c768200c58ae1f96693575",)),
    ),
    "esm2_t36_3B_UR50D": (
        _VOCABULARY,
        File(
            "pytorch_model-00001-of-00002.bin",
            None,
            ("0f971f11c449d21422aa982b791619c10351972992c735f4c3cd43fe09790412",),
        ),
        File(
            "pytorch_model-00002-of-00002.bin",
            None,
            ("7560b46fc383c691fb74b915b7d4bcef40d3df181447f16ba4b298845e308d0c",),
        ),
        File(".pt", 5_678_116_398, ("7de8b4082ba15891959ab368b77ce3886697af1efb16d3c9e9e7b0c5d3f07500",)),
        File("-contact-regression.pt", 6_759, ("4da500eab246481dc9c8c95bc7b1d02f2803d761c380b0e95186d4a07d0fc84e",)),
    ),
}


def _esm(
    name: str,
    stem: str,
    sizes: tuple[int, int, int],
    parameters: int,
    revision: str | None,
    *,
    learned_positions: int | None = None,
    norm_before: bool = False,
    contact_head: bool = True,
    citation: str = _LIN,
    aliases: tuple[str, ...] = (),
    header: str | None = None,
    note: str = "",
) -> Checkpoint:
    """A checkpoint of Meta's ESM, of so many layers, channels and heads. All share licence, hosts and the rest."""
    layers, channels, heads = sizes
    known = {file.name: file for file in _FILES.get(stem, ())}
    suffixes = {".pt": "models", "-contact-regression.pt": "regression"}
    return Checkpoint(
        name=name,
        family="esm",
        licence="MIT",
        citation=citation,
        aliases=spellings(name, f"facebook/{stem}", *aliases),
        note=note,
        parameters=parameters,
        config={
            "layers": layers,
            "channels": channels,
            "heads": heads,
            "feed_forward": 4 * channels,
            "learned_positions": learned_positions,
            "norm_before": norm_before,
            "token_dropout": True,
            "norm_eps": 1e-5,
            "contact_head": contact_head,
        },
        hub=f"facebook/{stem}",
        revision=revision,
        files=tuple(file for file in known.values() if file.name not in suffixes),
        originals=tuple(
            replace(known.get(suffix, File(suffix)), name=stem + suffix, url=f"{_ORIGINALS}/{folder}/{stem}{suffix}")
            for suffix, folder in suffixes.items()
            if suffix == ".pt" or contact_head
        ),
        header=header or name,
        pairs=False,
    )


def _esm1v(number: int, revision: str) -> Checkpoint:
    """One of the five ESM-1v, which differ in their seed. Nobody published a contact regression for them."""
    stem = "esm1v_t33_650M_UR90S"
    return _esm(
        f"esm1v-{number}",
        f"{stem}_{number}",
        (33, 1280, 20),
        652_355_873,
        revision,
        learned_positions=1026,
        contact_head=False,
        citation=_MEIER,
        aliases=(f"esm1v-n{number}", *(("esm1v", stem) if number == 1 else ())),
        header="esm1v",
        note="no contact head was published",
    )


ROWS: tuple[Checkpoint, ...] = (
    Checkpoint(
        name="plm-mini",
        family="esm",
        licence="MIT",
        citation="plm (this library); its model card is weights/plm_weights/plm_mini/README.md",
        note="a demonstration model that ships with the library; see its model card",
        parameters=2_844_033,
        folder="plm_mini",
        pairs=False,
        files=(
            _VOCABULARY,
            File("config.json"),
            File("model.safetensors", 5_696_674, ("8efeb62fdf6070fbc078d6962dc0389b02232650613e5042b675bf4420177db9",)),
        ),
    ),
    _esm("esm2-8m", "esm2_t6_8M_UR50D", (6, 320, 20), 7_512_353, "c731040fcd8d73dceaa04b0a8e6329b345b0f5df"),
    _esm("esm2-35m", "esm2_t12_35M_UR50D", (12, 480, 20), 33_501_153, "6fbf070e65b0b7291e7bbcd451118c216cff79d8"),
    _esm("esm2-150m", "esm2_t30_150M_UR50D", (30, 640, 20), 148_139_553, "a695f6045e2e32885fa60af20c13cb35398ce30c"),
    _esm("esm2-650m", "esm2_t33_650M_UR50D", (33, 1280, 20), 651_042_593, "08e4846e537177426273712802403f7ba8261b6c"),
    _esm("esm2-3b", "esm2_t36_3B_UR50D", (36, 2560, 40), 2_839_004_193, "476b639933c8baad5ad09a60ac1a87f987b656fc"),
    _esm("esm2-15b", "esm2_t48_15B_UR50D", (48, 5120, 40), 15_129_098_273, None),
    _esm(
        "esm1b",
        "esm1b_t33_650M_UR50S",
        (33, 1280, 20),
        652_358_433,
        "7b37824baec4d3658e1df7479222a7c79b465b76",
        learned_positions=1026,
        norm_before=True,
        citation=_RIVES,
        aliases=("esm-1b",),
    ),
    _esm1v(1, "8bfdb1892536cc77bd0760b9c25ddced2cd0b4c8"),
    _esm1v(2, "3c1e9e64480f069b163e456c361bfd80a8bab04c"),
    _esm1v(3, "0b00fd112e63f6b5e70a9cd8484d4e660312ce70"),
    _esm1v(4, "443968f644da132d323bbc6321a6d443149fa57b"),
    _esm1v(5, "fb2e51cb0f605cbad2c4ca3bb784be7bc8e2f4a8"),
)
