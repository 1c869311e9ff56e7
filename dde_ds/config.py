"""The configuration of a run: frozen dataclasses, read from strict YAML with ``a.b=value`` overrides.

The docstring below each field gives its meaning, its unit and when to change it. An unknown key, or a value of the wrong type or out
of range, ends in one line that names the key. The learning rate is used as written: it is never scaled by batch or ranks.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dde_ds.errors import UserError, nearest
from dde_ds.strict_yaml import dump_yaml, parse_yaml, read_yaml
from dde_ds.text import half_surrogate, without_passwords
from dde_ds.warn import reason

MANY = 10**9
"""Upper limit of counts of steps, pairs and files. Larger values are typing errors, or more than any machine can process."""
LONGEST_TIMEOUT = 100_000
"""Upper limit of minutes to wait for other ranks: two months."""
RENAMED = {
    "batch.micro": "batch.micro_batch_size",
    "reference.ledger": "reference.precomputed",
    "log.tensorboard": "log.trackers: [tensorboard]",
    "log.wandb_project": "log.trackers: [wandb], and log.project for its name",
}
"""Map keys of earlier versions to what they are called now."""
PATHS = re.compile(r"(path|output|deepspeed|precomputed|cache_dir|lora\.init)$")
"""Match keys whose text is, or may be, a path."""
TRAINABLE = {"all": ("*",), "attention": ("*.attn1.*", "*.attn2.*"), "cross_attention": ("*.attn2.*",)}
"""Patterns of the names of the parameters that each word of ``model.trainable`` selects."""
LONGEST_TEXT = 4096
"""Upper limit of characters in a text. Linux accepts no longer path."""


def _require(condition: bool, key: str, value: Any, expected: str) -> None:
    if not condition:
        raise UserError(f"{key} is {_shown(value)}: {expected}")


def _number(key: str, value: float, low: float, high: float = MANY) -> None:
    _require(value >= low, key, value, f"must be {low} or more")
    _require(value <= high, key, value, f"must be {high:,} or less")


def _positive(key: str, value: float, high: float = MANY) -> None:
    _require(value > 0, key, value, "must be above 0")
    _require(value <= high, key, value, f"must be {high:,} or less")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 100
_SHORT.maxlist = _SHORT.maxdict = 8


def _shown(value: Any) -> str:
    """Return a value for a message, cut short where it is long or deep."""
    return _SHORT.repr(value)


@dataclass(frozen=True)
class ModelConfig:
    path: str
    """Diffusers pipeline to align: a folder, or a hub id such as ``stabilityai/stable-diffusion-xl-base-1.0``. It is also the reference."""

    revision: str | None = None
    """Branch, tag or commit of a hub id. Pin it to make a run repeatable."""

    variant: str | None = None
    """Variant of the weight files to read: ``fp16`` reads ``diffusion_pytorch_model.fp16.safetensors``. None reads files without a variant
    in their name. If a component has no such file, None reads its only variant."""

    trainable: str | tuple[str, ...] = "all"
    """Part of the UNet that is trained: ``all``, ``attention``, ``cross_attention``, or a list of patterns of parameters' names such as
    ``["mid_block.*", "*.attn2.to_k.weight"]``. The rest keeps the base's values, and has no gradients and no optimizer state. A checkpoint holds
    the trained part alone; the export is a whole model. Not with ``lora``."""

    gradient_checkpointing: str = "auto"
    """Activations that the backward pass recomputes instead of keeping: ``none``, ``selective`` (norms and activation functions),
    ``every_K`` (all blocks but every K-th, such as ``every_2``) or ``full`` (all blocks). Memory falls in this order. ``full`` costs about
    a sixth of the throughput. The first mode that fits is the fastest. ``auto`` chooses this mode: it compares the count of ``dde-ds plan``
    with the available memory."""

    compile: bool = False
    """Compile the transformer blocks of policy and reference with ``torch.compile``. Compilation takes minutes at the start, which a run of
    hours regains. Not with ZeRO-3."""

    channels_last: bool = False
    """Run convolutions in the memory format of tensor cores. Turn it on if a few measured steps on your GPU are faster with this format."""

    float32_output: bool = True
    """Compute the last layer of a bf16 policy and reference in float32, from its bf16 weights, and compare float32 predictions. Rounding
    predictions to bf16 would add noise to z: a standard deviation of 0.6 at t = 999 of the demo's model. The layers before the last still
    round to bf16. This option costs about 0.01 % of the compute, and changes nothing in fp32."""

    def __post_init__(self):
        _require(
            self.variant is None or re.fullmatch(r"[\w-]+", self.variant) is not None,
            "model.variant",
            self.variant,
            "must be the part of a file's name between two dots, such as fp16, or null",
        )
        known = self.trainable in TRAINABLE if isinstance(self.trainable, str) else bool(self.trainable) and all(self.trainable)
        _require(
            known,
            "model.trainable",
            self.trainable,
            f'must be {", ".join(TRAINABLE)}, or a list of patterns of parameters\' names such as ["mid_block.*"]',
        )
        _require(
            re.fullmatch(r"auto|none|selective|full|every_([2-9]|[1-9][0-9]{1,8})", self.gradient_checkpointing) is not None,
            "model.gradient_checkpointing",
            self.gradient_checkpointing,
            "must be auto, none, selective, every_2, every_3, … or full",
        )

    @property
    def trained_patterns(self) -> tuple[str, ...]:
        """Return patterns of the names of the trained parameters."""
        return TRAINABLE[self.trainable] if isinstance(self.trainable, str) else self.trainable


@dataclass(frozen=True)
class ReferenceConfig:
    placement: Literal["auto", "replicated", "sharded", "cpu"] = "auto"
    """Place of the frozen copy of the model. ``replicated``: on every GPU (SDXL in bf16: 5.1 GB). ``sharded``: over all GPUs. ``cpu``: in
    the host's memory, loaded block by block. ``auto`` shards it beside a ZeRO-3 policy, keeps it on the CPU beside a policy whose weights
    are there, and replicates it otherwise. Changes memory and speed, not the result."""

    dtype: Literal["policy", "bf16", "fp32"] = "policy"
    """Precision of the reference. ``policy`` uses the run's: both models then compute exactly alike, and training begins at a margin of 0.
    ``bf16`` halves the reference's memory beside a float32 policy; ``fp32`` doubles it beside a bf16 one. Either way the first loss is
    log 2 up to rounding, which β and w_t multiply."""

    precomputed: str | None = None
    """File of the reference's errors, for runs that share seed, data and model, such as a search for β or the learning rate. If it lacks
    errors that the run needs, the run loads the reference and writes them there. If it has all, the run loads no reference: that saves one
    forward pass of two and the reference's memory. With another ``batch.micro_batch_size``, or on other hardware, the model itself would round
    differently. ``sft`` and ``mapo`` have no reference and ignore this key. ``dspo`` needs more than errors and refuses it."""


@dataclass(frozen=True)
class ObjectiveConfig:
    name: str = "dde"
    """Name of an objective in the table of ``dde_ds/objective/README.md``: ``dde`` and its two halves, ``uniform`` (Diffusion-DPO), and
    others. ``sft`` and ``mapo`` compare with no reference and ignore β. ``dspo`` needs a β far below 1."""

    beta: float = 2000.0
    """Strength of the preference, for errors that are means over a latent. With a higher β, the policy stays closer to the reference and
    pairs saturate earlier. The same β has a different effect for each objective: ``dde-ds suggest-beta`` measures it in a run's first
    steps."""

    correction_weight: float = 1.0
    """Weight η of the stepwise correction of ``dde`` and ``dde_step``. 0 turns it off."""

    correction_ema: float = 0.9
    """Decay ρ of the correction's sums, once an optimizer step: 0.9 remembers about ten steps."""

    correction_buckets: int = 50
    """Equal ranges of timesteps whose pairs share one average in the correction, from 1 to T. T gives the paper's array."""

    variance: Literal["posterior", "beta"] = "posterior"
    """Choice of σ_t² in the stepwise weight: ``posterior`` or ``beta``."""

    discount: float | None = None
    """Discount γ of ``discounted`` for each training timestep. Default: 0.9^(50/T)."""

    discount_mode: Literal["weight", "sample"] = "weight"
    """``weight`` puts the discount inside log σ; ``sample`` draws timesteps in proportion to it."""

    timestep_range: tuple[int, int] | None = None
    """Range [lo, hi) from which timesteps are drawn. Default: all. Narrow the range to train one segment of the trajectory."""

    link: Literal["logistic", "robust", "ipo", "hinge", "sigmoid", "dmpo"] = "logistic"
    """Loss of a pair's z: ``logistic``, ``robust``, ``ipo``, ``hinge``, ``sigmoid`` or ``dmpo``. ``logistic`` spends most of its gradient on
    pairs that are far on the wrong side; ``sigmoid`` stops pushing such pairs. Not for ``sft``, ``dspo``, ``kto`` and ``mapo``."""

    label_smoothing: float = 0.0
    """Assumed share ε of wrong labels, in [0, 0.5), for the links ``logistic``, ``robust`` and ``dmpo``. Raise it if annotators often
    disagree."""

    soft_labels: bool = False
    """Use each pair's share of votes from the shards instead of 1-ε, for the links ``logistic`` and ``dmpo``. The shards must hold these
    shares. In a mixture of sources, pairs of a source without votes count as sure."""

    winner_preserving: float | None = None
    """Share μ in [0, 1] of SDPO's safeguard, which scales the loser's gradient down where that gradient would raise the winner's error.
    SDPO's runs use 0.9 for SD1.5 and 0.6 for SDXL. None turns the safeguard off."""

    credit: Literal["pair", "mean"] = "pair"
    """Source of each timestep's share of the gradient. ``pair``: each pair's own z. ``mean``: the credit at the correction table's mean
    margin, which is the curve that ``dde-ds explain`` draws. That curve begins at the noisy end, and moves as the pairs get ahead."""

    single_shot: Literal["weight", "calibrated"] = "weight"
    """Gain of ``dde`` and ``dde_single``. ``weight`` is w_t. ``calibrated`` is 1/ᾱ_t with twice the correction weight, which makes z/β the
    true log ratio for Gaussian data of unit variance."""

    shared_noise: bool = True
    """Give winner and loser of a pair the same noise. Shared noise lowers the variance of their difference and is standard in the field."""

    def __post_init__(self):
        _positive("objective.beta", self.beta)
        _require(0 <= self.correction_ema < 1, "objective.correction_ema", self.correction_ema, "must lie in [0, 1)")
        _number("objective.correction_weight", self.correction_weight, 0)
        _number("objective.correction_buckets", self.correction_buckets, 1, 10**5)
        _require(0 <= self.label_smoothing < 0.5, "objective.label_smoothing", self.label_smoothing, "must lie in [0, 0.5)")
        within = self.winner_preserving is None or 0 <= self.winner_preserving <= 1
        _require(within, "objective.winner_preserving", self.winner_preserving, "must lie in [0, 1], or be null")


