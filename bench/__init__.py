"""The benchmark of hfac's kernels and optimizers: ``python -m bench`` from a checkout's root (or ``make bench``)."""

import os

# Read when torch is loaded: its profiler, which counts allocations, would print two lines for every use.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
