"""Shards behind a real web server and a real object store, with what networks do to them."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import random
import shutil
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
import torch

from dde_ds import UserError
from dde_ds.data import as_webdataset, storage
from dde_ds.data import cache as caching
from dde_ds.data.cache import BUCKETS, Cache
from dde_ds.data.inputs import find_pairs
from dde_ds.data.mixture import open_sources, order_of
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.reader import PairDataset, RankSlices, ReadingTotals, micro_batches
from dde_ds.data.shards import ShardSet
from dde_ds.data.storage import DamagedData, RemoteFolder
from tests.data.test_damage import break_pair, everything, same
from tests.support.tiny import write_tiny

INIT = RemoteFolder.__init__
BOMB = gzip.compress(bytes(100 * 2**20))
UMASK = os.umask(0o022)
os.umask(UMASK)
SLOW = 1.3
"""Seconds that a slow answer takes."""

pytest.importorskip("aiohttp")
pytest.importorskip("s3fs")


class Server(http.server.ThreadingHTTPServer):
    """A folder by HTTP, with ranges; ``faults`` names what happens to the next requests."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.requests = folder, [], []
        self.ranges, self.sent = True, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):  # a client that hung up
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server = self.server
        fault = server.faults.pop(0) if server.faults else None
        path = server.folder / self.path.lstrip("/")
        server.requests.append((self.path, self.headers.get("Range"), fault))
        if isinstance(fault, int):
            return self.answer(fault, b"")
        if fault in ("endless", "bomb"):
            return self.flood(compressed=fault == "bomb")
        if not path.is_file():
            return self.answer(404, b"")
        data, status = path.read_bytes(), 200
        if (wanted := self.headers.get("Range")) and server.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            data, status = data[int(first) : int(last) + 1], 206
        if fault == "slow":
            time.sleep(SLOW)
        if fault == "flipped":
            data = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        return self.answer(status, data, cut=fault == "cut", short=fault == "short")

    def answer(self, status: int, data: bytes, cut: bool = False, short: bool = False) -> None:
        if short:  # a proxy that lost the end and does not know it
            data = data[: len(data) // 2]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def flood(self, compressed: bool) -> None:
        """Far more than was asked for: plainly, or packed a thousandfold."""
        self.send_response(200)
        if compressed:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.close_connection = True
        for _ in range(1 if compressed else 100):
            self.wfile.write(BOMB if compressed else bytes(2**20))
            self.server.sent += len(BOMB) if compressed else 2**20

    def log_message(self, *_):
        pass


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_tiny(tmp_path / "served" / "set", (3, 3, 2))


@pytest.fixture
def server(folder):
    server = Server(folder.parent)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Short waits between attempts."""
    attempt_soon(monkeypatch, timeout=20)


def attempt_soon(monkeypatch, timeout: float) -> None:
    def quick(self, url, cache=None, timeout=60.0, longest=timeout, key="data.path"):
        INIT(self, url, cache, min(timeout, longest), attempts=5, first_delay=0.01, key=key)

    monkeypatch.setattr(RemoteFolder, "__init__", quick)


def read_all(shards: ShardSet) -> list[dict]:
    places = [(shard, row) for shard, count in enumerate(shards.counts) for row in range(count)]
    return [shards.read(*place) for place in places] + [shards.prompt(row) for row in range(shards.manifest["prompts"]["distinct"])]


def test_webdataset_is_given_local_shards_alone(server):
    with pytest.raises(UserError, match="only a local folder can be streamed by webdataset"):
        as_webdataset(f"{server.url}/set")


def test_a_driver_that_repeats_the_password_is_not_passed_on():
    """s3 takes what stands before the bucket for a part of its name."""
    with pytest.raises(UserError, match=r'Invalid bucket name "\*\*\*@bucket"') as raised:
        RemoteFolder("s3://user:secret@bucket/shards").fetch("manifest.json", 0, None, bool)
    assert "secret" not in str(raised.value)


def test_http_by_ranges(folder, server):
    shards = ShardSet(f"{server.url}/set")
    assert same(read_all(shards), everything(folder, True))
    assert shards.digest == ShardSet(folder).digest
    tars = [ranged for path, ranged, _ in server.requests if path.endswith(".tar")]
    assert all(tars)
    assert len(tars) == 8 + 3, "one range a pair and a prompt"


@pytest.mark.parametrize(
    "faults", [[500], [503, 500, 429], ["cut"], ["short", "cut"], ["flipped"], ["slow"], [500, "slow", "short", "flipped"]]
)
def test_faults_that_pass(folder, server, faults, monkeypatch):
    if "slow" in faults:  # only here: a busy machine is slow as well
        attempt_soon(monkeypatch, timeout=0.6 * SLOW)
    expected = everything(folder, True)
    server.faults = list(faults)
    shards = ShardSet(f"{server.url}/set")
    assert not server.faults, "the manifest met them"
    server.faults = list(faults)
    assert same(read_all(shards), expected)
    server.faults = [None, *faults]  # the index comes whole, the pair does not
    assert torch.equal(ShardSet(f"{server.url}/set").read(1, 1)["latents"], expected[4]["latents"])
    assert not server.faults


def test_random_faults(folder, server):
    """Half of all requests fail in some way, never five times in a row."""
    rng, expected = random.Random(0), everything(folder, True)
    for _ in range(2):
        server.faults = [
            rng.choice([500, "cut", "short", "flipped"]) if number % 5 and rng.random() < 0.6 else None for number in range(400)
        ]
        assert same(read_all(ShardSet(f"{server.url}/set")), expected)


def test_faults_that_stay(folder, server):
    shards = ShardSet(f"{server.url}/set")
    shards.read(0, 0)
    server.faults = [500] * 5
    with pytest.raises(UserError, match=rf"{server.url}/set/00000\.tar: not readable after 5 attempts: .*500") as caught:
        shards.read(0, 1)
    # A server that is down says nothing of the data: no sample is replaced for it.
    assert not isinstance(caught.value, DamagedData)
    server.faults = [403]
    with pytest.raises(UserError, match=r"not readable: .*403"):
        shards.read(0, 1)
    server.faults = ["flipped"] * 5
    with pytest.raises(DamagedData, match=r"00000\.tar, sample 000000001: checksum differs, .* \(5 attempts\)"):
        shards.read(0, 1)
    (folder / "00002.tar").unlink()
    with pytest.raises(DamagedData, match=r"00002\.tar, sample 000000006: the file is missing"):
        shards.read(2, 0)
    server.ranges = False
    with pytest.raises(DamagedData, match=r"bytes came for \d+ asked"):
        shards.read(0, 1)
    with pytest.raises(UserError, match=r"manifest\.json: the file is missing; is this a folder of shards"):
        ShardSet(f"{server.url}/nothing")
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"manifest\.json: not readable after 5 attempts"):
        ShardSet(f"{server.url}/set")


@pytest.mark.parametrize("fault", ["endless", "bomb"])
def test_no_more_is_taken_than_was_asked_for(folder, server, monkeypatch, fault):
    """A hundred megabytes for a manifest, and for a pair of a kilobyte: neither memory nor the line is given to them."""
    monkeypatch.setattr(storage, "WHOLE_BYTES", 2**20)
    tracemalloc.start()
    try:
        server.faults = [fault] * 5
        named = "server sends it compressed .gzip." if fault == "bomb" else "manifest.json: larger than 1,048,576 bytes"
        with pytest.raises(UserError, match=named):
            ShardSet(f"{server.url}/set")
        server.faults = []
        shards = ShardSet(f"{server.url}/set")
        shards.read(0, 0)
        server.faults = [fault] * 5
        with pytest.raises(UserError, match="compressed .gzip." if fault == "bomb" else r"more bytes came for \d+ asked"):
            shards.read(0, 1)
        assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    finally:
        tracemalloc.stop()
    assert server.sent < 60 * 2**20, "of six hundred"


def dataset(path: str, cache: Path | None = None, max_bad: int = 0) -> PairDataset:
    shards = open_sources([(path, 1.0)], str(cache) if cache else None, 0.01, strict=not max_bad)
    return PairDataset(shards, order_of(shards, 3, 2), PairRng(3, torch.ones(10), caption_dropout=0.2), max_bad)


def batches(data: PairDataset, workers: int, totals: ReadingTotals | None = None) -> list[dict]:
    return list(micro_batches(data, RankSlices(4, 4, 0, 1, 0, 6), workers, False, totals))


def test_workers_and_replacements(folder, server):
    """Loader workers are forked after the parent has used its connections."""
    break_pair(folder, 1, 1)
    local = batches(dataset(str(folder), max_bad=1), 0)
    for workers in (0, 2):
        totals = ReadingTotals()
        assert same(batches(dataset(f"{server.url}/set", max_bad=1), workers, totals), local)
        assert set(totals.bad) == {(1, 1)}


def test_cache_is_keyed_by_content(folder, server, tmp_path):
    """Two sets with equal file names share a cache and never meet; what is cached is not fetched again, and checked again."""
    write_tiny(folder.parent / "other", (3, 3, 2), first=100)
    cache = tmp_path / "cache"
    first, second = (batches(dataset(f"{server.url}/{name}", cache), 0) for name in ("set", "other"))
    assert not same(first, second)
    assert same(first, batches(dataset(str(folder)), 0))
    server.requests.clear()
    totals = ReadingTotals()
    assert same(batches(dataset(f"{server.url}/set", cache), 0, totals), first)
    assert {path for path, _, _ in server.requests} == {"/set/manifest.json"}
    assert totals.counters["cache_hits"] > 20
    assert totals.counters["cache_misses"] == 0
    entries = [path for path in cache.rglob("*") if path.is_file()]
    for path in entries:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    totals = ReadingTotals()
    assert same(batches(dataset(f"{server.url}/set", cache), 0, totals), first)
    assert totals.counters["cache_misses"] > 10


def test_cache_with_many_processes(tmp_path):
    """Eight processes, a cache that holds a tenth of what they want: never more than the limit at the end, never a wrong byte."""
    limit, size = BUCKETS * 4000, 1000
    children = []
    for seed in range(8):
        if not (child := os.fork()):
            code = 1
            try:
                cache, rng = Cache(tmp_path, limit), random.Random(seed)
                for _ in range(1500):
                    key = rng.randrange(10_000)
                    expected = key.to_bytes(4, "big") * (size // 4)
                    found = cache.get(str(key))
                    assert found in (None, expected)
                    if found is None:
                        cache.put(str(key), expected)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".partial"]
    cache = Cache(tmp_path, limit)
    for key in range(2000):  # every bucket is brought to its share when it is next written to
        cache.put(f"last {key}", bytes(10))
    held = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert limit / 4 < held <= limit
    cache.put("too large", bytes(5000))
    assert cache.get("too large") is None


def test_cache_on_a_full_or_read_only_disk(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir .*file: not writable"):
        Cache(tmp_path / "file", 10**6)
    cache = Cache(tmp_path / "cache", 10**6)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("in the way")
    cache.put("key", b"value")
    assert cache.get("key") is None


def test_cache_follows_no_link_and_waits_for_no_pipe(tmp_path, monkeypatch):
    """Others may write to the cache folder as well."""
    cache = Cache(tmp_path / "cache", BUCKETS * 4000)
    cache.put("key", b"value")
    (entry,) = (path for path in cache.folder.rglob("*") if path.is_file())
    assert entry.stat().st_mode & 0o777 == 0o666 & ~UMASK, "other users of the node read it too"
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    monkeypatch.setattr(caching.secrets, "token_hex", lambda _: "guessed")
    link = entry.with_name(f"{entry.name}.guessed.partial")
    link.symlink_to(victim)
    cache.put("key", b"other value")
    assert victim.read_bytes() == b"precious"
    assert cache.get("key") == b"value"
    assert link.is_symlink(), "it is not ours to remove"
    entry.unlink()
    os.mkfifo(entry)
    assert cache.get("key") is None
    entry.unlink()
    entry.symlink_to("/dev/zero")
    assert cache.get("key") is None


@pytest.fixture(scope="module")
def bucket():
    """A real S3 server on the loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        **{"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"},
        **{"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"},
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    import s3fs

    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    fs.mkdir("pairs")
    yield fs
    server.stop()
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})


