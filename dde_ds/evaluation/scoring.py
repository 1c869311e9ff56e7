"""Score a folder of images, and cache the scores beside them, by the digests of the image's file and of the scorer.

    folder/scores/pickscore-0123456789ab/00000.jsonl     one file a rank: {"image": sha256, "score": 21.3} a line

The prompt stands in the image's own text chunks, so the digest of the file covers the prompt too. The score of a whole set has one
file, scores/inception-0123456789ab.json, with a digest of all images.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dde_ds.distributed.collectives import barrier, broadcast_object, gather_rows
from dde_ds.distributed.environment import DistributedEnv
from dde_ds.errors import RankError, UserError
from dde_ds.evaluation.inception import SPLITS, InceptionScorer, inception_score
from dde_ds.evaluation.pictures import ImageFolder
from dde_ds.evaluation.scorers import Scorer
from dde_ds.files import sha256_of, write_atomically
from dde_ds.shape import COUNT, NUMBER, require_shape
from dde_ds.untrusted import parse_json, read_json, read_regular
from dde_ds.warn import reason

DIGITS = 12


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Switch off TF32 in convolutions.

    cuDNN uses TF32 by default from Ampere on, and TF32 keeps only three digits of each factor.
    """
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@full_float32()
def score_folder(
    pictures: ImageFolder,
    scorer: Scorer,
    ranks: DistributedEnv,
    device: torch.device,
    batch: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Score every image that has no score by this scorer yet. Every rank calls this.

    Raises:
        RankError: an image cannot be read, or a score is not a finite number.
    """
    folder = cache_folder(pictures, scorer.name, scorer.digest)
    known = read_cache(folder)
    barrier(ranks, device)  # all ranks read the cache before any rank writes
    share = list(pictures.items())[ranks.rank :: ranks.world_size]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{ranks.rank:05d}.jsonl"
    # Written anew, the file loses a last line that was cut short.
    write_atomically(path, b"".join(_row(image, score) for image, score in _read_rows(path)))
    with path.open("ab") as cache:
        waiting: list[tuple[str, str, Image.Image]] = []
        for number, (prompt, index) in enumerate(share, 1):
            data = _read(pictures.path(prompt, index))
            digest = hashlib.sha256(data).hexdigest()
            if digest not in known:
                waiting.append((digest, pictures.prompts[prompt], _decode(data, pictures.path(prompt, index))))
            if waiting and (len(waiting) == batch or number == len(share)):
                scores = scorer.score([image for _, _, image in waiting], [text for _, text, _ in waiting]).tolist()
                for (image, text, _), score in zip(waiting, scores, strict=True):
                    if not math.isfinite(score):
                        raise RankError(f"scorers {scorer.name}: gives {score} for an image of {text!r} in {pictures.folder}")
                    cache.write(_row(image, score))
                cache.flush()
                waiting = []
            on_progress(number, len(share))
    barrier(ranks, device)


def load_scores(pictures: ImageFolder, name: str, digest: str) -> Tensor:
    """Return the cached scores, (prompts, images a prompt) float64.

    Raises:
        UserError: images have no score. The message names the first of them.
    """
    known = read_cache(cache_folder(pictures, name, digest))
    scores = [known.get(sha256_of(pictures.path(*item))) for item in pictures.items()]
    missing = [pictures.path(*item).name for item, score in zip(pictures.items(), scores, strict=True) if score is None]
    if missing:
        named = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise UserError(
            f"{pictures.folder}: {len(missing)} of {len(scores)} images have no {name} score ({named}); score with dde-ds evaluate"
        )
    return torch.tensor(scores, dtype=torch.float64).view(len(pictures.prompts), pictures.per_prompt)


@full_float32()
def score_set(
    pictures: ImageFolder,
    scorer: InceptionScorer,
    ranks: DistributedEnv,
    device: torch.device,
    batch: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Score the images as a whole, unless these images have such a score already. Every rank calls this and reads its share.

    Raises:
        RankError: an image cannot be read.
        UserError: there are fewer images than the score has parts.
    """
    paths = [pictures.path(*item) for item in pictures.items()]
    if len(paths) < SPLITS:
        raise UserError(f"scorers {scorer.name}: {pictures.folder} holds {len(paths)} images; {SPLITS} or more are needed")
    known = load_set_score(pictures, scorer.name, scorer.digest) if ranks.is_main else None
    if broadcast_object(known, ranks):
        return
    share = equal_share(paths, ranks.rank, ranks.world_size)
    features = []
    for low in range(0, len(share), batch):
        chunk = share[low : low + batch]
        features.append(scorer.features([_decode(_read(path), path) for path in chunk]))
        on_progress(low + len(chunk), len(share))
    rows = gather_rows(torch.cat(features).to(device), ranks)[: len(paths)].cpu()
    if ranks.is_main:
        mean, deviation = inception_score(rows)
        row = {"images": _set_digest(pictures), "count": len(paths), "splits": SPLITS, "mean": mean, "deviation": deviation}
        path = cache_folder(pictures, scorer.name, scorer.digest).with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(row).encode() + b"\n")
    barrier(ranks, device)


