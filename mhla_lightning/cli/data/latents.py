"""Encode images or videos, and their captions, and write the latents as shards.

The same command continues an interrupted one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console

from mhla_lightning.cli.data import output
from mhla_lightning.cli.output import OnProgress, check_writable, progress_bars, write_json
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.data.prepare.latents.captioned import CaptionOptions
    from mhla_lightning.data.prepare.latents.work import LatentReport

HELP = "encode images or videos by a VAE into latent shards"
EPILOG = """SOURCE is a folder or an address of packed images, whose splits and order are kept, or a source of
mhla data pack. With --video it is a folder that mhla data clips made: clips of one size, or a folder
FRAMESxHEIGHTxWIDTH of each size, which OUT will have too.

With --text-encoder images have captions instead of classes. SOURCE is a folder of images, with folders
train, val and test or without. Captions are lines {"file": "NAME.jpg", "caption": "..."} of captions.jsonl
in it or of --captions FILE; without such a file, NAME.txt beside NAME.jpg. Or SOURCE is packed (mhla data
index --captioned), and captions are members KEY.txt or, under the key caption, KEY.json.

examples:
  mhla data latents data/imagenet data/imagenet-latents --vae stabilityai/sd-vae-ft-ema
  mhla data latents /images data/mine --vae /models/dc-ae --size 512 --val 0.02 --device cuda:0,cuda:1
  mhla data latents /photos data/photos --vae SANA --text-encoder SANA --instruction sana --size 1024
  mhla data latents --video data/clips data/clip-latents --vae /models/Wan2.1 --text-encoder /models/Wan2.1"""
_IMAGES_ONLY = ("size", "batch_size", "moments", "flip", "scale", "shift", "val", "seed")
_TEXT_ONLY = ("tokens", "long_captions")
_CAPTIONS_ONLY = ("instruction", "captions", "caption_key", "uncaptioned")  # of images
_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla data latents`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="packed images (train/, val/), mnist, torchvision:NAME[:ROOT] or a folder of classes",
    )
    parser.add_argument("out", metavar="OUT", nargs="?", help="folder to make, with the same splits")
    parser.add_argument("--to", metavar="OUT", help="another way to give OUT")
    parser.add_argument(
        "--video", action="store_true", help="encode clips with captions; VAE must be an AutoencoderKLWan"
    )
    parser.add_argument(
        "--vae",
        required=True,
        metavar="VAE",
        help="a folder of diffusers' AutoencoderKL or AutoencoderDC, or its name on the hub",
    )
    _add_text(parser)
    parser.add_argument(
        "--subfolder", metavar="NAME", help="folder inside VAE (default: none, or vae for a pipeline)"
    )
    parser.add_argument("--name", metavar="NAME", help="name of the VAE in recipes (default: VAE)")
    parser.add_argument(
        "--size", type=int, metavar="N", help="pixels a side after ADM's centre crop (default: 256)"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at once (default: 32)")
    parser.add_argument(
        "--device",
        default="auto",
        help="auto (all GPUs, else the CPU), cpu, or cuda:0,cuda:1; each gets a process (default: auto)",
    )
    parser.add_argument("--dtype", help="bf16 (stored as float16) or fp32 (default: bf16 on GPU, else fp32)")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--moments",
        action="store_true",
        default=None,
        help="keep the posterior's mean and log-variance (default where there is one)",
    )
    kept.add_argument(
        "--samples",
        dest="moments",
        action="store_false",
        default=None,
        help="keep one latent of each image, drawn by (seed, index)",
    )
    parser.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep the latents of the mirrored images too (default: with classes, not with captions)",
    )
    parser.add_argument(
        "--scale", type=float, metavar="S", help="a latent z is used as (z - T) * S (default: the VAE's)"
    )
    parser.add_argument("--shift", type=float, metavar="T", help="shift of the latents; see --scale")
    parser.add_argument(
        "--val",
        type=output.count_or_share,
        metavar="N|SHARE",
        help="number or share held out of a source that is not packed (default: 0.2)",
    )
    parser.add_argument(
        "--shards", type=int, metavar="N", help="training shards (default: about 512 MB each, at least 16)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="seed of --samples, and of the order of a source that is not packed (default: 0)",
    )
    parser.add_argument(
        "--max-skipped-share",
        type=float,
        default=0.01,
        metavar="P",
        help="allowed share of samples that cannot be used (default: 0.01)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace shards in OUT, and those that another command has begun",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="threads that read images, for each device (default: the number of cores, at most 8)",
    )
    output.add_json(parser)


def _add_text(parser: argparse.ArgumentParser) -> None:
    """Add the arguments about captions."""
    parser.add_argument(
        "--text-encoder",
        metavar="NAME",
        help="encoder of captions: a folder or hub name of umT5 or Gemma-2, or words:N (no download)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="the most tokens that a caption may have (default: 300 of Gemma-2, else 512)",
    )
    parser.add_argument(
        "--long-captions", metavar="WHAT", help="refuse or cut captions with more tokens (default: refuse)"
    )
    parser.add_argument(
        "--instruction",
        metavar="NAME",
        help="what Gemma-2 reads before a caption of an image: sana, as SanaPipeline (default: nothing)",
    )
    parser.add_argument(
        "--captions",
        metavar="FILE",
        help="JSON lines with the captions of a folder of images (default: captions.jsonl, or NAME.txt)",
    )
    parser.add_argument(
        "--caption-key",
        metavar="KEY",
        help="key of a caption in the JSON of images (default: caption, after a member txt)",
    )
    parser.add_argument(
        "--uncaptioned",
        metavar="WHAT",
        help="refuse or skip images without a caption (default: refuse)",
    )


def run(args: argparse.Namespace) -> int:
    """Encode and return 0. Raises UserError."""
    check_writable("json", args.json)
    out = _out(args)
    _demand_fitting(args)
    console = Console()
    with progress_bars(console) as on_progress:
        report = _make(args, out, on_progress, lambda text: console.print(text, markup=False, soft_wrap=True))
    rows = [output.index_row(split, index) for split, index in report.indices.items()]
    console.print(output.index_table(out, rows))
    for line in _remarks(report, "clips" if args.video else "images"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    vaes = {split: {**vars(index.vae)} for split, index in report.indices.items() if index.vae is not None}
    what, rate = "clips" if args.video else "images", report.samples / max(report.seconds, 1e-9)
    skipped, uncaptioned = (
        [dict(zip(("split", "sample", "reason"), one, strict=True)) for one in left]
        for left in (report.skipped, report.uncaptioned)
    )
    summary = {
        "vae": vaes,
        what: report.samples,
        "seconds": report.seconds,
        f"{what}_per_second": rate,
        "skipped": skipped,
        "uncaptioned": uncaptioned,
    }
    write_json(args.json, {"rows": rows, "summary": summary})
    return 0


def _make(
    args: argparse.Namespace, out: str, on_progress: OnProgress, on_note: Callable[[str], None]
) -> LatentReport:
    """Encode as the arguments ask."""
    from mhla_lightning.data.prepare.latents.make import LatentOptions, make_latents
    from mhla_lightning.data.prepare.latents.make_videos import VideoOptions, make_video_latents

    names = ("vae", "subfolder", "name", "device", "dtype", "shards", "max_skipped_share")
    chosen = {name: getattr(args, name) for name in names}
    if args.video:
        chosen |= {name: getattr(args, name) for name in _TEXT_ONLY if getattr(args, name) is not None}
        options = VideoOptions(**chosen, text_encoder=args.text_encoder)
        return make_video_latents(
            args.source,
            out,
            options,
            overwrite=args.overwrite,
            wait=False,
            on_progress=on_progress,
            on_note=on_note,
        )
    chosen |= {name: getattr(args, name) for name in _IMAGES_ONLY if getattr(args, name) is not None}
    images = LatentOptions(**chosen, workers=output.workers(args), text=_captions(args))
    return make_latents(
        args.source,
        out,
        images,
        overwrite=args.overwrite,
        wait=False,
        on_progress=on_progress,
        on_note=on_note,
    )


def _out(args: argparse.Namespace) -> str:
    if (args.out is None) == (args.to is None):
        raise UserError(
            "out", "the folder to make is needed once: mhla data latents SOURCE OUT, or SOURCE --to OUT"
        )
    return str(args.out or args.to)


def _captions(args: argparse.Namespace) -> CaptionOptions | None:
    """Return what the arguments say about captions of images."""
    from mhla_lightning.data.prepare.latents.captioned import CaptionOptions

    if args.text_encoder is None:
        return None
    chosen = {"tokens": args.tokens, "instruction": args.instruction, "file": args.captions}
    for name in ("uncaptioned", "long_captions"):
        if getattr(args, name) is not None:
            chosen[name] = getattr(args, name)
    return CaptionOptions(args.text_encoder, key=args.caption_key, **chosen)


def _demand_fitting(args: argparse.Namespace) -> None:
    """Raise UserError for options of images with videos, and of captions without a text encoder."""
    given = {name for name, value in vars(args).items() if value is not None}
    if args.video:
        foreign = [name for name in (*_IMAGES_ONLY, *_CAPTIONS_ONLY) if name in given]
        reason = "it is for images, and these are clips, whose size, splits and captions are kept"
    else:
        foreign = [
            name for name in (*_TEXT_ONLY, *_CAPTIONS_ONLY) if name in given and args.text_encoder is None
        ]
        reason = "it is for captions: name their encoder with `text_encoder`, and add --video for videos"
    if foreign:
        # The other names of `moments` and `flip`.
        other = {"moments": "--samples", "flip": "--no-flip"}.get(foreign[0])
        raise UserError(other if other and not getattr(args, foreign[0]) else foreign[0], reason)
    if args.video and args.text_encoder is None:
        raise UserError(
            "text_encoder",
            "needed with `video`: a folder or hub name of umT5 or Gemma-2, or words:N, e.g. words:64",
        )


def _remarks(report: LatentReport, what: str) -> list[str]:
    """Return remarks: rate, samples that were left out, statistics, and lines for a recipe."""
    lines = (
        [
            (
                f"{report.samples:,} {what} in {report.seconds:.0f} s: "
                f"{report.samples / max(report.seconds, 1e-9):,.1f} a second"
            )
        ]
        if report.samples
        else []
    )
    lines += [f"skipped {name} of {split}: {reason}" for split, name, reason in report.skipped[:_SHOWN]]
    lines += (
        [f"... and {len(report.skipped) - _SHOWN} more (--json FILE lists them)"]
        if len(report.skipped) > _SHOWN
        else []
    )
    for split, index in report.indices.items():
        if index.vae is not None:
            pairs = ", ".join(
                f"{mean:.3f} ± {std:.3f}" for mean, std in zip(index.vae.mean, index.vae.std, strict=True)
            )
            lines.append(f"{split}, mean ± std by channel, as used: {pairs}")
    index = next(iter(report.indices.values()))
    vae, text = index.vae, index.text
    if vae is not None:
        lines.append(
            f"in the recipe: data.vae: {{name: {vae.name}, scale: {vae.scale:.10g}, shift: "
            f"{vae.shift:.10g}, shape: {list(vae.shape)}}}"
        )
    if text is not None:
        lines.append(
            f"and: data.text_encoder: {{name: '{text.name}', tokens: {text.tokens}, channels: "
            f"{text.channels}{f', instruction: {text.instruction}' if text.instruction else ''}}}"
        )
    return lines