def test_s3(folder, bucket, tmp_path):
    bucket.put(str(folder), "pairs/set", recursive=True)
    shards = ShardSet("s3://pairs/set")
    assert same(read_all(shards), everything(folder, True))
    local = batches(dataset(str(folder)), 0)
    for workers in (0, 2):
        assert same(batches(dataset("s3://pairs/set", tmp_path / "cache"), workers), local)
    with pytest.raises(UserError, match=r"data\.path s3://pairs/none: manifest\.json: the file is missing"):
        ShardSet("s3://pairs/none")
    data = bytearray((folder / "00001.tar").read_bytes())
    data[json.loads((folder / "00001.json").read_bytes())["members"][0][2] - 500] ^= 1
    bucket.pipe("pairs/set/00001.tar", bytes(data))
    with pytest.raises(DamagedData, match=r"shard s3://pairs/set/00001\.tar, sample 000000003: checksum differs"):
        ShardSet("s3://pairs/set").read(1, 0)


def test_parquet_in_s3(parquet, bucket):
    bucket.put(str(parquet), "pairs/parquet/part-0.parquet")
    remote, local = find_pairs(["s3://pairs/parquet/part-*.parquet"]), find_pairs([str(parquet)])
    rows = local.survey().rows[5:9]
    assert [(pair.row, pair.caption, pair.winner) for pair in remote.read(rows)] == [
        (pair.row, pair.caption, pair.winner) for pair in local.read(rows)
    ]
    with pytest.raises(UserError, match="no file matches"):
        find_pairs(["s3://pairs/parquet/none-*.parquet"])
    with pytest.raises(UserError, match="no such file"):
        find_pairs(["s3://pairs/parquet/none.parquet"])