def equal_share(items: Sequence, rank: int, world: int) -> list:
    """Return this rank's share of the items. All shares have the same length, because gathering needs that.

    Joined in the order of the ranks, the shares are all items, followed by repetitions of the last item.
    """
    share = -(-len(items) // world)
    return [items[min(number, len(items) - 1)] for number in range(rank * share, (rank + 1) * share)]


def load_set_score(pictures: ImageFolder, name: str, digest: str) -> dict | None:
    """Return ``count``, ``splits``, ``mean`` and ``deviation`` of exactly these images, or None if they have no such score.

    Raises:
        UserError: the file of the score is damaged.
    """
    path = cache_folder(pictures, name, digest).with_suffix(".json")
    try:
        row = read_json(path)
        require_shape(row, {"images": str, "count": COUNT, "splits": COUNT, "mean": NUMBER, "deviation": NUMBER})
        return row if row["images"] == _set_digest(pictures) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UserError(f"{path}: damaged; delete it to score again") from None


def _set_digest(pictures: ImageFolder) -> str:
    return hashlib.sha256("".join(sha256_of(pictures.path(*item)) for item in pictures.items()).encode()).hexdigest()


def cached_digests(pictures: ImageFolder, name: str) -> set[str]:
    """Return the short digests of the versions of this scorer whose scores are cached."""
    digits = "?" * DIGITS
    paths = [path for ending in ("", ".json") for path in (pictures.folder / "scores").glob(f"{name}-{digits}{ending}")]
    return {path.name.removesuffix(".json").removeprefix(f"{name}-") for path in paths}


def cache_folder(pictures: ImageFolder, name: str, digest: str) -> Path:
    return pictures.folder / "scores" / f"{name}-{digest[:DIGITS]}"


def read_cache(folder: Path) -> dict[str, float]:
    """Return the scores that all ranks of all runs wrote, by the SHA-256 of the image's file."""
    return {image: score for path in sorted(folder.glob("*.jsonl")) for image, score in _read_rows(path)}


def _read_rows(path: Path) -> list[tuple[str, float]]:
    """Read a file of the cache. A last line that a kill cut short is left out, so that its image is scored again."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            try:
                row = parse_json(line)
                require_shape(row, {"image": str, "score": NUMBER})
                rows.append((row["image"], float(row["score"])))
            except ValueError:
                raise UserError(f"{path}: holds a damaged line, {line[:80]!r}; delete the file to score again") from None
    return rows


def _row(image: str, score: float) -> bytes:
    return json.dumps({"image": image, "score": score}).encode() + b"\n"


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise RankError(f"{path}: {reason(error).lower()}; generate again into the same folder") from None
    except ValueError as error:
        raise RankError(f"{path}: {error}; generate again into the same folder") from None


def _decode(data: bytes, path: Path) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGB")
    except Exception as error:  # Pillow may raise anything on a damaged image
        raise RankError(f"{path}: damaged: {error}; generate again into the same folder") from None
