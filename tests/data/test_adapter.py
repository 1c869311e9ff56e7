"""Shards through stock webdataset: the same pairs as the trainer's reader gives, also in several workers and batched."""

from __future__ import annotations

import pytest
import torch
import webdataset

from dde_ds import UserError
from dde_ds.data import as_webdataset
from dde_ds.data.shards import ShardSet


@pytest.mark.parametrize("shards", ["sd_shards", "sdxl_shards"])
def test_the_same_samples_as_the_indexed_reader(shards, request):
    folder = request.getfixturevalue(shards)
    own = ShardSet(folder)
    places = [(shard, row) for shard, count in enumerate(own.counts) for row in range(count)]
    found = list(as_webdataset(folder))
    assert len(found) == len(places) > 10
    for sample, place in zip(found, places, strict=True):
        pair = own.read(*place)
        expected = pair | own.prompt(int(pair.pop("prompt")))
        assert sample.pop("description") == own.describe(*place)
        assert len(sample.pop("__key__")) == 9
        assert sample.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in sample.items())


def test_workers_share_the_shards_and_batches_are_stacked(sd_shards):
    data = as_webdataset(sd_shards).to_tuple("__key__", "latents", "prompt_embeds").batched(3)
    batches = list(webdataset.WebLoader(data, batch_size=None, num_workers=2))
    keys = [key for names, _, _ in batches for key in names]
    assert sorted(keys) == sorted(sample["__key__"] for sample in as_webdataset(sd_shards))
    _, latents, embeds = batches[0]
    assert latents.shape == (3, 2, *ShardSet(sd_shards).latent_shape)
    assert embeds.shape[0] == 3


def test_shuffled_by_webdataset(sd_shards):
    keys = [sample["__key__"] for sample in as_webdataset(sd_shards)]
    shuffled = [sample["__key__"] for sample in as_webdataset(sd_shards, shardshuffle=10, seed=1).shuffle(100)]
    assert shuffled != keys
    assert sorted(shuffled) == sorted(keys)


def test_a_folder_without_shards_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no manifest.json"):
        as_webdataset(tmp_path)
