"""Rename a diffusers pipeline's weights to the names of the original code. Most programs other than diffusers load this layout
from one file.

UNet and VAE get the names of CompVis' and Stability's code. Text encoders get the names of OpenAI's CLIP or of open_clip.
diffusers reads this layout (``loaders/single_file_utils.py``) and does not write it. This module goes the way back.

The original code counts a UNet's layers through all of its blocks. ``input_blocks.N.0`` is a residual layer or a downsampler,
and ``input_blocks.N.1`` is the attention after it.

Some tensors of the original are left out because a pipeline holds no trained weight for them. They are CLIP's position_ids,
open_clip's logit_scale and the noise schedule's tables. Of Stable Diffusion 2's text encoder, the last layer and the
text_projection are left out too. The original has them, but nothing uses their output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dde_ds.errors import UserError
from dde_ds.models.family import Family

Rules = tuple[tuple[str, str], ...]

# Names inside a residual layer. Attention layers have the same names in both layouts.
RESNET: Rules = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
UNET: Rules = (
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
    (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^mid_block\.resnets\.0\.", "middle_block.0."),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
    (r"^mid_block\.resnets\.1\.", "middle_block.2."),
)
VAE: Rules = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)
OPEN_CLIP: Rules = (
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
)


def to_single_file(pipeline: Any, family: Family) -> dict[str, Tensor]:
    """Return a pipeline's weights as one checkpoint of the original code.

    Raises:
        UserError: a text encoder with more layers than programs read from such a file.
    """
    parts = {
        "model.diffusion_model.": unet_names(pipeline.unet.state_dict(), pipeline.unet.config),
        "first_stage_model.": vae_names(pipeline.vae.state_dict(), len(pipeline.vae.config.up_block_types)),
    }
    for text in family.text_encoders:
        encoder = getattr(pipeline, text.part)
        layers = encoder.config.num_hidden_layers
        if text.layers_read and layers > text.layers_read:
            raise UserError(
                f"format single: {text.part} has {layers} layers, of which programs read {text.layers_read} from a single file of "
                f"{family.title}; choose folder"
            )
        names = open_clip_names if text.open_clip else clip_names
        parts[text.single_file] = names(encoder.state_dict())
    return {prefix + name: value for prefix, weights in parts.items() for name, value in weights.items()}


def prediction_keys(scheduler: Mapping) -> dict[str, Tensor]:
    """Return the empty tensors whose names tell programs what a file's UNet predicts.

    ``v_pred`` stands for v prediction, and ``ztsnr`` for betas rescaled to zero terminal SNR. Not every family has these keys:
    see ``velocity_keys``.

    Args:
        scheduler: the pipeline's ``scheduler_config.json``.
    """
    keys = {"v_pred": scheduler.get("prediction_type") == "v_prediction", "ztsnr": bool(scheduler.get("rescale_betas_zero_snr"))}
    return {name: torch.empty(0) for name, is_set in keys.items() if is_set}


def unet_names(weights: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Return a UNet's weights under their original names."""
    layers = config["layers_per_block"]
    attending = {name.split(".")[1] for name in weights if name.startswith("up_blocks.") and ".attentions." in name}
    renamed = {}
    for name, value in weights.items():
        side, block, kind, layer, rest = (*name.split(".", 4), *[""] * 4)[:5]
        # Down: an input layer, then `layers` pairs (residual layer, attention) and a downsampler for each block. Up: each block has
        # one pair more.
        if side == "down_blocks":
            place = 1 + int(block) * (layers + 1) + (layers if kind == "downsamplers" else int(layer))
            inner = {"resnets": "0.", "attentions": "1.", "downsamplers": "0.op."}[kind]
            name = f"input_blocks.{place}.{inner}{rest.removeprefix('conv.') if kind == 'downsamplers' else rest}"
        elif side == "up_blocks":
            place = int(block) * (layers + 1) + (layers if kind == "upsamplers" else int(layer))
            inner = {"resnets": "0.", "attentions": "1.", "upsamplers": "2." if block in attending else "1."}[kind]
            name = f"output_blocks.{place}.{inner}{rest}"
        name = _rename(name, UNET)
        renamed[name if ".transformer_blocks." in name else _rename(name, RESNET)] = value
    return renamed


def vae_names(weights: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Return a VAE's weights under their original names.

    The original counts the decoder's blocks from the other end, and its attention is made of 1×1 convolutions.
    """
    renamed = {}
    for name, value in weights.items():
        name = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda match: f"decoder.up_blocks.{blocks - 1 - int(match[1])}", name)
        name = _rename(name, VAE)
        attention = re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", name)
        renamed[name] = value[:, :, None, None] if attention else value
    return renamed


def clip_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a text encoder's weights under the names that transformers had when the layout was made. Newer versions leave
    ``text_model.`` out."""
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": value
        for name, value in weights.items()
        if not name.endswith("position_ids")
    }


def open_clip_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a text encoder's weights in open_clip's layout.

    The three input projections of an attention become one tensor, and ``text_projection.weight`` is transposed.
    """
    weights = clip_names(weights)
    renamed = {}
    for name, value in weights.items():
        if ".q_proj." in name:
            kind = name.rpartition(".")[2]
            joined = torch.cat([weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            renamed[_rename(name.removesuffix(f"q_proj.{kind}") + f"in_proj_{kind}", OPEN_CLIP)] = joined
        elif ".k_proj." not in name and ".v_proj." not in name:
            renamed[_rename(name, OPEN_CLIP)] = value.T if name == "text_projection.weight" else value
    return renamed


def _rename(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
