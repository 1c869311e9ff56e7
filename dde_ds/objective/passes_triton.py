"""The passes of :mod:`.fused` as Triton kernels. They read each element once and write no intermediate results.

A program visits a sample's elements in the memory order of the policy's prediction, whatever its strides. Every program takes one part of a
noise tensor and of the samples that share it. The sums of the parts are added afterwards in a fixed order, so the result is the same every
time. Samples are the grid's first axis, because CUDA limits the other axes to 65,535.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dde_ds.objective.passes_torch import Sums, Wanted, accumulator, gradient_factor, implied_moved, moved_factor, rows_of
from dde_ds.objective.schedule import NoiseTarget

PART = 4096


def sums(policy: Tensor, reference: Tensor | None, target: NoiseTarget, wanted: Wanted) -> Sums:
    """Return mean squared errors, (N,), of the policy and, where given, of the reference, and the ``wanted`` results."""
    size, rows, samples = policy[0].numel(), rows_of(policy, target, wanted), len(policy)
    # The rows of ``parts``, in this order: the policy's errors, the reference's errors, ``moved``, and the inner products.
    lengths = [samples, samples * (reference is not None), samples * wanted.moved, rows * wanted.inner]
    parts = torch.empty(sum(lengths), triton.cdiv(size, PART), dtype=accumulator(policy), device=policy.device)
    tensors = {"policy": policy, "reference": reference, "noise": target.noise, "noisy": target.noisy}
    with torch.cuda.device_of(policy):
        _sums_kernel[(rows, parts.shape[1])](
            **_arguments(tensors, policy, target),
            parts=parts,
            **{
                "compare": reference is not None,
                "moved": wanted.moved,
                "inner_product": wanted.inner,
                "shared": len(target.noise) == rows,
            },
            **_constants(policy, target, rows),
        )
    policy_error, reference_error, moved, inner = (parts.sum(1) / size).split(lengths)
    return (
        policy_error,
        None if reference is None else reference_error,
        implied_moved(moved, target) if wanted.moved else None,
        inner if wanted.inner else None,
    )


def gradient(policy: Tensor, target: NoiseTarget, grad: Tensor, moved: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return the gradient with respect to ``policy``, in its dtype, as :func:`dde_ds.objective.passes_torch.gradient` does."""
    result, rows = torch.empty_like(policy), len(target.noise)
    reference = None if moved is None else moved[0]
    tensors = {"policy": policy, "reference": reference, "result": result, "noise": target.noise, "noisy": target.noisy}
    with torch.cuda.device_of(policy):
        _gradient_kernel[(rows, triton.cdiv(policy[0].numel(), PART))](
            **_arguments(tensors, policy, target),
            factor=gradient_factor(policy, target, grad),
            moved_factor=None if moved is None else moved_factor(policy, target, moved[1]),
            **{"moved": moved is not None},
            **_constants(policy, target, rows),
        )
    return result


def _arguments(tensors: dict[str, Tensor | None], policy: Tensor, target: NoiseTarget) -> dict:
    """Return kernel arguments: every tensor with its strides. Dimensions are in the memory order of the policy's prediction."""
    order = sorted(range(1, 4), key=policy.stride, reverse=True)
    _, middle, inner = sizes = [policy.shape[dim] for dim in order]
    arguments = {
        "size": policy[0].numel(),
        "middle": middle,
        "inner": inner,
        "scale": target.scale,
        "shift": target.shift,
    }
    linear = True
    for name, tensor in tensors.items():
        strides = (0, 0, 0, 0) if tensor is None else (tensor.stride(0), *(tensor.stride(dim) for dim in order))
        # The stride of a dimension with one element does not matter.
        dense = (middle * inner, inner, 1)
        linear &= tensor is None or all(n == 1 or s == d for n, s, d in zip(sizes, strides[1:], dense, strict=True))
        arguments |= {name: tensor, f"{name}_strides": strides}
    return arguments | {"linear": linear}


def _constants(policy: Tensor, target: NoiseTarget, rows: int) -> dict:
    exact = tl.float64 if policy.dtype == torch.float64 else tl.float32
    # Without fusion, each product and each sum is rounded separately. So kernels with and without a reference, which are compiled
    # separately, round alike.
    halves = len(policy) // rows
    return {
        "rows": rows,
        "halves": halves,
        "implied": target.scale is not None,
        "exact": exact,
        "part": PART,
        "enable_fp_fusion": False,
    }


