"""Options for how a UNet computes: faster passes, and an output in float32.

Apply the same options to policy and reference. Otherwise the two round differently, and do not begin with the same predictions.

Attention needs no option, because diffusers uses PyTorch's scaled_dot_product_attention by itself.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# The limit of compiled graphs. Each kind of block needs a graph for each of training, the reference's passes, drawing samples, evaluating
# held-out pairs, and the last, smaller batch of these.
GRAPHS = 64


def use_channels_last(unet: UNet2DConditionModel) -> None:
    """Run convolutions in the memory format of tensor cores, (N,H,W,C), so that no convolution transposes its input.

    The format of an input carries through blocks and skip connections. Only diffusers' transformers return PyTorch's default format, so a
    hook converts their outputs. The weights keep their format, because DeepSpeed broadcasts and flattens them as plain memory. A
    convolution then reorders its weights at each call, which costs little compared with the activations.
    """
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    unet.conv_in.register_forward_pre_hook(lambda module, args: (_channels_last(args[0]),))
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            module.register_forward_hook(lambda module, args, output: (_channels_last(output[0]),))


def _channels_last(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous(memory_format=torch.channels_last)


def compile_blocks(unet: UNet2DConditionModel) -> None:
    """Compile the transformer blocks with ``torch.compile``. There are many blocks of few kinds, and one compilation serves a kind.

    Compiled code keeps the casts of eager PyTorch. Without them, policy and reference would round differently in bfloat16, because the
    reference's graph needs no gradients and is fused differently. For the same reason, no graph serves several shapes, and the limit of
    graphs is high enough that none falls back to eager PyTorch.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    unet.compile_repeated_blocks(fullgraph=True, dynamic=False, options={"emulate_precision_casts": True})


def use_float32_output(unet: UNet2DConditionModel) -> None:
    """Compute the last layer, ``conv_out``, in float32, so that a bfloat16 UNet's predictions are float32. A float32 UNet does not change.

    At the noisy end, predictions differ from the noise by less than bfloat16 resolves. Without float32, the loss would compare rounding
    errors there. The weights keep their dtype, names and class, so that engines, checkpoints and exports see no change. Call this function
    after :func:`dde_ds.models.lora.add_adapters`, so that adapters of this layer are computed in float32 as well.
    """
    for layer in unet.conv_out.modules():  # One layer, or peft's wrapper around the layer and its adapters.
        if isinstance(layer, nn.Conv2d):
            layer.forward = MethodType(_float32_convolution, layer)


def _float32_convolution(layer: nn.Conv2d, value: Tensor) -> Tensor:
    # Cast inside this call, because ZeRO-3 gathers the weights for this call alone. TF32 represents bfloat16 factors exactly.
    return layer._conv_forward(value.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())
