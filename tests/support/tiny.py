"""Write shards of a few bytes a pair with the real writer, for tests that damage or read them thousands of times."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import torch

from dde_ds.data.manifest import manifest_digest
from dde_ds.data.writer import Sample, write_manifest, write_shard

SETTINGS = {
    **{"model": "tiny", "weights": "0" * 64, "vae_dtype": "torch.float32", "text_dtype": "torch.float32", "family": "sd"},
    **{"resolution": 16, "min_side": 4, "latents": "mean", "scaling_factor": 0.18, "flip": False, "empty_prompt": "encoded"},
    **{"pairs_per_shard": 3, "input": []},
}
SHAPE = (1, 2, 2)


def write_tiny(folder: Path, counts=(3, 3, 2), prompts: int = 3, first: float = 0.0, shape=SHAPE, **settings) -> Path:
    """Write a set of shards.

    All latents of pair k are ``first + k``, and its prompt is k mod ``prompts``. All numbers of prompt j's embedding are j.
    """
    settings = {**SETTINGS, **settings}
    folder.mkdir(parents=True, exist_ok=True)
    rows, number = [], 0
    for shard, count in enumerate(counts):
        samples = [pair(k, first, prompts, settings, shape) for k in range(number, number + count)]
        rows.append(write_shard(folder, f"{shard:05d}", samples, "digest", []))
        number += count
    words = [Sample(j, {"prompt_embeds": torch.full((2, 2), j).half()}, {"caption": f"caption {j}"}) for j in range(prompts)]
    files = [write_shard(folder, "prompts-00000", words, "digest", [])]
    manifest = {
        "settings": settings,
        "settings_digest": "digest",
        "latents": {"shape": list(shape), "dtype": "float16", "scaled": True},
        "prompts": {"distinct": prompts, "tensors": {"prompt_embeds": [2, 2]}, "files": files},
        "samples": number,
        "rows": {"decided": number},
        "shards": rows,
    }
    write_manifest(folder, manifest)
    return folder


def pair(k: int, first: float, prompts: int, settings: dict, shape=SHAPE) -> Sample:
    latents = torch.full((2, *shape), first + k).half()
    tensors = {"latents": latents, "prompt": torch.tensor(k % prompts)}
    if settings["flip"]:
        tensors["latents_flipped"] = -latents
    if settings["latents"] == "mean+logvar":
        tensors["logvar"] = torch.zeros_like(latents)
    return Sample(k, tensors, {"caption": f"caption {k % prompts}", "source": f"tiny:{k}"})


def as_format_2(folder: Path) -> Path:
    """Rewrite a set as the version before wrote it: with the CRC32 of each run of bytes, and without a digest in the index."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for row in [*manifest["shards"], *manifest["prompts"]["files"]]:
        tar, path = (folder / f"{row['name']}.tar").read_bytes(), folder / f"{row['name']}.json"
        index = json.loads(path.read_bytes())
        members = [[number, at, size, zlib.crc32(tar[at : at + size])] for number, at, size in index["members"]]
        older = {key: value for key, value in index.items() if key not in ("digests", "digest")} | {"members": members}
        data = (json.dumps(older) + "\n").encode()
        path.write_bytes(data)
        row["index"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    sign(folder, manifest | {"format": "dde_ds shards 2"})
    return folder


def sign(folder: Path, manifest: dict) -> None:
    """Write a manifest as its author would: with its right digest, whatever the manifest says."""
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": manifest_digest(manifest)}))
