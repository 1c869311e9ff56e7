"""From parquet to shards: decided pairs, encoded, a fixed range of pairs to each shard, resumable shard by shard."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dde_ds.data import shards
from dde_ds.data.pickapic import PairRow, count_captions, find_parquet, read_pairs
from dde_ds.errors import UserError
from dde_ds.models.encode import Encoder, Prepared, prepare_image, time_ids


def make_shards(
    inputs: Sequence[str],
    output: Path,
    encoder: Encoder,
    model: str,
    resolution: int,
    pairs_per_shard: int,
    batch: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Write the shards of all decided pairs of ``inputs`` into ``output`` and give back the manifest.

    Decided pair k belongs to shard k // pairs_per_shard whatever happens, so a second run with the same settings takes the
    shards that are whole and makes only what is missing. A pair with a missing or undecodable image is left out of its
    shard, counted in the manifest's ``rows`` and listed in ``errors.jsonl``.

    Args:
        model: what to call the model in the manifest.
        resolution: side of the square that images are scaled and cropped to, in pixels.
        batch: pairs encoded at a time.
        on_progress: called with pairs done and pairs in all.

    Raises:
        UserError: unusable input, or an output folder that was begun with other settings.
    """
    latent_shape = encoder.latent_shape(resolution)
    files = find_parquet(inputs)
    captions, counts = count_captions(files)
    if not captions:
        raise UserError(f"--input: no decided pair in {len(files)} files ({dict(counts)}): label_0 must be 1 or 0 in some rows")
    settings = {
        "model": model,
        "weights": encoder.digest(),
        "vae_dtype": str(encoder.vae_dtype),
        "family": encoder.family,
        "resolution": resolution,
        "latents": "mean",
        "scaling_factor": encoder.scaling_factor,
        "flip": False,
        "pairs_per_shard": pairs_per_shard,
        "input": [{"name": file.name, "sha256": shards.sha256_of(file)} for file in files],
    }
    digest = _claim(output, settings)

    prompt_row = {caption: row for row, caption in enumerate(dict.fromkeys(["", *captions]))}
    prompt_files = _write_prompts(output, encoder, list(prompt_row), 2 * batch)
    rows, errors = [], []
    pairs = read_pairs(files)
    for number, first in enumerate(range(0, len(captions), pairs_per_shard)):
        own = itertools.islice(pairs, pairs_per_shard)
        finished = shards.finished_shard(output, number, digest)
        if finished is None:
            failed: list[dict] = []
            samples = _encode(own, first, encoder, prompt_row, resolution, batch, failed)
            finished = shards.write_shard(output, number, samples, digest, failed), failed
        else:
            for _ in own:  # the next shard's pairs come after these
                pass
        rows.append(finished[0])
        errors += finished[1]
        on_progress(min(first + pairs_per_shard, len(captions)), len(captions))

    kept = sum(row["samples"] for row in rows)
    lines = "".join(json.dumps(error, ensure_ascii=False) + "\n" for error in errors)
    shards.write_atomically(output / "errors.jsonl", lines.encode())
    if kept == 0:
        raise UserError(
            f"--input: none of {len(captions)} decided pairs could be encoded; the reasons are in {output / 'errors.jsonl'}"
        )
    counts.update(error["reason"].partition(":")[0] for error in errors)
    manifest = {
        "settings": settings,
        "settings_digest": digest,
        "latents": {"shape": list(latent_shape), "dtype": "float16", "scaled": True},
        "prompts": {"distinct": len(prompt_row), "files": prompt_files},
        "samples": kept,
        "rows": dict(sorted(counts.items())),
        "shards": rows,
    }
    shards.write_manifest(output, manifest)
    return manifest


def _claim(output: Path, settings: dict) -> str:
    """Mark the folder as belonging to these settings, or find that it does; give back their digest."""
    path = output / "settings.json"
    output.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        before = json.loads(path.read_bytes())
        differing = [key for key in settings if before.get(key) != settings[key]]
        if differing:
            key = differing[0]
            raise UserError(
                f"--output {output}: was begun with other settings ({key} {before.get(key)!r}, now {settings[key]!r}); "
                "choose another folder or delete this one"
            )
    elif any(output.iterdir()):
        raise UserError(f"--output {output}: is not empty and holds no shards of ours; choose another folder")
    data = json.dumps(settings, ensure_ascii=False, indent=1).encode()
    shards.write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def _write_prompts(output: Path, encoder: Encoder, captions: Sequence[str], batch: int) -> list[dict]:
    rows = []
    for number, low in enumerate(range(0, len(captions), shards.PROMPTS_PER_FILE)):
        chunk = captions[low : low + shards.PROMPTS_PER_FILE]
        parts = [encoder.prompts(chunk[i : i + batch]) for i in range(0, len(chunk), batch)]
        tensors = {key: torch.cat([part[key] for part in parts]).half() for key in parts[0]}
        rows.append(shards.write_prompts(output, number, tensors))
    return rows


def _encode(
    pairs: Iterable[PairRow],
    first: int,
    encoder: Encoder,
    prompt_row: dict[str, int],
    resolution: int,
    batch: int,
    failed: list[dict],
) -> Iterator[shards.Sample]:
    """Samples of consecutive pairs; ``first`` is the number of the first. Rows that cannot be used go to ``failed``."""
    numbered = enumerate(pairs, first)
    while chunk := list(itertools.islice(numbered, batch)):
        usable = [(number, pair, images) for number, pair in chunk if (images := _images(pair, resolution, failed))]
        if not usable:
            continue
        pixels = torch.stack([image.pixels for _, _, images in usable for image in images])
        latents = encoder.latents(pixels).half().unflatten(0, (-1, 2))
        for (number, pair, images), latent in zip(usable, latents, strict=True):
            if not bool(latent.isfinite().all()):
                raise UserError(f"{pair.source}: its latents hold NaN or infinity; the VAE overflowed: use --vae-dtype float32")
            tensors: dict[str, Tensor] = {"latents": latent.contiguous(), "prompt": torch.tensor(prompt_row[pair.caption])}
            if encoder.family == "sdxl":
                tensors["time_ids"] = torch.stack([time_ids(image, resolution) for image in images])
            yield shards.Sample(f"{number:09d}", tensors, {"caption": pair.caption, "source": pair.source, **pair.provenance})


def _images(pair: PairRow, resolution: int, failed: list[dict]) -> list[Prepared] | None:
    """Winner and loser, or None after noting why not."""
    prepared = []
    for role, data in (("winner", pair.winner), ("loser", pair.loser)):
        try:
            if data is None:
                raise ValueError("missing image")
            prepared.append(prepare_image(data, resolution))
        except ValueError as error:
            failed.append({"source": pair.source, "image": role, "reason": str(error)})
            return None
    return prepared