@dataclass(frozen=True)
class SourceConfig:
    path: str
    """Folder or URL of shards."""

    weight: float = 1.0
    """Share of the pairs that come from here, relative to the other sources' weights; rounded to a thousandth."""

    def __post_init__(self):
        _positive("data.sources weight", self.weight)


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None
    """Shards from ``tools/shard_pickapic.py``: a folder, or a URL of ``http(s)://``, ``s3://``, ``gs://``, ``hf://`` …"""

    sources: tuple[SourceConfig, ...] = ()
    """Several folders or URLs instead of ``path``, each ``{path, weight}``. All must have the same model and resolution."""

    caption_dropout: float = 0.0
    """Share of pairs whose caption becomes empty, so that classifier-free guidance keeps working. Diffusion-DPO's recipe: 0.2."""

    flip: bool = False
    """Train on half of the pairs mirrored. Needs shards made with ``--flip``."""

    block_shards: int = 8
    """Number of shards that are shuffled together. More shards mix better and keep more files open."""

    workers: int = 2
    """Loader processes of each rank. 0 reads in the training process. Changes nothing of what is trained on."""

    allow_other_encoders: bool = False
    """Accept shards of another VAE or other text encoders than those of ``model.path``. Set it only if you know that they encode alike, such
    as the same ones in half precision. Other encoders give latents and embeddings another meaning."""

    max_bad_samples: int = 0
    """Damaged samples that a run may replace by their neighbours before it stops; each is reported once. 0 stops at the first."""

    cache_dir: str | None = None
    """Folder where a node keeps what it fetched from remote shards, for all its processes and later runs. None keeps nothing."""

    cache_gb: float = 100.0
    """Upper limit of the cache folder, in GB; the least recently used data is deleted first."""

    timeout_s: float = 60.0
    """Seconds for one attempt to read a range of a remote shard. There are five attempts."""

    def __post_init__(self):
        _require((self.path is None) != (not self.sources), "data.path", self.path, "give either data.path or data.sources")
        _require(0 <= self.caption_dropout < 1, "data.caption_dropout", self.caption_dropout, "must lie in [0, 1)")
        _number("data.block_shards", self.block_shards, 1)
        _number("data.workers", self.workers, 0, 256)
        _number("data.max_bad_samples", self.max_bad_samples, 0)
        _positive("data.cache_gb", self.cache_gb)
        _positive("data.timeout_s", self.timeout_s, 86_400)

    @property
    def weighted_paths(self) -> list[tuple[str, float]]:
        if self.path is not None:
            return [(self.path, 1.0)]
        return [(source.path, source.weight) for source in self.sources]

    @property
    def key(self) -> str:
        """Return the key that names the shards, for a message."""
        return "data.path" if self.path is not None else "data.sources"

    @property
    def name(self) -> str:
        """Return the paths of the shards without passwords, for a message or a model card."""
        return without_passwords(self.path or ", ".join(source.path for source in self.sources))


