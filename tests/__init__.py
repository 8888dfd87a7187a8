"""Tests of the package; `tests/<room>` mirrors `mhla_lightning/<room>`."""

import os
import platform

# Sums in one order on every processor with AVX2, also in the processes that tests start: recorded numbers and
# bounds of a few roundings hold for that order. The code of NumPy, torch, MKL and oneDNN chooses by the
# processor, and wider vectors add in another order.
if platform.machine() in ("x86_64", "AMD64"):
    os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
    os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
