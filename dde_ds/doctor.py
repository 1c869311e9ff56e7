"""``dde-ds doctor``: find before a large run what would fail an hour into it.

Every rank checks its own machine, and rank 0 prints one line for each check. Under the launcher of the run and with as many ranks,
the doctor sees what the run will see. Without a launcher, it checks one machine.
"""

from __future__ import annotations

import os
import platform
import resource
import secrets
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from dde_ds.config import RunConfig
from dde_ds.data.mixture import open_sources
from dde_ds.distributed.environment import DistributedEnv
from dde_ds.distributed.group import start
from dde_ds.errors import UserError
from dde_ds.models.unet import load_unet_config
from dde_ds.planning.cost import parameter_sizes
from dde_ds.planning.plan import checkpoint_bytes, export_bytes, kept_checkpoints
from dde_ds.planning.workload import trained_part
from dde_ds.text import printable, without_passwords
from dde_ds.warn import reason

PACKAGES = ("dde_ds", "torch", "deepspeed", "diffusers", "transformers", "safetensors")
# Containers come with 64 MB of shared memory, which is too little for NCCL and the loader's workers.
SHARED_MEMORY = 512 * 2**20
OPEN_FILES = 1024
CLOCK_SECONDS = 2.0
# A file that one node wrote may show late on another node, because NFS caches attributes for some seconds.
SHOWS_SECONDS = 10.0
TRAFFIC_BYTES = 64 * 2**20
# Checks that must find the same on every rank, and what to do if they do not.
ALIKE = {"versions": "install the same everywhere", "shards": "every node must read the same shards"}


class Failed(Exception):
    """A check has failed. The message says what is wrong, and how to mend it."""


def diagnose(run: RunConfig | None, timeout_minutes: float) -> int:
    """Print one line for each check. Every rank calls this. Return 0, or 1 if a check failed, the same on all ranks.

    Raises:
        UserError: the ranks did not meet, so nothing else can be checked.
    """
    ranks, device = start(timeout_minutes)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions", _versions),
        ("accelerator", lambda: _accelerator(device, run)),
        ("shared memory", _shared_memory),
        ("open files", _open_files),
        ("temporary folder", _temporary_folder),
        ("network device", lambda: _network_device(device)),
    ]
    if run:
        checks += [("shards", lambda: _shards(run)), ("free disk", lambda: _free_disk(run))]
        if run.reference.precomputed:
            checks.append(("precomputed", lambda: _precomputed(run, ranks)))
    healthy = _report(ranks, "ranks", _try(lambda: _ranks(ranks, device)))
    for name, check in checks:
        healthy &= _report(ranks, name, _try(check))
    # These checks talk to the other ranks, so each makes the same number of collectives whatever it finds.
    healthy &= _report(ranks, "clocks", _clocks())
    healthy &= _report(ranks, "traffic", _traffic(device))
    if run:
        healthy &= _report(ranks, "shared folder", _shared_folder(Path(run.output), ranks))
    return 0 if healthy else 1


