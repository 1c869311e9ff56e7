"""Measure the data path, side by side with stock webdataset and plain diffusers, on shards made for it.

    python tools/bench_data.py read --pairs 2000            # loader against webdataset, on the same tars
    python tools/bench_data.py resume                       # start-up and resume at a million samples
    python tools/bench_data.py memory                       # reading parquet of images, row group by row group
    python tools/bench_data.py encode --model launchers/demo/base --input launchers/demo/pairs/held_out.parquet
    python tools/bench_data.py relabel --scorer pickscore=MODEL --input launchers/demo/pairs/held_out.parquet

Every ratio is of two measurements in one run. Nothing is asserted: numbers are printed as rows of a Markdown table.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from benchmarks import machine, record, table
from PIL import Image

from dde_ds.data.inputs import find_pairs
from dde_ds.data.make import EncodingConfig, make_shards
from dde_ds.data.manifest import PROMPTS_PER_FILE
from dde_ds.data.order import Order
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.reader import PairDataset, RankSlices, micro_batches
from dde_ds.data.shards import ShardSet
from dde_ds.data.writer import Sample, write_manifest, write_shard
from dde_ds.distributed.environment import DistributedEnv
from dde_ds.errors import UserError
from dde_ds.evaluation.inception import InceptionScorer
from dde_ds.evaluation.relabel import relabel
from dde_ds.evaluation.scorers import build_scorers
from dde_ds.models.encode import Encoder
from dde_ds.models.silence import silence_libraries

SDXL = {"latents": (4, 128, 128), "prompts": {"prompt_embeds": [77, 2048], "pooled": [1280]}}
BATCH = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    subparser = functools.partial(argparse.ArgumentParser, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=subparser)  # pyright: ignore[reportArgumentType]  # any callable does
    read = commands.add_parser("read", help="pairs/s and MB/s of SDXL's shapes: sequential and shuffled, cold and warm")
    read.add_argument("--pairs", type=int, default=2000)
    read.add_argument("--repeats", type=int, default=15, help="epochs of each reader in each row")
    read.add_argument("--folder", type=Path, help="where the shards are made; default: a temporary folder")
    resume = commands.add_parser("resume", help="time to the first batch at the start and in mid-run")
    resume.add_argument("--samples", type=int, default=1_000_000)
    encode = commands.add_parser("encode", help="images/s of the sharding tool and of a plain loop over the same pairs")
    encode.add_argument("--model", required=True)
    encode.add_argument("--input", nargs="+", required=True)
    encode.add_argument("--batch", type=int, default=8)
    encode.add_argument("--pairs-per-shard", type=int, default=64)
    encode.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    memory = commands.add_parser("memory", help="memory of reading parquet, by the size of its row groups")
    memory.add_argument("--rows", type=int, default=4000)
    scoring = commands.add_parser("relabel", help="rows/s of relabelling and of a plain loop with the same scorer")
    scoring.add_argument("--scorer", required=True, help="as for dde-ds relabel")
    scoring.add_argument("--input", nargs="+", required=True)
    scoring.add_argument("--batch", type=int, default=8)
    scoring.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for command in (read, resume, encode, memory, scoring):
        command.add_argument("--write", action="store_true", help="put the table into BENCHMARKS.md")
    args = parser.parse_args()
    silence_libraries()
    measure_it, title = {
        "read": (bench_read, "Reading shards"),
        "resume": (bench_resume, "Starting and resuming"),
        "encode": (bench_encode, "Making shards"),
        "memory": (bench_memory, "Memory of reading parquet"),
        "relabel": (bench_relabel, "Relabelling"),
    }[args.command]
    try:
        with tempfile.TemporaryDirectory() as temporary:
            text = measure_it(args, Path(temporary))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    if args.write:
        record(f"{title}, {machine(getattr(args, 'device', 'cpu').partition(':')[0])}", text)
    return 0


def bench_read(args: argparse.Namespace, temporary: Path) -> str:
    folder = args.folder or temporary / "shards"
    if not (folder / "manifest.json").exists():
        write_synthetic(folder, args.pairs, per_shard=100)
    shards = ShardSet(folder)
    megabytes = 2 * 2 * np.prod(shards.latent_shape) / 1e6
    rows = []
    for order, workers, cold in itertools.product(("sequential", "shuffled"), (0, 2), (True, False)):
        rates: dict[Callable, list[float]] = {ours: [], stock: []}
        for turn in range(args.repeats):
            # The readers take turns, also at coming first, because other work on the machine slows neighbours alike.
            for reader in (ours, stock) if turn % 2 else (stock, ours):
                (drop_pages if cold else warm_pages)(folder)
                rates[reader].append(measure(lambda reader=reader, w=workers, o=order: reader(folder, w, o == "shuffled")))
        our_rate, stock_rate = (statistics.median(measured) for measured in rates.values())
        ratios = sorted(a / b for a, b in zip(*rates.values(), strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        cells = (f"{our_rate:.0f}", f"{our_rate * megabytes:.0f}", f"{stock_rate:.0f}", f"{stock_rate * megabytes:.0f}")
        rows.append(
            (
                order,
                "cold" if cold else "warm",
                str(workers),
                *cells,
                f"{statistics.median(ratios):.2f}",
                f"{low:.2f} to {high:.2f}",
            )
        )
    head = (
        "order",
        "page cache",
        "workers",
        "ours, pairs/s",
        "MB/s",
        "webdataset, pairs/s",
        "MB/s",
        "ours / webdataset",
        "middle half",
    )
    return (
        f"{sum(shards.counts)} pairs of {megabytes:.2f} MB of latents in {len(shards.counts)} shards, micro-batches of {BATCH}. "
        f"{args.repeats} epochs each, in turns: medians, of the rates and of the ratios of neighbours. "
        "Ours checks each pair's SHA-256, members, shapes and finite values; webdataset (raw bytes, safetensors) checks nothing. "
        "Cold: the files' pages dropped by posix_fadvise; what lies below the machine may still cache.\n\n" + table(head, rows)
    )


def measure(batches: Callable[[], Iterator[int]]) -> float:
    """Return the pairs a second of a whole epoch. The time includes starting the workers and filling a shuffle buffer."""
    started = time.perf_counter()
    pairs = sum(batches())
    return pairs / (time.perf_counter() - started)


def ours(folder: Path, workers: int, shuffled: bool) -> Iterator[int]:
    """Yield the number of pairs of each micro-batch of our reader, which checks checksums, shapes and finite values."""
    shards = ShardSet(folder)
    order = Order(shards.counts, 0, 8) if shuffled else Sequential(shards.counts)
    dataset = Latents(shards, order, PairRng(0, torch.ones(1000)))
    steps = order.samples // BATCH
    for batch in micro_batches(dataset, RankSlices(BATCH, BATCH, 0, 1, 0, steps), workers, pin_memory=False):
        yield len(batch["prompt"])


class Sequential(Order):
    """Take the pairs in the order of the shards, epoch after epoch."""

    def __init__(self, counts):
        super().__init__(counts, 0, 1)
        self.ends = np.cumsum(counts)

    def __setstate__(self, state):
        self.__init__(state[0])

    def locate(self, position: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.ends, position % self.samples, side="right"))
        return shard, position % self.samples - (int(self.ends[shard - 1]) if shard else 0)


class Latents(PairDataset):
    """Read what stock webdataset reads from the same tars: latents, time ids and the prompt's number; no embeddings, no noise."""

    def pair(self, position: int) -> dict[str, torch.Tensor]:
        return self.shards.read(*self.order.locate(position))


