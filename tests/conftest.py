from __future__ import annotations

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not torch.cuda.is_available():
    # Read when Triton is imported, as diffusers does: its kernels then run on the CPU, by its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dde_ds.models.silence import silence_libraries

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "launchers" / "demo"

silence_libraries()
# The tests' models are tiny: more threads would only wait for each other.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Under xdist, keep the tests of a file on one worker, because they share its launches.

    Keep all tests that make hosts on one worker too.
    """
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            group = "hosts" if item.get_closest_marker("launch") else item.path.stem + item.path.parent.name
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def sd_model(tmp_path_factory) -> Path:
    from tests.support.pipelines import save_sd

    return save_sd(tmp_path_factory.mktemp("model") / "sd")


@pytest.fixture(scope="session")
def sdxl_model(tmp_path_factory) -> Path:
    from tests.support.pipelines import save_sdxl

    return save_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture(scope="session")
def parquet(tmp_path_factory) -> Path:
    return first_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet")


def first_pairs(path: Path) -> Path:
    """Write twenty real pairs in Pick-a-Pic's columns, and return the file's path."""
    pq.write_table(pq.read_table(DEMO / "pairs" / "held_out.parquet").slice(0, 20), path)
    return path


def shard(
    parquet: Path, model: Path, output: Path, rank: int = 0, world: int = 1, columns: tuple[str, ...] = (), **options
) -> Path:
    from dde_ds.data.inputs import TableOptions, find_pairs
    from dde_ds.data.make import EncodingConfig, make_shards
    from dde_ds.models.encode import Encoder

    encoder = Encoder(str(model))
    recipe = EncodingConfig(str(model), **{"resolution": encoder.resolution, "pairs_per_shard": 6, "batch": 4, **options})
    make_shards(find_pairs([str(parquet)], table=TableOptions(columns)), output, encoder, recipe, rank, world)
    return output


@pytest.fixture(scope="session")
def sd_shards(tmp_path_factory, parquet, sd_model) -> Path:
    return shard(parquet, sd_model, tmp_path_factory.mktemp("shards") / "sd")


@pytest.fixture(scope="session")
def sdxl_shards(tmp_path_factory, parquet, sdxl_model) -> Path:
    return shard(parquet, sdxl_model, tmp_path_factory.mktemp("shards") / "sdxl")


@pytest.fixture
def schedule():
    from dde_ds import NoiseSchedule

    return NoiseSchedule.from_scheduler({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
