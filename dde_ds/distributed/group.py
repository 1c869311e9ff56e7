"""Join the process group, and recognise that another rank is lost."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from dde_ds.distributed.environment import DistributedEnv, read_environment
from dde_ds.errors import RankError

# Minutes that a rank waits for the others in one collective, unless the run says otherwise. NCCL's own default.
TIMEOUT_MINUTES = 10.0
DEEPSPEED = (0, 19, 8)
"""The oldest that trains right, as in setup.py. Before it ZeRO-2 sums bfloat16 gradients in bfloat16, and ZeRO skips no step for a NaN in float32."""


def check_deepspeed() -> None:
    """An older one would train, and wrongly.

    Raises:
        RankError: it is older than :data:`DEEPSPEED`.
    """
    import deepspeed

    if (deepspeed.__version_major__, deepspeed.__version_minor__, deepspeed.__version_patch__) < DEEPSPEED:
        oldest = ".".join(map(str, DEEPSPEED))
        raise RankError(
            f"deepspeed {deepspeed.__version__} is installed, whose ZeRO sums bfloat16 gradients in bfloat16 (stage 2) and lets a NaN into "
            f"float32 weights: pip install 'deepspeed>={oldest},<0.20'"
        )


def start(timeout_minutes: float = TIMEOUT_MINUTES) -> tuple[DistributedEnv, torch.device]:
    """Join the process group through DeepSpeed and pick this rank's device: its GPU, or the CPU (gloo).

    Args:
        timeout_minutes: how long any collective, and this call, wait for the other ranks before this one ends.

    Raises:
        UserError: the launcher's variables are wrong, the other ranks did not come, or DeepSpeed is too old.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    check_deepspeed()
    ranks = read_environment()
    ranks.export()
    accelerator = get_accelerator()
    assert accelerator is not None  # the CPU at least
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile a shared-memory collective here: a minute with a compiler, a crash without one. It has no
        # switch for it; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        if ranks.local_rank >= accelerator.device_count():
            raise RankError(
                f"rank {ranks.rank} is number {ranks.local_rank} on its node, but sees {accelerator.device_count()} GPUs: start one rank "
                "a GPU, and let each see all of its node's (Slurm: --gpus-per-node, not --gpus-per-task)"
            )
        accelerator.set_device(ranks.local_rank)
    timeout = timedelta(minutes=timeout_minutes)
    # ZeRO makes groups of its own without a timeout: they take these, which would be 10 minutes on NCCL and 30 on gloo.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
    began = time.monotonic()
    try:
        deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), timeout=timeout, verbose=False)
    except (dist.DistError, RuntimeError) as error:
        found = " ".join(str(error).split())
        if "EADDRINUSE" in found or "address already in use" in found.lower():
            raise RankError(
                f"port {ranks.port} on {ranks.address} is taken, by another run maybe: choose a free one, with --master_port for deepspeed "
                "and torchrun, --port for launchers/node.py, MASTER_PORT for srun and mpirun"
            ) from None
        raise RankError(
            f"rank {ranks.rank} of {ranks.world_size} did not meet the others at {ranks.address}:{ranks.port} in "
            f"{(time.monotonic() - began) / 60:.2g} minutes, where up to {timeout_minutes:g} are waited: {found[:200]}"
        ) from None
    return ranks, torch.device(accelerator.current_device_name())


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed, most likely because another rank is gone. Gloo raises a bare RuntimeError, told by its text."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
