"""The passes of :mod:`.fused` as Triton kernels: each element is read once and nothing is written between.

A sample's elements are visited in the order in which the policy's prediction lies in memory, whatever its strides. Every
program takes one part of a noise tensor and of the samples that share it; the sums of the parts are added afterwards in a fixed
order, so the result is the same every time. Samples are the grid's first axis: CUDA ends the others at 65,535.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dde_ds.objective.passes_torch import accumulator, gradient_factor
from dde_ds.objective.schedule import NoiseTarget

PART = 4096


def errors(policy: Tensor, reference: Tensor | None, target: NoiseTarget) -> tuple[Tensor, Tensor | None]:
    """Mean squared errors, (N,), of the policy, and of the reference where there is one."""
    size = policy[0].numel()
    predictions = 1 if reference is None else 2
    parts = torch.empty(predictions, len(policy), triton.cdiv(size, PART), dtype=accumulator(policy), device=policy.device)
    tensors = {"policy": policy, "reference": reference, "noise": target.noise, "noisy": target.noisy}
    with torch.cuda.device_of(policy):
        _errors_kernel[(len(target.noise), parts.shape[2])](
            **_arguments(tensors, policy, target),
            parts=parts,
            compare=reference is not None,  # pyright: ignore[reportArgumentType]  # triton wraps constants
            **_constants(policy, target),
        )
    found = parts.sum(2) / size
    return found[0], None if reference is None else found[1]


def gradient(policy: Tensor, target: NoiseTarget, grad: Tensor) -> Tensor:
    """Gradient with respect to ``policy``, in its dtype, where the errors' gradient is ``grad``, (N,)."""
    result = torch.empty_like(policy)
    tensors = {"policy": policy, "result": result, "noise": target.noise, "noisy": target.noisy}
    with torch.cuda.device_of(policy):
        _gradient_kernel[(len(target.noise), triton.cdiv(policy[0].numel(), PART))](
            **_arguments(tensors, policy, target), factor=gradient_factor(policy, target, grad), **_constants(policy, target)
        )
    return result


def _arguments(tensors: dict[str, Tensor | None], policy: Tensor, target: NoiseTarget) -> dict:
    """Kernel arguments: every tensor with its strides, dimensions in the order in which the policy's prediction lies in memory."""
    order = sorted(range(1, 4), key=policy.stride, reverse=True)
    _, middle, inner = sizes = [policy.shape[dim] for dim in order]
    arguments = {
        "size": policy[0].numel(),
        "middle": middle,
        "inner": inner,
        "noise_rows": len(target.noise),
        "scale": target.scale,
        "shift": target.shift,
    }
    linear = True
    for name, tensor in tensors.items():
        strides = (0, 0, 0, 0) if tensor is None else (tensor.stride(0), *(tensor.stride(dim) for dim in order))
        # A dimension of one element has no stride that matters.
        dense = (middle * inner, inner, 1)
        linear &= tensor is None or all(n == 1 or s == d for n, s, d in zip(sizes, strides[1:], dense, strict=True))
        arguments |= {name: tensor, f"{name}_strides": strides}
    return arguments | {"linear": linear}


def _constants(policy: Tensor, target: NoiseTarget) -> dict:
    exact = tl.float64 if policy.dtype == torch.float64 else tl.float32
    halves = len(policy) // len(target.noise)
    # Products and sums are rounded each for itself, so that a kernel with a reference and one without, which are compiled apart, round alike.
    return {"halves": halves, "implied": target.scale is not None, "exact": exact, "part": PART, "enable_fp_fusion": False}


@triton.jit
def _place(element, row, strides, middle, inner, linear: tl.constexpr):
    """Offset of an element of a row, counted in the policy's memory order."""
    first = row.to(tl.int64) * strides[0]
    if linear:
        return first + element
    # Strides of 32 bits may reach beyond them, in a view of a larger tensor. The divisions need no more than 32, and are faster so.
    outer = (element // (middle * inner)).to(tl.int64)
    rest = element % (middle * inner)
    return first + outer * strides[1] + (rest // inner).to(tl.int64) * strides[2] + (rest % inner).to(tl.int64) * strides[3]


@triton.jit
def _load(tensor, element, row, strides, size, middle, inner, linear: tl.constexpr, exact: tl.constexpr):
    return tl.load(tensor + _place(element, row, strides, middle, inner, linear), mask=element < size, other=0).to(exact)


@triton.jit
def _errors_kernel(
    policy, policy_strides, reference, reference_strides, noise, noise_strides, noisy, noisy_strides, scale, shift,
    parts, size, middle, inner, noise_rows,
    halves: tl.constexpr, compare: tl.constexpr, implied: tl.constexpr, linear: tl.constexpr, exact: tl.constexpr, part: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    element = tl.program_id(1) * part + tl.arange(0, part)
    epsilon = _load(noise, element, first, noise_strides, size, middle, inner, linear, exact)
    for half in tl.static_range(halves):  # pyright: ignore[reportGeneralTypeIssues]  # the winner and the loser that share this noise
        row = first + half * noise_rows
        aim = epsilon
        factor = 1.0
        if implied:
            factor = tl.load(scale + row).to(exact)
            aim -= tl.load(shift + row).to(exact) * _load(noisy, element, row, noisy_strides, size, middle, inner, linear, exact)
        place = row * tl.num_programs(1) + tl.program_id(1)
        off = factor * _load(policy, element, row, policy_strides, size, middle, inner, linear, exact) - aim
        tl.store(parts + place, tl.sum(off * off, 0))
        if compare:
            off = factor * _load(reference, element, row, reference_strides, size, middle, inner, linear, exact) - aim
            tl.store(parts + halves * noise_rows * tl.num_programs(1) + place, tl.sum(off * off, 0))


@triton.jit
def _gradient_kernel(
    policy, policy_strides, result, result_strides, noise, noise_strides, noisy, noisy_strides, scale, shift,
    factor, size, middle, inner, noise_rows,
    halves: tl.constexpr, implied: tl.constexpr, linear: tl.constexpr, exact: tl.constexpr, part: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    element = tl.program_id(1) * part + tl.arange(0, part)
    epsilon = _load(noise, element, first, noise_strides, size, middle, inner, linear, exact)
    for half in tl.static_range(halves):  # pyright: ignore[reportGeneralTypeIssues]  # triton's compiler unrolls it
        row = first + half * noise_rows
        off = _load(policy, element, row, policy_strides, size, middle, inner, linear, exact)
        if implied:
            off = off * tl.load(scale + row).to(exact)
            off += tl.load(shift + row).to(exact) * _load(noisy, element, row, noisy_strides, size, middle, inner, linear, exact)
        off = (off - epsilon) * tl.load(factor + row).to(exact)
        place = _place(element, row, result_strides, middle, inner, linear)
        tl.store(result + place, off.to(result.dtype.element_ty), mask=element < size)
