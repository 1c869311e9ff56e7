"""DeepSpeed engines: a ZeRO policy that trains, and a reference that only ever predicts."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from dde_ds.config import RunConfig
from dde_ds.engine import accepted, adamw8bit
from dde_ds.engine.reference import NO_TIMER, reference_config, resolve_placement
from dde_ds.errors import UserError
from dde_ds.models.checkpointing import is_selective
from dde_ds.shape import described
from dde_ds.shipped import deepspeed_file, deepspeed_names
from dde_ds.untrusted import read_json
from dde_ds.warn import reason

# Sections of a DeepSpeed configuration that the code below reads, each with an example. Each must be an object or absent. A parent
# comes before the sections inside it.
SECTIONS = {
    "zero_optimization": {"stage": 2},
    "zero_optimization.offload_optimizer": {"device": "cpu"},
    "zero_optimization.offload_param": {"device": "cpu"},
    "optimizer": {"type": "AdamW"},
    "optimizer.params": {"lr": 1e-5},
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "torch_autocast": {"enabled": False},
}
# Keys of zero_optimization that are counted in elements, except the last one, which is counted in ranks.
SIZES = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "zero_hpz_partition_size",
)
BUCKET = 500_000_000
"""Size of DeepSpeed's buckets, in elements, if a configuration does not set it."""


def initialize(
    policy: torch.nn.Module,
    reference: torch.nn.Module | None,
    config: dict | str | Path,
    *,
    reference_placement: str = "auto",
    reference_dtype: str = "policy",
) -> tuple[Any, Any | None]:
    """Build DeepSpeed engines for a policy and its frozen reference, from one DeepSpeed configuration.

    The process group is joined first if this has not happened yet. The reference gets no optimizer and no gradients. By
    default it has the policy's precision. Both models then round in the same places, and the first loss is log 2.

    Args:
        policy: the UNet to train. All of its parameters that require gradients are trained.
        reference: another copy of the UNet, or None for an objective without a reference.
        config: a DeepSpeed configuration, as a dict, the path of its JSON, or the name of a shipped file such as ``zero2``.
        reference_placement: ``replicated``, ``sharded`` or ``cpu``, see :mod:`dde_ds.engine.reference`. ``auto`` shards the
            reference beside a ZeRO-3 policy. If that policy's weights are offloaded to the CPU, ``auto`` also keeps the
            reference's shards there. Beside any other policy, ``auto`` replicates the reference.
        reference_dtype: ``policy``, ``bf16`` or ``fp32``.

    Returns:
        (policy engine, reference engine or None).

    Raises:
        UserError: the configuration is not readable or contradicts the models, policy and reference are one module, or
            DeepSpeed is too old.
    """
    if policy is reference:
        raise UserError("initialize(): policy and reference are the same module; load the reference a second time")
    config = read_config(config)
    # Refuse wrong settings of the reference before the policy takes its minutes.
    if reference is not None:
        reference_config(config, reference_placement, reference_dtype)
    engine = initialize_policy(policy, config)
    if reference is None:
        return engine, None
    return engine, initialize_reference(reference, config, reference_placement, reference_dtype)


def initialize_policy(policy: torch.nn.Module, config: dict) -> Any:
    """Build the policy's engine: the first half of :func:`initialize`.

    Load the reference after this call, so that host memory never holds two full UNets on their way to a GPU.

    Raises:
        UserError: as :func:`initialize`.
    """
    import deepspeed

    from dde_ds.distributed import group

    group.check_deepspeed()
    config = copy.deepcopy(config)
    if not torch.distributed.is_initialized():
        group.start()
    _refuse_autocast(config)
    _take_torch_adam(config)
    _keep_linear(config, is_selective(policy))
    config.setdefault("timers", {}).setdefault("throughput", dict(NO_TIMER))
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    zero = config.get("zero_optimization", {})
    if not all(parameter.requires_grad for parameter in policy.parameters()):
        # DeepSpeed reduces a leaf module's gradients as soon as the gradients of its inputs exist. The first block with adapters
        # has no gradients of inputs, since nothing before it is trained. DeepSpeed would reduce its weights' gradients before they
        # are computed.
        zero.pop("leaf_module", None)
    if zero.get("stage"):
        # Parameters that zero.Init has partitioned keep their full size in ds_numel.
        trained = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
        zero["reduce_bucket_size"] = bucket_elements(zero, trained)
    optimizer = adamw8bit.client_optimizer(config)
    engine, *_ = deepspeed.initialize(
        model=policy.train(),
        model_parameters=parameters,  # pyright: ignore[reportArgumentType]  # takes any iterable of parameters
        config=config,
        optimizer=optimizer,
    )
    return engine


