"""Choose how much of a UNet's forward pass is kept for the backward pass: memory against time.

The unit is the block that diffusers checkpoints: a ResNet block or a transformer block. Each mode keeps some of the
tensors of a block that autograd needs, and computes the others again:

    mode        what is kept                                                                   work that is done twice
    none        all                                                                            none
    selective   outputs of matrix products, convolutions and attention; norms, activations     almost none
                and sums are cheap and computed again
    every_K     all, in every K-th block; the other blocks are computed again as in full       (1 - 1/K) of full's
    full        the inputs of the block; the whole block is computed again                     a forward pass of the policy

The gradients are those of ``none`` in every mode.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dde_ds.models.family import BLOCKS, load_class

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_ATEN = torch.ops.aten
# The operators that do nearly all of a UNet's FLOPs: linear layers, convolutions, and the kernels behind
# scaled_dot_product_attention. The choice among these kernels depends on device, type and shape. Attention without any
# of them is two batched products.
KEPT = {
    *(_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default),
    _ATEN.convolution.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_fused_attention_overrideable.default,
}


def set_checkpointing(unet: UNet2DConditionModel, mode: str) -> None:
    """Choose what a UNet keeps of a forward pass. It may be called again with another mode.

    Args:
        unet: changed in place.
        mode: ``none``, ``selective``, ``every_K`` with K ≥ 2, or ``full``.

    Raises:
        ValueError: the mode does not exist.
    """
    every = re.fullmatch(r"every_([2-9]|[1-9]\d+)", mode)
    if every:
        step = int(every[1])
        unet.enable_gradient_checkpointing(partial(_recompute, {id(block) for block in blocks(unet)[step - 1 :: step]}))
    elif mode == "full":
        unet.enable_gradient_checkpointing(partial(_recompute, set()))
    elif mode == "selective":
        unet.enable_gradient_checkpointing(_selective)
    elif mode == "none":
        unet.disable_gradient_checkpointing()
    else:
        raise ValueError(f"gradient checkpointing {mode!r}: must be none, selective, every_2, every_3, … or full")


def is_selective(unet: torch.nn.Module) -> bool:
    """Return whether ``unet``, of any class, was set to ``selective``."""
    return any(
        getattr(module, "gradient_checkpointing", False) and module._gradient_checkpointing_func is _selective
        for module in unet.modules()
    )


def blocks(unet: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the ResNet and transformer blocks, in the order in which the UNet registers them."""
    kinds = tuple(map(load_class, BLOCKS))
    return [module for module in unet.modules() if isinstance(module, kinds)]


def _recompute(whole: set[int], block: torch.nn.Module, *args):
    """Run a block, and keep only its inputs unless its id is in ``whole``."""
    # Checkpoint the module instead of its forward: ZeRO-3 gathers the weights in hooks, which then run again with the
    # block.
    return block(*args) if id(block) in whole else checkpoint(block, *args, use_reentrant=False)


def _selective(block: torch.nn.Module, *args):
    """Run a block, and keep only the outputs of the operators in :data:`KEPT`."""
    if getattr(torch.nn.functional.linear, "__module__", None) == "deepspeed.runtime.zero.linear":
        raise RuntimeError(
            "selective checkpointing would give wrong gradients with the linear layers that DeepSpeed has put in place of PyTorch's: "
            "set zero_optimization.memory_efficient_linear to false wherever ZeRO-3 is used in this process"
        )
    # The compiler decides by itself what to keep, and what is cheaper to compute again.
    if block._compiled_call_impl is not None:
        return block(*args)
    return checkpoint(block, *args, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _keep))


def _keep(context, operator, *args, **kwargs) -> CheckpointPolicy:
    """Return whether the output of an operator is kept."""
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
