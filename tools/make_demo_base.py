"""Train the demo's base model: a Stable-Diffusion-shaped text-to-image pipeline for 64x64 emoji, small enough to commit.

    python tools/make_demo_base.py --pairs launchers/demo/pairs/train.parquet --output launchers/demo/base

The model learns from **both** images of every pair, and never which vendor drew which. So a preference is left to align to. Held-out
captions must not be in ``--pairs``. There are three parts, in this order:

1. an AutoencoderKL, factor 4, whose latents are then normalised in the weights (see ``normalise_latents``);
2. a byte-pair vocabulary of the captions, as a CLIPTokenizer;
3. a CLIPTextModel and a UNet2DConditionModel with cross-attention, trained together on the noise-prediction loss.

The output is a diffusers folder in float16. It takes about 12 and 60 minutes on two cores. If ``--output`` already holds a ``vae``, the
tool continues with part 2; delete the folder to start over.
"""

# The hints of diffusers' and transformers' constructors are narrower than what they take: tuple[str] for any number of blocks.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import argparse
import copy
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dde_ds.files import follow_umask

MAX_TOKENS = 20
TEXT_WIDTH = 128
LATENT_CHANNELS = 4
# Stable Diffusion 1.5's factor. It is far from 1, so code that forgets to apply it is noticed at once.
SCALING_FACTOR = 0.18215


def read_images(parquet: Path) -> tuple[list[str], torch.Tensor]:
    """Read captions, and images (2N,3,64,64) in [-1,1]: both pictures of each row, each under the row's caption."""
    captions, images = [], []
    for row in pq.read_table(parquet, columns=["caption", "jpg_0", "jpg_1"]).to_pylist():
        for key in ("jpg_0", "jpg_1"):
            captions.append(row["caption"])
            images.append(np.asarray(Image.open(io.BytesIO(row[key])).convert("RGB")))
    return captions, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Return the learning rate of a step: a linear warm-up, then a cosine to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress)))


@torch.no_grad()
def ema_update(averaged: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    for kept, new in zip(averaged.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def train_vae(images: torch.Tensor, steps: int, batch: int, generator: torch.Generator) -> Any:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=64,
        scaling_factor=SCALING_FACTOR,
    ).to(memory_format=torch.channels_last)
    averaged = copy.deepcopy(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0)
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak=2e-3)
        pixels = images[torch.randint(len(images), (batch,), generator=generator)]
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        # The KL term keeps the latents smooth enough to be diffused. At this weight it costs well under 1 dB.
        loss = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels) + 3e-4 * posterior.kl().mean() / 1024
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema_update(averaged, vae, decay=min(0.999, (step + 1) / (step + 10)))
        if step % 200 == 199 or step == steps - 1:
            print(f"vae {step + 1}/{steps}  loss {loss.item():.4f}  {time.perf_counter() - started:.0f} s", flush=True)
    return averaged.eval()


@torch.no_grad()
def encode_moments(vae: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the standard deviation of every image's latent, each (N,4,16,16), unscaled."""
    posteriors = [vae.encode(chunk).latent_dist for chunk in images.split(64)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


@torch.no_grad()
def normalise_latents(vae: Any, images: torch.Tensor) -> None:
    """Fold a per-channel affine map into the 1x1 convolutions around the latent, so that a scaled latent has mean 0, std 1.

    With a = 1/(s·SCALING_FACTOR), quant_conv then gives a·(z - mean), and log-variances move by 2·log a. post_quant_conv undoes
    both, so every reconstruction stays the same.
    """
    mean, std = encode_moments(vae, images)
    latents = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    centre, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    gain = 1 / (spread * SCALING_FACTOR)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:LATENT_CHANNELS] *= gain.view(-1, 1, 1, 1)
    quant.bias[:LATENT_CHANNELS] = gain * (quant.bias[:LATENT_CHANNELS] - centre)
    quant.bias[LATENT_CHANNELS:] += 2 * gain.log()
    post.bias += post.weight[:, :, 0, 0] @ centre
    post.weight /= gain.view(1, -1, 1, 1)


@torch.no_grad()
def reconstruction_psnr(vae: Any, images: torch.Tensor) -> float:
    """Return the mean peak signal-to-noise ratio in dB of decode(mean(encode(x))), for a pixel range of 2."""
    errors = [
        (vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) - x).square().mean((1, 2, 3)) for x in images.split(64)
    ]
    return float((10 * torch.log10(4 / torch.cat(errors))).mean())


