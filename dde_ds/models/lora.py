"""LoRA: train two thin matrices B and A beside the matrix W of a layer (arXiv 2106.09685).

The layer then computes W x + (α/r) B A x. B begins at zero. So an untrained adapter adds exactly nothing, and with the
adapters switched off the UNet is its own base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dde_ds.errors import UserError
from dde_ds.models.family import original_adapter_name

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
