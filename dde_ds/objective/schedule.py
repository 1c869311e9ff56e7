"""The noise schedule and the two weights of DDE, in float64 (arXiv 2411.14871, eq. 1-4).

Timesteps are diffusers' indices t = 0 … T-1, so ``alphas_cumprod[t]`` is ᾱ after t+1 noising steps; the paper's step k is
index k-1, and ᾱ before the first step is 1.
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

# A schedule rescaled to zero terminal SNR ends at ᾱ = 0, where w is infinite. ᾱ is floored at float16's smallest positive
# number, as diffusers' Euler schedulers do for the same reason: w is then at most 2²⁴ and nothing becomes NaN.
TERMINAL_ALPHA_CUMPROD = 2.0**-24
# Of w and λ. diffusers' own schedules stay below 2²⁹; far above, β·w·m would leave float32, which ends in NaN.
LARGEST_WEIGHT = 1e12

MOST_TIMESTEPS = 100_000
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def _cosine(u: float) -> float:
    """ᾱ at the share u of the steps (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17)."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(u: float) -> float:
    """diffusers' curve after Hang et al. 2024, arXiv 2407.03297: half the log SNR is Laplace-distributed."""
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6))
    return math.sqrt(snr / (1 + snr))


SIGNAL_CURVES = {"squaredcos_cap_v2": _cosine, "laplace": _laplace}


@dataclass(frozen=True)
class NoiseTarget:
    """What N predictions are compared with: scale · prediction + shift · x_t, the implied ε_θ, against ε."""

    noise: Tensor
    """ε, (N,C,H,W), or (N/2,C,H,W) where winners and losers share it."""

    scale: Tensor | None = None
    """(N,). None, with the two below, for a model that predicts the noise itself."""

    shift: Tensor | None = None
    """(N,)."""

    noisy: Tensor | None = None
    """x_t, (N,C,H,W)."""

    @property
    def implied(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return x_t, scale and shift, or None for a model that predicts the noise itself."""
        if self.scale is None:
            return None
        assert self.noisy is not None and self.shift is not None  # all three or none
        return self.noisy, self.scale, self.shift


@dataclass(frozen=True)
class NoiseSchedule:
    """Tables of the forward process, float64, each of shape (T,), on the CPU until :meth:`to` moves them.

    Build it with :meth:`from_scheduler`, so that every constant comes from the pipeline's own scheduler.
    """

    alphas_cumprod: Tensor
    """ᾱ_t = Π_{s≤t} (1-β_s)."""

    single_shot_weight: Tensor
    """w_t = (1-ᾱ_t)/ᾱ_t = 1/SNR(t): ‖x₀ - x̂₀‖² = w_t ‖ε - ε_θ‖² for the single-shot estimate x̂₀ (eq. 4, 10)."""

    stepwise_weight: Tensor
    """λ_t = β_t²/(2 σ_t² α_t (1-ᾱ_t)): the KL of one denoising step is λ_t ‖ε - ε_θ‖² (eq. 3, 7). λ_0 is stored as 0: it
    divides by zero with the posterior variance and no sum needs it."""

    prediction_type: str = "epsilon"
    """What the model's output is: ``epsilon``, ``v_prediction`` or ``sample``."""

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    @classmethod
    def from_scheduler(cls, scheduler: Any, variance: str = "posterior") -> NoiseSchedule:
        """Tables from a diffusers scheduler, its config, or the dict in ``scheduler_config.json``.

        ``variance`` is σ_t² of the reverse step: ``posterior``, β_t(1-ᾱ_{t-1})/(1-ᾱ_t), or ``beta``, β_t. The paper leaves
        it open; the posterior variance is our default.

        Raises:
            UserError: an unknown beta schedule, prediction type or variance, betas outside (0, 1), or so near to either end that
                a weight is too large to train with.
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
            beyond = (~(weight <= LARGEST_WEIGHT)).nonzero().flatten().tolist()  # NaN as well
            if beyond:
                raise UserError(
                    f"scheduler betas: the weight {name} at timestep {beyond[0]} is {weight[beyond[0]]:g}, above {LARGEST_WEIGHT:g}; "
                    "its betas lie too near to 0 or 1 for training"
                )
        return cls(alphas_cumprod, single_shot_weight, stepwise_weight, prediction_type)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε (eq. 2).

        ``clean`` and ``noise`` are (B,C,H,W), ``timesteps`` (B,). Computed in float32 or wider, given back in clean's dtype.
        """
        dtype = torch.promote_types(clean.dtype, torch.float32)
        alpha = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt().to(dtype) * clean.to(dtype) + (1 - alpha).sqrt().to(dtype) * noise.to(dtype)
        return noisy.to(clean.dtype)

    def path_weights(self, probabilities: Tensor) -> Tensor:
        """Return λ_t/p(t), (T,) float64, 0 where nothing is drawn: for t drawn from p, its mean with D·‖ε_θ - ε_ref‖² is the path KL.

        That is the KL divergence between the reverse chains of policy and reference, in nats, for latents of D elements:
        D Σ_t λ_t E‖ε_θ - ε_ref‖², as one step's is λ_t times the squared distance of its two means (eq. 3, with the reference's ε for ε).
        Where p leaves timesteps out, the sum is over the rest.
        """
        drawn = probabilities > 0
        return torch.where(drawn, self.stepwise_weight.to(probabilities.device) / torch.where(drawn, probabilities, 1), 0)

    def target(self, noise: Tensor, timesteps: Tensor, noisy: Tensor | None = None) -> NoiseTarget:
        """What predictions at ``timesteps``, (N,), are compared with. ``noisy`` is x_t, which a noise model does not need.

        From x_t = √ᾱ x₀ + √(1-ᾱ) ε and v = √ᾱ ε - √(1-ᾱ) x₀ (Salimans & Ho 2022, arXiv 2202.00512, app. D).
        """
        if self.prediction_type == "epsilon":
            return NoiseTarget(noise)
        alpha = self.alphas_cumprod.to(timesteps.device)[timesteps]
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        if self.prediction_type == "v_prediction":
            return NoiseTarget(noise, signal, sigma, noisy)
        return NoiseTarget(noise, -signal / sigma, 1 / sigma, noisy)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same tables there, which spares a copy at every use."""
        tables = ("alphas_cumprod", "single_shot_weight", "stepwise_weight")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in tables})


def _betas(config: Mapping) -> Tensor:
    """β_t, float64, of the schedules that diffusers trains with."""
    if config.get("trained_betas") is not None:
        try:
            return torch.tensor(config["trained_betas"], dtype=torch.float64).flatten()
        except (TypeError, ValueError):
            raise UserError("scheduler trained_betas: expected a list of numbers") from None
    kind = config.get("beta_schedule")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"scheduler beta_schedule is {kind!r}: expected a name")
    # Nothing is guessed: diffusers' schedulers differ in their defaults, and flow-matching ones have no betas at all.
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
    """Shift and scale √ᾱ so that it ends at 0 and starts where it did (Lin et al. 2023, arXiv 2305.08891, alg. 1)."""
    root = alphas_cumprod.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root.square().clamp_min(TERMINAL_ALPHA_CUMPROD)


def _stepwise_weight(alphas_cumprod: Tensor, variance: str) -> Tensor:
    """λ with one β_t divided out, since that is 0 where the floor of a zero-SNR schedule holds several timesteps: so is λ there."""
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
