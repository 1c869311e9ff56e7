"""The noise schedule and the two weights of DDE, in float64 (arXiv 2411.14871, eq. 1-4).

Timesteps are diffusers' indices t = 0 … T-1, so ``alphas_cumprod[t]`` is ᾱ after t+1 noising steps. The paper's step k is index k-1.
Before the first step ᾱ is 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dde_ds.errors import UserError, nearest

# A schedule rescaled to zero terminal SNR ends at ᾱ = 0, where w is infinite. So ᾱ is floored at float16's smallest positive number.
# diffusers' Euler schedulers do this for the same reason. w is then at most 2²⁴, and nothing becomes NaN.
TERMINAL_ALPHA_CUMPROD = 2.0**-24
# The upper limit of w and λ. diffusers' own schedules stay below 2²⁹. Far above the limit, β·w·m would overflow float32 and end in NaN.
LARGEST_WEIGHT = 1e12

MOST_TIMESTEPS = 100_000
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def _cosine(u: float) -> float:
    """Return ᾱ at the share u of the steps (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17)."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(u: float) -> float:
    """Return diffusers' curve at the share u of the steps. In it half the log SNR is Laplace-distributed (Hang et al. 2024, arXiv 2407.03297)."""
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6))
    return math.sqrt(snr / (1 + snr))


SIGNAL_CURVES = {"squaredcos_cap_v2": _cosine, "laplace": _laplace}


@dataclass(frozen=True)
class NoiseTarget:
    """The target of N predictions: scale · prediction + shift · x_t, the implied ε_θ, is compared with ε."""

    noise: Tensor
    """ε, (N,C,H,W), or (N/2,C,H,W) where winners and losers share it."""

    scale: Tensor | None = None
    """(N,). For a model that predicts the noise itself, ``scale``, ``shift`` and ``noisy`` are all None."""

    shift: Tensor | None = None
    """(N,)."""

    noisy: Tensor | None = None
    """x_t, (N,C,H,W)."""

    @property
    def implied(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return x_t, scale and shift, or None for a model that predicts the noise itself."""
        if self.scale is None:
            return None
        assert self.noisy is not None and self.shift is not None  # Either all three are given or none.
        return self.noisy, self.scale, self.shift


@dataclass(frozen=True)
class NoiseSchedule:
    """Tables of the forward process, float64, each of shape (T,). They are on the CPU until :meth:`to` moves them.

    Build a schedule with :meth:`from_scheduler`, so that every constant comes from the pipeline's own scheduler.
    """

    alphas_cumprod: Tensor
    """ᾱ_t = Π_{s≤t} (1-β_s)."""

    single_shot_weight: Tensor
    """w_t = (1-ᾱ_t)/ᾱ_t = 1/SNR(t). For the single-shot estimate x̂₀, ‖x₀ - x̂₀‖² = w_t ‖ε - ε_θ‖² (eq. 4, 10)."""

    stepwise_weight: Tensor
    """λ_t = β_t²/(2 σ_t² α_t (1-ᾱ_t)). The KL of one denoising step is λ_t ‖ε - ε_θ‖² (eq. 3, 7). λ_0 is stored as 0, because it would
    divide by zero with the posterior variance and no sum needs it."""

    prediction_type: str = "epsilon"
    """The kind of the model's output: ``epsilon``, ``v_prediction`` or ``sample``."""

    @property
    def num_train_timesteps(self) -> int:
        """Return T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    @classmethod
    def from_scheduler(cls, scheduler: Any, variance: str = "posterior") -> NoiseSchedule:
        """Compute the tables from a diffusers scheduler, its config, or the dict in ``scheduler_config.json``.

        ``variance`` chooses σ_t² of the reverse step: ``posterior`` is β_t(1-ᾱ_{t-1})/(1-ᾱ_t), and ``beta`` is β_t. The paper leaves
        this choice open. Our default is the posterior variance.

        Raises:
            UserError: the beta schedule, the prediction type or the variance is unknown, a beta lies outside (0, 1), or a weight is too
                large for training because betas lie too near to 0 or 1.
        """
        config = scheduler if isinstance(scheduler, Mapping) else scheduler.config
        betas = _betas(config)
        if len(betas) < 2:
            raise UserError(f"scheduler has {len(betas)} training timesteps: expected at least 2")
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise UserError(f"scheduler betas must lie in (0, 1), got a range of {betas.min():g} to {betas.max():g}")
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        if config.get("rescale_betas_zero_snr", False):
            alphas_cumprod = _rescale_zero_terminal_snr(alphas_cumprod)
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise UserError(f"scheduler prediction_type {prediction_type!r}{nearest(str(prediction_type), PREDICTION_TYPES)}")
        single_shot_weight = (1 - alphas_cumprod) / alphas_cumprod
        stepwise_weight = _stepwise_weight(alphas_cumprod, variance)
        for name, weight in (("w", single_shot_weight), ("λ", stepwise_weight)):
            beyond = (~(weight <= LARGEST_WEIGHT)).nonzero().flatten().tolist()  # The negation catches NaN too.
            if beyond:
                raise UserError(
                    f"scheduler betas: the weight {name} at timestep {beyond[0]} is {weight[beyond[0]]:g}, above {LARGEST_WEIGHT:g}; "
                    "its betas lie too near to 0 or 1 for training"
                )
        return cls(alphas_cumprod, single_shot_weight, stepwise_weight, prediction_type)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε, (B,C,H,W), in clean's dtype (eq. 2).

        ``clean`` is x₀ and ``noise`` is ε, (B,C,H,W) each. ``timesteps`` is (B,). The computation runs in float32 or wider.
        """
        dtype = torch.promote_types(clean.dtype, torch.float32)
        alpha = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt().to(dtype) * clean.to(dtype) + (1 - alpha).sqrt().to(dtype) * noise.to(dtype)
        return noisy.to(clean.dtype)

    def path_weights(self, probabilities: Tensor) -> Tensor:
        """Return λ_t/p(t), (T,) float64, with 0 where p(t) = 0. These weights turn a mean over drawn timesteps into the path KL.

        The path KL is the KL divergence between the reverse chains of policy and reference, in nats. For latents of D elements it is
        D Σ_t λ_t E‖ε_θ - ε_ref‖². One step contributes λ_t times the squared difference of the two predictions (eq. 3, with ε_ref
        instead of ε). For t drawn from p, the path KL is the mean of the returned weight times D·‖ε_θ - ε_ref‖². Where p leaves
        timesteps out, the sum runs over the others.
        """
        drawn = probabilities > 0
        return torch.where(drawn, self.stepwise_weight.to(probabilities.device) / torch.where(drawn, probabilities, 1), 0)

    def target(self, noise: Tensor, timesteps: Tensor, noisy: Tensor | None = None) -> NoiseTarget:
        """Return the target of predictions at ``timesteps``, (N,). ``noisy`` is x_t; a model that predicts noise does not need it.

        The formulas follow from x_t = √ᾱ x₀ + √(1-ᾱ) ε and v = √ᾱ ε - √(1-ᾱ) x₀ (Salimans & Ho 2022, arXiv 2202.00512, app. D).
        """
        if self.prediction_type == "epsilon":
            return NoiseTarget(noise)
        alpha = self.alphas_cumprod.to(timesteps.device)[timesteps]
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        if self.prediction_type == "v_prediction":
            return NoiseTarget(noise, signal, sigma, noisy)
        return NoiseTarget(noise, -signal / sigma, 1 / sigma, noisy)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """Return the same tables on ``device``, which avoids a copy at every use."""
        tables = ("alphas_cumprod", "single_shot_weight", "stepwise_weight")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in tables})


