"""Encode pairs into shards, on any number of ranks, resumable shard by shard.

Each shard holds a fixed range of pairs.

The work is a list of parts: first the files of prompts, then the shards. The pairs or prompts of a part follow from the
input alone, so ranks need not communicate. Each rank makes its own consecutive parts, and keeps parts that are already
complete. A rank that finds all parts complete writes the manifest. If two ranks do so, they write the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dde_ds.data.manifest import FORMAT, MOST_FILES, PROMPTS_PER_FILE, SOFT_LABEL
from dde_ds.data.pairs import NO_CAPTION, PairRow, PairSource, Survey, has_soft_labels, reading_of
from dde_ds.data.writer import Sample, finished_shard, remove_partials, write_manifest, write_shard
from dde_ds.errors import RankError, UserError
from dde_ds.files import write_atomically
from dde_ds.models.encode import WHITE, Encoder, Prepared, prepare_image
from dde_ds.text import encodable
from dde_ds.untrusted import JSON_BYTES, parse_json, read_regular
from dde_ds.warn import reason

# Number of chunks whose images are decoded while the GPU encodes the chunk before them.
LOOKAHEAD = 2
SAME_IMAGE = "same image"
# Counts in the manifest's ``noted``: these pairs are kept.
REPEATED_PAIR, CUT_CAPTION = "repeated pair", "cut caption"


@dataclass(frozen=True)
class EncodingConfig:
    """The settings for encoding pairs into samples."""

    model: str
    """Name of the model in the manifest."""
    resolution: int
    """Side in pixels of the square to which images are scaled and cropped."""
    pairs_per_shard: int = 1000
    batch: int = 8
    """Pairs that are encoded at a time.

    :meth:`settings` leaves this number out, so that it may be lowered on a restart. That changes some last bits.
    """
    latents: str = "mean"
    """``mean`` stores the mean of the VAE's posterior, and ``sample`` one draw from it.

    ``mean+logvar`` lets training draw anew each time it reads a pair.
    """
    flip: bool = False
    """Encode the mirrored images too, so that training may flip."""
    min_side: int | None = None
    """The shortest side in pixels that an image may have. Smaller images are left out. None means a quarter of the resolution."""
    background: tuple[int, int, int] = WHITE
    """Colour (red, green, blue; 0 to 255) under the transparent parts of images."""
    keep_no_caption: bool = False
    """Keep pairs without a caption, and give them the empty caption. An empty caption in the input counts as a caption."""

    def settings(self, encoder: Encoder, source: PairSource) -> dict:
        """Return the settings that identify these shards, for the manifest. One folder holds shards of one set of settings."""
        return {
            "format": FORMAT,
            "model": encodable(self.model),
            "weights": encoder.digests.full,
            "weights_half": encoder.digests.half,
            "vae_dtype": str(encoder.vae_dtype),
            "text_dtype": str(encoder.text_dtype),
            "family": encoder.family.layout.name,
            "resolution": self.resolution,
            "min_side": self.shortest,
            "background": list(self.background),
            "no_caption": "kept" if self.keep_no_caption else "left out",
            "latents": self.latents,
            "scaling_factor": encoder.scaling_factor,
            "flip": self.flip,
            "empty_prompt": "zeros" if encoder.zero_empty_prompt else "encoded",
            "pairs_per_shard": self.pairs_per_shard,
            "input": source.identity,
            # Only inputs that need these keys have them, so that the settings of older folders stay the same.
            **({"reading": reading} if (reading := reading_of(source)) else {}),
            **({SOFT_LABEL: True} if has_soft_labels(source) else {}),
        }

    @property
    def shortest(self) -> int:
        """Return the shortest side in pixels that an image may have."""
        return max(1, self.resolution // 4) if self.min_side is None else self.min_side


def make_shards(
    source: PairSource,
    output: Path,
    encoder: Encoder,
    recipe: EncodingConfig,
    rank: int = 0,
    world: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict | None:
    """Write this rank's part of the shards of all decided pairs of ``source`` into ``output``.

    A second run with the same settings keeps the complete shards and makes only the missing ones, even with
    another number of ranks. A pair with an unusable image is left out of its shard, counted in the manifest's ``rows``
    and listed in ``errors.jsonl``.

    Args:
        source: the input.
        output: the folder of shards.
        encoder: the VAE and text encoders.
        recipe: the settings of the encoding.
        rank, world: this rank, and the number of ranks.
        on_progress: called with the number of pairs done and the number of all pairs of this rank.

    Returns:
        The manifest, or None while other ranks are still at work. The last rank writes the manifest.

    Raises:
        UserError: the input is unusable, or the output folder was begun with other settings.
    """
    latent_shape = encoder.latent_shape(recipe.resolution)
    survey = source.survey(recipe.keep_no_caption)
    if not len(survey.rows):
        hint = (
            "keep_no_caption keeps those without a caption"
            if NO_CAPTION in survey.counts
            else "label_0 must be 1 or 0 in some rows; relabel gives labels to an input that has none"
        )
        raise UserError(f"input: no decided pair ({dict(survey.counts)}): {hint}")
    captions = ["", *(caption for caption in survey.captions if caption)]
    prompts_files, shards = -(-len(captions) // PROMPTS_PER_FILE), -(-len(survey.rows) // recipe.pairs_per_shard)
    if prompts_files + shards > MOST_FILES:
        raise UserError(f"pairs_per_shard {recipe.pairs_per_shard}: makes {shards} shards, more than a manifest holds; raise it")
    settings = recipe.settings(encoder, source)
    settings, digest = _claim(output, settings)
    shapes = {name: list(value.shape[1:]) for name, value in encoder.prompts([""]).items()}
    parts = (("prompts-", prompts_files), ("", shards))
    remove_partials(output, {f"{kind}{number:05d}" for kind, count in parts for number in _own(count, rank, world)})

    for number in _own(prompts_files, rank, world):
        name = f"prompts-{number:05d}"
        if finished_shard(output, name, digest) is None:
            low = number * PROMPTS_PER_FILE
            chunk = captions[low : low + PROMPTS_PER_FILE]
            write_shard(output, name, _encode_prompts(chunk, low, encoder, 2 * recipe.batch), digest, [])

    _make_pairs(source, survey, captions, output, encoder, recipe, digest, rank, world, on_progress)
    return _finish(source, survey, output, encoder, settings, digest, len(captions), latent_shape, shapes)


def _own(parts: int, rank: int, world: int) -> range:
    """Return a rank's parts. They are consecutive, so that few row groups are read by two ranks."""
    return range(parts * rank // world, parts * (rank + 1) // world)


def _make_pairs(source, survey, captions, output, encoder, recipe, digest, rank, world, on_progress) -> None:
    """Encode and write the shards of this rank that are missing."""
    size, total = recipe.pairs_per_shard, len(survey.rows)
    rank_shards = _own(-(-total // size), rank, world)
    missing = [number for number in rank_shards if finished_shard(output, f"{number:05d}", digest) is None]
    pairs_in = {number: min(size, total - number * size) for number in rank_shards}
    done = sum(count for number, count in pairs_in.items() if number not in set(missing))
    on_progress(done, sum(pairs_in.values()))
    if not missing:
        return
    prompt_of = {caption: row for row, caption in enumerate(captions)}
    rows = [survey.rows[number * size : (number + 1) * size] for number in missing]
    pairs = source.read(np.concatenate(rows))
    with ThreadPoolExecutor(max_workers=max(1, min(8, (os.cpu_count() or 1) // world))) as decoders:
        for number in missing:
            notes: list[dict] = []
            chunk = itertools.islice(pairs, pairs_in[number])
            prepared = _prepare(chunk, number * size, recipe, decoders)
            samples = _encode(prepared, encoder, prompt_of, recipe, number * size, pairs_in[number], notes)
            write_shard(output, f"{number:05d}", _reporting(samples, on_progress, done, pairs_in), digest, notes)
            done += pairs_in[number]
            on_progress(done, sum(pairs_in.values()))


def _reporting(samples: Iterable[Sample], on_progress, done: int, pairs_in: dict[int, int]) -> Iterator[Sample]:
    """Yield samples, and report the progress after each."""
    for number, sample in enumerate(samples, 1):
        yield sample
        on_progress(done + number, sum(pairs_in.values()))


def _finish(
    source, survey: Survey, output: Path, encoder, settings, digest: str, prompts: int, latent_shape, shapes
) -> dict | None:
    """Write ``errors.jsonl`` and the manifest if every part is there, and return the manifest. Otherwise return None."""
    parts = -(-len(survey.rows) // settings["pairs_per_shard"])
    names = [f"{number:05d}" for number in range(parts)]
    prompts_names = [f"prompts-{number:05d}" for number in range(-(-prompts // PROMPTS_PER_FILE))]
    shards, files = (
        [part_row for name in part if (part_row := finished_shard(output, name, digest, verify=False))]
        for part in (names, prompts_names)
    )
    if len(shards) < len(names) or len(files) < len(prompts_names):
        return None
    kept = sum(row["samples"] for row, _ in shards)
    failed = [note for _, notes in shards for note in notes if "reason" in note]
    repeated = _repeated(
        source, survey, "".join(note["fingerprints"] for _, notes in shards for note in notes if "fingerprints" in note)
    )
    undecided = [{"row": row, "source": source.name(row), "reason": reason} for row, reason in survey.excluded.items()]
    errors = sorted([*failed, *undecided, *repeated], key=lambda error: error["row"])
    lines = "".join(json.dumps(error, ensure_ascii=False) + "\n" for error in errors)
    write_atomically(output / "errors.jsonl", lines.encode())
    if kept == 0:
        raise UserError(
            f"input: none of {len(survey.rows)} decided pairs could be encoded; the reasons are in {output / 'errors.jsonl'}"
        )
    counts = survey.counts
    counts.update(error["reason"].partition(":")[0] for error in failed)
    cut = int(encoder.is_cut(survey.captions)[survey.caption_of].sum())  # This takes seconds for Pick-a-Pic's 59,000 captions.
    manifest = {
        "settings": settings,
        "settings_digest": digest,
        "latents": {"shape": list(latent_shape), "dtype": "float16", "scaled": True},
        "prompts": {"distinct": prompts, "tensors": shapes, "files": [row for row, _ in files]},
        "samples": kept,
        "rows": dict(sorted(counts.items())),
        "noted": {CUT_CAPTION: cut, REPEATED_PAIR: len(repeated), **survey.noted},
        "shards": [row for row, _ in shards],
    }
    write_manifest(output, manifest)
    return manifest


def _repeated(source: PairSource, survey: Survey, fingerprints: str) -> list[dict]:
    """Return a note for each kept pair whose caption and image bytes equal those of an earlier pair."""
    digests = np.frombuffer(bytes.fromhex(fingerprints), ">u8")
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    again = np.flatnonzero((digests != 0) & (first[which] != np.arange(len(digests))))
    pairs = zip(survey.rows[again].tolist(), survey.rows[first[which][again]].tolist(), strict=True)
    return [
        {"row": row, "source": source.name(row), "reason": f"{REPEATED_PAIR}: of {source.name(other)}", "kept": True}
        for row, other in pairs
    ]


# A model is identified by its weights, so its path may differ. Folders of earlier versions lack ``weights_half``.
FREE = ("model", "weights_half")


def _claim(output: Path, settings: dict) -> tuple[dict, str]:
    """Mark the folder as belonging to these settings, or check that it already does.

    Returns:
        The settings that the folder was begun with, and the digest of their file.

    Raises:
        UserError: the folder belongs to other settings, holds other files, or cannot be written.
    """
    path = output / "settings.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
        # List the folder before looking for the settings. Another rank may write the settings meanwhile, and writes its
        # shards only after them.
        foreign = [entry for entry in output.iterdir() if not entry.name.startswith(".settings.json.")]
    except OSError as error:
        raise UserError(f"output {output}: not writable: {reason(error).lower()}") from None
    data = json.dumps(settings, ensure_ascii=False, indent=1).encode()
    if not path.is_file():
        if foreign and not path.is_file():
            raise UserError(f"output {output}: is not empty and holds no shards of ours; choose another folder")
        write_atomically(path, data)
    try:
        data = read_regular(path, JSON_BYTES)
        before = parse_json(data)
        differing = [key for key in {**settings, **before} if key not in FREE and before.get(key) != settings.get(key)]
    except (ValueError, TypeError):
        raise UserError(f"output {output}: its settings.json is damaged; delete the folder") from None
    if differing and "background" not in before:
        raise UserError(
            f"output {output}: was begun by an earlier version, which read some images and captions otherwise; "
            "finish it with that version, or choose another folder"
        )
    if differing:
        key = differing[0]
        raise UserError(
            f"output {output}: was begun with other settings ({key} {before.get(key)!r}, now {settings.get(key)!r}); "
            "choose another folder or delete this one"
        )
    return before, hashlib.sha256(data).hexdigest()


def _encode_prompts(captions: list[str], first: int, encoder: Encoder, batch: int) -> Iterator[Sample]:
    """Yield the samples of prompts, numbered from ``first``.

    Raises:
        RankError: an embedding holds NaN or infinity.
    """
    for low in range(0, len(captions), batch):
        chunk = captions[low : low + batch]
        embeddings = {name: value.half() for name, value in encoder.prompts(chunk).items()}
        for line, caption in enumerate(chunk):
            tensors = {name: value[line].contiguous() for name, value in embeddings.items()}
            if not all(bool(value.isfinite().all()) for value in tensors.values()):
                raise RankError(f"the embedding of {caption!r} holds NaN or infinity; use --text-dtype float32")
            yield Sample(first + low + line, tensors, {"caption": caption})


Decoded = tuple[int, PairRow, "Future[Prepared]", "Future[Prepared]"]


def _prepare(pairs: Iterable[PairRow], first: int, recipe: EncodingConfig, decoders: ThreadPoolExecutor) -> Iterator[list[Decoded]]:
    """Yield consecutive pairs in chunks of a batch, numbered from ``first``. Meanwhile decode the images of the next chunks."""
    numbered = enumerate(pairs, first)
    ahead: deque[list[Decoded]] = deque()
    prepare = partial(_prepared, recipe=recipe)
    while True:
        while len(ahead) <= LOOKAHEAD and (chunk := list(itertools.islice(numbered, recipe.batch))):
            ahead.append(
                [(k, pair, decoders.submit(prepare, pair.winner), decoders.submit(prepare, pair.loser)) for k, pair in chunk]
            )
        if not ahead:
            return
        yield ahead.popleft()


def _prepared(data: bytes | None, recipe: EncodingConfig) -> Prepared:
    """Decode one image.

    Raises:
        ValueError: the image is missing or unusable.
    """
    if data is None:
        raise ValueError("missing image")
    return prepare_image(data, recipe.resolution, recipe.shortest, recipe.background)


def _encode(
    chunks: Iterable[list[Decoded]],
    encoder: Encoder,
    prompt_of: dict[str, int],
    recipe: EncodingConfig,
    first: int,
    count: int,
    notes: list[dict],
) -> Iterator[Sample]:
    """Yield the samples of ``count`` pairs, numbered from ``first``.

    Unusable pairs are added to ``notes``. At the end the fingerprints of all pairs are added too. 0 stands for a pair that was not used.

    Raises:
        RankError: the latents of a pair hold NaN or infinity.
    """
    fingerprints = np.zeros(count, ">u8")
    for chunk in chunks:
        usable = [(number, pair, images) for number, pair, *both in chunk if (images := _images(pair, both, notes))]
        if not usable:
            continue
        pixels = torch.stack([image.pixels for _, _, images in usable for image in images])
        numbers = [number for number, _, _ in usable]
        stored = _latents(encoder, pixels, numbers, recipe, 0)
        if recipe.flip:
            stored["latents_flipped"] = _latents(encoder, pixels.flip(-1), numbers, recipe, 1)["latents"]
        for line, (number, pair, images) in enumerate(usable):
            tensors = {name: value[line].contiguous() for name, value in stored.items()}
            if not all(bool(value.isfinite().all()) for value in tensors.values()):
                raise RankError(f"{pair.source}: its latents hold NaN or infinity; the VAE overflowed: use --vae-dtype float32")
            tensors["prompt"] = torch.tensor(prompt_of[pair.caption])
            if pair.soft_label is not None:
                tensors[SOFT_LABEL] = torch.tensor(pair.soft_label)
            tensors |= encoder.family.pair_tensors(images, recipe.resolution)
            yield Sample(number, tensors, {"caption": pair.caption, "source": pair.source, **pair.provenance})
            fingerprints[number - first] = _fingerprint(pair)
    notes.append({"fingerprints": fingerprints.tobytes().hex()})


def _fingerprint(pair: PairRow) -> int:
    """Return 64 bits of a digest of a pair's caption and image bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (pair.caption.encode(), pair.winner, pair.loser):
        assert part is not None  # An encoded pair has both images.
        digest.update(len(part).to_bytes(8, "big") + part)
    return int.from_bytes(digest.digest(), "big")


def _latents(encoder: Encoder, pixels: Tensor, numbers: list[int], recipe: EncodingConfig, stream: int) -> dict[str, Tensor]:
    """Return the stored tensors, (N,2,C,h,w) float16 each, of images (2N,3,H,W)."""
    mean, logvar = (value.unflatten(0, (-1, 2)) for value in encoder.posterior(pixels))
    if recipe.latents == "sample":
        # Seed the draw with the pair's number, so that a shard that is made again has the same contents.
        draws = [np.random.Generator(np.random.Philox(counter=[0, stream, number, 0])) for number in numbers]
        noise = torch.from_numpy(np.stack([draw.standard_normal(mean.shape[1:], dtype=np.float32) for draw in draws]))
        return {"latents": (mean + (0.5 * logvar).exp() * noise).half()}
    return {"latents": mean.half()} | ({"logvar": logvar.half()} if recipe.latents == "mean+logvar" else {})


def _images(pair: PairRow, both: list[Future[Prepared]], failed: list[dict]) -> list[Prepared] | None:
    """Return the winner and the loser. If the pair is unusable, add the reason to ``failed`` and return None."""
    prepared = []
    for role, image in zip(("winner", "loser"), both, strict=True):
        try:
            prepared.append(image.result())
        except ValueError as error:
            failed.append({"row": pair.row, "source": pair.source, "image": role, "reason": str(error)})
            return None
    winner, loser = prepared
    if winner.original_size == loser.original_size and torch.equal(winner.pixels, loser.pixels):
        failed.append({"row": pair.row, "source": pair.source, "reason": SAME_IMAGE})
        return None
    return prepared
