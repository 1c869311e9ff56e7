"""The objective as a training loop sees it: predictions in, loss and metrics out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dde_ds.errors import UserError, nearest
from dde_ds.objective import losses
from dde_ds.objective.correction import ERROR_NAMES, CorrectionTable
from dde_ds.objective.fused import noise_errors
from dde_ds.objective.schedule import NoiseSchedule
from dde_ds.objective.specs import OBJECTIVES, ObjectiveSpec

SATURATED = 0.01
TIMESTEP_BUCKETS = 10
# Rows of what is summed by timestep: pairs with m < 0, of those with m = 0 one half, reward margins, the winner's drift, its reference error, and how many pairs.
BY_TIMESTEP = ("accuracy", "margin", "drift", "reference", "pairs")


@dataclass
class ObjectiveOutput:
    loss: Tensor
    """Scalar, mean over the pairs of this call; carries the gradient."""

    logits: Tensor
    """z of each pair, (B,), detached. Empty for ``sft``."""

    metrics: dict[str, Tensor] = field(default_factory=dict)
    """0-d tensors, detached, still on the device: reading one is a host synchronisation."""

    by_timestep: Tensor | None = None
    """(len(BY_TIMESTEP),10): sums over the pairs of each tenth of the timesteps, so that micro-batches and ranks can be added up.
    None for ``sft``."""

    reference_errors: Tensor | None = None
    """d(ref,w) of each pair, then d(ref,l), (2B,), as the loss took them: what a later call may be given in the place of a
    prediction. None for ``sft``."""


class Objective:
    """Build it with :func:`build_objective`. Call it once a micro-batch, :meth:`commit` once an optimizer step."""

    def __init__(
        self,
        name: str,
        schedule: NoiseSchedule,
        beta: float,
        correction_weight: float,
        correction_ema: float,
        discount: float,
        discount_mode: str,
        timestep_range: tuple[int, int],
    ):
        spec = OBJECTIVES[name]
        self.name, self.schedule, self.beta = name, schedule, beta
        self.correction_weight = correction_weight if spec.corrected else 0.0
        self.timestep_probabilities = _timestep_probabilities(spec, schedule, discount, discount_mode, timestep_range)
        """p(t), (T,) float64: what the trainer samples timesteps from."""
        self.needs_reference, self.link = spec.needs_reference, spec.link
        self.table = CorrectionTable(schedule.stepwise_weight, correction_ema)
        drawn = spec.discounted and discount_mode == "sample"  # the gain is then in how often t is drawn
        self._gain = torch.ones(schedule.num_train_timesteps, dtype=torch.float64) if drawn else spec.gain(schedule, discount)

    def to(self, device: torch.device | str) -> Objective:
        """Move the tables; done by itself at the first call on another device."""
        self._gain = self._gain.to(device)
        self.table.to(device)
        self.schedule = self.schedule.to(device)
        return self

    def __call__(
        self,
        policy_pred: Tensor,
        reference_pred: Tensor | None,
        noise: Tensor,
        timesteps: Tensor,
        noisy_latents: Tensor | None = None,
        *,
        reference_errors: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Loss of B pairs.

        Args:
            policy_pred: the policy's output, (2B,C,H,W): B winners, then their B losers.
            reference_pred: the reference's output, same shape, no gradient; None for ``sft``, or where its errors are given.
            noise: ε, (B,C,H,W), shared by winner and loser; or (2B,C,H,W) where each has its own.
            timesteps: (B,) int64, shared by winner and loser.
            noisy_latents: x_t, (2B,C,H,W): needed only where the model predicts v or the sample.
            reference_errors: d(ref,·), (2B,), in the place of ``reference_pred``: what an earlier call with the same noise and
                timesteps gave out under this name. The loss is then the same, on a CPU to the last bit;
                on a GPU a test tells.

        Raises:
            UserError: shapes that do not fit together.
        """
        self._check(policy_pred, reference_pred, reference_errors, noise, timesteps, noisy_latents)
        if self._gain.device != policy_pred.device:
            self.to(policy_pred.device)
        target = self.schedule.target(noise, timesteps.repeat(2), noisy_latents)
        policy_error, reference_error = noise_errors(policy_pred, reference_pred if self.needs_reference else None, target)
        if not self.needs_reference:
            return self._supervised(policy_error)

        if reference_error is None:
            assert reference_errors is not None  # one of the two is there: _check
            reference_error = reference_errors.to(policy_error.dtype)
        m = losses.margin(policy_error, reference_error)
        z = self.logits(m, timesteps)
        loss = self.link.loss(z).mean()
        errors = torch.cat([policy_error.detach(), reference_error]).view(4, -1)
        self.table.add(timesteps, m.detach(), errors)
        return ObjectiveOutput(loss, z.detach(), *self._metrics(loss.detach(), z.detach(), errors, timesteps), reference_error)

    def logits(self, margin: Tensor, timesteps: Tensor) -> Tensor:
        """z of pairs with these margins at these timesteps, all (B,), by the correction table as it stands."""
        gain, correction = (table[timesteps].to(margin.dtype) for table in (self._gain, self.table.correction))
        return losses.logits(margin, gain, correction, self.beta, self.correction_weight)

    def correction(self, timesteps: Tensor) -> Tensor:
        """K_t of the given timesteps, (B,) float64, as the last :meth:`commit` left it."""
        return self.table.correction[timesteps]

    def commit(self) -> None:
        """At the end of each optimizer step: all-reduce the step's sums and update the correction table. Collective."""
        if self.needs_reference:
            self.table.commit()

    def discard(self) -> None:
        """In the place of :meth:`commit` where the optimizer skipped the step: forget what the step added to the table."""
        self.table.discard()

    def state_dict(self) -> dict[str, Tensor]:
        return self.table.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.table.load_state_dict(state)

    def _supervised(self, policy_error: Tensor) -> ObjectiveOutput:
        winner, loser = policy_error.chunk(2)
        metrics = {"error/policy_chosen": winner.detach().mean(), "error/policy_rejected": loser.detach().mean()}
        loss = winner.mean()
        return ObjectiveOutput(loss, winner.new_empty(0), {"loss": loss.detach(), **metrics})

    @torch.no_grad()
    def _metrics(self, loss: Tensor, z: Tensor, errors: Tensor, timesteps: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        chosen_drift, rejected_drift = errors[:2] - errors[2:]
        scale = -(self.beta / 2) * self._gain[timesteps].to(z.dtype)
        margins, ahead = scale * (chosen_drift - rejected_drift), losses.share_ahead(rejected_drift - chosen_drift)
        weight = self.link.weight(z)
        metrics = {
            "loss": loss,
            "rewards/chosen": (scale * chosen_drift).mean(),
            "rewards/rejected": (scale * rejected_drift).mean(),
            "rewards/margins": margins.mean(),
            "rewards/accuracies": losses.share_ahead(z).mean(),
            # Without the correction, which is the same for all pairs of a timestep: comparable between objectives.
            "rewards/margin_accuracies": ahead.mean(),
            "drift/chosen": chosen_drift.mean(),
            "drift/rejected": rejected_drift.mean(),
            "dde/correction_mean": self.correction_weight * self.correction(timesteps).mean(),
            # Share of pairs whose gradient weight σ(-z) is pinned near 0 (learnt) or 1 (far on the wrong side).
            "dde/saturation": ((weight < SATURATED) | (weight > 1 - SATURATED)).to(z.dtype).mean(),
        }
        metrics |= {f"error/{name}": error.mean() for name, error in zip(ERROR_NAMES, errors, strict=True)}
        by_timestep = z.new_zeros(len(BY_TIMESTEP), TIMESTEP_BUCKETS)
        bucket = timesteps * TIMESTEP_BUCKETS // self.schedule.num_train_timesteps
        by_timestep.index_add_(1, bucket, torch.stack([ahead, margins, chosen_drift, errors[2], torch.ones_like(z)]))
        return metrics, by_timestep

    def _check(self, policy_pred, reference_pred, reference_errors, noise, timesteps, noisy_latents) -> None:
        pairs = len(timesteps)
        if pairs == 0:
            raise UserError("objective got an empty batch: timesteps has no element")
        if policy_pred.ndim != 4 or len(policy_pred) != 2 * pairs:
            raise UserError(
                f"policy_pred has shape {tuple(policy_pred.shape)}, timesteps {pairs}: expected (2·{pairs},C,H,W), winners then losers"
            )
        if noise.shape[1:] != policy_pred.shape[1:] or len(noise) not in (pairs, 2 * pairs):
            raise UserError(
                f"noise has shape {tuple(noise.shape)}, policy_pred {tuple(policy_pred.shape)}: expected (B or 2B,C,H,W)"
            )
        if self.needs_reference and reference_pred is None and reference_errors is None:
            raise UserError(f"objective {self.name!r} compares with a reference, but reference_pred is None (only 'sft' has none)")
        if reference_pred is not None and reference_errors is not None:
            raise UserError("objective got both reference_pred and reference_errors: which of them counts? Give one")
        if self.needs_reference and reference_pred is not None and reference_pred.shape != policy_pred.shape:
            raise UserError(f"reference_pred has shape {tuple(reference_pred.shape)}, policy_pred {tuple(policy_pred.shape)}")
        if reference_errors is not None and reference_errors.shape != (2 * pairs,):
            raise UserError(
                f"reference_errors has shape {tuple(reference_errors.shape)}: expected ({2 * pairs},), winners then losers"
            )
        if self.schedule.prediction_type != "epsilon" and (noisy_latents is None or noisy_latents.shape != policy_pred.shape):
            raise UserError(f"a {self.schedule.prediction_type} model needs noisy_latents of shape {tuple(policy_pred.shape)}")


def build_objective(
    name: str,
    schedule: NoiseSchedule,
    *,
    beta: float = 2000.0,
    correction_weight: float = 1.0,
    correction_ema: float = 0.9,
    discount: float | None = None,
    discount_mode: str = "weight",
    timestep_range: tuple[int, int] | None = None,
) -> Objective:
    """An objective by its name.

    Args:
        name: ``dde`` (eq. 11), its ablations ``dde_single`` (no correction) and ``dde_step`` (no single-shot weight), the
            baselines ``uniform`` (eq. 12: Diffusion-DPO, D3PO), ``discounted`` and ``sft``.
        schedule: the noise schedule of the model that is trained.
        beta: strength of the preference term, for errors that are *means* over a latent's elements (Diffusion-DPO: 2000 for
            SD1.5, 5000 for SDXL).
        correction_weight: η, weight of the stepwise correction. A choice of ours: 1, as in eq. 11; 0 makes ``dde`` equal
            ``dde_single`` bit for bit.
        correction_ema: ρ in M ← ρM + (1-ρ)·mean. The paper says "exponential moving average"; 0.9 is our choice, as is
            that the first observation of a timestep sets its entry.
        discount: γ per training timestep of ``discounted``; default 0.9^(50/T), that is 0.9 per step of a 50-step sampler.
        discount_mode: ``weight`` puts γ^(T-1-t) inside log σ; ``sample`` draws t in proportion to it. Not the same objective.
        timestep_range: [lo, hi) that timesteps are drawn from; default all.

    Raises:
        UserError: an unknown name or an option out of range.
    """
    if name not in OBJECTIVES:
        raise UserError(f"objective.name {name!r}{nearest(str(name), OBJECTIVES)}")
    if not 0 < beta < math.inf:
        raise UserError(f"objective.beta is {beta}: it must be a finite number above 0")
    if not 0 <= correction_weight < math.inf:
        raise UserError(f"objective.correction_weight is {correction_weight}: it must be a finite number, 0 or more")
    if not 0 <= correction_ema < 1:
        raise UserError(f"objective.correction_ema is {correction_ema}: it must lie in [0, 1)")
    if discount_mode not in ("weight", "sample"):
        raise UserError(f"objective.discount_mode {discount_mode!r}{nearest(str(discount_mode), ('weight', 'sample'))}")
    discount = float(0.9 ** (50 / schedule.num_train_timesteps)) if discount is None else discount
    if not 0 < discount <= 1:
        raise UserError(f"objective.discount is {discount}: it must lie in (0, 1]")
    low, high = (0, schedule.num_train_timesteps) if timestep_range is None else timestep_range
    if not 0 <= low < high <= schedule.num_train_timesteps:
        raise UserError(f"objective.timestep_range is [{low}, {high}): it must lie within [0, {schedule.num_train_timesteps})")
    return Objective(name, schedule, beta, correction_weight, correction_ema, discount, discount_mode, (low, high))


def _timestep_probabilities(
    spec: ObjectiveSpec, schedule: NoiseSchedule, discount: float, discount_mode: str, timestep_range: tuple[int, int]
) -> Tensor:
    drawn = spec.discounted and discount_mode == "sample"
    profile = spec.gain(schedule, discount) if drawn else torch.ones(schedule.num_train_timesteps, dtype=torch.float64)
    low, high = timestep_range
    inside = torch.zeros_like(profile)
    inside[low:high] = profile[low:high]
    return inside / inside.sum()


def configured_objective(options: Any, scheduler: dict) -> Objective:
    """The objective of a run's ``objective`` section, :class:`dde_ds.config.ObjectiveConfig`, under a model's scheduler configuration.

    Raises:
        UserError: as :func:`build_objective`.
    """
    return build_objective(
        options.name,
        NoiseSchedule.from_scheduler(scheduler, options.variance),
        beta=options.beta,
        correction_weight=options.correction_weight,
        correction_ema=options.correction_ema,
        discount=options.discount,
        discount_mode=options.discount_mode,
        timestep_range=options.timestep_range,
    )
