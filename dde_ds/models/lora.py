"""LoRA: train two thin matrices B and A beside the matrix W of a layer (arXiv 2106.09685).

The layer then computes W x + (α/r) B A x. B begins at zero. So an untrained adapter adds exactly nothing, and with the
adapters switched off the UNet is its own base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dde_ds.errors import UserError
from dde_ds.files import sha256_of
from dde_ds.models.family import original_adapter_name, rename_adapters
from dde_ds.models.remembered import remembered
from dde_ds.untrusted import parse_json
from dde_ds.warn import reason

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

ADAPTER = "default"
_DOWN, _UP = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def add_adapters(unet: UNet2DConditionModel, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Put adapters beside the layers whose names end in one of ``targets``.

    Nothing else in the UNet is trained from then on.

    A is drawn from ``seed`` as in diffusers' own LoRA scripts: normal with variance 1/r². B is zero.

    Args:
        unet: changed in place.
        rank: r.
        alpha: α.
        targets: ends of names of layers.
        seed: selects A.

    Raises:
        UserError: peft is missing, or a target is not a layer that can have an adapter.
    """
    check_targets(unet, targets)
    from peft import LoraConfig

    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")  # pyright: ignore[reportArgumentType]  # α may be 0.5
        unet.add_adapter(options, ADAPTER)


def check_targets(unet: nn.Module, targets: Sequence[str]) -> None:
    """Refuse targets that :func:`add_adapters` could not use, without changing ``unet``.

    A UNet without weights will do.

    Raises:
        UserError: as :func:`add_adapters` raises.
    """
    if find_spec("peft") is None:
        raise UserError("lora is set, but peft is not installed: pip install -e '.[lora]'")
    for target in targets:
        layers = [layer for name, layer in unet.named_modules() if name == target or name.endswith(f".{target}")]
        if not layers or not all(isinstance(layer, (nn.Linear, nn.Conv2d)) for layer in layers):
            raise UserError(
                f"lora.targets names {target!r}: {'no linear layer or convolution' if layers else 'nothing'} in the UNet ends in it; "
                "to_q, to_k, to_v, to_out.0, ff.net.0.proj, ff.net.2, proj_in, proj_out, conv1 and conv2 are such names"
            )


