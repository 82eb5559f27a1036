"""`python -m modiff_kernels` is the command `modiff`."""

import sys

from modiff_kernels.cli import main

sys.exit(main())
