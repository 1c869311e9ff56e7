"""Write a policy, or a checkpoint of one, as files that other programs load: a diffusers folder, LoRA weights, or a single file."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn

from dde_ds import __version__
from dde_ds.config import RunConfig
from dde_ds.engine.checkpoint import WeightReader, read_state
from dde_ds.engine.modelspec import kohya_metadata, modelspec, predicts_velocity
from dde_ds.engine.single_file import prediction_keys, to_single_file
from dde_ds.engine.state import EMA, WEIGHT, gather, moments
from dde_ds.errors import UserError
from dde_ds.files import follow_umask, publish, put_in_place, save_tensors, staged_path, sync
from dde_ds.models import lora
from dde_ds.models.base import family_of
from dde_ds.models.family import save_adapters
from dde_ds.models.optional import load_optional
from dde_ds.models.parts import load_pipeline
from dde_ds.models.unet import DTYPES, load_scheduler_config, load_unet

FORMATS = ("folder", "lora", "kohya", "single")
LORA_FILE = "pytorch_lora_weights.safetensors"
"""The file that ``load_lora_weights(folder)`` looks for."""
KOHYA_FILE = "lora_kohya.safetensors"
"""The file of the same adapters for programs other than diffusers."""
SHOWN = (
    *("loss", "rewards/accuracies", "drift/chosen", "drift/rejected", "drift/path_kl"),
    *("dde/saturated_learnt", "dde/saturated_wrong"),
)
"""Metrics of the last row that a model card shows, beside all metrics of the held-out pairs."""


def export_policy(policy: Any, run: RunConfig, step: int, metrics: dict, target: Path) -> None:
    """Write the policy as a complete diffusers pipeline in the run's precision. Collective.

    If the run keeps a moving average of the weights, the average is written.

    Raises:
        UserError: a weight that is not finite, a base that cannot be loaded, or a disk that cannot be written. Raised on all
            ranks.
    """
    kind = EMA if run.ema and EMA in moments(policy) else WEIGHT  # the average begins with the first step that is made
    trained = {}
    for name, tensors in gather(policy, [kind]):  # saved directly, a module sharded by ZeRO-3 would silently give empty tensors
        if dist.get_rank() == 0:
            trained[name] = tensors[kind].cpu()
    problem = [None]
    if dist.get_rank() == 0:
        try:
            _write_folder(trained, DTYPES[run.precision], run, model_card(run, step, metrics, kind), target)
        except UserError as error:  # raised on all ranks below: the others would wait for this one
            problem = [str(error)]
    dist.broadcast_object_list(problem, 0)
    if problem[0]:
        raise UserError(problem[0])


def export_checkpoint(
    checkpoint: Path,
    run: RunConfig,
    metrics: dict,
    target: Path,
    dtype: str,
    form: str = "folder",
    raw: bool = False,
    max_shard_size: str | None = None,
) -> None:
    """Write a checkpoint's float32 weights as files that other programs load, in one process and without a GPU.

    Args:
        metrics: the last numbers that the run logged, for the model card.
        target: the folder or file to write.
        dtype: type of the exported weights, a key of ``DTYPES``.
        form: one of ``FORMATS``.
        raw: export the weights themselves, even if the run keeps a moving average of them.
        max_shard_size: largest size of a weight file in the folder, such as ``5GB``. None takes diffusers' default.

    Raises:
        UserError: an unknown dtype or form, a target that exists, a checkpoint of another model, or a weight that is not
            finite.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: must be one of {', '.join(DTYPES)}")
    if form not in FORMATS:
        raise UserError(f"format {form}: must be one of {', '.join(FORMATS)}")
    if form in ("lora", "kohya") and not run.lora:
        raise UserError(f"format {form}: this run trained parameters of the UNet and has no adapters; choose folder or single")
    if form in ("kohya", "single") and target.suffix != ".safetensors":
        raise UserError(f"output {target}: format {form} writes one file; give it a name that ends in .safetensors")
    if max_shard_size and not re.fullmatch(r"\d+[KMG]B", max_shard_size):
        raise UserError(f"max_shard_size {max_shard_size}: expected a size such as 500MB or 5GB")
    if target.exists():
        raise UserError(f"output {target}: exists already; choose another name")
    reader, kind = WeightReader(checkpoint), EMA if run.ema and not raw else WEIGHT
    trained = {name.removesuffix(f"/{kind}"): reader.read(name) for name in reader.names if name.endswith(f"/{kind}")}
    if not trained:
        raise UserError(f"checkpoint {checkpoint}: holds no moving average of the weights; export them with --raw")
    card = model_card(run, read_state(checkpoint)["step"], metrics, kind, form)
    if form == "folder":
        _write_folder(trained, DTYPES[dtype], run, card, target, max_shard_size)
    elif form == "lora":
        _in_place(target, card, lambda staging: _write_lora(trained, DTYPES[dtype], run, staging))
    elif form == "kohya":
        _write_file(target, *_kohya(trained, DTYPES[dtype], run), card)
    else:
        _write_single(trained, DTYPES[dtype], run, card, target)


