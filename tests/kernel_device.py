"""Where tests of Triton kernels run: on a GPU if there is one, else interpreted on the CPU."""

from importlib.util import find_spec
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Triton's interpreter takes numbers in bfloat16 for whole ones in products of matrices (3.6 to 3.9 do), so kernels that
# have any are tried in float16 there.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16


def mend_interpreter() -> None:
    """Loops up to a number that is not known when a kernel is compiled, interpreted with NumPy 2.4 and later.

    Triton's interpreter (up to 3.6) holds numbers in arrays of one, which NumPy no longer takes for a number.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: number.handle.data.item())

    interpreter._patch_lang_tensor = patched


if DEVICE.type == "cpu" and find_spec("triton"):
    mend_interpreter()
