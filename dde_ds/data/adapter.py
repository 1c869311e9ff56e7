"""Stream shards with stock webdataset, for training loops that bring their own loader.

The trainer itself does not use this: its indexed reader keeps an exact order, resumes anywhere and checks every sample's bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor
from webdataset.compat import WebDataset
from webdataset.shardlists import split_by_node

from dde_ds.data.manifest import DESCRIPTION_BYTES
from dde_ds.data.shards import ShardSet
from dde_ds.data.storage import LocalFolder
from dde_ds.errors import UserError
from dde_ds.untrusted import parse_json


def as_webdataset(folder: str | Path, **options: Any) -> WebDataset:
    """Return a ``webdataset.WebDataset`` over a local folder of shards, which yields each pair with its prompt's embeddings.

    A sample is a dict: ``__key__``, ``description`` (caption, source row) and the tensors of a pair and its prompt, as
    :mod:`dde_ds.data.shards` lists them: ``latents`` (2,C,H,W) winner then loser, ``prompt_embeds`` (S,D), and so on.
    Shuffle, split and batch it with webdataset's own methods: ``as_webdataset(folder, shardshuffle=100).shuffle(1000)``.

    webdataset checks no checksum, and drops the rest of a damaged tar without a word. Run ``tools/verify_shards.py`` before.

    Args:
        folder: local shards.
        options: passed on to ``webdataset.WebDataset``; by default shards are not shuffled, and are split over nodes and workers.

    Raises:
        UserError: no whole set of shards.
    """
    shards = ShardSet(folder)
    if not isinstance(shards.storage, LocalFolder):
        raise UserError(f"{folder}: only a local folder can be streamed by webdataset; download it first")
    tars = [shards.storage.where(f"{file['name']}.tar") for file in shards.manifest["shards"] if file["samples"]]
    options = {"shardshuffle": False, "nodesplitter": split_by_node, "empty_check": False, **options}
    return WebDataset(tars, **options).compose(partial(_decoded, shards=shards))  # pyright: ignore[reportReturnType]  # of its own kind


def _decoded(samples: Iterator[dict[str, Any]], shards: ShardSet) -> Iterator[dict[str, Any]]:
    # Not webdataset's .decode(), which unpickles members of some names.
    for sample in samples:
        tensors: dict[str, Tensor] = safetensors.torch.load(sample["safetensors"])
        prompt = shards.prompt(int(tensors.pop("prompt")))
        yield {"__key__": sample["__key__"], "description": parse_json(sample["json"], DESCRIPTION_BYTES), **tensors, **prompt}
