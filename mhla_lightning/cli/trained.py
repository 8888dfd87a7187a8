"""Arguments of all verbs that use the weights of a run: the run, its weights and the device."""

from __future__ import annotations

import argparse


def add_trained_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add RUN, --runs, --ckpt, --no-ema and --device.

    Args:
        parser: of the verb.
        several: whether it takes several runs.
    """
    parser.add_argument("run", metavar="RUN", nargs="+" if several else None, help="run id or run folder")
    parser.add_argument(
        "--runs", metavar="DIR", help="folder of all run folders (default: $MHLA_RUNS, else ./runs)"
    )
    parser.add_argument("--ckpt", metavar="STEP", help="step, or checkpoint folder (default: the newest)")
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="take the weights as trained (default: their average, where the run has one)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (default: the GPU if there is one), cpu, cuda, cuda:1, mps"
    )
