"""Draws guided samples of a diffusion run and lets a classifier run judge them.

Agreement is the share of samples whose likeliest class is the requested one, with its 95 % interval. FD is
the Frechet distance on the classifier's features to the validation images of the run's data. It compares
runs on one data set by one classifier and is no FID.
  mhla eval samples RUN --classifier convnet_mnist --n 500 --guidance 3 --steps 50

A text-to-image run draws one image for each of the first --n held-out captions, and the classifier is one of
the labels beside them. Where labels have the form `WHAT in the WHERE`, both parts are counted too. The
agreement of the real held-out images is what a perfect model would reach.
  mhla eval samples RUN --classifier convnet_digit_scenes --n 300 --guidance 2 --steps 20

The numbers are kept in the run folder, and the same command reads them.
"""

from __future__ import annotations

import argparse
import dataclasses

from mhla_lightning.cli.eval.image_table import print_numbers
from mhla_lightning.cli.output import write_json
from mhla_lightning.evaluation import with_options
from mhla_lightning.evaluation.sample_options import SampleOptions
from mhla_lightning.evaluation.samples import DRAWN_AGREEMENTS, interval
from mhla_lightning.runs.folder import find_run, runs_root

HELP = "guided samples of an image or text-to-image run, judged by a classifier run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla eval samples`."""
    parser.add_argument("run", metavar="RUN", help="run id or run folder")
    parser.add_argument(
        "--runs", metavar="DIR", help="folder of all run folders (default: $MHLA_RUNS, else ./runs)"
    )
    parser.add_argument(
        "--classifier",
        metavar="RUN",
        required=True,
        help="a run of an image classifier, e.g. of classification/convnet_mnist_cpu",
    )
    parser.add_argument(
        "--n",
        type=int,
        default=500,
        help="images, the same number of every class, or of the first held-out captions "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=1.5,
        help="scale of classifier-free guidance; 1 means none (default: %(default)s)",
    )
    parser.add_argument(
        "--sampler", help="ddpm, ddim, dpm++ or euler (default: ddpm, for flow matching euler)"
    )
    parser.add_argument("--steps", type=int, default=250, help="of the sampler (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument(
        "--reference",
        metavar="REF",
        help="REF.npz or a folder of image shards (default: the val split of the run's data)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=50, metavar="N", help="images drawn at once (default: %(default)s)"
    )
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="take the weights as trained (default: their average, where the run has one)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (default: the GPU if there is one), cpu, cuda, cuda:1, mps"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="measure again instead of reading the kept numbers"
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    folder = find_run(args.run, runs_root(args.runs))
    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(SampleOptions)
        if hasattr(args, field.name)
    }
    wanted = with_options("samples", {**given, "ema": not args.no_ema}, args.runs)
    numbers = None if args.fresh else wanted.kept(folder)
    title = f"{folder.run_id}{', measured before' if numbers else ''}"
    numbers = numbers or wanted.measure(folder)
    intervals = {name: interval(numbers[name], args.n) for name in DRAWN_AGREEMENTS if name in numbers}
    print_numbers(title, numbers, intervals)
    found = {"rows": [{"run": folder.run_id, **numbers}], "summary": wanted.identity}
    write_json(args.json, {**found, "intervals": {name: list(ends) for name, ends in intervals.items()}})
    return 0
