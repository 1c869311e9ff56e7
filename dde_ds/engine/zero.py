"""DeepSpeed engines: a ZeRO policy that trains, and a reference that only ever predicts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from dde_ds.config import RunConfig
from dde_ds.errors import UserError


def initialize(policy: torch.nn.Module, reference: torch.nn.Module | None, config: dict | str | Path) -> tuple[Any, Any | None]:
    """DeepSpeed engines for a policy and its frozen reference, from one DeepSpeed configuration.

    Joins the process group first where that has not happened. The reference gets no optimizer and no gradients, and the
    policy's precision, so that both take the same path through the numbers and the first loss is log 2. It is sharded
    beside a ZeRO-3 policy and replicated beside any other.

    Args:
        policy: the UNet to train; all of its parameters that require gradients are trained.
        reference: another copy of it, or None for an objective without one.
        config: a DeepSpeed configuration, as a dict or the path of its JSON.

    Returns:
        (policy engine, reference engine or None).

    Raises:
        UserError: the configuration is not readable, or policy and reference are one module.
    """
    import deepspeed

    from dde_ds import distributed

    if policy is reference:
        raise UserError("initialize(): policy and reference are the same module; load the reference a second time")
    config = read_config(config)
    if not torch.distributed.is_initialized():
        distributed.start()
    if config.get("torch_autocast", {}).get("enabled"):
        raise UserError("deepspeed torch_autocast is enabled: it would cast the policy and not the reference; use bf16")
    _take_torch_adam(config, deepspeed.accelerator.get_accelerator().device_name())

    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    policy_engine, *_ = deepspeed.initialize(model=policy.train(), model_parameters=parameters, config=config)
    if reference is None:
        return policy_engine, None
    reference.requires_grad_(False).eval()
    reference_engine, *_ = deepspeed.initialize(model=reference, config=reference_config(config))
    reference_engine.module.eval()
    return policy_engine, reference_engine


def _take_torch_adam(config: dict, device: str) -> None:
    """PyTorch's AdamW: DeepSpeed would first compile its own, for over a minute and with a CUDA toolkit, for the same update.

    An offloaded optimizer needs DeepSpeed's, which runs on the CPU.
    """
    optimizer = config.get("optimizer", {})
    offloaded = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    if optimizer.get("type") in ("Adam", "AdamW") and not offloaded:
        parameters = optimizer.setdefault("params", {})
        if parameters.setdefault("torch_adam", True) and device == "cuda":
            parameters.setdefault("fused", True)


def reference_config(config: dict) -> dict:
    """The policy's configuration without what trains: stage 3 stays 3, every other stage becomes 0 (replicated).

    DeepSpeed accepts an engine without optimizer at these two stages only.
    """
    batch = "train_micro_batch_size_per_gpu" if "train_micro_batch_size_per_gpu" in config else "train_batch_size"
    kept = {key: copy.deepcopy(config[key]) for key in ("bf16", "fp16", "steps_per_print", batch) if key in config}
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3:
        kept["zero_optimization"] = {key: value for key, value in zero.items() if key != "offload_optimizer"}
    else:
        kept["zero_optimization"] = {"stage": 0}
    return kept


def read_config(config: dict | str | Path) -> dict:
    """A DeepSpeed configuration as a dict of its own."""
    if isinstance(config, dict):
        return copy.deepcopy(config)
    try:
        return json.loads(Path(config).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"deepspeed {config}: {error.strerror.lower()}") from None
    except ValueError as error:
        raise UserError(f"deepspeed {config}: not valid JSON: {error}") from None


def complete_config(run: RunConfig, world: int) -> dict:
    """The run's DeepSpeed configuration, with what the run configuration states filled in.

    Raises:
        UserError: the JSON says something else than the run configuration; both keys are named.
    """
    config = read_config(run.deepspeed)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(
            f"{run.deepspeed}: zero_optimization.stage is {stage}: must be 1, 2 or 3 (0 reports no gradient norm to guard)"
        )
    accumulation = run.batch.accumulation(world)
    stated = {
        "train_batch_size": (run.batch.pairs, "batch.pairs"),
        "train_micro_batch_size_per_gpu": (run.batch.micro, "batch.micro"),
        "gradient_accumulation_steps": (accumulation, f"batch.pairs / ({world} ranks × batch.micro)"),
        "gradient_clipping": (run.optimizer.max_grad_norm, "optimizer.max_grad_norm"),
        "bf16.enabled": (run.precision == "bf16", "precision"),
        # Both on, DeepSpeed skips a step with a bad gradient at every stage and in either precision.
        "bf16.check_grad_overflow": (True, "guards"),
        "zero_optimization.compute_grad_norm": (True, "guards"),
        "fp16.enabled": (False, "precision"),
        "optimizer.type": ("AdamW", "optimizer"),
        "optimizer.params.lr": (run.optimizer.learning_rate, "optimizer.learning_rate"),
        "optimizer.params.betas": (list(run.optimizer.betas), "optimizer.betas"),
        "optimizer.params.eps": (run.optimizer.eps, "optimizer.eps"),
        "optimizer.params.weight_decay": (run.optimizer.weight_decay, "optimizer.weight_decay"),
    }
    if "scheduler" in config:
        raise UserError(
            f"{run.deepspeed}: scheduler is set, but optimizer.warmup_steps states the schedule; remove it from the JSON"
        )
    for dotted, (value, key) in stated.items():
        *parents, leaf = dotted.split(".")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        if place.setdefault(leaf, value) == "auto":
            place[leaf] = value
        if place[leaf] != value:
            raise UserError(
                f"{run.deepspeed}: {dotted} is {place[leaf]!r}, but {key} of the run says {value!r}; remove it from the JSON"
            )
    if run.precision == "fp32":
        # Communication and accumulation types are for mixed precision; in fp32 they would be contradictions.
        config.pop("data_types", None)
    return config
