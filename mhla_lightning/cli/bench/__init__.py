"""Measure speed ratios in one run.

Times are medians over turns that the cases take one after another; ratios are taken within a turn.

  mhla bench attention --tokens 256 1024 --turns 5
"""

from __future__ import annotations

import argparse

from mhla_lightning.cli.bench import attention, backbone, data, decode, kernels, resume, step
from mhla_lightning.cli.output import check_json
from mhla_lightning.errors import UserError

SUBJECTS = {
    "attention": attention,
    "backbone": backbone,
    "decode": decode,
    "kernels": kernels,
    "data": data,
    "resume": resume,
    "step": step,
}
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla bench`."""
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, subject in SUBJECTS.items():
        summary = (subject.__doc__ or "").partition("\n")[0]
        added = subjects.add_parser(
            name,
            help=subject.HELP,
            description=summary,
            epilog=f"Example: mhla bench {name} {subject.EXAMPLE}",
            allow_abbrev=False,
        )
        subject.add_arguments(added)
        added.add_argument("--json", metavar="FILE", help="write rows and summary")


def run(args: argparse.Namespace) -> int:
    """Carries out the verb."""
    check_json(args.json)
    subject = SUBJECTS[args.subject]
    if args.overrides and not getattr(subject, "TAKES_OVERRIDES", False):
        raise UserError(None, f"bench {args.subject}: unrecognized arguments: {' '.join(args.overrides)}")
    return subject.run(args)
