"""The keys of a DeepSpeed configuration that a run accepts.

They change speed and memory. They change neither what is trained nor who hears of it.
"""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

from dde_ds.errors import UserError, nearest

TAKEN = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "managed_gradient_accumulation"),
    *("optimizer", "gradient_clipping", "bf16", "fp16", "data_types", "zero_optimization", "communication_data_type"),
    *("prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "zero_force_ds_cpu_optimizer", "aio"),
    *("zero_allow_untested_optimizer", "disable_allgather", "disable_python_gc", "activation_checkpointing", "checkpoint"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "log_level", "timers"),
    "dataloader_drop_last",
)
"""Keys that a configuration may set. For some of them the run states the value. DeepSpeed ignores others, since it has no use for
them."""
REASONS = {
    **dict.fromkeys(("wandb", "comet", "tensorboard", "csv_monitor"), "log.trackers of the run says who gets its numbers"),
    **dict.fromkeys(("data_efficiency", "curriculum_learning"), "the order of the pairs is the run's own"),
    **dict.fromkeys(("amp", "torch_autocast"), "precision states the type of policy and reference"),
    **dict.fromkeys(("progressive_layer_drop", "compression_training", "quantize_training"), "it would change what is trained"),
    **dict.fromkeys(("elasticity", "autotuning"), "batch.pairs states the batch, and dde-ds plan says what fits"),
    "flops_profiler": "it would change functions of PyTorch while a step runs; dde-ds plan counts FLOPs",
    "compile": "model.compile states it",
    "scheduler": "optimizer.warmup_steps states the schedule",
}
"""Reasons why certain other keys are not accepted. Each of these keys may be in a file if it is switched off."""
ZERO_REASONS = {
    **dict.fromkeys(
        ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"), "offload_optimizer and offload_param took its place"
    ),
    "zenflow": "it would update weights with gradients of earlier steps",
}
"""Reasons why certain keys of ``zero_optimization`` are not accepted."""
OPTIMIZER_PARAMS = ("lr", "betas", "eps", "weight_decay", "torch_adam", "fused")
FLAGS = (
    *("prescale_gradients", "zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer", "disable_allgather"),
    *("disable_python_gc", "wall_clock_breakdown", "memory_breakdown", "dump_state"),
)


def check_accepted(config: dict, where: str) -> None:
    """Remove from ``config`` what is switched off, and refuse what a run does not accept.

    Raises:
        UserError: a key that a run does not accept, or a value that would end DeepSpeed later or change what is trained.
    """
    for key in [key for key in config if key not in TAKEN]:
        if not _is_off(config[key]):
            hint = nearest(key, TAKEN)
            reason = REASONS.get(key) or f"a run does not take this key{hint if 'did you mean' in hint else ''}"
            raise UserError(f"{where}: {key} is set, but {reason}; remove it from the JSON")
        del config[key]  # DeepSpeed refuses some of these keys whatever their value
    zero = config.get("zero_optimization", {})
    for key, reason in ZERO_REASONS.items():
        if not _is_off(zero.pop(key, None)):
            raise UserError(f"{where}: zero_optimization.{key} is set, but {reason}; remove it from the JSON")
    for key in config.get("optimizer", {}).get("params", {}):
        if key not in OPTIMIZER_PARAMS:
            raise UserError(f"{where}: optimizer.params.{key} is set, but the run states the optimizer; remove it from the JSON")
    types = config.get("data_types", {})
    for key in types:
        if key != "grad_accum_dtype":
            raise UserError(f"{where}: data_types.{key} is set, but precision states the types; remove it from the JSON")
    if types.get("grad_accum_dtype") == "auto":
        del types["grad_accum_dtype"]
    for section in ("offload_optimizer", "offload_param"):
        # No NVMe drive: DeepSpeed does not give back the optimizer's state from there, and a checkpoint needs it.
        _choose(zero.get(section, {}), "device", ("cpu", "none"), f"{where}: zero_optimization.{section}")
    _choose(types, "grad_accum_dtype", ("fp32", "bf16"), f"{where}: data_types")
    _choose(config, "gradient_allreduce_op", ("mean",), where)  # a sum would grow with the number of ranks
    _choose(config, "log_level", ("debug", "info", "warning", "error", "critical"), where)
    for key in FLAGS:
        if config.get(key) == "auto":
            del config[key]
        _choose(config, key, (True, False), where)
    if config.get("steps_per_print") == "auto":
        del config["steps_per_print"]
    _check_number(config, "steps_per_print", 1, int, where)
    _check_number(config, "gradient_predivide_factor", 1e-6, (int, float), where)


def _choose(section: dict, key: str, allowed: tuple, where: str) -> None:
    if section.get(key) is not None and section[key] not in allowed:
        choices = " or ".join(map(json.dumps, allowed))
        raise UserError(f"{where}: {key} is {section[key]!r}: must be {choices}; or leave it out")


def _check_number(config: dict, key: str, low: float, kind: Any, where: str) -> None:
    value = config.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= 10**12):
        raise UserError(f"{where}: {key} is {value!r}: must be a {'whole ' * (kind is int)}number, {low} or more; or leave it out")


def ask_deepspeed(config: dict, where: str) -> None:
    """Let DeepSpeed read a completed configuration, so that a refusal comes before a model is loaded.

    Raises:
        UserError: DeepSpeed refuses the configuration.
    """
    config = copy.deepcopy(config)
    # DeepSpeed compares this key with the number of running ranks. The configuration may be for planned ranks.
    del config["train_batch_size"]
    silenced = logging.root.manager.disable
    # Nothing is trained here, so DeepSpeed's lines about its accelerator would only distract.
    logging.disable(logging.WARNING)
    try:
        from deepspeed.runtime.config import DeepSpeedConfig

        DeepSpeedConfig(config)
    except ImportError:
        raise
    except Exception as error:  # a wrong type may raise anything: TypeError, AttributeError, pydantic's errors, …
        raise UserError(f"{where}: DeepSpeed does not take it: {_first_error(error)}") from None
    finally:
        logging.disable(silenced)


def _first_error(error: Exception) -> str:
    from pydantic import ValidationError

    if isinstance(error, ValidationError) and (problems := error.errors()):  # its own text has several lines
        place = ".".join(map(str, problems[0].get("loc", ())))
        return f"{error.title}: {place} is {problems[0].get('input')!r}: {problems[0].get('msg')}"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _is_off(value: Any) -> bool:
    return value in (None, False, {}) or (isinstance(value, dict) and value.get("enabled") is False)