def stock(folder: Path, workers: int, shuffled: bool) -> Iterator[int]:
    """Yield the number of pairs of each batch of stock webdataset, used in its fastest safe way.

    It reads raw bytes, and safetensors are decoded by hand. It shuffles by itself: the shards, and a buffer of 8 shards' size.
    """
    from webdataset.compat import WebDataset, WebLoader

    urls = [str(path) for path in sorted(folder.glob("[0-9]*.tar"))]
    data = WebDataset(urls, shardshuffle=len(urls) if shuffled else False, seed=0, empty_check=False)
    if shuffled:
        data = data.shuffle(800, initial=400)
    data = data.map(_decode).batched(BATCH, collation_fn=_stack, partial=False)
    for batch in WebLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None):
        yield len(batch["latents"])


def _decode(sample: dict) -> dict:
    import safetensors.torch

    return safetensors.torch.load(sample["safetensors"])


def _stack(samples: list[dict]) -> dict:
    # webdataset adds each sample's key to the result of map().
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0] if not key.startswith("__")}


def drop_pages(folder: Path) -> None:
    """Make the kernel forget the files, so that the disk is read."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_pages(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def write_synthetic(folder: Path, pairs: int, per_shard: int) -> None:
    """Write shards of SDXL's shapes with the real writer. The latents are noise."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    shape = SDXL["latents"]

    def sample(number: int) -> Sample:
        tensors = {
            "latents": torch.randn(2, *shape, generator=generator).half(),
            "prompt": torch.tensor(number % 8),
            "time_ids": torch.full((2, 6), 1024.0),
        }
        return Sample(number, tensors, {"caption": f"caption {number}", "source": f"synthetic:{number}"})

    rows = []
    for number, low in enumerate(range(0, pairs, per_shard)):
        rows.append(write_shard(folder, f"{number:05d}", map(sample, range(low, min(pairs, low + per_shard))), "synthetic", []))
    words = ({name: torch.zeros(size).half() for name, size in SDXL["prompts"].items()} for _ in range(8))
    files = [write_shard(folder, "prompts-00000", (Sample(j, w, {"caption": ""}) for j, w in enumerate(words)), "synthetic", [])]
    write_manifest(folder, manifest(rows, files, 8))


