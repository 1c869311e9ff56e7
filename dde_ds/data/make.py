"""From pairs to shards: encoded, a fixed range of pairs to each shard, resumable shard by shard, by any number of ranks.

The work is a list of parts, prompts files first, then shards. Which pairs or prompts are in a part follows from the input
alone, so ranks need not talk: each makes its own consecutive parts and takes those that are whole already. Whoever finds all
parts whole writes the manifest; two that do so write the same bytes.
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

from dde_ds.data.manifest import FORMAT, MOST_FILES, PROMPTS_PER_FILE
from dde_ds.data.pairs import NO_CAPTION, PairRow, PairSource, Survey
from dde_ds.data.writer import Sample, finished_shard, remove_partials, write_manifest, write_shard
from dde_ds.errors import RankError, UserError
from dde_ds.files import write_atomically
from dde_ds.models.encode import WHITE, Encoder, Prepared, prepare_image
from dde_ds.untrusted import JSON_BYTES, parse_json, read_regular
from dde_ds.warn import reason

# Chunks of pairs whose images are decoded while the GPU encodes those before them.
LOOKAHEAD = 2
SAME_IMAGE = "same image"
# What is counted of pairs that are kept.
REPEATED_PAIR, CUT_CAPTION = "repeated pair", "cut caption"


@dataclass(frozen=True)
class EncodingConfig:
    """How pairs become samples."""

    model: str
    """What to call the model in the manifest."""
    resolution: int
    """Side of the square that images are scaled and cropped to, in pixels."""
    pairs_per_shard: int = 1000
    batch: int = 8
    """Pairs encoded at a time. Not among the settings: it may be lowered on a restart, and then changes a last bit here and there."""
    latents: str = "mean"
    """``mean`` of the VAE's posterior, one ``sample`` of it, or ``mean+logvar``: a new draw each time a pair is read."""
    flip: bool = False
    """Encode the mirrored images too, so that training may flip."""
    min_side: int | None = None
    """Images with a shorter side are left out. Default: a quarter of the resolution."""
    background: tuple[int, int, int] = WHITE
    """Colour (red, green, blue; 0 to 255) under the transparent parts of images."""
    keep_no_caption: bool = False
    """Keep pairs without a caption, which then have the empty one. An empty caption is a caption."""

    def settings(self, encoder: Encoder, source: PairSource) -> dict:
        """What makes these shards these shards, for the manifest."""
        return {
            "format": FORMAT,
            "model": self.model,
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
        }

    @property
    def shortest(self) -> int:
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

    A second run with the same settings, at any number of ranks, takes the shards that are whole and makes only what is missing.
    A pair with an unusable image is left out of its shard, counted in the manifest's ``rows`` and listed in ``errors.jsonl``.

    Args:
        on_progress: called with pairs done and pairs in all, of this rank.

    Returns:
        The manifest, or None while other ranks are still at work: the last of them writes it.

    Raises:
        UserError: unusable input, or an output folder that was begun with other settings.
    """
    latent_shape = encoder.latent_shape(recipe.resolution)
    survey = source.survey(recipe.keep_no_caption)
    if not len(survey.rows):
        mend = (
            "keep_no_caption keeps those without a caption"
            if NO_CAPTION in survey.counts
            else "label_0 must be 1 or 0 in some rows"
        )
        raise UserError(f"input: no decided pair ({dict(survey.counts)}): {mend}")
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
            own = captions[low : low + PROMPTS_PER_FILE]
            write_shard(output, name, _encode_prompts(own, low, encoder, 2 * recipe.batch), digest, [])

    _make_pairs(source, survey, captions, output, encoder, recipe, digest, rank, world, on_progress)
    return _finish(source, survey, output, encoder, settings, digest, len(captions), latent_shape, shapes)


def _own(parts: int, rank: int, world: int) -> range:
    """A rank's parts: consecutive, so that it reads few row groups that another reads too."""
    return range(parts * rank // world, parts * (rank + 1) // world)


def _make_pairs(source, survey, captions, output, encoder, recipe, digest, rank, world, on_progress) -> None:
    size, total = recipe.pairs_per_shard, len(survey.rows)
    own = _own(-(-total // size), rank, world)
    missing = [number for number in own if finished_shard(output, f"{number:05d}", digest) is None]
    pairs_in = {number: min(size, total - number * size) for number in own}
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
    for number, sample in enumerate(samples, 1):
        yield sample
        on_progress(done + number, sum(pairs_in.values()))


def _finish(
    source, survey: Survey, output: Path, encoder, settings, digest: str, prompts: int, latent_shape, shapes
) -> dict | None:
    """Write ``errors.jsonl`` and the manifest if every part is there."""
    parts = -(-len(survey.rows) // settings["pairs_per_shard"])
    names = [f"{number:05d}" for number in range(parts)]
    prompts_names = [f"prompts-{number:05d}" for number in range(-(-prompts // PROMPTS_PER_FILE))]
    shards, files = (
        [found for name in part if (found := finished_shard(output, name, digest, verify=False))] for part in (names, prompts_names)
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
    cut = int(encoder.is_cut(survey.captions)[survey.caption_of].sum())  # some seconds for the 59,000 captions of Pick-a-Pic
    manifest = {
        "settings": settings,
        "settings_digest": digest,
        "latents": {"shape": list(latent_shape), "dtype": "float16", "scaled": True},
        "prompts": {"distinct": prompts, "tensors": shapes, "files": [row for row, _ in files]},
        "samples": kept,
        "rows": dict(sorted(counts.items())),
        "noted": {CUT_CAPTION: cut, REPEATED_PAIR: len(repeated)},
        "shards": [row for row, _ in shards],
    }
    write_manifest(output, manifest)
    return manifest


def _repeated(source: PairSource, survey: Survey, fingerprints: str) -> list[dict]:
    """Kept pairs that are another one again, with caption and bytes of both images."""
    found = np.frombuffer(bytes.fromhex(fingerprints), ">u8")
    _, first, which = np.unique(found, return_index=True, return_inverse=True)
    again = np.flatnonzero((found != 0) & (first[which] != np.arange(len(found))))
    pairs = zip(survey.rows[again].tolist(), survey.rows[first[which][again]].tolist(), strict=True)
    return [
        {"row": row, "source": source.name(row), "reason": f"{REPEATED_PAIR}: of {source.name(other)}", "kept": True}
        for row, other in pairs
    ]


# A model is known by its weights, wherever it lies. Their second digest is missing in folders of earlier versions.
FREE = ("model", "weights_half")


def _claim(output: Path, settings: dict) -> tuple[dict, str]:
    """Mark the folder as belonging to these settings, or find that it does; give back those that it was begun with, and their digest."""
    path = output / "settings.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
        # Before looking for the settings: another rank may write them now, and its shards only after them.
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
    """Consecutive pairs in chunks of a batch, numbered from ``first``, the images of the next chunks already being decoded."""
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
    """Samples of ``count`` pairs from number ``first`` on. Those that cannot be used go to ``notes``, then all fingerprints (0: not used)."""
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
            tensors |= encoder.family.pair_tensors(images, recipe.resolution)
            yield Sample(number, tensors, {"caption": pair.caption, "source": pair.source, **pair.provenance})
            fingerprints[number - first] = _fingerprint(pair)
    notes.append({"fingerprints": fingerprints.tobytes().hex()})


def _fingerprint(pair: PairRow) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in (pair.caption.encode(), pair.winner, pair.loser):
        assert part is not None  # both images of an encoded pair are there
        digest.update(len(part).to_bytes(8, "big") + part)
    return int.from_bytes(digest.digest(), "big")


def _latents(encoder: Encoder, pixels: Tensor, numbers: list[int], recipe: EncodingConfig, stream: int) -> dict[str, Tensor]:
    """What is stored of images (2N,3,H,W): tensors (N,2,C,h,w) float16."""
    mean, logvar = (value.unflatten(0, (-1, 2)) for value in encoder.posterior(pixels))
    if recipe.latents == "sample":
        # By the pair's number, so that a shard made again is the same shard.
        draws = [np.random.Generator(np.random.Philox(counter=[0, stream, number, 0])) for number in numbers]
        noise = torch.from_numpy(np.stack([draw.standard_normal(mean.shape[1:], dtype=np.float32) for draw in draws]))
        return {"latents": (mean + (0.5 * logvar).exp() * noise).half()}
    return {"latents": mean.half()} | ({"logvar": logvar.half()} if recipe.latents == "mean+logvar" else {})


def _images(pair: PairRow, both: list[Future[Prepared]], failed: list[dict]) -> list[Prepared] | None:
    """Winner and loser, or None after noting why not."""
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
