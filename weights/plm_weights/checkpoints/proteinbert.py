"""The row of ProteinBERT.

Its name means the authors' pickle, of which size and hash are on record (the pointer of nadavbra/proteinbert_data_files
at 4636c3d; a record of Zenodo holds the same bytes under another name), and its hub id a SavedModel that one of them
uploaded, of which neither is. The licence is what README, setup.py and the card on the hub say.
"""

from plm_weights.checkpoints import Checkpoint, File, spellings

ROWS: tuple[Checkpoint, ...] = (
    Checkpoint(
        name="proteinbert",
        family="proteinbert",
        licence="MIT (no licence file)",
        citation="Brandes et al. 2022, Bioinformatics 38, 2102-2110, doi:10.1093/bioinformatics/btac020",
        aliases=spellings(
            "proteinbert",
            "GrimSqueaker/proteinBERT",
            "protein_bert",
            "epoch_92400_sample_23500000",
            "full_go_epoch_92400_sample_23500000",
        ),
        note="UniRef90 and 8,943 GO annotations",
        parameters=15_981_321,
        config={
            "vocabulary": 26,
            "annotations": 8943,
            "layers": 6,
            "channels": 128,
            "global_channels": 512,
            "heads": 4,
            "key_size": 64,
            "kernel": 9,
            "dilation": 5,
            "norm_eps": 1e-3,
        },
        hub="GrimSqueaker/proteinBERT",
        originals=(
            File(
                "epoch_92400_sample_23500000.pkl",
                191_800_918,
                ("cffb53e237e49fa91f19a4c8bc0898dcfd75fd12eab7833d6e95b36c02ebacbf",),
                "https://media.githubusercontent.com/media/nadavbra/proteinbert_data_files/master/"
                "epoch_92400_sample_23500000.pkl",
                ("https://zenodo.org/records/10371965/files/full_go_epoch_92400_sample_23500000.pkl",),
            ),
        ),
        preferred="original",
        header="proteinbert",
        pairs=False,
    ),
)
