"""``python -m plm``, the same as ``plm``."""

import sys

from plm.cli import main

sys.exit(main())
