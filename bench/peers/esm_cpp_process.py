"""esm-cpp at work, for `peers/esm_cpp.py`: it needs numpy below 2, so it has an environment of its own (`make bench`).

Imports nothing of this project. Each line is an order:

    {"do": "load", "weights": "model.safetensors", "int8": false, "calibration": [proteins]}
    {"do": "logits", "sequences": [proteins], "save": "x.npz" or null}       # the answer is the number of tokens
"""

import json
import sys
from importlib.metadata import version

del sys.path[0]  # this folder, where another file is called esm_cpp

import esm_cpp  # noqa: E402
import numpy as np  # noqa: E402

PERCENTILE, ALPHA = 99.9, 0.5  # of its own quantize.py, and the value that its page recommends


class Server:
    def __init__(self) -> None:
        self.tokenizer = esm_cpp.Tokenizer()

    def ids(self, sequences: list[str]) -> list[np.ndarray]:
        return [np.asarray(self.tokenizer.encode(sequence), dtype=np.int32) for sequence in sequences]

    def load(self, weights: str, int8: bool, calibration: list[str]) -> dict[str, object]:
        self.model = esm_cpp.Model.load_from_safetensors(weights)
        if int8:
            observer = esm_cpp.ActivationObserver()
            for row in self.ids(calibration):
                self.model.forward_with_observer(row, np.ones_like(row), observer)
            self.model.apply_smoothquant(observer.percentile(PERCENTILE), ALPHA)
            self.model.quantize_weights()
        return {"isa": esm_cpp.current_isa(), "threads": esm_cpp.Model.num_threads}

    def logits(self, sequences: list[str], save: str | None) -> int:
        found = self.model.forward_scheduled(self.ids(sequences))
        if save:
            np.savez(save, *found)
        return sum(map(len, found))


def main() -> None:
    server = Server()
    print(json.dumps({"esm-cpp": version("esm-cpp"), "isa": esm_cpp.current_isa()}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(server, order.pop("do"))(**order)), flush=True)


if __name__ == "__main__":
    main()
