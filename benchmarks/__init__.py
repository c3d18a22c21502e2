"""Benchmarks of batchnorm_ext: run as ``python -m benchmarks`` from the repository root."""

import sys
from pathlib import Path

# An installed batchnorm_ext is compiled already; the checkout's would have to be first.
_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT in sys.path:
    sys.path.remove(_ROOT)
    sys.path.append(_ROOT)
