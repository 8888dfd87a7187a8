"""Compares generated images with real ones: FID, sFID, IS, precision and recall.

The numbers are those of ADM's evaluator. SAMPLES.npz holds uint8 images (N, H, W, 3) as arr_0, as `mhla
sample` writes them. REF is a reference file of ADM, an npz file of images, or a folder of image shards (its
val split). Features come from Inception (extra eval), or from a classifier run of yours. The distance of a
classifier is called FD, not FID. It compares only with distances on the same features.
  mhla eval fid SAMPLES.npz --reference VIRTUAL_imagenet256_labeled.npz
  mhla eval fid SAMPLES.npz --reference data/mnist --features my_classifier
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mhla_lightning.cli.eval.image_table import print_numbers
from mhla_lightning.cli.output import write_json

HELP = "generated images against real ones: FID, sFID, IS, precision, recall"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla eval fid`."""
    parser.add_argument("samples", metavar="SAMPLES.npz", help="generated images")
    parser.add_argument(
        "--reference", metavar="REF", required=True, help="REF.npz, or a folder or address of image shards"
    )
    parser.add_argument(
        "--features",
        metavar="NAME",
        default="inception",
        help="inception, or a classifier run (default: %(default)s)",
    )
    parser.add_argument(
        "--runs", metavar="DIR", help="folder of all run folders (default: $MHLA_RUNS, else ./runs)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (default: the GPU if there is one), cpu, cuda, cuda:1, mps"
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    from mhla_lightning.evaluation.image_metrics import image_metrics
    from mhla_lightning.evaluation.images import read_reference, read_samples
    from mhla_lightning.evaluation.networks import open_network
    from mhla_lightning.inference.weights import choose_device

    device = choose_device(args.device)
    images = read_samples(args.samples)
    network = open_network(args.features, args.runs, device)
    reference = read_reference(args.reference, network, images.shape[1:3])
    numbers = image_metrics(network(images), reference, network.published, device)
    name = Path(args.samples).name
    print_numbers(
        f"{len(images)} images of {name} against {reference.name}, features of {network.name}", numbers
    )
    facts = {
        "samples": args.samples,
        "images": len(images),
        "reference": args.reference,
        "features": args.features,
    }
    write_json(args.json, {"rows": [{"samples": name, **numbers}], "summary": facts})
    return 0
