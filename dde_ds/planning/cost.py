"""Count the cost of a UNet on tensors without data: parameters, FLOPs, and the bytes of a training pass.

No weights are loaded and no numbers are computed. The UNet is built from its configuration in PyTorch's FakeTensorMode, where every
operation knows the shapes of its results. A forward and a backward pass then run through it. So the count covers the same operations that
training calls, eager and uncompiled. Attention counts as a kernel that keeps its inputs, its output and a sum for each row, like flash and
memory-efficient attention. The workspaces of libraries are not counted.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from dde_ds.models.checkpointing import set_checkpointing
from dde_ds.models.compute_options import use_float32_output
from dde_ds.models.family import Conditioning, conditioning_shapes
from dde_ds.models.lora import add_adapters
from dde_ds.models.trainable import train_part
from dde_ds.models.unet import predict

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

TOKENS = 77
"""The length of CLIP's prompts, which condition all families."""

_ATEN = torch.ops.aten
_FLOPS = {
    **flop_registry,
    # FakeTensorMode uses this kernel on a machine without a GPU. PyTorch itself counts the FLOPs only of the CUDA kernels.
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(
        grad.shape, q.shape, k.shape, v.shape
    ),
}


@dataclass(frozen=True)
class Pass:
    """The cost of a forward and backward pass of the policy."""

    kept: int
    """Bytes that are kept for the backward pass at the end of the forward pass."""
    peak: int
    """Peak live bytes, excluding weights, inputs and gradients. Each gradient is handed on as soon as it is complete."""
    flops: int
    """FLOPs (2 × multiply-adds) of both passes, including recomputation."""


class Adapters(NamedTuple):
    """The LoRA arguments of :func:`dde_ds.models.lora.add_adapters`."""

    rank: int
    targets: tuple[str, ...]


class Selection(NamedTuple):
    """What :func:`dde_ds.models.trainable.train_part` takes."""

    patterns: tuple[str, ...]


class Sizes(NamedTuple):
    """The number of elements of each parameter of a UNet, in the UNet's order."""

    trained: tuple[int, ...]
    frozen: tuple[int, ...] = ()


def parameter_sizes(config: dict, part: Adapters | Selection | None = None) -> Sizes:
    """Return the parameter sizes of a UNet2DConditionModel. With ``part``, only these adapters or parameters are trained."""
    return _parameter_sizes(_key(config), part)


def forward_flops(config: dict, latent: tuple[int, int, int], tokens: int = TOKENS) -> int:
    """Return the FLOPs (2 × multiply-adds) of one prediction for a latent of shape (C,H,W)."""
    return _forward_flops(_key(config), tuple(latent), tokens)


def pair_flops(config: dict, latent: tuple[int, int, int], tokens: int = TOKENS, reference: bool = True) -> int:
    """Return the FLOPs of training on one pair, without recomputation.

    For each of the two latents, the policy's forward pass costs one prediction, and its backward pass costs two. With ``reference``, the
    reference's forward pass costs one more.
    """
    return (2 * 3 + 2 * reference) * forward_flops(config, latent, tokens)


def training_pass(
    config: dict,
    latent: tuple[int, int, int],
    checkpointing: str,
    dtype: torch.dtype,
    tokens: int = TOKENS,
    pairs: int = 1,
    part: Adapters | Selection | None = None,
    float32_output: bool = True,
) -> Pass:
    """Count the memory and FLOPs of one micro-batch, with winners and losers in one call. All three numbers are proportional to ``pairs``.

    Args:
        config: the UNet's configuration.
        latent: shape of a latent, (C,H,W).
        checkpointing: a mode of :func:`dde_ds.models.checkpointing.set_checkpointing`.
        dtype: dtype of weights and latents.
        tokens: number of tokens of a prompt.
        pairs: pairs of the micro-batch.
        part: train these adapters or parameters alone. None trains all weights.
        float32_output: the option ``model.float32_output``. It adds the float32 copies of the last layer's input, weights and output.
    """
    return _training_pass(_key(config), tuple(latent), checkpointing, dtype, tokens, pairs, part, float32_output)


