"""``dde-ds generate``, ``evaluate``, ``compare`` and ``report``: draw images, score them, compare models and report.

``launchers/generate.py`` calls ``dde-ds generate``.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dde_ds.errors import UserError
from dde_ds.models.family import guidance_defaults
from dde_ds.text import printable

# The options of drawing, by the names of the fields of DrawOptions. An option that is not given takes the field's default.
DRAWING = ("images_per_prompt", "seed", "scheduler", "steps", "guidance", "resolution", "precision")

GENERATE = """Draw a model's images for evaluation, split over all ranks.

    dde-ds generate --model runs/first/export --prompts prompts.txt --out images/first
    deepspeed --module dde_ds.cli generate …      # on many GPUs

Each image is a function of (model, seed, prompt, image number) alone: any number of ranks gives the same. Start it again to
make what is missing. Exit code 0: all images are there. 1: an error, in one line. 130: Ctrl-C; what is made is kept.
"""


def add_commands(commands: Any) -> None:
    """Add ``evaluate``, ``compare``, ``report`` and ``generate`` to the subcommands.

    Each subcommand sets ``act``, a function that takes the parsed arguments.
    """
    make = commands.add_parser("evaluate", help="draw, score and compare models with a base: is it better, and how sure are we")
    make.add_argument("--base", required=True, metavar="[NAME=]DIR", help="diffusers folder or hub id, or a folder of its images")
    make.add_argument("--model", required=True, action="append", metavar="[NAME=]DIR", help="likewise; may be given several times")
    make.add_argument("--variant", help="of the files of --base's weights, such as fp16; default: those without, or the only one")
    make.add_argument("--prompts", help="txt, jsonl or parquet; needed where images are to be drawn")
    add_drawing(make)
    _add_comparing(make)
    make.set_defaults(act=evaluate, report={"over_ranks": True})

    compare = commands.add_parser("compare", help="compare folders of images that are scored already")
    compare.add_argument("--base", required=True, metavar="[NAME=]DIR", help="folder of images with their scores")
    compare.add_argument(
        "--model", required=True, action="append", metavar="[NAME=]DIR", help="likewise; may be given several times"
    )
    _add_comparing(compare)
    compare.set_defaults(act=compare_scored)

    report = commands.add_parser("report", help="one HTML page from a run folder, from a comparison, or from both")
    report.add_argument("source", nargs="+", type=Path, help="run folder, folder of a comparison, or its comparison.json")
    report.add_argument("--output", type=Path, help="default: report.html in the first of them")
    report.add_argument(
        "--pictures", type=int, default=6, help="how many of the largest gains, of the largest losses and at random"
    )
    report.set_defaults(act=write_report)

    draw = commands.add_parser("generate", help="draw a model's images for evaluation, split over all ranks", description=GENERATE)
    draw.set_defaults(act=generate, report={"over_ranks": True})
    draw.add_argument("--model", required=True, help="diffusers folder or hub id")
    draw.add_argument("--revision", help="branch, tag or commit of a hub id")
    draw.add_argument("--variant", help="of the weights' files, such as fp16; default: those without, or the only one")
    draw.add_argument("--prompts", required=True, help="txt (one a line), jsonl or parquet (caption, prompt or text)")
    draw.add_argument("--out", type=Path, required=True, help="folder for the images")
    add_drawing(draw)


def add_drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images-per-prompt", type=int, help="default: 8")
    parser.add_argument("--limit", type=int, help="only the first so many distinct prompts")
    parser.add_argument("--seed", type=int, help="default: 0; an image's noise is a function of seed, prompt and image number")
    parser.add_argument("--scheduler", help="ddim (default), dpm++, euler or unipc")
    parser.add_argument("--steps", type=int, help="default: 50")
    parser.add_argument("--guidance", type=float, help=f"default: {guidance_defaults()}")
    parser.add_argument("--resolution", type=int, help="side in pixels; default: the model's own")
    parser.add_argument("--precision", help="of the UNet: fp32, bf16 or fp16; default: fp16 on a GPU, fp32 on the CPU")
    parser.add_argument("--batch", type=int, default=8, help="images drawn, or scored, at a time")


def _add_comparing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scorers",
        nargs="+",
        required=True,
        metavar="NAME[=MODEL[,PROCESSOR]]",
        help="clip, pickscore, hps_v2, hps_v2.1, aesthetic, inception; MODEL is a local folder or file, or a hub id with @revision if "
        "wanted (inception: a local file); or FILE.py:NAME, a scorer of your own file, which is executed",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for comparison.json and comparison.md")


def generate(args: argparse.Namespace) -> None:
    """Draw this rank's share of a model's images."""
    from dde_ds.evaluation.generate_folder import generate_folder
    from dde_ds.evaluation.prompts import read_prompts

    options = draw_options(args)
    prompts, repeated = read_prompts(args.prompts, args.limit)
    ranks, device = join()
    with progress("images", ranks) as advance:
        generate_folder(args.model, args.revision, prompts, args.out, options, ranks, device, args.batch, advance, args.variant)
    if ranks.is_main:
        _say_prompts(prompts, repeated)
        print(f"{len(prompts) * options.images_per_prompt} images: {args.out}")


def evaluate(args: argparse.Namespace) -> None:
    """Draw the images that are missing, score those that have no score, and compare the models.

    Every rank calls this. Rank 0 writes the comparison.
    """
    from dde_ds.evaluation.comparison import name_sources
    from dde_ds.evaluation.generate_folder import generate_folder, side_of
    from dde_ds.evaluation.inception import InceptionScorer
    from dde_ds.evaluation.pictures import open_pictures, require_whole
    from dde_ds.evaluation.prompts import read_prompts
    from dde_ds.evaluation.scorers import build_scorers
    from dde_ds.evaluation.scoring import score_folder, score_set

    options = draw_options(args)
    sources = name_sources([args.base, *args.model])
    drawn = {name: source for name, source in sources.items() if not (Path(source) / "manifest.json").exists()}
    if args.variant and next(iter(sources)) not in drawn:
        raise UserError("--variant: --base is a folder of images, nothing is drawn from it; leave it out")
    if drawn and not args.prompts:
        raise UserError(f"--prompts: needed to draw the images of {', '.join(drawn)}")
    given = [name for name in ("prompts", "limit", *DRAWING) if getattr(args, name) is not None]
    if given and not drawn:
        raise UserError(f"--{given[0].replace('_', '-')}: --base and --model are folders of images, nothing is drawn; leave it out")
    prompts, repeated = read_prompts(args.prompts, args.limit) if drawn else ([], 0)
    for source in drawn.values():
        side_of(source, None, options)  # refuse a bad resolution before hours of loading and drawing
    ranks, device = join()
    scorers = build_scorers(args.scorers, device)  # refuse a missing scorer before hours of drawing
    folders = {name: Path(source) for name, source in sources.items()}
    for name, source in drawn.items():
        folders[name] = args.out / "images" / name
        with progress(f"images of {name}", ranks) as advance:
            variant = args.variant if name == next(iter(sources)) else None
            generate_folder(source, None, prompts, folders[name], options, ranks, device, args.batch, advance, variant)
    for name, folder in folders.items():
        pictures = open_pictures(folder)
        require_whole(pictures)
        for scorer in scorers:
            with progress(f"{scorer.name} of {name}", ranks) as advance:
                if isinstance(scorer, InceptionScorer):
                    score_set(pictures, scorer, ranks, device, args.batch, advance)
                else:
                    score_folder(pictures, scorer, ranks, device, args.batch, advance)
    if ranks.is_main:
        if drawn:
            _say_prompts(prompts, repeated)
        _compare(folders, [scorer.name for scorer in scorers], {s.name: s.digest for s in scorers}, args.out)


def compare_scored(args: argparse.Namespace) -> None:
    from dde_ds.evaluation.comparison import name_sources, name_version

    folders = {name: Path(source) for name, source in name_sources([args.base, *args.model]).items()}
    _compare(folders, [name_version(name) for name in args.scorers], None, args.out)


def write_report(args: argparse.Namespace) -> None:
    from dde_ds.report.write import report

    if args.pictures < 0:
        raise UserError(f"--pictures {args.pictures}: must be 0 or more")
    print(printable(str(report(args.source, args.output, args.pictures))))


def draw_options(args: argparse.Namespace) -> Any:
    from dde_ds.evaluation.generate_folder import DrawOptions

    return DrawOptions(**{name: getattr(args, name) for name in DRAWING if getattr(args, name) is not None})


def join() -> tuple[Any, Any]:
    """Return the ranks and this rank's device. Join the process group if a launcher started several ranks."""
    import torch

    from dde_ds.distributed.environment import read_environment
    from dde_ds.distributed.group import start
    from dde_ds.models.silence import silence_libraries

    silence_libraries()
    ranks = read_environment()
    if ranks.world_size > 1:
        return start()
    return ranks, torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def progress(what: str, ranks: Any) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that takes (done, total) and moves a progress bar.

    Only rank 0 shows the bar, and only on a terminal. The bar counts rank 0's own share.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (ranks.is_main and console.is_terminal)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _compare(folders: dict[str, Path], scorers: list[str], digests: dict[str, str] | None, out: Path) -> None:
    from dde_ds.evaluation.comparison import compare_folders, print_table, write_comparison

    comparison = compare_folders(folders, scorers, digests)
    write_comparison(comparison, out)
    print_table(comparison)
    print(f"{out / 'comparison.json'}, {out / 'comparison.md'}")


def _say_prompts(prompts: list[str], repeated: int) -> None:
    if repeated:
        print(f"{len(prompts)} distinct prompts; {repeated} repetitions left out", file=sys.stderr)