def read_adapters(unet: nn.Module, file: str, rank: int, targets: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of each layer from a file with diffusers' or kohya's names. The file's α/r is multiplied into B.

    Args:
        unet: tells the layers' names and shapes. It may be without weights, and with or without adapters.
        rank, targets: as for :func:`add_adapters`; the file must have adapters of this rank for these layers, and nothing else.

    Raises:
        UserError: the file cannot be read, or does not agree with rank, targets or the UNet.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    if not Path(file).is_file() or not file.endswith(".safetensors"):
        raise UserError(
            f"lora.init {file}: must be a .safetensors file, such as export/pytorch_lora_weights.safetensors of a LoRA run"
        )
    try:
        with safe_open(file, "pt") as opened:
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            metadata = parse_json((opened.metadata() or {}).get("lora_adapter_metadata", "{}").encode())
        names = list(stored)
        renamed = rename_adapters(_without_alpha(stored), getattr(unet, "config", None))
    except Exception as error:  # diffusers raises many kinds on names that it does not know
        raise UserError(f"lora.init {file}: no LoRA of this model: {' '.join(str(error).split())[:300]}") from None
    tensors = {name: value.float() for name, value in renamed.items()}
    if not any(".lora_A." in name for name in tensors):
        tensors = convert_unet_state_dict_to_peft(tensors)
    layers = _layers(unet, targets)
    known = {f"unet.{name}.lora_{part}.weight" for name in layers for part in "AB"}
    other = sorted([name for name in tensors if name not in known] + [name for name in names if "dora_scale" in name])
    if other:
        raise UserError(
            f"lora.init {file}: {len(other)} of its {len(names)} tensors belong to no layer of lora.targets in the UNet ({', '.join(other[:3])}"
            f"{', …' if len(other) > 3 else ''}); name all layers that it has in lora.targets; text encoders are not trained"
        )
    if missing := sorted(known - tensors.keys()):
        raise UserError(
            f"lora.init {file}: lacks {len(missing)} of the {len(known)} tensors of lora.targets ({', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}); lora.targets must name the layers that it has"
        )
    alpha = _stated_alpha(file, metadata, rank)
    return {name: _checked(file, name, layer, tensors, rank, alpha) for name, layer in layers.items()}


def _without_alpha(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return kohya's tensors with each layer's α/r multiplied into its B, and without the α."""
    found = {name: value for name, value in stored.items() if not name.endswith(".alpha")}
    for layer in [name.removesuffix(".alpha") for name in stored.keys() - found.keys()]:
        up, rank = f"{layer}.lora_up.weight", len(stored[f"{layer}.lora_down.weight"])
        found[up] = stored[up].float() * (stored[f"{layer}.alpha"].item() / rank)
    return found


def _layers(unet: nn.Module, targets: Sequence[str]) -> dict[str, Any]:
    """Return the layers that have or would get adapters, by their names in the UNet."""
    return {
        name: getattr(layer, "base_layer", layer)
        for name, layer in unet.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    }


def _checked(file: str, name: str, layer: Any, tensors: dict[str, Tensor], rank: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Return A and B of one layer, with α/r in B, or refuse their shapes."""
    down, up = (tensors[f"unet.{name}.lora_{part}.weight"] for part in "AB")
    if len(down) != rank:
        raise UserError(f"lora.rank is {rank}: lora.init {file} has rank {len(down)} in {name}; set lora.rank to the file's")
    kernel = layer.weight.shape[2:]
    shapes = (rank, *layer.weight.shape[1:]), (len(layer.weight), rank, *(1 for _ in kernel))
    if (tuple(down.shape), tuple(up.shape)) != shapes:
        raise UserError(
            f"lora.init {file}: {name} has shapes {tuple(down.shape)} and {tuple(up.shape)}, this UNet needs {shapes[0]} and {shapes[1]}"
        )
    if not (down.isfinite().all() and up.isfinite().all()):
        raise UserError(f"lora.init {file}: {name} holds NaN or infinity")
    return down, up * (alpha / rank)


def _stated_alpha(file: str, metadata: dict, rank: int) -> float:
    """Return the α that diffusers' metadata state, or r."""
    if metadata.get("unet.alpha_pattern") or metadata.get("unet.rank_pattern"):
        raise UserError(f"lora.init {file}: has layers of several ranks or α; give all one rank")
    return float(metadata.get("unet.lora_alpha", rank))


@torch.no_grad()
def set_adapters(unet: nn.Module, adapters: dict[str, tuple[Tensor, Tensor]], scale: float) -> None:
    """Give adapters that :func:`add_adapters` made the values of :func:`read_adapters`.

    Args:
        scale: α/r of the UNet's adapters. B is divided by it, so that the model is that of the file whatever its α.
    """
    parameters = dict(unet.named_parameters())
    for name, (down, up) in adapters.items():
        parameters[name + _DOWN].copy_(down)
        parameters[name + _UP].copy_(up / scale)


def adapters_digest(file: str) -> str:
    """Return the SHA-256 of a file of adapters. It is read once and remembered.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return remembered("adapters", [Path(file)], lambda: [sha256_of(Path(file))])[0]
    except OSError as error:
        raise UserError(f"lora.init {file}: {reason(error).lower()}") from None


def differences(adapters: dict[str, Tensor], scale: float) -> Iterator[tuple[str, Tensor]]:
    """Yield, for each adapter, the name of the weight that it is added to and the matrix (α/r) B A.

    The matrices are as large as the layers, so they are made one at a time. A convolution's B is 1×1, and its A has the
    kernel. Flattened, they multiply like those of a linear layer.

    Args:
        adapters: trained parameters, float32, by their names in the UNet with adapters.
        scale: α/r.
    """
    for layer in [name.removesuffix(_UP) for name in adapters if name.endswith(_UP)]:
        yield f"{layer}.weight", scale * (adapters[layer + _UP].flatten(1) @ adapters[layer + _DOWN].flatten(1))


def to_file(adapters: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return adapters under the names that ``load_lora_weights`` and other tools read.

    The scale is multiplied into B. Tools that find no α in a file assume α = r, and would silently load adapters of
    another strength.

    Args:
        adapters: trained parameters, by their names in the UNet with adapters.
        scale: α/r.
    """
    return {
        name.replace(f".{ADAPTER}.weight", ".weight"): value * scale if name.endswith(_UP) else value
        for name, value in adapters.items()
    }


def to_kohya(adapters: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return adapters under the names of kohya's sd-scripts, each with its α. Most programs other than diffusers read
    these names.

    B is stored as it was trained: all readers of this layout multiply by α/r, where r is A's number of rows.
    """
    from diffusers.utils import convert_state_dict_to_kohya

    renamed = convert_state_dict_to_kohya({f"unet.{name.replace(f'.{ADAPTER}.', '.')}": value for name, value in adapters.items()})
    renamed = {original_adapter_name(name): value for name, value in renamed.items()}
    return renamed | {name: torch.tensor(float(alpha)) for name in renamed if name.endswith(".alpha")}
