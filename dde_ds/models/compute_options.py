"""What makes a UNet's passes faster and leaves its numbers alone. Policy and reference must be treated alike: one model in two
arithmetics does not begin at the same predictions.

Attention needs nothing: diffusers takes PyTorch's scaled_dot_product_attention by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

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
