"""W9: how long it takes from nothing to the first embedding: fresh processes, one protein of 350 residues, ESM-2 8M."""

import resource
import subprocess
import sys
from functools import partial
from random import Random

from inputs import protein
from measuring import Contest, Contestant, Settings, Workload
from peers.esm import published

CODE = {
    "torch alone": "import torch",
    "transformers default": (
        "import sys, torch; from transformers import EsmModel, EsmTokenizer; folder, protein = sys.argv[1:];"
        "model = EsmModel.from_pretrained(folder, add_pooling_layer=False).eval();"
        "batch = EsmTokenizer.from_pretrained(folder)([protein], return_tensors='pt');\n"
        "with torch.inference_mode(): model(**batch).last_hidden_state[0, 1:-1].mean(0)"
    ),
    "plm": (
        "import sys, plm; folder, protein = sys.argv[1:];"
        "plm.embed(plm.load(folder, device='cpu'), protein, pool='mean')"
    ),
}


class Fresh:
    """A process per run."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __call__(self, arguments: list[str]) -> None:
        subprocess.run([sys.executable, "-c", self.code, *arguments], check=True, capture_output=True)

    def children_mib(self) -> float:
        """The largest resident set that a process of this one's has had."""
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def cold(settings: Settings) -> Contest:
    arguments = [str(published("esm2-8m", settings.quick)), protein(20 if settings.quick else 350, Random(4))]

    def errors(runs: dict[str, Fresh]) -> dict[str, float]:
        """Nothing to compare (W1 does); but files are read from the disk once before anything is timed."""
        for run in runs.values():
            run(arguments)
        return {}

    everyone = {name: Contestant(partial(Fresh, code)) for name, code in CODE.items()}
    return Contest(contestants=everyone, inputs=arguments, units=1, errors=errors)  # type: ignore[arg-type]


WORKLOADS = (
    Workload(
        "W9 cold-start",
        "import everything, load ESM-2 8M and embed one protein of 350 residues, in a fresh process",
        cold,
        unit="starts",
        ceiling=None,
        minutes=0.9,
        memory=True,
    ),
)
