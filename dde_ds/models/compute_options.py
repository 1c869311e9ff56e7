"""How a UNet computes: what makes its passes faster and leaves its numbers alone, and what keeps its output from being rounded. Policy and
reference must be treated alike: one model in two arithmetics does not begin at the same predictions.

Attention needs nothing: diffusers takes PyTorch's scaled_dot_product_attention by itself.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# Each kind of block in each of: training, the reference's passes, drawings, looks and their last, smaller batch.
GRAPHS = 64


def use_channels_last(unet: UNet2DConditionModel) -> None:
    """Convolutions in the memory format that tensor cores read, (N,H,W,C), without transposing first.

    The format of an input carries through blocks and skips, but for diffusers' transformers, which give theirs back in PyTorch's own. The
    weights stay as they are: DeepSpeed broadcasts and flattens them as plain memory. A convolution then reorders them each time, which is
    little beside the activations.
    """
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    unet.conv_in.register_forward_pre_hook(lambda module, args: (_channels_last(args[0]),))
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            module.register_forward_hook(lambda module, args, output: (_channels_last(output[0]),))


def _channels_last(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous(memory_format=torch.channels_last)


def compile_blocks(unet: UNet2DConditionModel) -> None:
    """``torch.compile`` of the transformer blocks, which are many of few kinds: one compilation serves all of a kind.

    Casts are kept where eager PyTorch has them: a policy's graph and a reference's, which needs no gradients, are fused differently, and
    would otherwise round differently in bfloat16. For the same reason no graph serves several shapes, and none is left to eager
    PyTorch because there are too many.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    unet.compile_repeated_blocks(fullgraph=True, dynamic=False, options={"emulate_precision_casts": True})


def use_float32_output(unet: UNet2DConditionModel) -> None:
    """Compute the last layer, ``conv_out``, in float32, so that a bfloat16 UNet's predictions are float32. A float32 UNet stays as it is.

    A prediction near the noise, as at the noisy end, differs from it by less than bfloat16 resolves: the loss would compare roundings.
    The weights keep their type, names and class, so that engines, checkpoints and exports see no change. Call it after
    :func:`dde_ds.models.lora.add_adapters`: adapters of this layer are computed in float32 as well.
    """
    for layer in unet.conv_out.modules():  # one layer, or peft's wrapper with the layer and its adapters inside
        if isinstance(layer, nn.Conv2d):
            layer.forward = MethodType(_float32_convolution, layer)


def _float32_convolution(layer: nn.Conv2d, value: Tensor) -> Tensor:
    # Cast here and not before: ZeRO-3 gathers the weights for this call alone. TF32 loses nothing of bfloat16 factors.
    return layer._conv_forward(value.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())
