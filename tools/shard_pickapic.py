"""Turn Pick-a-Pic parquet into shards of VAE latents and text embeddings.

    python tools/shard_pickapic.py --input 'pickapic_v2/train-*.parquet' --model stabilityai/stable-diffusion-xl-base-1.0 \\
        --output shards/sdxl

Keeps the decided pairs (label_0 is 1 or 0), winner first. May be stopped and started again: shards that are whole are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dde_ds.errors import UserError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="parquet files or globs in Pick-a-Pic v2's columns")
    parser.add_argument("--model", required=True, help="diffusers folder or hub id whose VAE and text encoders encode")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--resolution", type=int, help="side of the square images in pixels; default: the model's own")
    parser.add_argument("--pairs-per-shard", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8, help="pairs encoded at a time")
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--vae-dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    import torch

    from dde_ds.data.make import make_shards
    from dde_ds.data.pickapic import find_parquet
    from dde_ds.models.encode import Encoder
    from dde_ds.models.quiet import quiet_libraries

    quiet_libraries()
    try:
        for name in ("pairs_per_shard", "batch"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
        find_parquet(args.input)  # before minutes of loading
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        encoder = Encoder(args.model, args.revision, device, getattr(torch, args.vae_dtype))
        columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TextColumn("pairs"), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("encoding", total=None)
            manifest = make_shards(
                args.input,
                args.output,
                encoder,
                model=args.model,
                resolution=args.resolution or encoder.resolution,
                pairs_per_shard=args.pairs_per_shard,
                batch=args.batch,
                on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{manifest['samples']} pairs in {len(manifest['shards'])} shards, {manifest['prompts']['distinct']} prompts: {args.output}"
    )
    print(f"rows: {json.dumps(manifest['rows'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
