"""Where the package logs: fall-backs and what was decided."""

import logging

logger = logging.getLogger("modiff_kernels")
