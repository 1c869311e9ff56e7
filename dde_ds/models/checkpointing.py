"""How much of a UNet's forward pass is kept for the backward one: memory against time.

The unit is what diffusers checkpoints: a ResNet block or a transformer block. For each mode, of a block's tensors that autograd wants:

    none        all stay                                                                       no work is done twice
    selective   outputs of matrix products, convolutions and attention stay; norms,            almost none
                activations and sums, which are cheap, are computed again
    every_K     all blocks but every K-th are computed again, as in full                       (1 - 1/K) of full's
    full        its inputs stay; the whole block is computed again                             a forward pass of the policy

Gradients are those of ``none`` in every mode.
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
# Where a UNet's FLOPs are: linear layers and convolutions, and the kernels behind scaled_dot_product_attention, which depend on
# device, type and shape. Without any of them attention is two batched products.
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
    """Choose what a UNet keeps of a forward pass. May be called again with another mode.

    Raises:
        ValueError: no such mode.
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
    """Whether ``unet``, of whatever class, was set to ``selective``."""
    return any(
        getattr(module, "gradient_checkpointing", False) and module._gradient_checkpointing_func is _selective
        for module in unet.modules()
    )


def blocks(unet: torch.nn.Module) -> list[torch.nn.Module]:
    """ResNet and transformer blocks, in the order in which the UNet registers them."""
    kinds = tuple(map(load_class, BLOCKS))
    return [module for module in unet.modules() if isinstance(module, kinds)]


def _recompute(whole: set[int], block: torch.nn.Module, *args):
    # The module itself, not its forward: ZeRO-3 gathers the weights in hooks, which run again with the block.
    return block(*args) if id(block) in whole else checkpoint(block, *args, use_reentrant=False)


def _selective(block: torch.nn.Module, *args):
    if getattr(torch.nn.functional.linear, "__module__", None) == "deepspeed.runtime.zero.linear":
        raise RuntimeError(
            "selective checkpointing would give wrong gradients with the linear layers that DeepSpeed has put in place of PyTorch's: "
            "set zero_optimization.memory_efficient_linear to false wherever ZeRO-3 is used in this process"
        )
    if block._compiled_call_impl is not None:  # the compiler decides by itself what is cheaper computed again than kept
        return block(*args)
    return checkpoint(block, *args, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _keep))


def _keep(context, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