def manifest(rows: list[dict], files: list[dict], distinct: int) -> dict:
    settings = {
        **{"model": "synthetic", "family": "sdxl", "latents": "mean", "flip": False, "scaling_factor": 0.13025, "resolution": 1024},
        **{"min_side": 256, "empty_prompt": "zeros", "vae_dtype": "torch.float32", "text_dtype": "torch.float32", "input": []},
    }
    return {
        "settings": settings,
        "settings_digest": "synthetic",
        "latents": {"shape": list(SDXL["latents"]), "dtype": "float16", "scaled": True},
        "prompts": {"distinct": distinct, "tensors": SDXL["prompts"], "files": files},
        "samples": sum(row["samples"] for row in rows),
        "rows": {},
        "shards": rows,
    }


def bench_resume(args: argparse.Namespace, folder: Path) -> str:
    """Time opening a manifest of a million samples, and finding positions anywhere. The shards themselves are not there."""
    row = {"samples": 1000, "bytes": 266_000_000, "sha256": "0" * 64, "index": {"bytes": 50_000, "sha256": "0" * 64}}
    shards = [{"name": f"{number:05d}", **row} for number in range(args.samples // 1000)]
    distinct = 59 * PROMPTS_PER_FILE
    files = [{"name": f"prompts-{number:05d}", **row, "samples": PROMPTS_PER_FILE} for number in range(59)]
    write_manifest(folder, manifest(shards, files, distinct))
    size, rows = (folder / "manifest.json").stat().st_size, []
    for position in (0, args.samples // 2, 10 * args.samples + 7, 10**12):
        started = time.perf_counter()
        opened = ShardSet(folder, check_sizes=False)  # the files are not there
        order = Order(opened.counts, 0, 8)
        after_open = time.perf_counter()
        for offset in range(BATCH):
            order.locate(position + offset)
        located = time.perf_counter()
        for offset in range(1000):
            order.locate(position + offset)
        times = (after_open - started, located - after_open, time.perf_counter() - located)
        rows.append((f"{position:,}", *(f"{1e3 * seconds:.1f}" for seconds in times)))
    head = ("resumed at position", "manifest read and checked, ms", f"first {BATCH} positions located, ms", "next 1,000, ms")
    return f"{args.samples:,} samples in {len(shards)} shards, a synthetic manifest of {size / 1e3:.0f} kB.\n\n{table(head, rows)}"


def bench_encode(args: argparse.Namespace, folder: Path) -> str:
    source = find_pairs(args.input)
    encoder = Encoder(args.model, device=args.device)
    recipe = EncodingConfig(args.model, encoder.resolution, args.pairs_per_shard, args.batch)
    rows = source.survey().rows
    pairs = len(rows)

    def plain() -> None:
        """Do what a script of thirty lines does: decode and encode batches of pairs in turn, and keep everything in a list."""
        from dde_ds.models.encode import prepare_image

        kept, stream = [], source.read(rows)
        while chunk := list(itertools.islice(stream, args.batch)):
            pixels = torch.stack(
                [prepare_image(data, recipe.resolution).pixels for pair in chunk for data in (pair.winner, pair.loser)]  # pyright: ignore[reportArgumentType]  # both are there
            )
            kept.append((encoder.latents(pixels).half(), encoder.prompts([pair.caption for pair in chunk])))

    times: dict[str, list[float]] = {"tool": [], "plain loop": []}
    for turn in range(2):
        for name, work in (
            ("tool", lambda turn=turn: make_shards(source, folder / str(turn), encoder, recipe)),
            ("plain loop", plain),
        ):
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    tool, loop = (2 * pairs / min(times[name]) for name in ("tool", "plain loop"))
    about = f"{pairs} pairs at {recipe.resolution} pixels, {args.batch} at a time, model {args.model}; better of two."
    head = ("tool, images/s", "plain diffusers loop, images/s", "tool / loop")
    return f"{about}\n\n{table(head, [(f'{tool:.1f}', f'{loop:.1f}', f'{tool / loop:.2f}')])}"


def bench_relabel(args: argparse.Namespace, folder: Path) -> str:
    """Score all pairs by the tool and by a plain loop: decode, score, append to a list."""
    source, device = find_pairs(args.input), torch.device(args.device)
    (scorer,) = build_scorers([args.scorer], device)
    assert not isinstance(scorer, InceptionScorer)
    rows = source.survey().rows

    def plain() -> None:
        kept, stream = [], source.read(rows)
        while chunk := list(itertools.islice(stream, args.batch)):
            images = [Image.open(io.BytesIO(data)) for pair in chunk for data in (pair.winner, pair.loser) if data]
            kept.append(scorer.score(images, [pair.caption for pair in chunk for _ in range(2)]))

    times: dict[str, list[float]] = {"tool": [], "plain loop": []}
    plain()  # loads the model
    for turn in range(2):
        output = folder / f"{turn}.jsonl"
        for name, work in (
            ("tool", lambda output=output: relabel(source, output, [scorer], DistributedEnv(0, 1, 0), device, args.batch)),
            ("plain loop", plain),
        ):
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    tool, loop = (len(rows) / min(times[name]) for name in ("tool", "plain loop"))
    about = f"{len(rows)} pairs, {args.batch} at a time, {scorer.name}; better of two."
    head = ("relabel, rows/s", "plain loop, rows/s", "relabel / loop")
    return f"{about}\n\n{table(head, [(f'{tool:.1f}', f'{loop:.1f}', f'{tool / loop:.2f}')])}"


def bench_memory(args: argparse.Namespace, folder: Path) -> str:
    """Measure the reading of parquet files of 300 kB images: all pairs, and only the last 100."""
    image, rows = 300_000, []
    for group, batch in itertools.product((100, 1000), (1024, 8)):
        path = folder / f"{group}.parquet"
        in_a_process(lambda path=path, group=group, batch=batch: write_parquet(path, args.rows, group, batch, image))
        source = find_pairs([str(path)])
        numbers = source.survey().rows
        for what, wanted in (("all", numbers), ("the last 100", numbers[-100:])):
            peak, rate = in_a_process(lambda source=source, wanted=wanted: peak_of_reading(source, wanted))
            size = 2 * image * group / 1e6
            rows.append((str(group), f"{size:.0f}", str(min(batch, group)), what, f"{peak / 1e6:.0f}", f"{rate:.0f}"))
        path.unlink()
    return f"{args.rows} rows of two images of {image / 1e3:.0f} kB.\n\n" + table(
        ("rows a row group", "MB a row group", "rows a page", "read", "memory on top, MB", "pairs/s"), rows
    )


def write_parquet(path: Path, rows: int, group: int, batch: int, image: int) -> tuple[float, float]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema({"caption": pa.string(), "label_0": pa.float64(), "jpg_0": pa.binary(), "jpg_1": pa.binary()})
    with pq.ParquetWriter(path, schema, compression="none", write_batch_size=batch) as writer:
        for low in range(0, rows, group):
            count = min(group, rows - low)
            images = [[os.urandom(image) for _ in range(count)] for _ in range(2)]
            writer.write_table(pa.table([["word"] * count, [1.0] * count, *images], schema=schema), row_group_size=group)
    return 0.0, 0.0


def peak_of_reading(source, wanted: np.ndarray) -> tuple[float, float]:
    """Read the wanted pairs. Return the most bytes of memory beyond what the process had, and the pairs a second."""
    before, peak, started = resident(), 0, time.perf_counter()
    for number, _ in enumerate(source.read(wanted)):
        if number % 16 == 0:
            peak = max(peak, resident())
    return peak - before, len(wanted) / (time.perf_counter() - started)


def in_a_process(work: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """Return two numbers that ``work`` measures in a process of its own.

    So memory that an allocator kept from an earlier measurement does not count.
    """
    reading, writing = os.pipe()
    if not os.fork():
        os.write(writing, " ".join(map(str, work())).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        first, second = map(float, answer.read().split())
    os.wait()
    return first, second


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