def trained_unet(trained: dict[str, Tensor], run: RunConfig) -> Any:
    """Return the base's UNet, float32, with the trained weights in it. Adapters are merged into the weights of their layers.

    Raises:
        UserError: the base lacks a parameter that was trained.
    """
    unet = load_unet(run.model.path, run.model.revision, variant=run.model.variant)
    weights = unet.state_dict()  # these share memory with the UNet
    for name, value in lora.differences(trained, run.lora.scale) if run.lora else trained.items():
        if name not in weights:
            raise UserError(f"model.path {run.model.path}: has no {name} in its UNet, which was trained: not the base of this run")
        if run.lora:
            weights[name] += value.view_as(weights[name])
        else:
            weights[name].copy_(value)
    return unet


def _pipeline(trained: dict[str, Tensor], dtype: torch.dtype, run: RunConfig) -> Any:
    """Return the base's pipeline with the trained UNet in ``dtype`` and its other parts in float32.

    Optional parts that cannot be read are left out. A printed line names each of them.
    """
    base = run.model.path, run.model.revision, run.model.variant
    optional, reasons = load_optional(*base)
    for part, reason in reasons.items():
        print(f"export: the {part.replace('_', ' ')} of the base is left out: {reason}", flush=True)
    if reasons.keys() & {"safety_checker"}:
        optional["requires_safety_checker"] = False
    return load_pipeline(*base, unet=trained_unet(trained, run).to(dtype), **optional)


def _write_folder(
    trained: dict[str, Tensor], dtype: torch.dtype, run: RunConfig, card: str, target: Path, max_shard_size: str | None = None
) -> None:
    """Write a folder with the trained UNet and the base's other parts. A LoRA run's adapters go into files beside them, for the
    base model.

    The UNet is stored in ``dtype``, the other parts in float32. A plain ``from_pretrained(folder)`` then works. With text
    encoders stored in half precision, that call would mix types.
    """
    pipeline = _pipeline(trained, dtype, run)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            require_finite({f"{name}.{key}": value for key, value in part.state_dict().items()})

    def write(staging: Path) -> None:
        pipeline.save_pretrained(staging, safe_serialization=True, max_shard_size=max_shard_size)
        if run.lora:
            _write_lora(trained, dtype, run, staging)

    _in_place(target, card, write)


def _write_lora(trained: dict[str, Tensor], dtype: torch.dtype, run: RunConfig, folder: Path) -> None:
    """Write the adapters twice: for diffusers, and for other programs."""
    assert run.lora is not None
    layers = {name: value.to(dtype).contiguous() for name, value in lora.to_file(trained, run.lora.scale).items()}
    require_finite(layers)
    kohya_layers, metadata = _kohya(trained, dtype, run)
    save_adapters(layers, folder, LORA_FILE)
    save_tensors(kohya_layers, folder / KOHYA_FILE, {"format": "pt"} | metadata)


