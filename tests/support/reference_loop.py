"""Do the same training without DeepSpeed and without the objective's code, in one process. Every launch must give equal numbers."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Container

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel

from dde_ds.config import RunConfig
from dde_ds.data.order import Order
from dde_ds.data.pair_rng import PairRng
from dde_ds.data.reader import PairDataset
from dde_ds.data.shards import ShardSet


def plain_losses(run: RunConfig, skipped: Container[int] = ()) -> list[float]:
    """Return the loss of each optimizer step of a ``dde`` run in fp32. All pairs of a step are in one batch."""
    return [loss for loss, _ in plain_steps(run, skipped=skipped)]


def plain_steps(run: RunConfig, dtype: torch.dtype = torch.float32, skipped: Container[int] = ()) -> list[tuple[float, float]]:
    """Return the loss and the gradient norm before clipping of each optimizer step, computed in ``dtype``.

    Steps in ``skipped``, counted from 1, train nothing and give no loss, but use up their pairs.
    """
    scheduler = DDIMScheduler.from_pretrained(run.model.path, subfolder="scheduler")
    betas = np.linspace(scheduler.config.beta_start**0.5, scheduler.config.beta_end**0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - betas)
    previous = np.concatenate([[1.0], alpha_bar[:-1]])
    single_shot = (1 - alpha_bar) / alpha_bar
    with np.errstate(divide="ignore"):
        stepwise = betas / (2 * (1 - betas) * (1 - previous))
    stepwise[0] = 0
    bucket = np.arange(1000) * run.objective.correction_buckets // 1000
    sums = np.zeros((2, run.objective.correction_buckets))  # of margins, and how many

    policy = UNet2DConditionModel.from_pretrained(run.model.path, subfolder="unet", torch_dtype=dtype).train()
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    if run.lora:
        import peft

        # Add the adapters as diffusers' training scripts do, from the run's seed.
        torch.manual_seed(run.seed)
        policy.requires_grad_(False)
        policy.add_adapter(
            peft.LoraConfig(
                r=run.lora.rank,
                lora_alpha=run.lora.alpha or run.lora.rank,
                target_modules=list(run.lora.targets),
                init_lora_weights="gaussian",
            )
        )
    elif run.model.trainable != "all":
        words = {"attention": ["*.attn[12].*"], "cross_attention": ["*.attn2.*"]}
        patterns = words[run.model.trainable] if isinstance(run.model.trainable, str) else run.model.trainable
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    options = run.optimizer
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay)
    shards = ShardSet(run.data.path)
    allowed = torch.zeros(1000)
    allowed[slice(*(run.objective.timestep_range or (0, 1000)))] = 1
    draws = PairRng(run.seed, allowed, caption_dropout=run.data.caption_dropout)
    dataset = PairDataset(shards, Order(shards.counts, run.seed, run.data.block_shards), draws)

    steps = []
    for step in (step for step in range(run.steps) if step + 1 not in skipped):
        positions = range(step * run.batch.pairs, (step + 1) * run.batch.pairs)
        batch = dataset.collate([dataset.pair(position) for position in positions])
        t = batch["timesteps"]
        noise = batch["noise"].to(dtype).repeat(2, 1, 1, 1)
        noisy = scheduler.add_noise(batch["latents"].to(dtype), noise, t.repeat(2))
        conditions = None
        if "time_ids" in batch:
            conditions = {"text_embeds": batch["pooled_prompt_embeds"].to(dtype), "time_ids": batch["time_ids"]}

        def errors(unet, noisy=noisy, t=t, batch=batch, conditions=conditions, noise=noise):
            predicted = unet(noisy, t.repeat(2), batch["prompt_embeds"].to(dtype), added_cond_kwargs=conditions).sample
            if scheduler.config.prediction_type == "v_prediction":
                signal = torch.tensor(alpha_bar[t.repeat(2).numpy()], dtype=dtype).view(-1, 1, 1, 1)
                predicted = signal.sqrt() * predicted + (1 - signal).sqrt() * noisy
            return (noise - predicted).square().mean((1, 2, 3)).chunk(2)

        winner, loser = errors(policy)
        with torch.no_grad():
            reference_winner, reference_loser = errors(reference)
        margin = (winner - reference_winner) - (loser - reference_loser)
        mean = np.divide(*sums, out=np.zeros(sums.shape[1]), where=sums[1] > 0)
        correction = torch.tensor([(stepwise * mean[bucket])[i + 1 :].sum() for i in t.tolist()], dtype=dtype)
        gain = torch.tensor(single_shot[t.numpy()], dtype=dtype)
        loss = -F.logsigmoid(-(run.objective.beta / 2) * (gain * margin + run.objective.correction_weight * correction)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, options.max_grad_norm)
        optimizer.param_groups[0]["lr"] = options.learning_rate * min(1.0, (step + 1) / max(1, options.warmup_steps))
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss.item(), norm.item()))

        sums *= run.objective.correction_ema
        for j, m in zip(t.tolist(), margin.tolist(), strict=True):
            sums[:, bucket[j]] += m, 1
    return steps