def check_engine(config: dict, trained: int | None, ranks: int, selective: bool) -> None:
    """Refuse a configuration that :func:`initialize_policy` would refuse, before models are loaded.

    Args:
        config: a configuration that :func:`complete_config` made.
        trained: number of trained elements; None if they are too few to matter.
        selective: whether gradient checkpointing is known to be selective.

    Raises:
        UserError: a section that the run cannot have, a missing package or compiler, or too many trained elements for 8-bit
            AdamW.
    """
    config = copy.deepcopy(config)
    _refuse_autocast(config)
    _take_torch_adam(config)
    _keep_linear(config, selective)
    if adamw8bit.client_optimizer(config) and trained:
        adamw8bit.check_partition(trained, ranks)


def initialize_reference(reference: torch.nn.Module, config: dict, placement: str = "auto", dtype: str = "policy") -> Any:
    """Build the reference's engine: the second half of :func:`initialize`, with the same configuration."""
    import deepspeed

    reference.requires_grad_(False).eval()
    engine, *_ = deepspeed.initialize(model=reference, config=reference_config(config, placement, dtype))
    engine.module.eval()  # pyright: ignore[reportAttributeAccessIssue]  # PyTorch's type hint says that it may be a tensor
    return engine


def bucket_elements(zero: dict, trained: int) -> int:
    """Return the number of elements in a bucket for the reduction of gradients, at most ``trained``.

    DeepSpeed allocates the configured size, even if there are fewer gradients.
    """
    return min(zero.get("reduce_bucket_size", BUCKET), trained)


def offloads_optimizer(config: dict) -> bool:
    """Return whether a configuration keeps the optimizer's state off the device."""
    return config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"


def _take_torch_adam(config: dict) -> None:
    """Choose PyTorch's fused AdamW.

    DeepSpeed would first compile its own AdamW for the same update. That takes over a minute, and a CUDA toolkit.

    An offloaded optimizer needs DeepSpeed's AdamW, which runs on the CPU. The first run compiles it once.

    Raises:
        UserError: the optimizer is offloaded, and the compiler is missing.
    """
    optimizer = config.get("optimizer", {})
    if offloads_optimizer(config):
        missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
        if missing:
            raise UserError(
                f"deepspeed zero_optimization.offload_optimizer: {' and '.join(missing)} not found: DeepSpeed compiles its optimizer for the "
                "CPU; install them, or take a file without offload"
            )
    elif optimizer.get("type") in ("Adam", "AdamW"):
        parameters = optimizer.setdefault("params", {})
        if parameters.setdefault("torch_adam", True):
            parameters.setdefault("fused", True)  # one pass over the weights, on a CPU as well


def _refuse_autocast(config: dict) -> None:
    if config.get("torch_autocast", {}).get("enabled"):
        raise UserError("deepspeed torch_autocast is enabled: it would cast the policy and not the reference; use bf16")


def _keep_linear(config: dict, selective: bool) -> None:
    """Keep PyTorch's own linear layers at stage 3. By default DeepSpeed would replace them in the whole process.

    DeepSpeed's layers multiply and then add the bias, which in bfloat16 rounds twice. A run's numbers would depend on its
    stage. The layers also add the bias in place, to the tensor that selective checkpointing has kept. When a block is computed
    again, the bias would be added a second time, and the gradients would silently be wrong.

    DeepSpeed's layers exist so that gathered weights need not be kept until the backward pass. Checkpointing achieves that as
    well.

    Raises:
        UserError: the configuration asks for DeepSpeed's layers, and checkpointing is selective.
    """
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and zero.setdefault("memory_efficient_linear", False) and selective:
        raise UserError(
            "deepspeed zero_optimization.memory_efficient_linear is true, but model.gradient_checkpointing is selective, which needs "
            "PyTorch's own; remove it from the JSON"
        )