@dataclass(frozen=True)
class BatchConfig:
    pairs: int
    """Preference pairs of one optimizer step, over all ranks. The paper: 2048."""

    micro_batch_size: int = 1
    """Pairs of one forward and backward pass on one rank, with 2 latents each. Use as many as fit. Changes speed and memory, not the
    result."""

    def __post_init__(self):
        _number("batch.pairs", self.pairs, 1, 10**7)
        _number("batch.micro_batch_size", self.micro_batch_size, 1, 10**5)

    def accumulation(self, world: int) -> int:
        """Return the number of micro-batches of one optimizer step on each of ``world`` ranks.

        Raises:
            UserError: the batch does not divide evenly; the message lists micro-batches and batches that do.
        """
        if self.pairs % (world * self.micro_batch_size) == 0:
            return self.pairs // (world * self.micro_batch_size)
        unit = world * self.micro_batch_size
        near = sorted({max(1, self.pairs // unit) * unit, (self.pairs // unit + 1) * unit})
        fits = f"batch.pairs {' or '.join(map(str, near))}"
        if self.pairs % world == 0:
            share = self.pairs // world
            micros = [n for n in range(1, min(share, 4 * self.micro_batch_size) + 1) if share % n == 0]
            fits += f", or batch.micro_batch_size {', '.join(map(str, micros[-8:]))}"
        raise UserError(
            f"batch.pairs is {self.pairs}: not a multiple of {world} ranks × batch.micro_batch_size {self.micro_batch_size}; what fits: {fits}"
        )


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float
    """AdamW's learning rate after warm-up, exactly as written. Diffusion-DPO's code: 1e-8 × 2048 pairs = 2.048e-5 at β 2000."""

    warmup_steps: int = 0
    """Optimizer steps n of linear warm-up. Step k, from 0, runs at (k+1)/n of the rate; later steps run at the full rate."""

    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""

    eps: float = 1e-8
    """AdamW's ε."""

    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""

    max_grad_norm: float = 1.0
    """Global norm that gradients are clipped to. 0 does not clip."""

    type: Literal["adamw", "adamw_8bit"] = "adamw"
    """``adamw`` or ``adamw_8bit``. The moments of ``adamw_8bit`` take 2 bytes a parameter instead of 8, over all ranks together. That pays off
    on up to four GPUs; SDXL needs two. It runs under ZeRO-1 or 2 without offload, and needs the extra ``lowbit``."""

    def __post_init__(self):
        _positive("optimizer.learning_rate", self.learning_rate)
        _number("optimizer.warmup_steps", self.warmup_steps, 0)
        _require(all(0 <= b < 1 for b in self.betas), "optimizer.betas", self.betas, "must lie in [0, 1)")
        _positive("optimizer.eps", self.eps)
        _number("optimizer.weight_decay", self.weight_decay, 0)
        _number("optimizer.max_grad_norm", self.max_grad_norm, 0)

    def rate(self, step: int) -> float:
        """Return the learning rate of optimizer step ``step``, counted from 0: linear warm-up, then constant."""
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps))


@dataclass(frozen=True)
class LoraConfig:
    """Train two thin matrices beside each chosen layer, and nothing else."""

    rank: int
    """Rank r: the thin side of the adapters. Memory, file size and capacity grow with it; 4 to 128 are usual."""

    alpha: float | None = None
    """Scale the adapters by α/r. None means α = r: no scale. Change it only together with the learning rate."""

    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Endings of the names of layers that get adapters. Default: the projections of all attention layers. ``ff.net.0.proj`` and
    ``ff.net.2`` add the feed-forward layers; ``conv1`` and ``conv2`` add the convolutions."""

    init: str | None = None
    """File of an existing LoRA to continue from, with diffusers' or kohya's names: ``.safetensors``. Rank and layers must be those of ``rank`` and
    ``targets``; its own α is taken into account. The reference stays the base without adapters. None begins with adapters that add nothing."""

    def __post_init__(self):
        _number("lora.rank", self.rank, 1, 4096)
        if self.alpha is not None:
            _positive("lora.alpha", self.alpha)
        _require(len(self.targets) >= 1, "lora.targets", self.targets, "must name at least one layer")

    @property
    def alpha_or_rank(self) -> float:
        return self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        return self.alpha_or_rank / self.rank


@dataclass(frozen=True)
class EmaConfig:
    """Keep a moving average of the trained weights, which the export then takes."""

    decay: float
    """Decay of the average, which spans about the last 1/(1 - decay) optimizer steps. It warms up: at step k it is at most k/(9 + k), which is
    0.99 after 891 steps and 0.999 after 8,991."""

    def __post_init__(self):
        _require(0 < self.decay < 1, "ema.decay", self.decay, "must lie in (0, 1)")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100
    """Optimizer steps between checkpoints; the end always writes one. A killed run loses what came after the last, so save often."""

    keep: int = 2
    """Number of newest checkpoints to keep. Each takes 12 bytes a trained parameter, for float32 weights and AdamW's two moments, and 4
    more with ``ema``."""

    keep_every: int | None = None
    """Also keep checkpoints at multiples of this step, to compare models of different training lengths. Each takes the size above."""

    def __post_init__(self):
        _number("checkpoint.every", self.every, 1)
        _number("checkpoint.keep", self.keep, 1)
        if self.keep_every is not None:
            _number("checkpoint.keep_every", self.keep_every, 1)


@dataclass(frozen=True)
class GuardsConfig:
    max_skipped_in_a_row: int = 5
    """End the run after so many steps in a row whose loss or gradient is not a finite number. Fewer are skipped, counted, and written to
    ``skipped.jsonl``; they change no weight. 1 ends the run at the first."""

    def __post_init__(self):
        _number("guards.max_skipped_in_a_row", self.max_skipped_in_a_row, 1)


@dataclass(frozen=True)
class SamplesConfig:
    prompts: tuple[str, ...] = ()
    """Prompts to draw before the first step, during the run and at its end, always from the same noise. Without prompts nothing is drawn."""

    every: int = 100
    """Optimizer steps between two sets of samples."""

    inference_steps: int = 30
    """DDIM steps of a sample."""

    guidance_scale: float = 7.5
    """Classifier-free guidance scale of a sample. SDXL: 5."""

    seed: int = 0
    """Seed of the samples' noise."""

    def __post_init__(self):
        _number("samples.every", self.every, 1)
        _number("samples.inference_steps", self.inference_steps, 1, 1000)
        _require(0 <= self.seed < 2**63, "samples.seed", self.seed, "must lie in [0, 2^63)")


@dataclass(frozen=True)
class EvaluationConfig:
    path: str | None = None
    """Folder of held-out shards, made with the same model. The run evaluates their pairs at ten fixed timesteps with fixed noise, so that
    the loss compares over the run and between runs. None evaluates nothing."""

    every: int = 100
    """Optimizer steps between two evaluations; the end always makes one."""

    pairs: int = 512
    """Pairs of one evaluation; each takes a forward pass. The standard error of a share is at most 0.5/√pairs. The run keeps the base's
    predictions of all of them in the host's memory: with 512 pairs of SDXL in bf16, 134 MB over all ranks."""

    def __post_init__(self):
        _number("evaluation.every", self.every, 1)
        _number("evaluation.pairs", self.pairs, 1)


@dataclass(frozen=True)
class LogConfig:
    every: int = 1
    """Optimizer steps between two rows of ``metrics.jsonl``; each row averages the steps since the last. To write a row, the host waits for
    the device a few times."""

    trackers: tuple[str, ...] = ()
    """Experiment trackers that also get the rows and the sample images: ``tensorboard`` (files in the run folder), ``wandb``, ``mlflow``,
    ``trackio``, ``comet_ml``, ``aim``, ``clearml``, ``dvclive`` or ``swanlab``. The tracker's own package must be installed. Its own
    environment variables apply: ``WANDB_MODE=offline`` keeps everything in the run folder."""

    project: str = "dde_ds"
    """Name of the project or experiment in the trackers."""

    def __post_init__(self):
        _number("log.every", self.every, 1)


@dataclass(frozen=True)
class RunConfig:
    """Describe a whole run. Paths are relative to the working directory."""

    output: str
    """Run folder. It gets config.yaml, metrics.jsonl, correction.jsonl, credit.jsonl, skipped.jsonl, checkpoints/, samples/, export/ and, last, DONE."""

    steps: int
    """Number of optimizer steps. Raise it on ``--resume`` to train longer."""

    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    lora: LoraConfig | None = None
    """``{rank, alpha, targets}`` trains LoRA adapters alone. The same UNet with its adapters off is the reference, so memory holds one UNet.
    It needs the extra ``lora``. None trains all parameters of the UNet."""

    ema: EmaConfig | None = None
    """``{decay}`` keeps a float32 average of the trained weights, sharded over the ranks. It takes 4 bytes a parameter in memory and in a
    checkpoint. The export uses the average; samples and held-out evaluations use the weights themselves. None keeps no average."""

    log: LogConfig = field(default_factory=LogConfig)

    deepspeed: str = "ds_configs/zero2.json"
    """DeepSpeed configuration file. Batch, optimizer, precision and clipping are filled in there from this configuration."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """``bf16`` or ``fp32``, for the policy, and for the reference unless ``reference.dtype`` differs. ``fp32`` does not use TF32."""

    max_hours: float | None = None
    """Stop the run after so many hours from the start of each launch: it ends the step, saves, and exits with code 75. Use it on clusters that
    end jobs at a time limit, and leave room for one step and one checkpoint. None never stops."""

    timeout_minutes: float = 10.0
    """Minutes that a rank waits for the others in one collective before it ends with an error. A lost node can go unnoticed for so long.
    Raise it if one rank works alone for longer, such as to write the export to a slow file system."""

    seed: int = 0
    """Seed of data order, noise, timesteps and caption dropout. Each is a pure function of (seed, pairs consumed)."""

    def __post_init__(self):
        for key, path in (
            ("output", self.output),
            ("data.cache_dir", self.data.cache_dir),
            ("reference.precomputed", self.reference.precomputed),
        ):
            _require("://" not in (path or ""), key, path, "must be a path of this machine: nothing is written to a URL")
        _number("steps", self.steps, 1)
        if self.max_hours is not None:
            _positive("max_hours", self.max_hours)
        _positive("timeout_minutes", self.timeout_minutes, LONGEST_TIMEOUT)
        _require(0 <= self.seed < 2**63, "seed", self.seed, "must lie in [0, 2^63)")
        for key, usual in (("placement", "auto"), ("dtype", "policy")):
            value = getattr(self.reference, key)
            _require(
                not self.lora or value == usual,
                f"reference.{key}",
                value,
                f"must be {usual} with lora: the policy itself is the reference",
            )
        _require(
            not self.lora or self.model.trainable == "all",
            "model.trainable",
            self.model.trainable,
            "must be all with lora, which trains its adapters alone; remove one of the two",
        )
        _require(
            not (self.reference.precomputed and self.data.max_bad_samples),
            "data.max_bad_samples",
            self.data.max_bad_samples,
            "must be 0 with reference.precomputed: a run whose shards are whole would read the errors of the replacements",
        )

    @property
    def reference_precision(self) -> str:
        return self.precision if self.reference.dtype == "policy" else self.reference.dtype

    def as_data(self) -> dict:
        """Return the configuration as plain data, for files and trackers that others may read: passwords in URLs are struck out."""
        return _plain(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        """Return :meth:`as_data` as YAML."""
        return dump_yaml(self.as_data())


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``a.b=value`` overrides (values are YAML too), and check it.

    Raises:
        UserError: a missing or malformed file, an unknown or missing key, a value of the wrong type or out of range.
    """
    try:
        data = read_yaml(path)
    except OSError as error:
        raise UserError(f"config {path}: {reason(error).lower()}") from None
    except ValueError as error:
        raise UserError(f"config {path}: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"config {path}: expected keys and values, found {_shown(data)}")
    for override in overrides:
        _override(data, override)
    return config_of(data)


def config_of(data: Any) -> RunConfig:
    """Return a run from plain data, such as a checkpoint's ``state.json``, checked as :func:`load_config` does."""
    return _build(RunConfig, data, "")


def section_of(kind: type, data: dict, key: str) -> Any:
    """Return a section such as :class:`ReferenceConfig` from plain data, checked as :func:`load_config` does. ``key`` names it."""
    return _build(kind, data, f"{key}.")


def _override(data: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {_shown(override)}: expected key=value, such as optimizer.learning_rate=1e-6")
    *parents, leaf = key.split(".")
    for parent in parents:
        data[parent] = {} if data.get(parent) is None else data[parent]
        data = data[parent]
        if not isinstance(data, dict):
            raise UserError(f"override {_shown(override)}: {parent!r} holds a value, not keys")
    try:
        data[leaf] = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"override {_shown(override)}: {error}; text may need quotes of its own: {key}='\"…\"'") from None
    if "#" in text and isinstance(data[leaf], str) and "#" not in data[leaf]:
        raise UserError(
            f"override {_shown(override)}: YAML takes what follows # for a comment; put the text in quotes: {key}='\"…\"'"
        )


def _build(cls: type, data: Any, prefix: str) -> Any:
    """Build a dataclass from plain data; check every key and type. ``prefix`` is the dotted key of ``data``, with its dot."""
    if not isinstance(data, dict):
        raise UserError(f"{prefix.rstrip('.')} is {_shown(data)}: expected keys and values")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            whole = f"{prefix}{key}"
            raise UserError(
                f"unknown key {whole}{f'; it is now {RENAMED[whole]}' if whole in RENAMED else nearest(str(key), hints)}"
            )
    values = {}
    for spec in dataclasses.fields(cls):
        key = f"{prefix}{spec.name}"
        if spec.name in data:
            kind = hints[spec.name]
            values[spec.name] = (
                _build(kind, data[spec.name], key + ".") if _is_section(kind) else _convert(data[spec.name], kind, key)
            )
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise UserError(f"missing key {key}: {spec.name} has no default")
    return cls(**values)


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _convert(value: Any, kind: Any, key: str) -> Any:
    """Return ``value`` as ``kind``; allow only conversions that lose nothing."""
    if isinstance(kind, types.UnionType):  # X | None, or a text or a list of texts
        if value is None and types.NoneType in kind.__args__:
            return None
        listed = isinstance(value, (list, tuple))
        kinds = [each for each in kind.__args__ if each is not types.NoneType]
        return _convert(value, next((each for each in kinds if (typing.get_origin(each) is tuple) == listed), kinds[0]), key)
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        fixed = parts[-1] is not Ellipsis
        if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(parts)):
            raise UserError(f"{key} is {_shown(value)}: expected a list" + (f" of {len(parts)}" if fixed else ""))
        return tuple(_convert(item, parts[0], f"{key}[{i}]") for i, item in enumerate(value))
    if _is_section(kind):
        return _build(kind, value, key + ".")
    if typing.get_origin(kind) is Literal:
        *first, last = map(repr, typing.get_args(kind))
        _require(value in typing.get_args(kind), key, value, f"must be {', '.join(first)} or {last}")
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)  # neither NaN nor infinity came here
    if kind is str and isinstance(value, str):
        _check_text(value, key)
        return value
    if isinstance(value, kind) and kind is not float and (kind is bool or not isinstance(value, bool)):
        return value
    names = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false"}
    raise UserError(f"{key} is {_shown(value)}: expected {names[kind]}")


def _check_text(text: str, key: str) -> None:
    """Refuse text that no path, file or tokenizer accepts."""
    if "\0" in text:
        raise UserError(f"{key} is {_shown(text)}: must not hold a NUL character")
    if half_surrogate(text):
        raise UserError(f"{key} is {_shown(text)}: must not hold half a surrogate pair")
    if len(text) > LONGEST_TEXT:
        raise UserError(f"{key} has {len(text):,} characters: must have {LONGEST_TEXT:,} or fewer")
    # Linux accepts no longer name: even to ask whether such a file exists is an error.
    if PATHS.search(key) and any(len(part.encode()) > 255 for part in text.split("/")):
        raise UserError(f"{key} is {_shown(text)}: must have no name of more than 255 bytes in it")


def _plain(value: Any) -> Any:
    """Return tuples as lists, so that PyYAML writes plain YAML, and text without passwords."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, str):
        return without_passwords(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
