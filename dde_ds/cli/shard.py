"""``dde-ds shard``, ``tools/shard_pickapic.py`` and ``launchers/encode.py``: turn preference pairs into shards."""

from __future__ import annotations

import argparse
import errno
import time
import warnings
from pathlib import Path
from typing import Any

from dde_ds.data.columns import PRESETS
from dde_ds.distributed.environment import DistributedEnv, read_environment
from dde_ds.errors import RankError, UserError
from dde_ds.models.base import called
from dde_ds.text import verbatim
from dde_ds.warn import reason

DISK_PROBLEMS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
DTYPES = ("float32", "bfloat16", "float16")
DESCRIPTION = """Turn preference pairs into shards of VAE latents and text embeddings.

    dde-ds shard --input 'pickapic_v2/data/train-*.parquet' --model stabilityai/stable-diffusion-xl-base-1.0 --output shards/sdxl
    deepspeed --module dde_ds.cli shard …      # on many GPUs: each rank makes its own shards, and none waits for another

Keeps the decided pairs (label_0 is 1 or 0), winner first. May be stopped and started again: shards that are whole are kept.
Many ranks need an output folder that every node sees; the rank that ends last writes the manifest.
"""


def add_commands(commands: Any) -> None:
    options = commands.add_parser(
        "shard", help="turn preference pairs into shards of latents and text embeddings", description=DESCRIPTION
    )
    kept = "whole shards are kept, a second run goes on"
    options.set_defaults(act=shard, report={"over_ranks": True, "kept": kept})
    options.add_argument(
        "--alone", action="store_true", help="do not look for a launcher's variables: this process makes all shards"
    )
    add_input(options)
    options.add_argument(
        "--min-margin",
        type=float,
        help="leave out pairs whose shares of the votes differ by less, 0 to 1; default: 0, none but ties",
    )
    options.add_argument("--labels", type=Path, help="labels of scorers for this input, as relabel writes them")
    options.add_argument(
        "--labels-as",
        metavar="HOW",
        help="winner: the scorers' winner, where all prefer the same picture (default); agree: only pairs on which scorers and people "
        "agree; soft: the scorers' winner, the difference of the scores as a soft label",
    )
    options.add_argument("--model", required=True, help="diffusers folder or hub id whose VAE and text encoders encode")
    options.add_argument("--revision", help="branch, tag or commit of a hub id")
    options.add_argument("--variant", help="of the weights' files, such as fp16; default: those without, or the only one")
    options.add_argument("--output", type=Path, required=True, help="folder for the shards")
    options.add_argument("--resolution", type=int, help="side of the square images in pixels; default: the model's own")
    options.add_argument("--min-side", type=int, help="leave out images with a shorter side; default: a quarter of the resolution")
    options.add_argument("--background", default="white", help="colour under transparent parts: a name or #rrggbb; default: white")
    options.add_argument("--keep-no-caption", action="store_true", help="keep pairs without a caption, with the empty one")
    options.add_argument("--pairs-per-shard", type=int, default=1000)
    options.add_argument(
        "--latents",
        choices=("mean", "sample", "mean+logvar"),
        default="mean",
        help="the VAE posterior's mean, one draw of it, or both its moments for a new draw each time (twice the size)",
    )
    options.add_argument(
        "--flip", action="store_true", help="store mirrored images too, for data.flip (adds the size of the latents)"
    )
    options.add_argument("--batch", type=int, default=8, help="pairs encoded at a time")
    options.add_argument("--device", help="default: the GPU where there is one")
    options.add_argument(
        "--vae-dtype", choices=DTYPES, help="default: float32; on a GPU float16 if the VAE says that it does not overflow"
    )
    options.add_argument("--text-dtype", choices=DTYPES, help="default: float32, on a GPU float16")
    options.add_argument("--dry-run", action="store_true", help="read labels, say what a run would keep and take, write nothing")


def add_input(options: Any) -> None:
    """Add the options that say where pairs come from: those of every command that reads pairs."""
    options.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="parquet files in Pick-a-Pic v2's columns (paths, quoted globs, or URLs such as hf://…, s3://…), a pairs.jsonl, "
        "a folder of either, or a data set for `datasets`; with --columns or --preset any parquet, arrow, feather, csv, json or jsonl",
    )
    options.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="ROLE=NAME",
        help="what the columns of a table mean: caption=… with winner=… loser=…, or image_0=… image_1=… and label_0=…, votes_0=… "
        "votes_1=…, votes=… or preference_0=…; or a ranking: images=… ranks=…|scores=…, or image=… rank=…|score=… group=…",
    )
    options.add_argument("--preset", metavar="NAME", help=f"columns of a public data set: {', '.join(PRESETS)}")
    options.add_argument("--pairs", metavar="WHICH", help="of a ranking: all (default), adjacent or best-worst")
    options.add_argument(
        "--root",
        help="folder that the paths of a pairs.jsonl are relative to and stay below; default: its own. A table may also name a .zip, a .tar "
        "or a URL",
    )
    options.add_argument("--follow-links", action="store_true", help="take images behind links that lead out of the root")
    options.add_argument("--split", default="train", help="of a data set given by name")


def input_pairs(args: argparse.Namespace) -> Any:
    """Return the pairs that the options of :func:`add_input` name."""
    from dde_ds.data.inputs import TableOptions, find_pairs

    labels, how, margin = (getattr(args, name, None) for name in ("labels", "labels_as", "min_margin"))
    of_scores = labels is not None and how == "soft"  # whose shares the margin is of
    table = TableOptions(tuple(args.columns), args.preset, args.pairs, None if of_scores else margin)
    source = find_pairs(args.input, args.split, args.root, args.follow_links, table)
    if labels is None:
        if how is not None:
            raise UserError(f"labels_as {how}: is for labels, and there are none; leave it out")
        return source
    from dde_ds.data.labels import LabelledPairs

    return LabelledPairs(source, labels, how or "winner", margin if of_scores else None)


