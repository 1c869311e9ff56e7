"""Save complete diffusers pipelines of a few thousand parameters, which are loaded like any other pipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS = 12


def make_tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-"
    vocabulary = {
        token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)])
    }
    return CLIPTokenizer(vocabulary, [], model_max_length=TOKENS)


def _text_encoder(tokenizer: CLIPTokenizer, kind=CLIPTextModel, width: int = 16, **options):
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            projection_dim=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **{"num_hidden_layers": 1, **options},
        )
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )


def _unet(cross_attention_dim: int, **options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=cross_attention_dim,
        **{"attention_head_dim": 2, **options},
    )


def _scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )


def save_sd(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Save a Stable Diffusion 1.x pipeline: 16x16 images, 4x8x8 latents."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(16),
        scheduler=_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_sdxl(folder: Path, second_width: int = 16) -> Path:
    """Save an SDXL pipeline: two text encoders, pooled embeddings, size conditioning."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(tokenizer),
        text_encoder_2=_text_encoder(tokenizer, CLIPTextModelWithProjection, second_width),
        tokenizer=tokenizer,
        tokenizer_2=make_tokenizer(),
        unet=_unet(
            16 + second_width,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=_scheduler("epsilon"),
    ).save_pretrained(folder)
    return folder


def save_sd2(folder: Path, prediction_type: str = "v_prediction") -> Path:
    """Save a Stable Diffusion 2.x pipeline: open_clip's text encoder, linear projections, another head count in each block."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(tokenizer, width=24, num_hidden_layers=2, hidden_act="gelu"),
        tokenizer=tokenizer,
        unet=_unet(24, attention_head_dim=(1, 2), use_linear_projection=True),
        scheduler=_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