def _try(check: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, check()
    except (Failed, UserError) as error:
        return False, str(error)
    except OSError as error:
        return False, f"{error.filename or 'system'}: {reason(error).lower()}"


def _gather(value) -> list:
    """Return the values of all ranks, in the order of the ranks. Collective."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _report(ranks: DistributedEnv, name: str, finding: tuple[bool, str]) -> bool:
    """Print one line for all ranks: the finding that they share, or the hosts whose findings differ. Collective.

    Return True if no rank failed.
    """
    findings = _gather((*finding, socket.gethostname(), ranks.rank))
    failed = [entry for entry in findings if not entry[0]]
    if failed:
        by_text: dict[str, list[tuple]] = {}
        for entry in failed:
            by_text.setdefault(entry[1], []).append(entry)
        where = {text: ", ".join(sorted({f"{entry[2]}" for entry in entries})) for text, entries in by_text.items()}
        text = "; ".join(f"{text} (on {hosts})" if len(findings) > 1 else text for text, hosts in where.items())
    else:
        counts = Counter(entry[1] for entry in findings)
        text = "; ".join(text if len(counts) == 1 else f"{text} ({count} ranks)" for text, count in counts.most_common(4))
        if name in ALIKE and len(counts) > 1:
            failed, text = findings, f"ranks differ: {text}; {ALIKE[name]}"
    if ranks.is_main:
        print(f"{'FAIL' if failed else 'ok  '}  {name:17} {printable(without_passwords(text))}", flush=True)
    return not failed


def _versions() -> str:
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            if package != "dde_ds":  # dde_ds may run from its folder without being installed
                raise Failed(f"{package} is not installed: pip install -e .") from None
    return ", ".join(versions)


def _accelerator(device: torch.device, run: RunConfig | None) -> str:
    if device.type == "cpu":
        return "CPU (gloo); training at full size needs GPUs"
    properties = torch.cuda.get_device_properties(device)
    if run and run.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise Failed(f"{properties.name} has no bfloat16: set precision=fp32")
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def _ranks(ranks: DistributedEnv, device: torch.device) -> str:
    hosts = Counter(_gather(socket.gethostname()))
    numbers = torch.tensor([float(ranks.rank + 1)], device=device)
    dist.all_reduce(numbers)
    if numbers.item() != ranks.world_size * (ranks.world_size + 1) / 2:
        raise Failed(f"a sum over {ranks.world_size} ranks is wrong: {numbers.item():g}")
    if len(set(hosts.values())) > 1:
        raise Failed(f"hosts hold different numbers of ranks: {', '.join(f'{host} {count}' for host, count in hosts.items())}")
    return f"{ranks.world_size} on {len(hosts)} hosts, meeting at {ranks.address}"


def _shared_memory() -> str:
    size = shutil.disk_usage("/dev/shm").total
    if size < SHARED_MEMORY:
        raise Failed(f"/dev/shm holds {size / 2**20:.0f} MiB: give the container 16 GiB (--shm-size 16g, or an emptyDir in memory)")
    return f"/dev/shm holds {size / 2**30:.1f} GiB"


def _open_files() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        raise Failed(f"{soft} files may be open: raise it to {OPEN_FILES} or more (ulimit -n)")
    return "no limit" if soft == resource.RLIM_INFINITY else f"{soft} may be open"


def _temporary_folder() -> str:
    with tempfile.NamedTemporaryFile(prefix="dde_ds-doctor-") as file:
        file.write(b"x")
        return str(Path(file.name).parent)


def _network_device(device: torch.device) -> str:
    variable = "GLOO_SOCKET_IFNAME" if device.type == "cpu" else "NCCL_SOCKET_IFNAME"
    known = [name for _, name in socket.if_nameindex()]
    chosen = os.environ.get(variable, "")
    # NCCL's syntax: prefixes, "=" for exact names, "^" for all others.
    names = [name for name in chosen.lstrip("^=").split(",") if name]
    exact = variable.startswith("GLOO") or chosen.startswith(("=", "^="))
    lost = [name for name in names if not (name in known if exact else any(interface.startswith(name) for interface in known))]
    if lost and not chosen.startswith("^"):
        raise Failed(f"{variable}={chosen!r} names no device of this host; it has {', '.join(known)}")
    others = [name for name in known if name != "lo"]
    return f"{variable}={chosen}" if chosen else f"chosen by the library among {', '.join(others) or 'lo'}"


def _clocks() -> tuple[bool, str]:
    dist.barrier()
    times = _gather(time.time())
    apart = max(times) - min(times)
    if apart > CLOCK_SECONDS:
        return False, f"clocks are {apart:.1f} s apart: start a time service (chrony) on all nodes"
    return True, f"at most {apart:.2f} s apart"


def _traffic(device: torch.device) -> tuple[bool, str]:
    """Measure the bus bandwidth of one all-reduce, for information. Fail only if its sum is wrong."""
    world = dist.get_world_size()
    if world == 1:
        return True, "one rank: none"
    values = torch.ones(TRAFFIC_BYTES // 4, device=device)
    dist.all_reduce(values)  # the first all-reduce makes the connections
    values.fill_(1.0)
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(values)
    total = values[-1].item()
    seconds = max(_gather(time.perf_counter() - started))
    if total != world:
        return False, f"a sum over {world} ranks came out as {total:g}"
    rate = 2 * (world - 1) / world * TRAFFIC_BYTES / seconds / 1e9
    return True, f"all-reduce of {TRAFFIC_BYTES // 2**20} MiB at {rate:.2f} GB/s"


def _shards(run: RunConfig) -> str:
    """Open shards and held-out pairs as the run would, and describe them. Every node must read the same."""
    data = run.data
    remote = {"cache_dir": data.cache_dir, "cache_gb": data.cache_gb, "timeout": data.timeout_s}
    shards = open_sources(data.weighted_paths, **remote, strict=not data.max_bad_samples, key=data.key)
    text = f"{data.name}: {sum(shards.counts)} pairs, digest {shards.digest[:8]}"
    if not run.evaluation.path:
        return text
    held_out = open_sources([(run.evaluation.path, 1.0)], **remote, key="evaluation.path")
    return f"{text}; {run.evaluation.path}: {sum(held_out.counts)} pairs, digest {held_out.digest[:8]}"


def _precomputed(run: RunConfig, ranks: DistributedEnv) -> str:
    """Check the folder of ``reference.precomputed``. Only rank 0 reads and writes there."""
    assert run.reference.precomputed is not None  # diagnose calls this only then
    folder = Path(run.reference.precomputed).absolute().parent
    if ranks.is_main:
        try:
            tempfile.TemporaryFile(dir=_existing(folder)).close()
        except OSError as error:
            raise Failed(f"reference.precomputed {run.reference.precomputed}: not writable: {reason(error).lower()}") from None
    return f"{folder}: writable by rank 0"


def _free_disk(run: RunConfig) -> str:
    """Compare the free disk with what the run will keep, as :mod:`dde_ds.planning.plan` counts it."""
    sizes = parameter_sizes(load_unet_config(run.model.path, run.model.revision), trained_part(run))
    each, kept, exported = checkpoint_bytes(run, sizes), kept_checkpoints(run), export_bytes(run, sizes)
    need = each * kept + exported
    free = shutil.disk_usage(_existing(Path(run.output))).free
    wanted = f"{kept} checkpoints of {sum(sizes.trained) / 1e6:.0f} M parameters and the export take {need / 1e9:.1f} GB"
    if free < need:
        raise Failed(f"output {run.output}: {free / 1e9:.1f} GB free, but {wanted}; free some, or lower checkpoint.keep")
    return f"{free / 1e9:.0f} GB free, {wanted}"


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.absolute().parent
    return path


def _shared_folder(output: Path, ranks: DistributedEnv) -> tuple[bool, str]:
    """Check that every rank can write into one folder, as a checkpoint needs it, and that rank 0 sees all the files.

    The folder and its parents are left as they were.
    """
    token, folder = _gather(secrets.token_hex(8))[0], _existing(output)
    probes = [folder / f".dde_ds-doctor-{token}-{rank}" for rank in range(ranks.world_size)]
    problem = ""
    try:
        _write_synced(probes[ranks.rank], token)
    except OSError as error:
        problem = f"output {folder}: not writable: {reason(error).lower()}"
    wrote = not problem
    written = [probe for probe, failed in zip(probes, _gather(problem), strict=True) if not failed]
    if ranks.is_main and not problem and (lost := _not_shown(written, token)):
        rank = probes.index(lost[0])
        problem = (
            f"output {folder}: a file that rank {rank} wrote is not there for rank 0; it must be one file system for all nodes"
        )
    dist.barrier()
    if wrote:
        probes[ranks.rank].unlink(missing_ok=True)
    return not problem, problem or f"{folder}: written, renamed and synced by all, seen by rank 0"


def _write_synced(path: Path, text: str) -> None:
    """Write a file as a part of a checkpoint is written: under another name, synced, then renamed."""
    staged = path.with_suffix(".staged")
    try:
        with staged.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.rename(path)
    finally:
        staged.unlink(missing_ok=True)


def _not_shown(paths: list[Path], text: str) -> list[Path]:
    """Wait up to :data:`SHOWS_SECONDS` for files that other nodes wrote. Return the files that still do not hold ``text``."""
    deadline = time.monotonic() + SHOWS_SECONDS
    while (lost := [path for path in paths if not _holds(path, text)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return lost


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False
