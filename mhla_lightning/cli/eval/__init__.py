"""Evaluates trained models.

Language runs with lm-evaluation-harness, sample files against real images, diffusion runs by a classifier,
videos by VBench, text-to-image runs by CLIP, GenEval and DPG-Bench.

  mhla eval fid --help
"""

from __future__ import annotations

import argparse

from mhla_lightning.cli.eval import clip, dpg, fid, geneval, lm, samples, vbench
from mhla_lightning.cli.output import check_json

SUBJECTS = {
    "lm": lm,
    "fid": fid,
    "samples": samples,
    "vbench": vbench,
    "clip": clip,
    "geneval": geneval,
    "dpg": dpg,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla eval`."""
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, subject in SUBJECTS.items():
        added = subjects.add_parser(
            name,
            help=subject.HELP,
            description=subject.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        subject.add_arguments(added)
        added.add_argument("--json", metavar="FILE", help="write the table as JSON too")


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    check_json(args.json)
    return SUBJECTS[args.subject].run(args)