@triton.jit
def _place(element, row, strides, middle, inner, linear: tl.constexpr):
    """Return the offset in memory of a row's element. ``element`` counts in the policy's memory order."""
    first = row.to(tl.int64) * strides[0]
    if linear:
        return first + element
    # In a view of a larger tensor, offsets may exceed 32 bits although strides do not. The divisions need only 32 bits, which is faster.
    outer = (element // (middle * inner)).to(tl.int64)
    rest = element % (middle * inner)
    return first + outer * strides[1] + (rest // inner).to(tl.int64) * strides[2] + (rest % inner).to(tl.int64) * strides[3]


@triton.jit
def _load(tensor, element, row, strides, size, middle, inner, linear: tl.constexpr, exact: tl.constexpr):
    return tl.load(tensor + _place(element, row, strides, middle, inner, linear), mask=element < size, other=0).to(exact)


@triton.jit
def _sums_kernel(
    policy, policy_strides, reference, reference_strides, noise, noise_strides, noisy, noisy_strides, scale, shift,
    parts, size, middle, inner, rows,
    halves: tl.constexpr, compare: tl.constexpr, moved: tl.constexpr, inner_product: tl.constexpr, shared: tl.constexpr,
    implied: tl.constexpr, linear: tl.constexpr, exact: tl.constexpr, part: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    element = tl.program_id(1) * part + tl.arange(0, part)
    samples = halves * rows
    epsilon = _load(noise, element, first, noise_strides, size, middle, inner, linear, exact)
    for half in tl.static_range(halves):  # pyright: ignore[reportGeneralTypeIssues]  # the winner and the loser of a pair
        row = first + half * rows
        if half > 0 and not shared:
            epsilon = _load(noise, element, row, noise_strides, size, middle, inner, linear, exact)
        aim = epsilon
        factor = 1.0
        if implied:
            factor = tl.load(scale + row).to(exact)
            aim -= tl.load(shift + row).to(exact) * _load(noisy, element, row, noisy_strides, size, middle, inner, linear, exact)
        place = row * tl.num_programs(1) + tl.program_id(1)
        own = _load(policy, element, row, policy_strides, size, middle, inner, linear, exact)
        off = factor * own - aim
        tl.store(parts + place, tl.sum(off * off, 0))
        if inner_product:
            if half == 0:
                winner = off
            else:
                below = (1 + compare + moved) * samples + first
                tl.store(parts + below * tl.num_programs(1) + tl.program_id(1), tl.sum(winner * off, 0))
        if compare:
            other = _load(reference, element, row, reference_strides, size, middle, inner, linear, exact)
            off = factor * other - aim
            tl.store(parts + samples * tl.num_programs(1) + place, tl.sum(off * off, 0))
            if moved:
                off = own - other
                tl.store(parts + 2 * samples * tl.num_programs(1) + place, tl.sum(off * off, 0))


@triton.jit
def _gradient_kernel(
    policy, policy_strides, reference, reference_strides, result, result_strides, noise, noise_strides, noisy, noisy_strides,
    scale, shift, factor, moved_factor, size, middle, inner, rows,
    halves: tl.constexpr, moved: tl.constexpr, implied: tl.constexpr, linear: tl.constexpr, exact: tl.constexpr, part: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    element = tl.program_id(1) * part + tl.arange(0, part)
    epsilon = _load(noise, element, first, noise_strides, size, middle, inner, linear, exact)
    for half in tl.static_range(halves):  # pyright: ignore[reportGeneralTypeIssues]  # triton's compiler unrolls it
        row = first + half * rows
        own = _load(policy, element, row, policy_strides, size, middle, inner, linear, exact)
        off = own
        if implied:
            off = off * tl.load(scale + row).to(exact)
            off += tl.load(shift + row).to(exact) * _load(noisy, element, row, noisy_strides, size, middle, inner, linear, exact)
        off = (off - epsilon) * tl.load(factor + row).to(exact)
        if moved:
            other = _load(reference, element, row, reference_strides, size, middle, inner, linear, exact)
            off += tl.load(moved_factor + row).to(exact) * (own - other)
        place = _place(element, row, result_strides, middle, inner, linear)
        tl.store(result + place, off.to(result.dtype.element_ty), mask=element < size)
