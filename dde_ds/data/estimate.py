"""Estimate what a sharding would keep and how much space it would take.

The estimate reads labels, captions and a sample of images. It loads no weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from dde_ds.data.make import CUT_CAPTION, EncodingConfig
from dde_ds.data.pairs import PairSource
from dde_ds.errors import UserError
from dde_ds.models.base import family_of
from dde_ds.models.encode import cut_captions, image_size
from dde_ds.models.unet import load_component_config

# Number of pairs whose image headers are read, and length of the runs in which they lie, spread evenly over the input.
SAMPLED, RUN = 256, 32
# Bytes of a sample beside its tensors: two tar headers, the .json, the padding of each member to 512 bytes, and the
# header of safetensors.
OVERHEAD = 2560


def estimate(source: PairSource, recipe: EncodingConfig, revision: str | None = None) -> dict:
    """Return the estimate of a sharding: rows by reason, samples, distinct prompts, the share of images that would be
    upscaled, and bytes on disk.

    ``upscaled`` and ``unusable`` are shares of ``sampled`` images, of which only the headers are decoded.

    Args:
        source: the input.
        recipe: how its pairs would be encoded.
        revision: revision of the model on the hub.

    Raises:
        UserError: the resolution does not fit the VAE, or the model's configuration or tokenizers cannot be loaded.
    """
    survey = source.survey(recipe.keep_no_caption)
    family = family_of(recipe.model, revision)
    vae = load_component_config(recipe.model, "vae", revision)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    if recipe.resolution % factor:
        raise UserError(f"resolution {recipe.resolution}: must be a multiple of {factor}, the VAE's factor")
    latent = 2 * 2 * vae["latent_channels"] * (recipe.resolution // factor) ** 2
    copies = 1 + recipe.flip + (recipe.latents == "mean+logvar")
    texts = {text.part: load_component_config(recipe.model, text.part, revision) for text in family.text_encoders}
    prompt = 2 * sum(math.prod(shape) for shape in family.prompt_shapes(texts).values())
    cut = cut_captions(_tokenizers(recipe.model, family.tokenizers, revision), survey.captions)[survey.caption_of].sum()
    captions = len(survey.captions) + ("" not in survey.captions)
    sides = _sides(source, survey.rows)
    known = [side for side in sides if side is not None]
    return {
        "rows": dict(survey.counts),
        "noted": {CUT_CAPTION: int(cut), **survey.noted},
        "pairs": len(survey.rows),
        "shards": -(-len(survey.rows) // recipe.pairs_per_shard),
        "prompts": captions,
        "sampled": len(sides),
        "upscaled": sum(side < recipe.resolution for side in known) / max(1, len(known)),
        "unusable": sum(side is None or side < recipe.shortest for side in sides) / max(1, len(sides)),
        "bytes": len(survey.rows) * (latent * copies + OVERHEAD) + captions * (prompt + OVERHEAD),
    }


def _tokenizers(model: str, names: Iterable[str], revision: str | None) -> list[Any]:
    from transformers import CLIPTokenizer

    try:
        return [CLIPTokenizer.from_pretrained(model, subfolder=name, revision=revision) for name in names]  # pyright: ignore[reportArgumentType]  # it accepts None
    except OSError as error:
        raise UserError(f"model {model}: tokenizer not loadable: {' '.join(str(error).split())}") from None


def _sides(source: PairSource, rows: np.ndarray) -> list[int | None]:
    """Return the short side in pixels of each image of a sample of pairs.

    None stands for a missing or unreadable image.
    """
    starts = np.linspace(0, max(0, len(rows) - RUN), SAMPLED // RUN).astype(np.int64)
    chosen = np.unique(np.concatenate([rows[start : start + RUN] for start in starts])) if len(rows) else rows
    sides: list[int | None] = []
    for pair in source.read(chosen):
        for data in (pair.winner, pair.loser):
            try:
                sides.append(min(image_size(data)) if data else None)
            except ValueError:
                sides.append(None)
    return sides


def shard_bytes(manifest: dict) -> int:
    """Return the bytes of all tars of a set, from its manifest."""
    return sum(row["bytes"] for row in [*manifest["shards"], *manifest["prompts"]["files"]])