def shard(args: argparse.Namespace) -> None:
    """Make the shards, or this rank's part of them. With ``--dry-run``, print what a run would keep and take."""
    _check(args)
    ranks = DistributedEnv(0, 1, 0) if args.alone else read_environment()
    try:
        with called("--model"):
            if not args.dry_run:
                _shard(args, ranks.rank, ranks.world_size, ranks.local_rank)
            elif ranks.is_main:
                _dry_run(args)
    except OSError as error:
        inside = [str(name) for name in (error.filename2, error.filename) if str(name).startswith(str(args.output))]
        if error.errno not in DISK_PROBLEMS and not inside:
            raise
        raise RankError(
            f"--output {inside[0] if inside else args.output}: {reason(error).lower()}; whole shards are kept, a second run goes on"
        ) from None


def _check(args: argparse.Namespace) -> None:
    from dde_ds.data.manifest import MOST_SAMPLES

    for name in ("pairs_per_shard", "batch", "resolution", "min_side"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if args.pairs_per_shard > MOST_SAMPLES:
        raise UserError(f"--pairs-per-shard {args.pairs_per_shard}: must be {MOST_SAMPLES} or less")
    _colour(args.background)  # refuse a bad colour before anything is read


def _colour(name: str) -> tuple[int, int, int]:
    from PIL import ImageColor

    try:
        colour = ImageColor.getrgb(name)
    except ValueError:
        colour = ()
    if len(colour) != 3:  # a fourth number is the colour's own transparency
        raise UserError(f"--background {name}: expected a colour's name or #rrggbb")
    return colour


def _recipe(args: argparse.Namespace, resolution: int):
    from dde_ds.data.make import EncodingConfig

    return EncodingConfig(
        args.model,
        resolution,
        args.pairs_per_shard,
        args.batch,
        latents=args.latents,
        flip=args.flip,
        min_side=args.min_side,
        background=_colour(args.background),
        keep_no_caption=args.keep_no_caption,
    )


def _resolution(args: argparse.Namespace) -> int:
    """Return the side of the images in pixels, from ``--resolution`` or the model's configuration. Loads no weights."""
    from dde_ds.models.unet import load_component_config, load_unet_config

    factor = 2 ** (len(load_component_config(args.model, "vae", args.revision)["block_out_channels"]) - 1)
    side = args.resolution or load_unet_config(args.model, args.revision)["sample_size"] * factor
    if side % factor:
        raise UserError(f"--resolution {side}: must be a multiple of {factor}, the VAE's factor")
    return side


def _dry_run(args: argparse.Namespace) -> None:
    from dde_ds.data.estimate import estimate

    recipe = _recipe(args, _resolution(args))
    expected = estimate(input_pairs(args), recipe, args.revision)
    _print_rows(expected["rows"], expected["noted"])
    print(f"a run would encode {expected['pairs']} pairs into {expected['shards']} shards, and {expected['prompts']} prompts")
    print(
        f"of {expected['sampled']} images looked at, {expected['upscaled']:.1%} are smaller than {recipe.resolution} pixels and would be "
        f"upscaled, {expected['unusable']:.1%} could not be used"
    )
    print(f"disk: {expected['bytes'] / 1e9:.2f} GB")


def _shard(args: argparse.Namespace, rank: int, world: int, local_rank: int) -> None:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dde_ds.data.estimate import shard_bytes
    from dde_ds.data.make import make_shards
    from dde_ds.models.encode import Encoder
    from dde_ds.models.silence import silence_libraries

    silence_libraries()
    warnings.filterwarnings("ignore", module="PIL")  # the table at the end counts odd images
    recipe = _recipe(args, _resolution(args))
    source = input_pairs(args)  # refuse a bad input before minutes of loading
    device = args.device or (f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    # A restart must give the same bytes. The fastest algorithm may be a different one each time, and round differently.
    torch.backends.cudnn.deterministic = True
    vae, text = (getattr(torch, name) if name else None for name in (args.vae_dtype, args.text_dtype))
    encoder = Encoder(args.model, args.revision, device, vae, text, args.variant)
    started, first = time.perf_counter(), None
    rate = TextColumn("{task.fields[rate]:.1f} images/s")
    columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TextColumn("pairs"), rate, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=rank > 0) as progress:
        bar = progress.add_task("encoding", total=None, rate=0.0)

        def show(done: int, total: int) -> None:
            nonlocal started, first
            if first is None:  # pairs of earlier runs do not count in the rate
                started, first = time.perf_counter(), done
            rate = 2 * (done - first) / max(1e-9, time.perf_counter() - started)
            progress.update(bar, completed=done, total=total, rate=rate)

        manifest = make_shards(source, args.output, encoder, recipe, rank, world, show)
    if manifest is None:
        print(f"rank {rank} of {world}: done; the rank that ends last writes the manifest")
        return
    _print_rows(manifest["rows"], manifest["noted"])
    print(
        f"{manifest['samples']} pairs in {len(manifest['shards'])} shards, {manifest['prompts']['distinct']} prompts, "
        f"{shard_bytes(manifest) / 1e9:.2f} GB: {args.output}"
    )


def _print_rows(rows: dict[str, int], noted: dict[str, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("rows", "", box=None, show_header=False)
    for what, count in sorted(rows.items(), key=lambda item: -item[1]):
        table.add_row(verbatim(what), f"{count:,}")
    for remark, count in noted.items():
        if count:
            table.add_row(verbatim(f"{remark} (kept)"), f"{count:,}")
    Console().print(table)
