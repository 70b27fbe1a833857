"""The original ProteinBERT as a process that times itself when told to, for `bench/proteinbert.py --keras`.

It runs in an environment of its own with tensorflow and protein-bert (``pip install tensorflow-cpu==2.15.1 "numpy<2"
pandas h5py && pip install --no-deps protein-bert==1.0.1``), and imports nothing of this project. Each line it reads is
``{"sequences": [proteins]}``, all padded to 512; it answers with the seconds that batches of 32 took.
"""

import json
import os
import sys
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
del sys.path[0]  # this folder, where another file is called proteinbert

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from proteinbert.conv_and_global_attention_model import create_model  # noqa: E402
from proteinbert.tokenization import tokenize_seq  # noqa: E402

SEQ_LEN, BATCH, PAD = 512, 32, 25


def main() -> None:
    tf.config.threading.set_intra_op_parallelism_threads(2)
    model = create_model(SEQ_LEN, 26, 8943)
    call = tf.function(lambda x: model(x, training=False))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        rows = [tokenize_seq(sequence) for sequence in json.loads(line)["sequences"]]
        start = time.perf_counter()
        for first in range(0, len(rows), BATCH):
            tokens = np.array([row + [PAD] * (SEQ_LEN - len(row)) for row in rows[first : first + BATCH]], np.int32)
            call([tf.constant(tokens), tf.zeros((len(tokens), 8943))])
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
