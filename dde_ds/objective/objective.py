"""The objective as a training loop uses it: from predictions to the loss and its metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dde_ds.errors import UserError, nearest
from dde_ds.objective import losses
from dde_ds.objective.correction import ERROR_NAMES, CorrectionTable
from dde_ds.objective.fused import noise_sums
from dde_ds.objective.links import LINKS, bind
from dde_ds.objective.reference_point import ReferencePoint
from dde_ds.objective.schedule import NoiseSchedule
from dde_ds.objective.specs import OBJECTIVES, ObjectiveSpec, calibrated, single_shot

SATURATED = 0.01
TIMESTEP_BUCKETS = 50
# The sums by timestep, one a row: pairs with m < 0 (a pair with m = 0 counts one half), reward margins, the winner's drift, the winner's
# reference error, the credit g_t · (the link's weight), and the number of pairs.
BY_TIMESTEP = ("accuracy", "margin", "drift", "reference", "credit", "pairs")


@dataclass
class ObjectiveOutput:
    """The result of one call of :class:`Objective`."""

    loss: Tensor
    """The mean loss over the pairs of this call, 0-d. It carries the gradient."""

    logits: Tensor
    """z of each pair, (B,), detached. Empty for ``sft``, which has no z."""

    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached 0-d tensors, still on the device. Reading a value synchronises the host with the device."""

    by_timestep: Tensor | None = None
    """Sums over the pairs of each fiftieth of the timesteps, (len(BY_TIMESTEP),50). Being sums, they can be added over micro-batches and
    ranks. None where there is no reference."""

    reference_errors: Tensor | None = None
    """d(ref,w) of each pair, then d(ref,l), (2B,), as the loss used them. A later call accepts them instead of the reference's
    prediction. None where there is no reference."""


@dataclass(frozen=True)
class LossOptions:
    """Options that turn z into a loss. :func:`build_objective` explains each of them."""

    link: str = "logistic"
    label_smoothing: float = 0.0
    soft_labels: bool = False
    winner_preserving: float | None = None
    credit: str = "pair"
    single_shot: str = "weight"


NEEDS_PREDICTION = "compares the two models' predictions with each other"

SINGLE_SHOTS = ("weight", "calibrated")
CREDITS = ("pair", "mean")


