"""Tell which rank a process is. Only this module reads what launchers put into the environment.

=============  ======================================================  =============================================
started by     rank, number of ranks, local rank                       where the ranks meet
=============  ======================================================  =============================================
deepspeed,     RANK, WORLD_SIZE, LOCAL_RANK                            MASTER_ADDR, MASTER_PORT
torchrun
mpirun         OMPI_COMM_WORLD_RANK, …_SIZE, …_LOCAL_RANK              MASTER_ADDR (needed on several nodes only)
mpiexec (PMI)  PMI_RANK, PMI_SIZE, MPI_LOCALRANKID or PMI_LOCAL_RANK   MASTER_ADDR (needed on several nodes only)
srun           SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID       first host of SLURM_STEP_NODELIST
=============  ======================================================  =============================================

The first line that applies counts, because under Slurm any of the other launchers may have been started inside a task.
MASTER_ADDR and MASTER_PORT count if they are set and there are several ranks. Nothing is guessed: variables that are incomplete or
contradict each other are an error.
"""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from dde_ds.distributed.hostfile import first_host, valid_host
from dde_ds.errors import UserError

DEFAULT_PORT = 29500
# Below 32768, where operating systems begin to assign ports by themselves.
OWN_PORTS = range(20000, 32000)


@dataclass(frozen=True)
class DistributedEnv:
    """The place of a process among all ranks, and where the ranks meet."""

    rank: int
    """Number of this process among all, from 0."""
    world_size: int
    """Number of processes."""
    local_rank: int
    """Number of this process on its node, from 0."""
    address: str = "127.0.0.1"
    """Host or IP address at which the ranks meet."""
    port: int = 0
    """Port at which they meet; 0 means any free port."""

    @property
    def is_main(self) -> bool:
        """Return whether this process is rank 0."""
        return self.rank == 0

    def export(self) -> None:
        """Write the five variables that DeepSpeed and PyTorch read."""
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            MASTER_ADDR=self.address,
            MASTER_PORT=str(self.port),
        )