def _betas(config: Mapping) -> Tensor:
    """Return β_t, (T,) float64, for one of the schedules with which diffusers trains."""
    if config.get("trained_betas") is not None:
        try:
            return torch.tensor(config["trained_betas"], dtype=torch.float64).flatten()
        except (TypeError, ValueError):
            raise UserError("scheduler trained_betas: expected a list of numbers") from None
    kind = config.get("beta_schedule")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"scheduler beta_schedule is {kind!r}: expected a name")
    # Guess no missing value: diffusers' schedulers differ in their defaults, and flow-matching schedulers have no betas at all.
    needed = ["beta_schedule"] if kind in SIGNAL_CURVES else ["beta_schedule", "beta_start", "beta_end"]
    missing = [key for key in needed if config.get(key) is None]
    if missing or config.get("snr_shift_scale"):
        what = f"no {', '.join(missing)}" if missing else f"snr_shift_scale is {config['snr_shift_scale']}, which is not supported"
        raise UserError(
            f"scheduler {config.get('_class_name', 'config')}: {what}; the scheduler of a DDPM-trained model is needed "
            "(flow matching and EDM are not)"
        )
    steps = config.get("num_train_timesteps", 1000)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 2 <= steps <= MOST_TIMESTEPS:
        raise UserError(f"scheduler num_train_timesteps is {steps!r}: expected a whole number from 2 to {MOST_TIMESTEPS}")
    if kind in SIGNAL_CURVES:
        signal = [SIGNAL_CURVES[kind](i / steps) for i in range(steps + 1)]
        return torch.tensor([min(1 - after / before, 0.999) for before, after in itertools.pairwise(signal)], dtype=torch.float64)
    start, end = config["beta_start"], config["beta_end"]
    for key, value in (("beta_start", start), ("beta_end", end)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise UserError(f"scheduler {key} is {value!r}: expected a number in (0, 1)")
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if kind == "sigmoid":
        return torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (end - start) + start
    raise UserError(f"scheduler beta_schedule {kind!r}{nearest(str(kind), ('linear', 'scaled_linear', 'sigmoid', *SIGNAL_CURVES))}")


def _rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that it ends at 0 and keeps its first value (Lin et al. 2023, arXiv 2305.08891, alg. 1)."""
    root = alphas_cumprod.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root.square().clamp_min(TERMINAL_ALPHA_CUMPROD)


def _stepwise_weight(alphas_cumprod: Tensor, variance: str) -> Tensor:
    """Return λ_t, (T,), in a form with one β_t cancelled.

    The floor of a zero-SNR schedule can hold several timesteps, where β_t is 0. λ_t is then 0 there as well, instead of 0/0.
    """
    previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    alphas = alphas_cumprod / previous
    if variance == "posterior":
        remaining = 1 - previous
    elif variance == "beta":
        remaining = 1 - alphas_cumprod
    else:
        raise UserError(f"objective.variance {variance!r}{nearest(str(variance), ('posterior', 'beta'))}")
    weight = (1 - alphas) / (2 * alphas * remaining)
    weight[0] = 0.0
    return weight
