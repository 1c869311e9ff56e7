from __future__ import annotations

import pytest
import torch

from dde_ds.objective.fused import squared_error


def plain(prediction, noise, scale=None, offset=None):
    noise = noise.repeat(len(prediction) // len(noise), 1, 1, 1)
    if scale is not None:
        prediction = scale.view(-1, 1, 1, 1) * prediction + offset
    return (noise - prediction).square().mean((1, 2, 3))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("implied", [True, False])
def test_gradcheck(shared, implied):
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    noise = torch.randn(2 if shared else 4, 2, 3, 3, dtype=torch.float64, generator=generator)
    extra = (
        (torch.rand(4, dtype=torch.float64, generator=generator), torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=generator))
        if implied
        else ()
    )
    assert torch.autograd.gradcheck(lambda p: squared_error(p, noise, *extra), prediction)
    torch.testing.assert_close(squared_error(prediction, noise, *extra), plain(prediction, noise, *extra))


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 3, 5, 7), (2, 1, 1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_shape_and_stride(shape, memory_format):
    prediction = torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
    noise = torch.randn(1, *shape[1:], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(squared_error(prediction, noise), plain(prediction, noise))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype):
    prediction = torch.randn(4, 4, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    noise = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    error = squared_error(prediction, noise)
    exact = prediction.detach().double().requires_grad_()
    expected = plain(exact, noise.double())
    assert error.dtype == torch.float32
    torch.testing.assert_close(error.double(), expected, rtol=1e-6, atol=0)
    error.sum().backward()
    expected.sum().backward()
    assert prediction.grad.dtype == dtype
    torch.testing.assert_close(prediction.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_inputs_are_left_alone():
    prediction, noise = torch.randn(2, 1, 2, 2, requires_grad=True), torch.randn(1, 1, 2, 2)
    before = prediction.detach().clone(), noise.clone()
    squared_error(prediction, noise).sum().backward()
    assert torch.equal(prediction, before[0])
    assert torch.equal(noise, before[1])
