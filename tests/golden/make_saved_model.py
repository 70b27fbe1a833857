"""Writes the Keras SavedModel of the golden ProteinBERT, as its authors' SavedModel on the hub was made.

    python tests/golden/make_saved_model.py

Run by hand where the original is installed (protein-bert 1.0.1, TensorFlow 2.15.1, Keras 2.15.0, numpy 1.26.4); no test
needs it. The weights are those of tiny_2blocks/weights.pkl. Of what TensorFlow writes the variables are kept; the
graph beside them is 700 kB that nothing here reads.
"""

import json
import pickle
import shutil
import tempfile
from pathlib import Path

from proteinbert.conv_and_global_attention_model import create_model, get_model_with_hidden_layers_as_outputs

FOLDER = Path(__file__).parent / "proteinbert"

if __name__ == "__main__":
    case, target = FOLDER / "tiny_2blocks", FOLDER / "saved_model"
    settings = json.loads((case / "config.json").read_text())
    with (case / "weights.pkl").open("rb") as file:
        annotations, weights, _ = pickle.load(file)
    model = create_model(24, 26, annotations, **settings["upstream_create_model_kwargs"])
    model.set_weights(weights)
    with tempfile.TemporaryDirectory() as folder:
        get_model_with_hidden_layers_as_outputs(model).save(folder)
        shutil.copytree(Path(folder) / "variables", target / "variables", dirs_exist_ok=True)
