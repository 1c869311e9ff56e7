"""The fused errors against their plain formulation, through the PyTorch passes and through the Triton kernels' interpreter."""

from __future__ import annotations

import importlib

import pytest
import torch

from dde_ds import UserError
from dde_ds.objective import fused, passes_torch
from dde_ds.objective.fused import noise_errors, noise_sums
from dde_ds.objective.schedule import NoiseTarget


@pytest.fixture(params=["torch", "torch, small", "triton interpreted", pytest.param("triton compiled", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Choose the passes under test, and return their device.

    The passes are PyTorch's by blocks, PyTorch's by autograd for small predictions, Triton's in its interpreter on the CPU, or Triton's
    compiled for a GPU.
    """
    kind = request.param
    if kind != "torch, small":
        monkeypatch.setattr(fused, "SMALL_ELEMENTS", 0)
    if kind.startswith("triton"):
        pytest.importorskip("triton", reason="Triton is not installed")
        if (kind == "triton compiled") != torch.cuda.is_available():
            pytest.skip("no CUDA device" if kind == "triton compiled" else "the kernels run compiled here")
    # The shapes here are all smaller than a real block. Smaller blocks make several of them, and a smaller last one.
    monkeypatch.setattr(passes_torch, "BLOCK_ELEMENTS", 500)
    passes = importlib.import_module(f"dde_ds.objective.passes_{kind.split(' ')[0].strip(',')}")
    monkeypatch.setattr(fused, "_passes", lambda _: passes)
    return "cuda" if kind == "triton compiled" else "cpu"


def plain(prediction, target):
    """Autograd through the written formula."""
    noise = target.noise.repeat(len(prediction) // len(target.noise), 1, 1, 1)
    if target.scale is not None:
        prediction = target.scale.view(-1, 1, 1, 1) * prediction + target.shift.view(-1, 1, 1, 1) * target.noisy
    return (noise - prediction).square().mean((1, 2, 3))


def made_up(device, shape, shared=True, implied=False, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    policy, reference, noisy = torch.randn(3, *shape, dtype=torch.float64, generator=generator).to(dtype)
    noise = torch.randn(shape[0] // 2 if shared else shape[0], *shape[1:], dtype=torch.float64, generator=generator)
    scale, shift = torch.rand(2, shape[0], dtype=torch.float64, generator=generator)
    policy, reference, noisy, noise, scale, shift = (each.to(device) for each in (policy, reference, noisy, noise, scale, shift))
    target = NoiseTarget(noise, scale, shift, noisy.double()) if implied else NoiseTarget(noise)
    return policy.requires_grad_(), reference, target


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("implied", [True, False])
def test_gradcheck(device, shared, implied):
    policy, reference, target = made_up(device, (4, 2, 3, 3), shared, implied)
    assert torch.autograd.gradcheck(lambda p: noise_errors(p, reference, target)[0], policy)
    found = noise_errors(policy, reference, target)
    torch.testing.assert_close(found, (plain(policy, target), plain(reference, target)))
    assert not found[1].requires_grad


def permuted(tensor, order):
    """The same values, with the four dimensions lying in memory in the given order."""
    back = [order.index(dim) for dim in range(4)]
    return tensor.permute(order).contiguous().permute(back)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "width first": lambda x: permuted(x, [0, 3, 2, 1]),
    "batch innermost": lambda x: permuted(x, [1, 2, 3, 0]),
    "every other element": lambda x: torch.stack([x, x + 1], -1).flatten(3)[..., ::2],
}


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (6, 3, 5, 7), (2, 1, 1, 1), (2, 5, 1, 1700)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_shape_and_stride(device, shape, layout):
    """The policy's layout is not the reference's and not the noise's."""
    policy, reference, target = made_up(device, shape, implied=True, dtype=torch.float32)
    laid_out = LAYOUTS[layout](policy.detach()).requires_grad_()
    assert torch.equal(laid_out, policy)
    for predictions in ((laid_out, reference), (policy, LAYOUTS[layout](reference)), (laid_out, LAYOUTS[layout](reference))):
        found = noise_errors(*predictions, target)
        expected = plain(policy, target), plain(reference, target)
        torch.testing.assert_close(found, tuple(each.float() for each in expected))
    (grad,) = torch.autograd.grad(noise_errors(laid_out, reference, target)[0].sum(), laid_out)
    torch.testing.assert_close(grad, torch.autograd.grad(plain(policy, target).sum(), policy)[0])


def test_noise_expanded_over_the_batch(device):
    policy, reference, _ = made_up(device, (4, 2, 3, 3))
    noise = torch.randn(1, 2, 3, 3, dtype=torch.float64, device=device).expand(2, -1, -1, -1)
    torch.testing.assert_close(
        noise_errors(policy, reference, NoiseTarget(noise))[0], plain(policy, NoiseTarget(noise.contiguous()))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(device, dtype):
    policy, reference, target = made_up(device, (4, 4, 32, 32), dtype=dtype)
    target = NoiseTarget(target.noise.float())
    found = noise_errors(policy, reference, target)
    exact = policy.detach().double().requires_grad_()
    expected = plain(exact, NoiseTarget(target.noise.double()))
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-6, atol=0)
    found[0].sum().backward()
    expected.sum().backward()
    assert policy.grad.dtype == dtype
    torch.testing.assert_close(policy.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_equal_predictions_have_equal_errors_to_the_last_bit(device):
    policy, _, target = made_up(device, (4, 4, 19, 17), implied=True, dtype=torch.float32)
    assert torch.equal(*noise_errors(policy, policy.detach().clone(), target))


def test_without_a_reference(device):
    policy, reference, target = made_up(device, (4, 2, 3, 3))
    error, none = noise_errors(policy, None, target)
    assert none is None
    assert torch.equal(error, noise_errors(policy, reference, target)[0])
    (grad,) = torch.autograd.grad(error.sum(), policy)
    torch.testing.assert_close(grad, torch.autograd.grad(plain(policy, target).sum(), policy)[0])


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("implied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reference_changes_no_bit_of_the_policys_errors(device, dtype, implied, layout):
    """On a GPU these are two kernels, compiled apart."""
    policy, reference, target = made_up(device, (4, 4, 40, 40), implied=implied, dtype=dtype)
    policy = LAYOUTS[layout](policy.detach())
    assert torch.equal(noise_errors(policy, None, target)[0], noise_errors(policy, reference, target)[0])


@pytest.mark.parametrize(
    ("noise", "reference", "named"),
    [((3, 2, 3, 3), (4, 2, 3, 3), "noise"), ((2, 1, 3, 3), (4, 2, 3, 3), "noise"), ((2, 2, 3, 3), (4, 2, 3, 1), "reference")],
)
def test_shapes_that_do_not_fit(device, noise, reference, named):
    """Refused before a kernel would read past an end."""
    policy = torch.randn(4, 2, 3, 3, device=device)
    with pytest.raises(UserError, match=named):
        noise_errors(policy, torch.randn(reference, device=device), NoiseTarget(torch.randn(noise, device=device)))
    with pytest.raises(UserError, match="none of them 0"):
        noise_errors(policy[:0], None, NoiseTarget(policy[:0]))


def test_inputs_are_left_alone_and_nothing_else_is_kept(device, monkeypatch):
    monkeypatch.setattr(fused, "SMALL_ELEMENTS", 0)
    policy, reference, target = made_up(device, (4, 2, 3, 3), implied=True)
    inputs = (policy, reference, target.noise, target.noisy)
    before = [each.detach().clone() for each in inputs]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        error, _ = noise_errors(policy, reference, target)
    assert {tensor.data_ptr() for tensor in kept} == {
        tensor.data_ptr() for tensor in (policy, target.noise, target.scale, target.shift, target.noisy)
    }
    error.sum().backward()
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_predictions_have_the_numbers_of_large_ones(monkeypatch, dtype):
    policy, reference, target = made_up("cpu", (4, 4, 32, 32), dtype=dtype)
    target = NoiseTarget(target.noise.float())
    found = []
    for small in (0, policy.numel()):
        monkeypatch.setattr(fused, "SMALL_ELEMENTS", small)
        errors = noise_errors(policy, reference, target)
        found.append((*errors, *torch.autograd.grad(errors[0].sum(), policy)))
    for by_block, small in zip(*found, strict=True):
        torch.testing.assert_close(small, by_block, rtol=torch.finfo(dtype).eps, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True))


def plain_moved(policy, reference, target):
    scale = 1 if target.scale is None else target.scale.view(-1, 1, 1, 1)
    return (scale * policy - scale * reference).square().mean((1, 2, 3))


def plain_inner(policy, target):
    noise = target.noise.repeat(len(policy) // len(target.noise), 1, 1, 1)
    if target.scale is not None:
        policy = target.scale.view(-1, 1, 1, 1) * policy + target.shift.view(-1, 1, 1, 1) * target.noisy
    winner, loser = (policy - noise).chunk(2)
    return (winner * loser).mean((1, 2, 3))


@pytest.mark.parametrize(("shape", "layout"), [((6, 3, 5, 7), "channels last"), ((2, 5, 1, 1700), "every other element")])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("implied", [True, False])
def test_what_has_moved_and_inner_products(device, shape, layout, shared, implied):
    policy, reference, target = made_up(device, shape, shared, implied)
    laid_out = LAYOUTS[layout](policy.detach()).requires_grad_()
    found = noise_sums(laid_out, reference, target, teach_moved=True, inner=True)
    torch.testing.assert_close(found.policy, plain(policy, target))
    torch.testing.assert_close(found.reference, plain(reference, target))
    torch.testing.assert_close(found.moved, plain_moved(policy, reference, target))
    torch.testing.assert_close(found.inner, plain_inner(policy, target).detach())
    assert not found.inner.requires_grad and not found.reference.requires_grad
    # Each with weights of its own, together and alone.
    for weights in ([1.0, -0.7], [1.0, 0.0], [0.0, 1.0]):
        ramp = torch.arange(1.0, len(policy) + 1, dtype=torch.float64, device=device)
        losses = [
            weights[0] * (ramp * errors).sum() + weights[1] * (moved / ramp).sum()
            for errors, moved in ((found.policy, found.moved), (plain(policy, target), plain_moved(policy, reference, target)))
        ]
        (grad,) = torch.autograd.grad(losses[0], laid_out, retain_graph=True)
        torch.testing.assert_close(grad, torch.autograd.grad(losses[1], policy)[0])
    (alone,) = torch.autograd.grad(found.moved.sum(), laid_out)
    torch.testing.assert_close(alone, torch.autograd.grad(plain_moved(policy, reference, target).sum(), policy)[0])


@pytest.mark.parametrize("implied", [True, False])
def test_gradcheck_of_what_has_moved(device, implied):
    policy, reference, target = made_up(device, (4, 2, 3, 3), implied=implied)
    assert torch.autograd.gradcheck(lambda p: noise_sums(p, reference, target, teach_moved=True)[::2], policy)
    assert not noise_sums(policy, reference, target, moved=True).moved.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implied", [True, False])
def test_what_is_asked_for_beside_changes_no_bit_of_the_errors(device, dtype, implied):
    policy, reference, target = made_up(device, (4, 4, 40, 40), implied=implied, dtype=dtype)
    found = []
    for wanted in ({}, {"moved": True}, {"teach_moved": True, "inner": True}):
        sums = noise_sums(policy, reference, target, **wanted)
        found.append((sums.policy, sums.reference, torch.autograd.grad(sums.policy.sum(), policy)[0]))
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))


def test_the_reference_is_kept_for_the_backward_pass_only_where_it_is_taught(device, monkeypatch):
    monkeypatch.setattr(fused, "SMALL_ELEMENTS", 0)
    policy, reference, target = made_up(device, (4, 2, 3, 3))
    for taught in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            noise_sums(policy, reference, target, moved=True, teach_moved=taught, inner=True)
        assert (reference.data_ptr() in [tensor.data_ptr() for tensor in kept]) == taught


def test_an_inner_product_needs_pairs(device):
    policy, _, target = made_up(device, (3, 2, 3, 3), shared=False)
    with pytest.raises(UserError, match="as many losers"):
        noise_sums(policy, None, target, inner=True)
