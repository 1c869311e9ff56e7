"""Stream shards with stock webdataset, for training loops that bring their own loader.

The trainer itself does not use this module. Its indexed reader keeps an exact order, resumes anywhere and checks the
bytes of every sample.
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
    """Return a ``webdataset.WebDataset`` over a local folder of shards.

    It yields each pair together with the embeddings of its prompt.

    A sample is a dict. It holds ``__key__``, ``description`` (caption, source row) and the tensors of a pair and of its
    prompt: ``latents`` (2,C,H,W) with the winner before the loser, ``prompt_embeds`` (S,D), and so on.
    :mod:`dde_ds.data.shards` lists them all. Shuffle, split and batch the samples with webdataset's own methods, such
    as ``as_webdataset(folder, shardshuffle=100).shuffle(1000)``.

    webdataset checks no checksum, and silently drops the rest of a damaged tar. Run ``tools/verify_shards.py`` first.

    Args:
        folder: a local folder of shards.
        options: passed on to ``webdataset.WebDataset``. By default shards are not shuffled, and are split over nodes
            and workers.

    Raises:
        UserError: the folder holds no whole set of shards, or is not local.
    """
    shards = ShardSet(folder)
    if not isinstance(shards.storage, LocalFolder):
        raise UserError(f"{folder}: only a local folder can be streamed by webdataset; download it first")
    tars = [shards.storage.where(f"{file['name']}.tar") for file in shards.manifest["shards"] if file["samples"]]
    options = {"shardshuffle": False, "nodesplitter": split_by_node, "empty_check": False, **options}
    return WebDataset(tars, **options).compose(partial(_decoded, shards=shards))  # pyright: ignore[reportReturnType]  # compose() returns the same class


def _decoded(samples: Iterator[dict[str, Any]], shards: ShardSet) -> Iterator[dict[str, Any]]:
    # webdataset's .decode() is not used, because it unpickles members with certain names.
    for sample in samples:
        tensors: dict[str, Tensor] = safetensors.torch.load(sample["safetensors"])
        prompt = shards.prompt(int(tensors.pop("prompt")))
        yield {"__key__": sample["__key__"], "description": parse_json(sample["json"], DESCRIPTION_BYTES), **tensors, **prompt}