def made_up_conditioning(config: Any, latents: int, tokens: int = TOKENS) -> Conditioning:
    """Return conditioning of zeros in the shapes for a UNet with this ``config``, a dict."""
    return Conditioning(**{name: torch.zeros(latents, *shape) for name, shape in conditioning_shapes(config, tokens).items()})


class Meter(TorchDispatchMode):
    """A context that counts FLOPs and the bytes of live tensors that operations inside it created, with their peak.

    ``FlopCounterMode`` does not serve here, because it would keep tensors alive that the pass has released.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.flops = self.bytes = self.peak = 0
        # A view of a known tensor needs no memory of its own.
        self._seen = dict.fromkeys(tensor.untyped_storage()._cdata for tensor in known)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        if operator._overloadpacket in _FLOPS:
            self.flops += _FLOPS[operator._overloadpacket](*args, **kwargs, out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)

    def _drop(self, key: int, size: int) -> None:
        self.bytes -= size
        del self._seen[key]


def run_pass(unet: torch.nn.Module, noisy: Tensor, conditioning: Conditioning) -> Pass:
    """Run a forward and backward pass and count its cost. Real tensors work too, so that tests can check the count."""
    # DeepSpeed moves a gradient into its buckets as soon as it is complete. So drop each gradient here.
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        for parameter in unet.parameters()
        if parameter.requires_grad
    ]
    timesteps = torch.zeros(len(noisy), dtype=torch.int64)
    with Meter([*unet.parameters(), noisy, timesteps, *(value for value in conditioning if value is not None)]) as meter:
        prediction = predict(unet, noisy, timesteps, conditioning)
        kept = meter.bytes
        prediction.backward(torch.ones_like(prediction))
    for hook in hooks:
        hook.remove()
    return Pass(kept, meter.peak, meter.flops)


@lru_cache(maxsize=8)
def _parameter_sizes(key: str, part: Adapters | Selection | None) -> Sizes:
    with torch.device("meta"):
        parameters = list(_build(key, part).parameters())
    trained, frozen = ([each.numel() for each in parameters if each.requires_grad is wanted] for wanted in (True, False))
    return Sizes(tuple(trained), tuple(frozen))


@lru_cache(maxsize=8)
def _forward_flops(key: str, latent: tuple[int, int, int], tokens: int) -> int:
    with torch.device("meta"):
        unet, noisy = _build(key), torch.zeros(1, *latent)
        conditioning = made_up_conditioning(json.loads(key), 1, tokens)
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            predict(unet, noisy, torch.zeros(1, dtype=torch.int64), conditioning)
    return flops.get_total_flops()


@lru_cache(maxsize=64)
def _training_pass(
    key: str,
    latent: tuple[int, int, int],
    checkpointing: str,
    dtype: torch.dtype,
    tokens: int,
    pairs: int,
    part: Adapters | Selection | None,
    float32_output: bool,
) -> Pass:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        unet = _build(key, part)
    with FakeTensorMode():
        for module in unet.modules():
            for name, value in module.named_parameters(recurse=False):
                empty = torch.empty(value.shape, dtype=dtype)
                setattr(module, name, torch.nn.Parameter(empty, requires_grad=value.requires_grad))
        set_checkpointing(unet.train(), checkpointing)
        if float32_output:
            use_float32_output(unet)
        conditioning = made_up_conditioning(json.loads(key), 2 * pairs, tokens)
        return run_pass(unet, torch.zeros(2 * pairs, *latent, dtype=dtype), conditioning)


def _build(key: str, part: Adapters | Selection | None = None) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(json.loads(key))
    assert isinstance(unet, UNet2DConditionModel)  # from_config returns a tuple only if unused keys are requested.
    if isinstance(part, Adapters):
        add_adapters(unet, part.rank, part.rank, part.targets, seed=0)
    elif part:
        train_part(unet, part.patterns)
    return unet


def _key(config: dict) -> str:
    return json.dumps(dict(config), sort_keys=True, default=list)