class Objective:
    """A preference objective with its correction table. Build it with :func:`build_objective`.

    Call the objective once a micro-batch and :meth:`commit` once an optimizer step.
    """

    def __init__(
        self,
        name: str,
        schedule: NoiseSchedule,
        beta: float,
        correction_weight: float,
        correction_ema: float,
        correction_buckets: int,
        discount: float,
        discount_mode: str,
        timestep_range: tuple[int, int],
        options: LossOptions,
    ):
        self.spec = spec = OBJECTIVES[name]
        self.name, self.schedule, self.beta, self.options = name, schedule, beta, options
        is_calibrated = options.single_shot == "calibrated"
        self.correction_weight = (1 + is_calibrated) * correction_weight if spec.corrected else 0.0
        self.timestep_probabilities = _timestep_probabilities(spec, schedule, discount, discount_mode, timestep_range)
        """p(t), (T,) float64: the distribution from which the trainer samples timesteps."""
        self.needs_reference = spec.needs_reference
        self.link = bind(LINKS[options.link], beta, options.label_smoothing)
        """The loss of z and its gradient weight, for an objective without its own loss."""
        self.table = CorrectionTable(schedule.stepwise_weight, correction_ema, correction_buckets)
        drawn = spec.discounted and discount_mode == "sample"  # The frequency of t then carries the gain.
        gain = calibrated if is_calibrated else spec.gain
        ones = torch.ones(schedule.num_train_timesteps, dtype=torch.float64)
        own_gain = ones if drawn else gain(schedule, discount)
        self._gain, self._credit_gain = (ones, own_gain) if options.credit == "mean" else (own_gain, None)
        self._path_weight = schedule.path_weights(self.timestep_probabilities)
        self._drawn_log = self.timestep_probabilities.log()
        self._reference_point = ReferencePoint() if spec.has_reference_point else None

    def to(self, device: torch.device | str) -> Objective:
        """Move the tables to ``device``. The first call with predictions on another device does this by itself."""
        self._gain, self._path_weight, self._drawn_log = (
            each.to(device) for each in (self._gain, self._path_weight, self._drawn_log)
        )
        self._credit_gain = None if self._credit_gain is None else self._credit_gain.to(device)
        self.table.to(device)
        if self._reference_point:
            self._reference_point.to(device)
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
        soft_labels: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Compute the loss of B pairs.

        Args:
            policy_pred: the policy's output, (2B,C,H,W): B winners, then their B losers.
            reference_pred: the reference's output, same shape, without a gradient. None for ``sft`` and ``mapo``, and where
                ``reference_errors`` is given.
            noise: ε, (B,C,H,W) where winner and loser share it, or (2B,C,H,W) where each has its own.
            timesteps: (B,) int64, shared by winner and loser.
            noisy_latents: x_t, (2B,C,H,W). Needed only where the model predicts v or the sample.
            reference_errors: d(ref,·), (2B,), given instead of ``reference_pred``. They are the ``reference_errors`` of an earlier
                call with the same noise and timesteps. The loss is then the same: on a CPU to the last bit; on a GPU a test checks it.
            soft_labels: the certainty of each pair's label, such as the winner's share of votes, (B,) in [0, 1]. Required where the
                option ``soft_labels`` is on, refused where it is off. Their range is checked on the CPU alone, because reading
                a GPU tensor makes the host wait for the GPU.

        Raises:
            UserError: shapes do not match, an input is missing or given twice, or a label is out of range.
        """
        self._check(policy_pred, reference_pred, reference_errors, noise, timesteps, noisy_latents)
        self._check_labels(soft_labels, len(timesteps))
        if self._gain.device != policy_pred.device:
            self.to(policy_pred.device)
        target = self.schedule.target(noise, timesteps.repeat(2), noisy_latents)
        sums = noise_sums(
            policy_pred,
            reference_pred if self.needs_reference else None,
            target,
            moved=self.needs_reference and reference_pred is not None,
            teach_moved=self.spec.needs_prediction,
            inner=self.options.winner_preserving is not None,
        )
        policy_error, reference_error, share = sums.policy, sums.reference, self.options.winner_preserving
        if sums.inner is not None and share is not None:
            policy_error = losses.preserve_winner(policy_error, sums.inner, policy_pred[0].numel(), share)
        if self.needs_reference and reference_error is None:
            assert reference_errors is not None  # _check refuses a call with neither reference_pred nor reference_errors.
            reference_error = reference_errors.to(policy_error.dtype)

        of_each, z = self.pair_losses(timesteps, policy_error, reference_error, sums.moved, soft_labels)
        loss, z, policy_error = of_each.mean(), z.detach(), policy_error.detach()
        if reference_error is None:
            return ObjectiveOutput(loss, z, self._unreferenced_metrics(loss.detach(), z, policy_error))
        errors = torch.cat([policy_error, reference_error]).view(4, -1)
        self.table.add(timesteps, losses.margin(policy_error, reference_error), errors)
        if self._reference_point:
            self._reference_point.add(reference_error - policy_error)
        metrics, by_timestep = self._metrics(loss.detach(), z, errors, timesteps, soft_labels)
        if sums.moved is not None:
            metrics |= self._path_metrics(sums.moved.detach(), reference_error, timesteps, policy_pred[0].numel())
        return ObjectiveOutput(loss, z, metrics, by_timestep, reference_error)

    def pair_losses(
        self,
        timesteps: Tensor,
        policy: Tensor,
        reference: Tensor | None,
        moved: Tensor | None = None,
        soft_labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair, (B,), and z for the metrics, (B,), or (0,) for ``sft``. Use the current state and leave it as it is.

        Args:
            timesteps: (B,).
            policy, reference, moved: d(θ,·), d(ref,·) and ‖ε_θ - ε_ref‖², (2B,) each, winners then losers. ``reference`` is None for
                objectives without a reference. Only ``dspo`` needs ``moved``.
            soft_labels: (B,).
        """
        z = None if reference is None else self.logits(losses.margin(policy, reference), timesteps)
        if self.spec.own_loss:
            point = self._reference_point.value.to(policy.dtype) if self._reference_point else None
            steps = self.schedule.num_train_timesteps
            return self.spec.own_loss(losses.Terms(policy, reference, moved, z, self.beta, steps, point))
        assert z is not None  # An objective without a reference has its own loss.
        of_each = self.link.loss(z) if soft_labels is None else self.link.loss(z, soft_labels.to(z.dtype))
        if self._credit_gain is not None:
            of_each = self._mean_credit(self._credit_gain)[timesteps].to(z.dtype) * of_each
        return of_each, z

    def _mean_credit(self, gain: Tensor) -> Tensor:
        """Return c_t / mean(c), (T,) float64, for ``credit: mean``. The mean is over p(t).

        c_t = g_t σ(-z̄_t), with z̄_t from the mean margin of the correction table. The computation uses logarithms, so that no share
        underflows where the policy is far ahead at every timestep.
        """
        margin = self.table.average[0][self.table.bucket]
        z = losses.logits(margin, gain, self.table.correction, self.beta, self.correction_weight)
        credit = gain.log() + torch.nn.functional.logsigmoid(-z)
        return torch.exp(credit - torch.logsumexp(credit + self._drawn_log, 0))

    def logits(self, margin: Tensor, timesteps: Tensor) -> Tensor:
        """Return z, (B,), of pairs with these margins, (B,), at these timesteps, (B,), by the current correction table.

        With ``credit: mean``, return the z of ``uniform``.
        """
        gain, correction = (table[timesteps].to(margin.dtype) for table in (self._gain, self.table.correction))
        weight = self.correction_weight if self._credit_gain is None else 0.0
        return losses.logits(margin, gain, correction, self.beta, weight)

    def correction(self, timesteps: Tensor) -> Tensor:
        """Return K_t of the given timesteps, (B,) float64, from the table of the last :meth:`commit`."""
        return self.table.correction[timesteps]

    def commit(self) -> None:
        """End an optimizer step: all-reduce the step's sums and update the correction table. Collective."""
        if self.needs_reference:
            self.table.commit()
        if self._reference_point:
            self._reference_point.commit()

    def discard(self) -> None:
        """Forget the step's sums. Call this instead of :meth:`commit` where the optimizer skipped the step."""
        self.table.discard()
        if self._reference_point:
            self._reference_point.discard()

    def state_dict(self) -> dict[str, Tensor]:
        point = {"reference_point": self._reference_point.value.cpu().clone()} if self._reference_point else {}
        return {**self.table.state_dict(), **point}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.table.load_state_dict(state)
        if self._reference_point:
            self._reference_point.discard()
            self._reference_point.value.copy_(state["reference_point"])

    @torch.no_grad()
    def _unreferenced_metrics(self, loss: Tensor, z: Tensor, policy_error: Tensor) -> dict[str, Tensor]:
        winner, loser = policy_error.chunk(2)
        metrics = {"loss": loss, "error/policy_chosen": winner.mean(), "error/policy_rejected": loser.mean()}
        return metrics | ({"rewards/accuracies": losses.share_ahead(z).mean()} if len(z) else {})

    @torch.no_grad()
    def _path_metrics(self, moved: Tensor, reference_error: Tensor, timesteps: Tensor, elements: int) -> dict[str, Tensor]:
        """Return the path KL between policy and reference in nats, and, for comparison, the same sum over the reference's errors."""
        weight = elements * self._path_weight[timesteps].repeat(2)
        return {"drift/path_kl": (weight * moved).mean(), "error/reference_path": (weight * reference_error).mean()}

    @torch.no_grad()
    def _credit(self, z: Tensor, timesteps: Tensor, soft_labels: Tensor | None) -> Tensor:
        """Return each pair's credit, g_t times the absolute value of the link's weight, (B,). Return zeros for an objective with its own loss."""
        if self.spec.own_loss:
            return torch.zeros_like(z)
        gain = self._gain if self._credit_gain is None else self._mean_credit(self._credit_gain)
        weight = self.link.weight(z) if soft_labels is None else self.link.weight(z, soft_labels.to(z.dtype))
        return gain[timesteps].to(z.dtype) * weight.abs()  # Some links push a pair back once it is far enough ahead.

    @torch.no_grad()
    def _metrics(
        self, loss: Tensor, z: Tensor, errors: Tensor, timesteps: Tensor, soft_labels: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        chosen_drift, rejected_drift = errors[:2] - errors[2:]
        gain = self._gain[timesteps].to(z.dtype)
        scale = -(self.beta / 2) * gain
        margins, ahead = scale * (chosen_drift - rejected_drift), losses.share_ahead(rejected_drift - chosen_drift)
        # With ``credit: mean`` K shapes the credit, and is no part of z.
        correction = (self.correction_weight if self._credit_gain is None else 0.0) * self.correction(timesteps).mean()
        metrics = {
            "loss": loss,
            "rewards/chosen": (scale * chosen_drift).mean(),
            "rewards/rejected": (scale * rejected_drift).mean(),
            "rewards/margins": margins.mean(),
            "rewards/accuracies": losses.share_ahead(z).mean(),
            # Without the correction, so that the number compares between objectives.
            "rewards/margin_accuracies": ahead.mean(),
            "drift/chosen": chosen_drift.mean(),
            "drift/rejected": rejected_drift.mean(),
            "dde/correction_mean": correction,
            "dde/offset_mean": 0 - self.beta / 2 * correction,  # In units of z.
        }
        if not self.spec.own_loss and LINKS[self.options.link].one_sided:
            # The shares of saturated pairs. Where σ(-z) is near 0, the pair is learnt and teaches nothing more. Where σ(-z) is near 1,
            # the pair is far on the wrong side and pushes with full weight.
            push = losses.logistic_weight(z)
            metrics["dde/saturated_learnt"] = (push < SATURATED).to(z.dtype).mean()
            metrics["dde/saturated_wrong"] = (push > 1 - SATURATED).to(z.dtype).mean()
        if self._reference_point:
            metrics["kto/reference_point"] = self._reference_point.value
        metrics |= {f"error/{name}": error.mean() for name, error in zip(ERROR_NAMES, errors, strict=True)}
        by_timestep = z.new_zeros(len(BY_TIMESTEP), TIMESTEP_BUCKETS)
        bucket = timesteps * TIMESTEP_BUCKETS // self.schedule.num_train_timesteps
        credit = self._credit(z, timesteps, soft_labels)
        by_timestep.index_add_(1, bucket, torch.stack([ahead, margins, chosen_drift, errors[2], credit, torch.ones_like(z)]))
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
            raise UserError(f"objective {self.name!r} compares with a reference, but reference_pred is None")
        if self.spec.needs_prediction and reference_pred is None:
            raise UserError(f"objective {self.name!r} {NEEDS_PREDICTION}: reference_errors are not enough, give reference_pred")
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

    def _check_labels(self, soft_labels: Tensor | None, pairs: int) -> None:
        if (soft_labels is not None) != self.options.soft_labels:
            given = (
                "given, but objective.soft_labels is off" if soft_labels is not None else "missing, but objective.soft_labels is on"
            )
            raise UserError(f"soft_labels are {given}")
        if soft_labels is None:
            return
        if soft_labels.shape != (pairs,):
            raise UserError(f"soft_labels has shape {tuple(soft_labels.shape)}: expected ({pairs},)")
        if soft_labels.device.type == "cpu":
            check_soft_labels(soft_labels)


def check_soft_labels(labels: Tensor) -> None:
    """Refuse labels outside [0, 1]. This waits for the labels' device.

    Raises:
        UserError: a label is outside [0, 1] or not a number.
    """
    wrong = labels[~((labels >= 0) & (labels <= 1))]
    if len(wrong):
        raise UserError(f"soft label {wrong[0].item():g}: must lie in [0, 1], the share of votes for the winner")


def build_objective(
    name: str,
    schedule: NoiseSchedule,
    *,
    beta: float = 2000.0,
    correction_weight: float = 1.0,
    correction_ema: float = 0.9,
    correction_buckets: int = 50,
    discount: float | None = None,
    discount_mode: str = "weight",
    timestep_range: tuple[int, int] | None = None,
    link: str = "logistic",
    label_smoothing: float = 0.0,
    soft_labels: bool = False,
    winner_preserving: float | None = None,
    credit: str = "pair",
    single_shot: str = "weight",
) -> Objective:
    """Build an objective by its name.

    Args:
        name: a row of :data:`dde_ds.objective.specs.OBJECTIVES`. Among them are ``dde`` (eq. 11), its ablations ``dde_single`` (no
            correction) and ``dde_step`` (no single-shot weight), and ``uniform`` (eq. 12: Diffusion-DPO, D3PO). An objective with its
            own loss, such as ``sft`` or ``kto``, uses only ``timestep_range`` of the options below, and ``beta`` where its loss has one.
        schedule: the noise schedule of the trained model.
        beta: β, the strength of the preference term, for errors that are *means* over a latent's elements. Diffusion-DPO uses 2000 for
            SD1.5 and 5000 for SDXL.
        correction_weight: η, the weight of the stepwise correction. The default 1, as in eq. 11, is our choice. With 0, ``dde`` equals
            ``dde_single`` bit for bit.
        correction_ema: ρ, the share of the table's sums that remains after an optimizer step. The paper says "exponential moving
            average"; the default 0.9 is our choice.
        correction_buckets: n, from 1 to T: the number of equal ranges of timesteps. The timesteps of a range share one average margin.
            T gives the paper's array, but at small batches its entries are old.
        discount: γ per training timestep, for ``discounted``. The default is 0.9^(50/T), which is 0.9 per step of a 50-step sampler.
        discount_mode: ``weight`` puts γ^(T-1-t) inside log σ. ``sample`` draws t in proportion to γ^(T-1-t). The two are different
            objectives.
        timestep_range: [lo, hi), the range from which timesteps are drawn. The default is all timesteps.
        link: the function from z to the loss, a row of :data:`dde_ds.objective.links.LINKS`.
        label_smoothing: ε in [0, 0.5), the assumed share of wrong labels, for ``logistic``, ``robust`` and ``dmpo``.
        soft_labels: use the labels that each call gives for its pairs instead of 1-ε, for ``logistic`` and ``dmpo``.
        winner_preserving: μ in [0, 1] of :func:`dde_ds.objective.losses.preserve_winner`. By default losers' gradients stay whole.
        credit: the way to distribute the gradient over timesteps. ``pair`` uses g_t, K_t and each pair's own z. ``mean`` multiplies the
            link of ``uniform``'s z by c_t / mean(c), where c_t = g_t σ(-z̄_t) comes from the correction table's mean margins and carries
            no gradient. With ``mean``, a pair far on the wrong side weighs no more than its timestep does.
        single_shot: ``weight`` for w_t with η as given (eq. 11), or ``calibrated`` for 1/ᾱ_t with twice η. For ``dde`` and
            ``dde_single``. For Gaussian data of unit variance, ``calibrated`` makes z/β 0.995 to 1.004 of a pair's true log ratio;
            ``weight`` makes it 0.44 to 0.99.

    Raises:
        UserError: the name is unknown, an option is out of range, or an option has no meaning with the objective.
    """
    if name not in OBJECTIVES:
        raise UserError(f"objective.name {name!r}{nearest(str(name), OBJECTIVES)}")
    if not 0 < beta < math.inf:
        raise UserError(f"objective.beta is {beta}: it must be a finite number above 0")
    if not 0 <= correction_weight < math.inf:
        raise UserError(f"objective.correction_weight is {correction_weight}: it must be a finite number, 0 or more")
    if not 0 <= correction_ema < 1:
        raise UserError(f"objective.correction_ema is {correction_ema}: it must lie in [0, 1)")
    if not 1 <= correction_buckets <= schedule.num_train_timesteps:
        raise UserError(
            f"objective.correction_buckets is {correction_buckets}: it must lie in 1 to {schedule.num_train_timesteps}, the number of timesteps"
        )
    if discount_mode not in ("weight", "sample"):
        raise UserError(f"objective.discount_mode {discount_mode!r}{nearest(str(discount_mode), ('weight', 'sample'))}")
    discount = float(0.9 ** (50 / schedule.num_train_timesteps)) if discount is None else discount
    if not 0 < discount <= 1:
        raise UserError(f"objective.discount is {discount}: it must lie in (0, 1]")
    low, high = (0, schedule.num_train_timesteps) if timestep_range is None else timestep_range
    if not 0 <= low < high <= schedule.num_train_timesteps:
        raise UserError(f"objective.timestep_range is [{low}, {high}): it must lie within [0, {schedule.num_train_timesteps})")
    options = LossOptions(link, label_smoothing, soft_labels, winner_preserving, credit, single_shot)
    _check_options(name, options)
    return Objective(
        name, schedule, beta, correction_weight, correction_ema, correction_buckets, discount, discount_mode, (low, high), options
    )


def _check_options(name: str, options: LossOptions) -> None:
    """Refuse options that are invalid alone or in combination.

    Raises:
        UserError: an option is out of range, or has no meaning with the objective or with another option.
    """
    if options.link not in LINKS:
        raise UserError(f"objective.link {options.link!r}{nearest(str(options.link), LINKS)}")
    if options.credit not in CREDITS:
        raise UserError(f"objective.credit {options.credit!r}{nearest(str(options.credit), CREDITS)}")
    if options.single_shot not in SINGLE_SHOTS:
        raise UserError(f"objective.single_shot {options.single_shot!r}{nearest(str(options.single_shot), SINGLE_SHOTS)}")
    if not 0 <= options.label_smoothing < 0.5:
        raise UserError(f"objective.label_smoothing is {options.label_smoothing}: it must lie in [0, 0.5)")
    if options.winner_preserving is not None and not 0 <= options.winner_preserving <= 1:
        raise UserError(f"objective.winner_preserving is {options.winner_preserving}: it must lie in [0, 1]")
    spec, chosen = OBJECTIVES[name], LINKS[options.link]
    of_the_link = {key: getattr(options, key) for key in ("link", "label_smoothing", "soft_labels", "winner_preserving", "credit")}
    for key, value in of_the_link.items():
        if spec.own_loss and value != getattr(LossOptions, key):
            raise UserError(f"objective.{key} is {value!r}: {name} has a loss of its own, on which it has no effect; leave it out")
    if options.label_smoothing and not chosen.smoothing:
        raise UserError(
            f"objective.label_smoothing is {options.label_smoothing}: objective.link {options.link} has no label; only "
            f"{', '.join(key for key, row in LINKS.items() if row.smoothing)} have one"
        )
    if options.soft_labels and not chosen.soft_labels:
        raise UserError(
            f"objective.soft_labels is true: objective.link {options.link} takes no labels of its pairs; only "
            f"{', '.join(key for key, row in LINKS.items() if row.soft_labels)} do"
        )
    if options.soft_labels and options.label_smoothing:
        raise UserError(f"objective.label_smoothing is {options.label_smoothing}: a pair's own label takes its place; leave it out")
    if options.single_shot != "weight" and spec.gain is not single_shot:
        raise UserError(f"objective.single_shot is {options.single_shot!r}: {name} has no single-shot weight; leave it out")


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
    """Build the objective of a run's ``objective`` section, :class:`dde_ds.config.ObjectiveConfig`, for a model's scheduler configuration.

    Raises:
        UserError: for the reasons of :func:`build_objective` and :meth:`.schedule.NoiseSchedule.from_scheduler`.
    """
    return build_objective(
        options.name,
        NoiseSchedule.from_scheduler(scheduler, options.variance),
        beta=options.beta,
        correction_weight=options.correction_weight,
        correction_ema=options.correction_ema,
        correction_buckets=options.correction_buckets,
        discount=options.discount,
        discount_mode=options.discount_mode,
        timestep_range=options.timestep_range,
        link=options.link,
        label_smoothing=options.label_smoothing,
        soft_labels=options.soft_labels,
        winner_preserving=options.winner_preserving,
        credit=options.credit,
        single_shot=options.single_shot,
    )
