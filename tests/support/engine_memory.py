"""Print the bytes that real engines hold, as one rank of several, for a tiny UNet and two micro-batches a step.

Gradients are counted before the step is made.

RANK=… WORLD_SIZE=… python -m tests.support.engine_memory CONFIG.json… > one JSON line a configuration
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from pathlib import Path

import deepspeed
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from dde_ds.distributed.process import end_process
from dde_ds.engine.ema import update_ema
from dde_ds.engine.state import EMA
from dde_ds.engine.update import gradient_accumulation
from dde_ds.engine.zero import initialize_policy, initialize_reference
from dde_ds.models.checkpointing import set_checkpointing
from dde_ds.models.lora import add_adapters
from dde_ds.models.silence import silence_libraries
from dde_ds.models.trainable import train_part
from dde_ds.models.unet import predict
from dde_ds.planning.cost import made_up_conditioning
from dde_ds.training.reference import adapters_off, frozen_model


def bytes_of(tensors) -> int:
    """Return the bytes of the tensors' distinct storages."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None}
    return sum(storages.values())


def weights(engine) -> list[Tensor]:
    """Return the weights of an engine. For stage 3, these are this rank's parts and the weights that are whole on every rank."""
    parameters = list(engine.module.parameters())
    return [*parameters, *(parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor"))]


def on_the_host(engine) -> list[Tensor]:
    """Return this rank's parts that are kept in the host's memory.

    On a CPU, this is the device's memory as well, so DeepSpeed is asked where it keeps them.
    """
    if getattr(engine.optimizer, "offload_device", None) != "cpu":
        return []
    return [parameter.ds_tensor for parameter in engine.module.parameters()]


def masters(optimizer) -> list[Tensor]:
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    raise TypeError(type(optimizer).__name__)


def gradients(engine) -> list[Tensor]:
    """Return the gradients' sums over the micro-batches of a step, as they are before the step is made."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "grad_partitions_flat_buffer"):
        return [optimizer.grad_partitions_flat_buffer]
    if hasattr(optimizer, "fp32_groups_gradients_flat"):
        return [*optimizer.fp32_groups_gradients_flat, *(parameter.grad for parameter in engine.module.parameters())]
    sums = [tensor for group in optimizer.averaged_gradients.values() if group is not None for tensor in group]
    sums += [tensor for group in optimizer.all_grad_tensors.values() if group is not None for tensor in group]
    return [*sums, *(parameter.grad for parameter in engine.module.parameters())]


def made(unet: dict, dtype: torch.dtype) -> UNet2DConditionModel:
    """Make a UNet directly in ``dtype``, so that it is not whole in float32 on the way."""
    torch.set_default_dtype(dtype)
    try:
        return UNet2DConditionModel.from_config(unet)
    finally:
        torch.set_default_dtype(torch.float32)


def highest_resident() -> int:
    """Return the most bytes that this process has held so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def moved(engine, before: dict[str, Tensor], trained: bool) -> int:
    """Return how many of the trained, or of the frozen, parameters differ in a bit from what they were ``before``. Collective."""
    parameters = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad is trained]
    found = 0
    for name, parameter in parameters:
        with deepspeed.zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else contextlib.nullcontext():
            found += not torch.equal(parameter, before[name])
    return found


def held(
    config: dict,
    unet: dict,
    side: int,
    checkpointing: str = "none",
    placement: str = "auto",
    ema: float | None = None,
    lora: dict | None = None,
    trainable: str = "*",
) -> dict[str, int]:
    before = highest_resident()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    policy = made(unet, dtype)
    if lora:
        add_adapters(policy, lora["rank"], 1.0, lora["targets"], seed=0)
    else:
        train_part(policy, [trainable])
    at_first = {name: value.detach().clone() for name, value in policy.named_parameters()}
    set_checkpointing(policy, checkpointing)
    policy = initialize_policy(policy, config)
    if lora:
        reference, predictions = None, adapters_off(policy.module)
    else:
        reference = initialize_reference(made(unet, dtype), config, placement)
        predictions = frozen_model(reference)
    noisy = torch.randn(2, unet["in_channels"], side, side, dtype=dtype)
    batch = made_up_conditioning(unet, 2, 8)
    timesteps = torch.zeros(2, dtype=torch.int64)
    sizes = {"gradients": 0}
    for _ in range(2):  # optimizer steps: the moments are made in the first
        with gradient_accumulation(policy):
            for _ in range(config["gradient_accumulation_steps"]):
                with torch.no_grad():
                    predictions(noisy, timesteps, batch)
                policy.backward(predict(policy, noisy, timesteps, batch).float().square().mean())
                sizes["gradients"] = max(sizes["gradients"], bytes_of(gradients(policy)))
                if not policy.is_gradient_accumulation_boundary():
                    policy.step()
        policy.step()
        if ema:
            update_ema(policy, ema)
    model = bytes_of(weights(policy))
    # Leave out the 2 kB that say what the 8 bits mean.
    state = [
        item for values in policy.optimizer.optimizer.state.values() for item in values.items() if item[0] not in ("qmap1", "qmap2")
    ]
    host = bytes_of(on_the_host(reference)) if reference else 0
    averages = [value for name, value in state if name == EMA]
    moments = [value for name, value in state if name != EMA and torch.is_tensor(value) and value.dim()]
    sizes |= {
        "weights": model,
        "optimizer": bytes_of([*weights(policy), *masters(policy.optimizer), *moments]) - model,
        "ema": bytes_of(averages),
        "reference": bytes_of(weights(reference)) - host if reference else 0,
        "host": host,
        "resident_before": before,
        "peak_resident": highest_resident(),
    }
    # Gathered last: stage 3 frees what it gathers, and would change what is counted above.
    changed = {"frozen_moved": moved(policy, at_first, trained=False), "trained_moved": moved(policy, at_first, trained=True)}
    return sizes | changed


def main() -> None:
    silence_libraries()
    for path in sys.argv[1:]:
        job = json.loads(Path(path).read_text(encoding="utf-8"))
        print(json.dumps(held(**job)), flush=True)


if __name__ == "__main__":
    main()
    end_process(0)