def read_config(config: dict | str | Path) -> dict:
    """Read a DeepSpeed configuration into a new dict, and check the types of the sections that the code here reads.

    Sizes become integers, and most sizes of ``"auto"`` are removed: see :func:`_check_sizes`.

    Raises:
        UserError: a file that cannot be read, a section that is no object, or a size that is no valid number.
    """
    if isinstance(config, dict):
        values, where = copy.deepcopy(config), "deepspeed configuration"
    else:
        where = f"deepspeed {config}"
        try:
            values = read_json(deepspeed_file(config), unique_keys=True)
        except FileNotFoundError:
            raise UserError(f"{where}: no such file; shipped are {', '.join(deepspeed_names())}") from None
        except OSError as error:
            raise UserError(f"{where}: {reason(error).lower()}") from None
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON: {error}") from None
    _check_sections(values, where)
    _check_sizes(values.get("zero_optimization", {}), where)
    return values


def _check_sections(config: Any, where: str) -> None:
    """Refuse sections that are no objects. DeepSpeed takes some of them as a bare value, and answers others with a traceback."""
    if not isinstance(config, dict):
        raise UserError(f'{where}: is {described(config)}: must be an object, such as {{"zero_optimization": {{"stage": 2}}}}')
    for dotted, example in SECTIONS.items():
        value = config
        for key in dotted.split("."):
            value = value.get(key, {})
        if not isinstance(value, dict):
            raise UserError(f"{where}: {dotted} is {value!r}: must be an object, such as {json.dumps(example)}; or leave it out")


def _check_sizes(zero: dict, where: str) -> None:
    """Normalise sizes in place: 5e8 becomes an integer, and ``"auto"`` is removed.

    Files for other trainers contain ``"auto"``. DeepSpeed does not understand it, and uses its default if a key is missing.

    Raises:
        UserError: a size that is no valid number.
    """
    for key in [key for key in SIZES if key in zero]:
        value, wrong = zero[key], None
        if value == "auto":
            if key != "zero_hpz_partition_size":  # complete_config fills in the ranks of a node
                del zero[key]
            continue
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or value < 0:
            wrong = "a whole number, 0 or more"
        elif key == "reduce_bucket_size" and value < 1:
            wrong = "1 or more"
        elif key == "allgather_bucket_size" and value % 2:
            wrong = "even"
        if wrong:
            raise UserError(f"{where}: zero_optimization.{key} is {value!r}: must be {wrong}; or leave it out")
        zero[key] = int(value)


