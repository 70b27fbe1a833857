"""Import this first, and the modules of bench/ can be imported.

Its folder is on the path only meanwhile: it has files with the names of other packages.
"""

import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench"

sys.path.insert(0, str(BENCH))
try:
    import cuda_peers  # noqa: F401
    import device  # noqa: F401
    from on_device import kernels, parity, suite  # noqa: F401  # and all that these import
finally:
    sys.path.remove(str(BENCH))