def train_tokenizer(captions: list[str], vocabulary: int) -> CLIPTokenizer:
    """Train CLIP's byte-pair encoding (lower case, ``</w>`` at a word's end). Its merges are learnt from the captions."""
    backend = CLIPTokenizer().backend_tokenizer
    backend.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    model = json.loads(backend.to_str())["model"]
    return CLIPTokenizer(model["vocab"], [tuple(merge) for merge in model["merges"]], model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        # No attention at 16x16: it would triple the time of a step on a CPU.
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
    ).to(memory_format=torch.channels_last)


def build_scheduler() -> DDIMScheduler:
    """Return Stable Diffusion's own schedule."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def save(folder: Path, vae, tokenizer, text_encoder, unet) -> None:
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline = copy.deepcopy(pipeline).to(torch.float16)
    # transformers loads a text encoder in the type that it was saved in, but diffusers loads the rest in float32. A plain
    # from_pretrained(folder) would mix the two types. So the text encoder, which is small, is saved in float32.
    pipeline.text_encoder = copy.deepcopy(text_encoder).float()
    pipeline.save_pretrained(folder, safe_serialization=True)
    follow_umask(*folder.rglob("*.safetensors"))


def train_denoiser(args, captions, latents, tokenizer, vae, generator) -> None:
    """Do part 3. Save the averaged weights every 1,000 steps, so that one can look at pictures before the end."""
    mean, std = latents
    text_encoder, unet = build_text_encoder(tokenizer), build_unet()
    averaged = copy.deepcopy(torch.nn.ModuleList([text_encoder, unet])).eval()
    model = torch.nn.ModuleList([text_encoder, unet])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=1e-3)
    alphas = build_scheduler().alphas_cumprod

    def tokens(texts):
        return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids

    ids, empty = tokens(captions), tokens([""])
    started, running = time.perf_counter(), 0.0
    for step in range(args.unet_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.unet_steps, peak=1e-3)
        chosen = torch.randint(len(captions), (args.batch,), generator=generator)
        clean = SCALING_FACTOR * (mean[chosen] + std[chosen] * torch.randn(mean[chosen].shape, generator=generator))
        dropped = torch.rand(args.batch, 1, generator=generator) < 0.1
        hidden = text_encoder(torch.where(dropped, empty, ids[chosen]))[0]
        timesteps = torch.randint(1000, (args.batch,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        signal = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        loss = F.mse_loss(unet(noisy.contiguous(memory_format=torch.channels_last), timesteps, hidden).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema_update(averaged, model, decay=min(0.999, (step + 1) / (step + 10)))
        running += loss.item()
        if step % 200 == 199:
            print(f"unet {step + 1}/{args.unet_steps}  loss {running / 200:.4f}  {time.perf_counter() - started:.0f} s", flush=True)
            running = 0.0
        if step % 1000 == 999 or step == args.unet_steps - 1:
            save(args.output, vae, tokenizer, averaged[0], averaged[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--pairs", type=Path, required=True, help="parquet in Pick-a-Pic's columns, images of 64x64")
    parser.add_argument("--output", type=Path, required=True, help="diffusers folder to write")
    parser.add_argument("--vae-steps", type=int, default=2400)
    parser.add_argument("--unet-steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=32, help="images a step of the denoiser; the autoencoder takes half of it")
    parser.add_argument("--vocabulary", type=int, default=1500, help="size of the tokenizer's vocabulary")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    captions, images = read_images(args.pairs)
    images = images.contiguous(memory_format=torch.channels_last)
    if (args.output / "vae").is_dir():
        print(f"reusing {args.output / 'vae'}")
        vae = AutoencoderKL.from_pretrained(args.output / "vae", torch_dtype=torch.float32).eval()
    else:
        vae = train_vae(images, args.vae_steps, args.batch // 2, generator)
        before = reconstruction_psnr(vae, images)
        normalise_latents(vae, images)
        print(
            f"vae reconstruction {before:.2f} dB, after normalising the latents {reconstruction_psnr(vae, images):.2f} dB",
            flush=True,
        )
        copy.deepcopy(vae).half().save_pretrained(args.output / "vae", safe_serialization=True)
        follow_umask(*(args.output / "vae").glob("*.safetensors"))
    tokenizer = train_tokenizer(captions, args.vocabulary)
    print(
        f"vocabulary {len(tokenizer)}, longest caption {max(len(tokenizer(c).input_ids) for c in captions)} tokens of {MAX_TOKENS}"
    )
    train_denoiser(args, captions, encode_moments(vae, images), tokenizer, vae, generator)


if __name__ == "__main__":
    main()
