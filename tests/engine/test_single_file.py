"""The original layout against diffusers' own reader of it, and against what is known of the published files."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils as reader
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dde_ds import UserError
from dde_ds.engine.single_file import clip_names, to_single_file
from dde_ds.models.family import FAMILIES
from tests.support.pipelines import save_sd2, save_sdxl


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_reads_back_every_bit(tmp_path, sd_model, name):
    xl = name == "sdxl"
    kind = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    # The reader tells SDXL's two text encoders apart by their widths.
    model = save_sdxl(tmp_path / name, second_width=24) if xl else save_sd2(tmp_path / name) if name == "sd2" else sd_model
    pipeline = kind.from_pretrained(model)
    weights = {name: value.contiguous() for name, value in to_single_file(pipeline, FAMILIES[name]).items()}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    back = kind.from_single_file(tmp_path / "model.safetensors", config=str(model), local_files_only=True)
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if xl else [])):
        expected = getattr(pipeline, part).state_dict()
        found = getattr(back, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), part


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )


def text_config(width: int, layers: int, heads: int, **options) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads, **options
    )


def sd() -> SimpleNamespace:
    """The true architecture of Stable Diffusion 1.5, without weights."""
    unet = UNet2DConditionModel(
        block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8, layers_per_block=2
    )
    return SimpleNamespace(unet=unet, vae=vae(), text_encoder=CLIPTextModel(text_config(768, 12, 12)))


def sd2() -> SimpleNamespace:
    """The true architecture of Stable Diffusion 2.1. Its text encoder lacks the last of the original's 24 layers."""
    unet = UNet2DConditionModel(
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        layers_per_block=2,
        use_linear_projection=True,
    )
    return SimpleNamespace(unet=unet, vae=vae(), text_encoder=CLIPTextModel(text_config(1024, 23, 16, hidden_act="gelu")))


def sdxl() -> SimpleNamespace:
    """The true architecture of SDXL base."""
    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    second = CLIPTextModelWithProjection(text_config(1280, 32, 20, projection_dim=1280, hidden_act="gelu"))
    return SimpleNamespace(unet=unet, vae=vae(), text_encoder=CLIPTextModel(text_config(768, 12, 12)), text_encoder_2=second)


UNET, VAE = "model.diffusion_model.", "first_stage_model."
OPEN_CLIP = "cond_stage_model.model."
CLIP, FIRST, SECOND = "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


@pytest.mark.parametrize(
    ("make", "kind", "tensors", "shapes"),
    [
        (
            sd,
            "v1",
            {UNET: 686, VAE: 248, CLIP: 196},
            {
                f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
                f"{UNET}input_blocks.3.0.op.weight": (320, 320, 3, 3),
                f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
                f"{UNET}middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
                f"{UNET}output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
                f"{UNET}output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
                f"{UNET}output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
                f"{VAE}decoder.up.3.block.0.norm1.weight": (512,),
                f"{VAE}decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
                f"{VAE}encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
                f"{CLIP}text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
            },
        ),
        (
            sd2,
            "v2",
            {UNET: 686, VAE: 248, OPEN_CLIP: 23 * 12 + 4},
            {
                f"{UNET}input_blocks.1.1.proj_in.weight": (320, 320),
                f"{UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
                f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias": (320,),
                f"{OPEN_CLIP}token_embedding.weight": (49408, 1024),
                f"{OPEN_CLIP}positional_embedding": (77, 1024),
                f"{OPEN_CLIP}transformer.resblocks.0.attn.in_proj_weight": (3072, 1024),
                f"{OPEN_CLIP}transformer.resblocks.22.mlp.c_fc.weight": (4096, 1024),
                f"{OPEN_CLIP}ln_final.weight": (1024,),
            },
        ),
        (
            sdxl,
            "xl_base",
            {UNET: 1680, VAE: 248, FIRST: 196, SECOND: 389},
            {
                f"{UNET}label_emb.0.0.weight": (1280, 2816),
                f"{UNET}input_blocks.8.1.transformer_blocks.9.attn2.to_v.weight": (1280, 2048),
                f"{UNET}output_blocks.5.2.conv.weight": (640, 640, 3, 3),
                f"{UNET}output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
                f"{SECOND}transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
                f"{SECOND}positional_embedding": (77, 1280),
                f"{SECOND}text_projection": (1280, 1280),
            },
        ),
    ],
)
def test_the_true_architectures(make, kind, tensors, shapes):
    """Names and shapes alone, on the meta device: those of the published files, and no weight is lost on the way back."""
    with torch.device("meta"):
        pipeline = make()
    found = to_single_file(pipeline, FAMILIES[make.__name__])
    assert {prefix: sum(name.startswith(prefix) for name in found) for prefix in tensors} == tensors
    assert len(found) == sum(tensors.values())
    for name, shape in shapes.items():
        assert found[name].shape == shape, name
    assert reader.infer_diffusers_model_type(found) == kind

    def shapes_of(weights):
        return {name: value.shape for name, value in weights.items()}

    assert shapes_of(reader.convert_ldm_unet_checkpoint(found, pipeline.unet.config)) == shapes_of(pipeline.unet.state_dict())
    assert shapes_of(reader.convert_ldm_vae_checkpoint(found, pipeline.vae.config)) == shapes_of(pipeline.vae.state_dict())
    if kind != "v1":
        encoder, prefix = (pipeline.text_encoder, OPEN_CLIP) if kind == "v2" else (pipeline.text_encoder_2, SECOND)
        back = reader.convert_open_clip_checkpoint(encoder, found, prefix=prefix)
        assert shapes_of(clip_names(back)) == shapes_of(clip_names(encoder.state_dict()))


def test_a_layer_that_no_program_reads_is_refused():
    with torch.device("meta"):
        pipeline = sd2()
        pipeline.text_encoder = CLIPTextModel(text_config(1024, 24, 16, hidden_act="gelu"))
    with pytest.raises(
        UserError, match="24 layers, of which programs read 23 from a single file of Stable Diffusion 2; choose folder"
    ):
        to_single_file(pipeline, FAMILIES["sd2"])
