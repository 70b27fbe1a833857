"""The rows of the ProGen2 family.

The authors' archives have hashes on record; of the hub's ports, which others made, neither these nor a revision is. So
a row's name means the archive, and its hub id (``hugohrban/progen2-medium``) the port. Sizes and hashes are of the
``pytorch_model.bin`` within the archive; none is known of the archive itself.
"""

from plm_weights.checkpoints import Checkpoint, File, spellings

_ARCHIVES = "https://storage.googleapis.com/sfr-progen-research/checkpoints"
_NIJKAMP = "Nijkamp et al. 2023, Cell Systems 14, 968-978, doi:10.1016/j.cels.2023.10.002"


def _progen2(
    published: str,
    sizes: tuple[int, int, int],
    rotated: int,
    parameters: int,
    size: int,
    sha256: str,
    *,
    note: str = "UniRef90 and BFD30",
    vocabulary: int = 32,
    max_length: int = 1024,
    header: str | None = None,
) -> Checkpoint:
    """A checkpoint of so many layers, channels and heads; ``note`` says what it was trained on."""
    layers, channels, heads = sizes
    name, hub = published.lower(), f"hugohrban/{published}"
    return Checkpoint(
        name=name,
        family="progen2",
        licence="BSD-3-Clause",
        citation=_NIJKAMP,
        aliases=spellings(name, hub),
        note=note,
        parameters=parameters,
        config={
            "vocabulary": vocabulary,
            "outputs": vocabulary,
            "layers": layers,
            "channels": channels,
            "heads": heads,
            "rotated": rotated,
            "feed_forward": 4 * channels,
            "max_length": max_length,
            "norm_eps": 1e-5,
        },
        hub=hub,
        originals=(File("config.json"), File("pytorch_model.bin", size, (sha256,))),
        archive=f"{_ARCHIVES}/{published}.tar.gz",
        preferred="original",
        header=header or name,
        pairs=False,
    )


_SMALL, _MEDIUM, _LARGE, _XLARGE = (12, 1024, 16), (27, 1536, 16), (32, 2560, 32), (32, 4096, 16)

ROWS: tuple[Checkpoint, ...] = (
    _progen2(
        "progen2-small",
        _SMALL,
        32,
        151_148_576,
        605_674_611,
        "8226a310edda873003b7ea50396d9be0195e34986b98392f79b5f782b67e3f05",
    ),
    _progen2(
        "progen2-medium",
        _MEDIUM,
        48,
        764_803_616,
        3_060_333_315,
        "545f4d3e0072c0f422c90e221100d0ebe756989d0f09af3ede57736680adb9e2",
    ),
    _progen2(
        "progen2-oas",
        _MEDIUM,
        48,
        764_803_616,
        1_530_726_083,
        "6a0d5cea517a15aa9e4caa31681a309a48f13efe9b423418b7751259c762d299",
        note="antibodies, OAS at 85%",
    ),
    _progen2(
        "progen2-base",
        _MEDIUM,
        48,
        764_803_616,
        1_533_871_811,
        "393126403594e4c0d3d1a9eef06a3e92614c979af907f6aca06eb882b7c8aea8",
        note="UniRef90 and BFD30, 2,048 tokens",
        max_length=2048,
    ),
    _progen2(
        "progen2-large",
        _LARGE,
        64,
        2_779_356_160,
        5_559_845_203,
        "ab03cb15d6ba4a02baea20648f2406f6d2aa186f68bec1b811be1222aca7a4cd",
        vocabulary=51200,
    ),
    _progen2(
        "progen2-BFD90",
        _LARGE,
        64,
        2_779_356_160,
        5_559_845_203,
        "9c81810054fde79b4130e579dbd98b2b1e8e9772f1138aae497f71f5cb101a0c",
        note="UniRef90 and BFD90",
        vocabulary=51200,
        header="progen2-large",
    ),
    _progen2(
        "progen2-xlarge",
        _XLARGE,
        64,
        6_443_638_816,
        12_888_412_563,
        "01e84cc6eec2ada7a5722adcc1a6f5c3e4baa3ccdf937446d5d02f8c99fdcda7",
    ),
)
