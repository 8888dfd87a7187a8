"""What all verbs that use the weights of a run ask for alike: which run, which of its weights, on what
device.
"""

from __future__ import annotations

import argparse


def add_trained_arguments(parser: argparse.ArgumentParser, dest: str) -> None:
    """RUN, as the attribute `dest`, and --runs, --ckpt, --no-ema, --device."""
    parser.add_argument(dest, metavar="RUN", help="run id or run folder")
    parser.add_argument(
        "--runs", metavar="DIR", help="where run folders live (default: $MHLA_RUNS, else ./runs)"
    )
    parser.add_argument("--ckpt", metavar="STEP", help="step, or checkpoint folder (default: the newest)")
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="the weights as trained (default: their average, where the run has one)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (default: the GPU where there is one), cpu, cuda, cuda:1, mps"
    )
