"""Join the process group, and recognise that another rank is lost."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from dde_ds.distributed.environment import DistributedEnv, read_environment
from dde_ds.errors import RankError

# Minutes that a rank waits for the others in one collective, unless the run says otherwise. NCCL has the same default.
TIMEOUT_MINUTES = 10.0
DEEPSPEED = (0, 19, 8)
"""The oldest version that trains correctly, as in setup.py.

Before it, ZeRO-2 sums bfloat16 gradients in bfloat16, and in float32 ZeRO does not skip a step for a NaN.
"""


def check_deepspeed() -> None:
    """Refuse a version of DeepSpeed that would train, but wrongly.

    Raises:
        RankError: the version is older than :data:`DEEPSPEED`.
    """
    import deepspeed

    if (deepspeed.__version_major__, deepspeed.__version_minor__, deepspeed.__version_patch__) < DEEPSPEED:
        oldest = ".".join(map(str, DEEPSPEED))
        raise RankError(
            f"deepspeed {deepspeed.__version__} is installed, whose ZeRO sums bfloat16 gradients in bfloat16 (stage 2) and lets a NaN into "
            f"float32 weights: pip install 'deepspeed>={oldest},<0.20'"
        )


def start(timeout_minutes: float = TIMEOUT_MINUTES) -> tuple[DistributedEnv, torch.device]:
    """Join the process group through DeepSpeed, and choose this rank's device: its GPU, or the CPU (with gloo).

    Collective.

    Args:
        timeout_minutes: how long this call and every later collective wait for the other ranks before this rank ends.

    Returns:
        This rank's place among the ranks, and its device.

    Raises:
        UserError: the launcher's variables are wrong, the other ranks did not come, the port is taken, this rank has no
            GPU, or DeepSpeed is too old.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    check_deepspeed()
    ranks = read_environment()
    ranks.export()
    accelerator = get_accelerator()
    assert accelerator is not None  # there is always at least the CPU
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile a shared-memory collective here, which takes a minute with a compiler and crashes
        # without one. DeepSpeed has no switch against it. gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        if ranks.local_rank >= accelerator.device_count():
            raise RankError(
                f"rank {ranks.rank} is number {ranks.local_rank} on its node, but sees {accelerator.device_count()} GPUs: start one rank "
                "a GPU, and let each see all of its node's (Slurm: --gpus-per-node, not --gpus-per-task)"
            )
        accelerator.set_device(ranks.local_rank)
    timeout = timedelta(minutes=timeout_minutes)
    # ZeRO makes its own groups without a timeout. They take these defaults, which would otherwise be 10 minutes on NCCL
    # and 30 on gloo.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
    began = time.monotonic()
    try:
        deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), timeout=timeout, verbose=False)
    except (dist.DistError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        if "EADDRINUSE" in problem or "address already in use" in problem.lower():
            raise RankError(
                f"TCP port {ranks.port} on {ranks.address} is taken, by another run maybe: choose a free one, with --master_port for deepspeed "
                "and torchrun, --port for launchers/node.py, MASTER_PORT for srun and mpirun"
            ) from None
        raise RankError(
            f"rank {ranks.rank} of {ranks.world_size} did not meet the others at {ranks.address}:{ranks.port} in "
            f"{(time.monotonic() - began) / 60:.2g} minutes, where up to {timeout_minutes:g} are waited: {problem[:200]}"
        ) from None
    return ranks, torch.device(accelerator.current_device_name())


def is_lost_peer(error: Exception) -> bool:
    """Return whether a collective failed, most likely because another rank is gone.

    Gloo raises a bare RuntimeError, which only its text identifies.
    """
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