def complete_config(run: RunConfig, world: int, local_world_size: int | None = None) -> dict:
    """Return the run's DeepSpeed configuration, completed with what the run configuration states.

    Args:
        world: number of ranks.
        local_world_size: ranks on each node, for a file that shards within nodes. None assumes that all ranks are on one node.

    Raises:
        UserError: the JSON contradicts the run configuration (the message names both keys), or sets a key or value that the
            run or DeepSpeed does not take.
    """
    config = read_config(run.deepspeed)
    accepted.check_accepted(config, f"deepspeed {run.deepspeed}")
    _check_stage(run, config)
    zero = config["zero_optimization"]
    accumulation = run.batch.accumulation(world)
    stated = {
        "train_batch_size": (run.batch.pairs, "batch.pairs"),
        "train_micro_batch_size_per_gpu": (run.batch.micro_batch_size, "batch.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation, f"batch.pairs / ({world} ranks × batch.micro_batch_size)"),
        "gradient_clipping": (run.optimizer.max_grad_norm, "optimizer.max_grad_norm"),
        "bf16.enabled": (run.precision == "bf16", "precision"),
        # With both keys on, DeepSpeed skips a step with a bad gradient at stages 1 to 3, in either precision.
        "bf16.check_grad_overflow": (True, "guards"),
        "zero_optimization.compute_grad_norm": (True, "guards"),
        "fp16.enabled": (False, "precision"),
        "optimizer.type": (adamw8bit.TYPE if run.optimizer.type == "adamw_8bit" else "AdamW", "optimizer.type"),
        "optimizer.params.lr": (run.optimizer.learning_rate, "optimizer.learning_rate"),
        "optimizer.params.betas": (list(run.optimizer.betas), "optimizer.betas"),
        "optimizer.params.eps": (run.optimizer.eps, "optimizer.eps"),
        "optimizer.params.weight_decay": (run.optimizer.weight_decay, "optimizer.weight_decay"),
    }
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
        place[leaf] = value  # equal is not enough: 8.0 == 8 and true == 1
    if "zero_hpz_partition_size" in zero:
        node = local_world_size or world
        if zero["zero_hpz_partition_size"] == "auto":
            zero["zero_hpz_partition_size"] = node
        if not zero["zero_hpz_partition_size"] or world % zero["zero_hpz_partition_size"]:
            raise UserError(
                f"{run.deepspeed}: zero_optimization.zero_hpz_partition_size is {zero['zero_hpz_partition_size']}: must divide the {world} "
                'ranks; "auto" takes the ranks of a node'
            )
    if world == 1:
        _leave_out_reduction(zero, run.precision)
    if run.precision == "fp32":
        # These types are for mixed precision; in fp32 they would contradict it.
        config.pop("data_types", None)
    else:  # DeepSpeed's default is to sum in the model's own type, where late terms are lost
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    accepted.ask_deepspeed(config, f"deepspeed {run.deepspeed}")
    return config


def _leave_out_reduction(zero: dict, precision: str) -> None:
    """Set the keys with which a single rank copies and waits least.

    A single rank has nothing to reduce, but DeepSpeed still goes through the whole reduction. In bfloat16, gradients are added
    to their float32 sums directly from a contiguous bucket. In float32, they would be copied from the bucket into one more
    buffer. Both buffers would be allocated anew in each micro-batch.

    With offload the keys stay as they are, since the same streams carry gradients to the host.
    """
    if zero["stage"] in (1, 2) and not offloads_optimizer({"zero_optimization": zero}):
        zero |= {"overlap_comm": False, "reduce_scatter": False, "contiguous_gradients": precision == "bf16"}


def _check_stage(run: RunConfig, config: dict) -> None:
    """Refuse a ZeRO stage, or a setting beside it, that the run cannot train with."""
    zero = config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise UserError(f"{run.deepspeed}: zero_optimization.stage is {stage}: must be 0, 1, 2 or 3")
    if stage == 0 and run.precision == "bf16":
        raise UserError(
            f"{run.deepspeed}: zero_optimization.stage is 0, where DeepSpeed sums gradients in bf16, but precision is bf16; take "
            "ds_configs/zero1.json, which sums in float32"
        )
    if stage == 3 and run.model.compile:
        raise UserError(
            f"{run.deepspeed}: zero_optimization.stage is 3, whose weights come and go between a compiled block's operations, but "
            "model.compile is true; take stage 1 or 2, or set it to false"
        )
    placement = resolve_placement(zero, run.reference.placement)
    if run.model.compile and placement != "replicated" and not run.lora:
        raise UserError(
            f"reference.placement is {placement}, whose weights come and go between a compiled block's operations, but model.compile is true; "
            "set reference.placement to replicated, or model.compile to false"
        )
    if zero.get("compute_grad_norm") is False:
        raise UserError(f"{run.deepspeed}: zero_optimization.compute_grad_norm is false, but a run watches the norm; remove it")
    if zero.get("round_robin_gradients"):
        raise UserError(
            f"{run.deepspeed}: zero_optimization.round_robin_gradients is true, with which DeepSpeed takes one parameter's float32 weights for "
            "another's: checkpoints would be wrong; set it to false"
        )
    if config.get("managed_gradient_accumulation") is False:
        raise UserError(
            f"{run.deepspeed}: managed_gradient_accumulation is false, but batch.pairs states the accumulation; remove it"
        )
