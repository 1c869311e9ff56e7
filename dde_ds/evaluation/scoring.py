"""Scores of a folder of images, cached beside them: by the digest of the image's file and of the scorer.

    folder/scores/pickscore-0123456789ab/00000.jsonl     one file a rank: {"image": sha256, "score": 21.3} a line

The prompt stands in the image's own text chunks, so the file's digest covers it too.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dde_ds.distributed import Ranks, agree
from dde_ds.errors import RankError, UserError
from dde_ds.evaluation.pictures import Pictures
from dde_ds.evaluation.scorers import Scorer
from dde_ds.files import sha256_of, write_atomically

DIGITS = 12


def score_folder(
    pictures: Pictures,
    scorer: Scorer,
    ranks: Ranks,
    device: torch.device,
    batch: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Score every image that has none by this scorer yet. Every rank calls this.

    Raises:
        RankError: an image that cannot be read, a score that is not a finite number.
    """
    folder = cache_folder(pictures, scorer.name, scorer.digest)
    known = read_cache(folder)
    agree(ranks, device)  # all have read before one writes
    share = list(pictures.items())[ranks.rank :: ranks.world]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{ranks.rank:05d}.jsonl"
    write_atomically(path, b"".join(_row(image, score) for image, score in _read_rows(path)))  # without a torn last line
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
                        raise RankError(f"--scorers {scorer.name}: gives {score} for an image of {text!r} in {pictures.folder}")
                    cache.write(_row(image, score))
                cache.flush()
                waiting = []
            on_progress(number, len(share))
    agree(ranks, device)


def load_scores(pictures: Pictures, name: str, digest: str) -> Tensor:
    """Cached scores, (prompts, images a prompt) float64.

    Raises:
        UserError: images without a score; the message names the first of them.
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


def cached_digests(pictures: Pictures, name: str) -> set[str]:
    """Short digests of the scorers of this name whose scores are cached."""
    return {folder.name.removeprefix(f"{name}-") for folder in (pictures.folder / "scores").glob(f"{name}-{'?' * DIGITS}")}


def cache_folder(pictures: Pictures, name: str, digest: str) -> Path:
    return pictures.folder / "scores" / f"{name}-{digest[:DIGITS]}"


def read_cache(folder: Path) -> dict[str, float]:
    """Scores by the SHA-256 of the image's file, as all ranks of all runs wrote them."""
    return {image: score for path in sorted(folder.glob("*.jsonl")) for image, score in _read_rows(path)}


def _read_rows(path: Path) -> list[tuple[str, float]]:
    """A last line that a kill cut short is left out: its image is scored again."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            try:
                row = json.loads(line)
                rows.append((str(row["image"]), float(row["score"])))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}: holds a damaged line, {line[:80]!r}; delete the file to score again") from None
    return rows


def _row(image: str, score: float) -> bytes:
    return json.dumps({"image": image, "score": score}).encode() + b"\n"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RankError(f"{path}: {error.strerror.lower()}; generate again into the same folder") from None


def _decode(data: bytes, path: Path) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise RankError(f"{path}: damaged: {error}; generate again into the same folder") from None
