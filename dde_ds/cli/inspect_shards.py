"""``dde-ds inspect`` and ``tools/inspect_shards.py``: print what shards hold, and write a sheet of their pairs."""

from __future__ import annotations

import argparse
import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dde_ds.errors import UserError
from dde_ds.shape import COUNT, NUMBER, require_shape
from dde_ds.text import verbatim

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

DESCRIPTION = """Say what shards hold, and show some of their pairs.

    dde-ds inspect shards/sdxl
    dde-ds inspect shards/sdxl --sheet sheet.html --pairs 24

The sheet decodes pairs from their latents, as training sees them: winner, loser, caption. ``.html`` or ``.png``.
"""

# What the table needs of a manifest, beside what reading does.
SHOWN = {
    "settings": {
        **dict.fromkeys(("empty_prompt", "model", "vae_dtype", "text_dtype"), object),
        **{"scaling_factor": NUMBER, "resolution": COUNT, "min_side": COUNT, "input": [{"rows": COUNT}]},
    },
    "rows": (COUNT,),
    "noted": (COUNT,),
}


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="say what shards hold, and show some of their pairs", description=DESCRIPTION)
    parser.set_defaults(act=inspect_shards)
    parser.add_argument("folder", help="folder or URL of shards")
    parser.add_argument("--sheet", type=Path, help="write decoded pairs to this .html or .png")
    parser.add_argument("--pairs", type=int, default=16, help="pairs on the sheet, evenly taken from all")
    parser.add_argument("--model", help="pipeline whose VAE decodes; default: the one that the shards were made with")
    parser.add_argument("--revision")
    parser.add_argument("--device", default="cpu")


def inspect_shards(args: argparse.Namespace) -> None:
    """Print a table of the manifest, and write the sheet if ``--sheet`` is given."""
    from rich.console import Console

    from dde_ds.data.shards import ShardSet
    from dde_ds.models.silence import silence_libraries

    silence_libraries()
    if args.sheet and args.sheet.suffix not in (".html", ".png"):
        raise UserError(f"--sheet {args.sheet}: expected a name that ends in .html or .png")
    if args.pairs < 1:
        raise UserError(f"--pairs {args.pairs}: must be 1 or more")
    shards = ShardSet(args.folder, key="folder")
    try:
        require_shape({"noted": {}} | shards.manifest, SHOWN)  # earlier versions noted nothing
    except ValueError as error:  # training does not need what is shown here
        raise UserError(f"{args.folder}: manifest.json does not say what is shown here: {error}") from None
    Console().print(summary(shards.manifest))
    if args.sheet:
        pairs = decode(shards, args.pairs, args.model or str(shards.manifest["settings"]["model"]), args.revision, args.device)
        write_sheet(args.sheet, pairs)
        print(f"{len(pairs)} pairs: {args.sheet}")


def summary(manifest: dict) -> Table:
    from rich.table import Table

    from dde_ds.data.estimate import shard_bytes
    from dde_ds.data.manifest import FORMAT

    settings, table = manifest["settings"], Table(show_header=False, box=None)
    sizes = [row["samples"] for row in manifest["shards"]]
    rows = {
        "format": f"{manifest['format']}, {'SHA-256' if manifest['format'] == FORMAT else 'CRC32'} of each pair compared on reading",
        "pairs": f"{manifest['samples']:,} in {len(sizes)} shards of {min(sizes)} to {max(sizes)}",
        "prompts": f"{manifest['prompts']['distinct']:,} distinct; the empty one is {settings['empty_prompt']}",
        "size": f"{shard_bytes(manifest) / 1e9:.3f} GB",
        "latents": f"{'x'.join(map(str, manifest['latents']['shape']))} float16, {settings['latents']}, "
        f"{'also mirrored' if settings['flip'] else 'not mirrored'}, times {settings['scaling_factor']:g}",
        **({"labels": "soft: the winner's share of the votes"} if settings.get("soft_label") else {}),
        "images": f"{settings['resolution']} pixels, from sides of {settings['min_side']} up",
        "model": f"{settings['model']} ({settings['family']}; VAE {settings['vae_dtype']}, text {settings['text_dtype']})",
        "input": f"{len(settings['input'])} files, {sum(file['rows'] for file in settings['input']):,} rows",
        **{f"rows: {reason}": f"{count:,}" for reason, count in manifest["rows"].items()},
        **{f"kept: {remark}": f"{count:,}" for remark, count in manifest.get("noted", {}).items() if count},
    }
    for name, value in rows.items():
        table.add_row(verbatim(name), verbatim(value))
    return table


def decode(shards, count: int, model: str, revision: str | None, device: str) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """Decode at most ``count`` pairs, evenly taken from all: (winner, loser, caption), with images (H,W,3) uint8."""
    import numpy as np
    import torch

    from dde_ds.models.base import called, find_variant
    from dde_ds.models.parts import load_part

    with called("--model"):
        vae = load_part(model, "vae", revision, find_variant(model, revision)).to(device)
    places = [(shard, row) for shard, size in enumerate(shards.counts) for row in range(size)]
    chosen = [places[i] for i in np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).astype(int))]
    scale, shift = shards.manifest["settings"]["scaling_factor"], getattr(vae.config, "shift_factor", None) or 0.0
    pairs = []
    for place in chosen:
        with torch.no_grad():
            pixels = vae.decode(shards.read(*place)["latents"].float().to(device) / scale + shift).sample
        images = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pairs.append((images[0], images[1], str(shards.describe(*place).get("caption", ""))))
    return pairs


def write_sheet(path: Path, pairs: list[tuple[np.ndarray, np.ndarray, str]]) -> None:
    from PIL import Image, ImageDraw

    if path.suffix == ".html":
        body = "".join(
            f"<figure><img src='{data_url(winner)}'><img src='{data_url(loser)}'><figcaption>{html.escape(caption)}</figcaption></figure>"
            for winner, loser, caption in pairs
        )
        style = "body{font:14px sans-serif;display:flex;flex-wrap:wrap}figure{margin:8px;width:424px}img{width:208px;margin:2px}"
        path.write_text(
            f"<!doctype html><meta charset=utf-8><title>Pairs</title><style>{style}</style><p>Left: preferred.</p>{body}",
            encoding="utf-8",
        )
        return
    side, line, columns = 208, 16, 4
    sheet = Image.new("RGB", (columns * (2 * side + 8), -(-len(pairs) // columns) * (side + line + 8)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (winner, loser, caption) in enumerate(pairs):
        left, top = number % columns * (2 * side + 8), number // columns * (side + line + 8)
        for offset, image in ((0, winner), (side, loser)):
            sheet.paste(Image.fromarray(image).resize((side, side)), (left + offset, top))
        draw.text((left + 2, top + side + 2), caption[:60].encode("latin-1", "replace").decode("latin-1"), fill="black")
    sheet.save(path)


def data_url(image: np.ndarray) -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