def _kohya(trained: dict[str, Tensor], dtype: torch.dtype, run: RunConfig) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of the adapters' file for other programs. α stays float32, since bfloat16 has 8 significant
    bits."""
    assert run.lora is not None
    try:
        metadata = kohya_metadata(run)
    except UserError as error:  # adapters can be exported without their base
        print(f"warning: the adapters' file does not say which models it is for: {error}", flush=True)
        metadata = {}
    layers = lora.to_kohya({name: value.to(dtype).contiguous() for name, value in trained.items()}, run.lora.alpha_or_rank)
    require_finite(layers)
    return layers, metadata


def _write_single(trained: dict[str, Tensor], dtype: torch.dtype, run: RunConfig, card: str, target: Path) -> None:
    """Write one file in the layout of the original Stable Diffusion code.

    All tensors are in ``dtype``, since programs that read such a file expect one type.
    """
    family = family_of(run.model.path, run.model.revision)
    weights = to_single_file(_pipeline(trained, dtype, run), family)
    scheduler = load_scheduler_config(run.model.path, run.model.revision)
    if family.velocity_keys:
        weights |= prediction_keys(scheduler)
    elif predicts_velocity(scheduler):
        print(f"warning: this model predicts v; {family.velocity_warning}")
    weights = {name: value.to(dtype).contiguous() for name, value in weights.items()}
    require_finite(weights)
    _write_file(target, weights, modelspec(run), card)


def _write_file(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str], card: str) -> None:
    """Write one safetensors file. It appears under its name only when it is whole."""
    staged = staged_path(target)
    try:
        staged.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, staged, {"format": "pt", "model_card": card} | metadata)
        sync(staged)
        put_in_place(staged, target)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise _unwritable(target, error) from None


def _in_place(target: Path, card: str, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder, and add the model card. The folder appears under its name only when it is whole."""
    staging = target.with_name(f".{target.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        write(staging)
        follow_umask(*staging.rglob("*.safetensors"))  # diffusers wrote them readable for their owner alone
        (staging / "README.md").write_text(card, encoding="utf-8")
        publish(staging, target)
    except (OSError, SafetensorError) as error:
        raise _unwritable(target, error) from None


def _unwritable(target: Path, error: Exception) -> UserError:
    return UserError(
        f"export {target}: not writable: {' '.join(str(error).split())}; the checkpoint is as it was: mend it, then dde-ds export"
    )


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that hold NaN or infinity, before anything is written.

    Raises:
        UserError: the message names the first bad tensors and says how many there are.
    """
    bad = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if bad:
        named = ", ".join(bad[:3]) + (", …" if len(bad) > 3 else "")
        narrow = any(tensors[name].dtype == torch.float16 for name in bad)
        raise UserError(
            f"export: {len(bad)} of {len(tensors)} tensors hold NaN or infinity ({named}); nothing was exported: "
            + ("fp16 ends at 65,504, choose --dtype bf16 or fp32, or " if narrow else "")
            + "export an older checkpoint, and train on with a lower optimizer.learning_rate"
        )


def model_card(run: RunConfig, step: int, metrics: dict, kind: str, form: str = "folder") -> str:
    """Return the text of a model card: base, pairs, objective, settings, and the last numbers that the run logged.

    Args:
        kind: which weights were exported, ``EMA`` or ``WEIGHT``.
        form: which files lie beside the card, one of ``FORMATS``.
    """
    head = {
        **({"base_model": run.model.path} if is_hub_id(run.model.path) else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["preference-alignment", *(["lora"] if run.lora else [])],
    }
    settings = {
        "base model": run.model.path + (f" at {run.model.revision}" if run.model.revision else ""),
        "preference pairs": run.data.name,
        "objective": f"{run.objective.name}, β = {run.objective.beta:g}",
        "optimizer steps": f"{step} of {run.batch.pairs} pairs",
        "learning rate": f"{run.optimizer.learning_rate:g}",
        "precision": run.precision,
        "seed": run.seed,
        **({"weights": f"moving average of decay {run.ema.decay:g}"} if run.ema and kind == EMA else {}),
        **({"trained part": _trained_part(run)} if run.model.trainable != "all" else {}),
        **(
            {"LoRA": f"rank {run.lora.rank}, α {run.lora.alpha_or_rank:g}, on {', '.join(run.lora.targets)}{_begun(run)}"}
            if run.lora
            else {}
        ),
        "trained with": f"dde_ds {__version__}",
    }
    numbers = {
        name: f"{value:.4g}"
        for name, value in metrics.items()
        if isinstance(value, int | float) and (name in SHOWN or name.startswith("eval/"))
    }
    paper = "pairs of a preferred and a rejected image (Denoised Distribution Estimation and its baselines, arXiv 2411.14871)"
    if form in ("folder", "single"):
        part = "" if run.model.trainable == "all" else f"A part of the UNet, {_trained_part(run)}, "
        what = f"{part or 'The UNet '}was trained on {paper}; all other parts are the base model's, and so is its licence."
    else:
        what = f"Adapters of the UNet, trained on {paper}. They need the base model, whose licence holds for them too."
    if run.lora and form in ("folder", "lora"):
        what += f"\n\nThe adapters are in `{LORA_FILE}`, for `load_lora_weights` on the base model, and in `{KOHYA_FILE}` for other programs."
        what += " The UNet beside them has them merged already." if form == "folder" else ""
    rows = "\n".join(f"| {name} | {value} |" for name, value in (settings | numbers).items())
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {run.model.path}, aligned with preference pairs\n\n"
        f"{what}\n\n| | |\n| --- | --- |\n{rows}\n"
    )


def _begun(run: RunConfig) -> str:
    """Return the adapters that a LoRA run began with, for the model card."""
    return f", begun with {run.lora.init}" if run.lora and run.lora.init else ""


def _trained_part(run: RunConfig) -> str:
    """Return ``model.trainable`` for a table in Markdown, where a bare ``*`` would be emphasis."""
    patterns = run.model.trainable
    return patterns.replace("_", " ") if isinstance(patterns, str) else ", ".join(f"`{pattern}`" for pattern in patterns)


def is_hub_id(path: str) -> bool:
    """Return whether ``model.path`` names a repository of the Hugging Face hub. The hub refuses cards with any other base."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return not Path(path).exists()