def read_environment(environment: Mapping[str, str] = os.environ) -> DistributedEnv:
    """Return this process's place among the ranks. A process without a launcher is rank 0 of 1.

    Raises:
        UserError: a variable is missing beside others of its launcher, is malformed, or contradicts another.
    """
    present = {name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environment}
    if present:
        return _from_torch(environment)
    if any(name.startswith("OMPI_COMM_WORLD_") for name in environment):
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        return _from_mpi(environment, "mpirun", names, "OMPI_COMM_WORLD_LOCAL_SIZE")
    slurm = tuple(environment.get(name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
    pmi = tuple(environment.get(name) for name in ("PMI_RANK", "PMI_SIZE"))
    if pmi != (None, None) and pmi != slurm:  # if equal, srun --mpi=pmi2 set both, and Slurm's variables tell more
        local = next((name for name in ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID") if name in environment), None)
        return _from_mpi(environment, "mpiexec", ("PMI_RANK", "PMI_SIZE", local or "MPI_LOCALRANKID"), "MPI_LOCALNRANKS")
    if "SLURM_PROCID" in environment:
        return _from_slurm(environment)
    return DistributedEnv(0, 1, 0)


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the environment holds any variable of a launcher, even if others are missing.

    This process is a rank then.
    """
    return any(
        name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_RANK", "PMI_SIZE", "SLURM_PROCID") or name.startswith("OMPI_COMM_WORLD_")
        for name in environment
    )


def _from_torch(environment: Mapping[str, str]) -> DistributedEnv:
    """Return the place among the ranks that deepspeed or torchrun set."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, world, local = _whole_numbers(environment, names, "start with deepspeed, torchrun or srun")
    _check(rank, world, local, names)
    if "LOCAL_WORLD_SIZE" in environment:
        (ours,) = _whole_numbers(environment, ("LOCAL_WORLD_SIZE",), "")
        if not local < ours <= world:
            raise UserError(f"environment: LOCAL_RANK={local}, LOCAL_WORLD_SIZE={ours}, WORLD_SIZE={world} contradict each other")
    if "SLURM_STEP_NUM_TASKS" in environment:
        # A launcher inside each task starts at least one rank a task. Fewer ranks than tasks mean that the variables
        # were inherited from somewhere else.
        (tasks,) = _whole_numbers(environment, ("SLURM_STEP_NUM_TASKS",), "")
        if tasks > world:
            raise UserError(
                f"environment: WORLD_SIZE={world}, but srun started {tasks} tasks; unset RANK, WORLD_SIZE and LOCAL_RANK"
            )
    if world == 1 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # No other rank has to find this one, so any free port will do. The launcher's port may be in use by another
        # run. Only with torchrun's own store must the port be the launcher's.
        return DistributedEnv(rank, world, local)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(f"environment: {' and '.join(missing)} not set beside RANK={rank} and WORLD_SIZE={world}")
    address = _address(environment)
    assert address is not None  # it is not missing
    return DistributedEnv(rank, world, local, address, _port(environment, DEFAULT_PORT))


def _from_mpi(environment: Mapping[str, str], launcher: str, names: tuple[str, str, str], local_size: str) -> DistributedEnv:
    """Return the place among the ranks that an MPI launcher set.

    It is found in the variables ``names`` and ``local_size``.
    """
    rank, world, local = _whole_numbers(environment, names, f"start with {launcher}, or set RANK, WORLD_SIZE and LOCAL_RANK")
    _check(rank, world, local, names)
    if world == 1:
        return DistributedEnv(rank, world, local)
    address = _address(environment)
    if address is None:
        here = _whole_numbers(environment, (local_size,), f"set MASTER_ADDR to rank 0's host: {launcher} does not tell")[0]
        if here != world:
            raise UserError(
                f"environment: MASTER_ADDR not set, and {launcher} does not tell it: {local_size}={here} of {world} ranks run here; "
                "set it to rank 0's host"
            )
        address = "127.0.0.1"
    return DistributedEnv(rank, world, local, address, _port(environment, DEFAULT_PORT))


def _from_slurm(environment: Mapping[str, str]) -> DistributedEnv:
    """Return the place among the ranks that srun set."""
    if "SLURM_STEP_NUM_TASKS" not in environment:
        # This is the batch script itself or a shell of an allocation: it looks like task 0 of a step that was never
        # started.
        (tasks,) = _whole_numbers({"SLURM_NTASKS": "1", **environment}, ("SLURM_NTASKS",), "")
        if tasks > 1:
            raise UserError(f"environment: SLURM_NTASKS={tasks}, but this is no task of srun; put srun before the command")
        return DistributedEnv(0, 1, 0)
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    rank, world, local = _whole_numbers(environment, names, "start with srun")
    _check(rank, world, local, names)
    if world == 1:
        return DistributedEnv(0, 1, local)
    address = _address(environment)
    if address is None:
        name = next((name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if name in environment), None)
        if name is None:
            raise UserError("environment: neither SLURM_STEP_NODELIST nor MASTER_ADDR is set; start with srun")
        address = first_host(environment[name], name)
    # Two steps on one node must not meet at the same port.
    ids = {"SLURM_JOB_ID": "0", "SLURM_STEP_ID": "0", **environment}
    job, step = _whole_numbers(ids, ("SLURM_JOB_ID", "SLURM_STEP_ID"), "")
    return DistributedEnv(rank, world, local, address, _port(environment, OWN_PORTS[(job * 7 + step) % len(OWN_PORTS)]))


def free_port() -> int:
    """Return a port of this machine that is free now, for ranks that all run here.

    The port lies below 32768, where operating systems begin to assign ports by themselves. So no other process gets it
    by chance before the ranks have started.

    Raises:
        UserError: none of 100 ports was free.
    """
    for port in random.Random().sample(OWN_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise UserError(f"no free port among 100 tried, {OWN_PORTS[0]} to {OWN_PORTS[-1]}: choose one with --port")


def _check(rank: int, world: int, local: int, names: tuple[str, str, str]) -> None:
    """Refuse numbers that contradict each other."""
    if world < 1 or rank >= world or local > rank:
        values = ", ".join(f"{name}={value}" for name, value in zip(names, (rank, world, local), strict=True))
        raise UserError(f"environment: {values} contradict each other: expected local rank <= rank < number of ranks")


def _address(environment: Mapping[str, str]) -> str | None:
    """Return MASTER_ADDR, or None if it is not set.

    Raises:
        UserError: it is not a host name or an IP address.
    """
    address = environment.get("MASTER_ADDR")
    if address is not None and not valid_host(address):
        raise UserError(f"environment: MASTER_ADDR={address!r}: expected a host name or an IP address")
    return address


def _port(environment: Mapping[str, str], default: int) -> int:
    """Return MASTER_PORT, or ``default`` if it is not set.

    Raises:
        UserError: it is not a port.
    """
    text = environment.get("MASTER_PORT", str(default))
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535 or (int(text) == 0 and default != 0):
        raise UserError(f"environment: MASTER_PORT={text!r}: expected a port, 1 to 65535")
    return int(text)


def _whole_numbers(environment: Mapping[str, str], names: tuple[str, ...], mend: str) -> list[int]:
    """Return the values of environment variables as integers.

    Raises:
        UserError: one is missing, or is not a whole number; the message ends with ``mend`` if one is missing.
    """
    missing = [name for name in names if name not in environment]
    if missing:
        beside = [f"{name}={environment[name]}" for name in names if name in environment]
        raise UserError(
            f"environment: {', '.join(missing)} not set"
            + (f" beside {', '.join(beside)}" if beside else "")
            + (mend and f"; {mend}")
        )
    for name in names:
        if not re.fullmatch(r"[0-9]{1,9}", environment[name]):
            raise UserError(f"environment: {name}={environment[name]!r}: expected a whole number, 0 or more")
    return [int(environment[name]) for name in names]
