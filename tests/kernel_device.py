"""Where tests of Triton kernels run: on a GPU if there is one, else interpreted on the CPU."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Triton's interpreter takes numbers in bfloat16 for whole ones in products of matrices (3.6 to 3.9 do), so kernels that
# have any are tried in float16 there.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
