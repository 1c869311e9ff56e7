"""All that is known of the model families SD1, SD2 and SDXL.

All other modules ask this table, and a test checks that they do. A family is a diffusers pipeline: its parts, what its
UNet is conditioned by, and the names that other programs use for it. To add a family, add a row to :data:`FAMILIES`. If
it has new tensors, add them to :class:`Conditioning` and :data:`LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the command line reads the table, and must start without torch
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A part of a pipeline, in any family."""

    classes: tuple[str, ...]
    """The classes that the part may have, as ``model_index.json`` names them."""
    library: str
    """The library of these classes."""
    weights: str | None = None
    """The library's name of the weight file, before the variant and ``.safetensors``.

    None stands for a part without weights.
    """
    numbers: Mapping[str, int] = field(default_factory=dict)
    """Values of the part's configuration that this project computes with, and the maximum of each.

    Each must be a whole number of at least 1.
    """


_TEXT = {"max_position_embeddings": 2**16, "vocab_size": 2**24}
_TOKENIZER = Part(("CLIPTokenizer", "CLIPTokenizerFast"), "transformers")
PARTS = {
    "unet": Part(
        ("UNet2DConditionModel",),
        "diffusers",
        "diffusion_pytorch_model",
        {"in_channels": 64, "sample_size": 2048, "cross_attention_dim": 2**16},
    ),
    "vae": Part(("AutoencoderKL",), "diffusers", "diffusion_pytorch_model", {"latent_channels": 64}),
    "text_encoder": Part(("CLIPTextModel", "CLIPTextModelWithProjection"), "transformers", "model", _TEXT),
    "text_encoder_2": Part(("CLIPTextModelWithProjection",), "transformers", "model", _TEXT | {"projection_dim": 2**16}),
    "tokenizer": _TOKENIZER,
    "tokenizer_2": _TOKENIZER,
}
"""The parts that training, drawing and the export need, beside the scheduler."""
OPTIONAL = {
    "safety_checker": Part(("StableDiffusionSafetyChecker",), "diffusers", "model"),
    "feature_extractor": Part(("CLIPImageProcessor",), "transformers"),
    "image_encoder": Part(("CLIPVisionModelWithProjection",), "transformers", "model"),
}
"""The parts that an export holds if the base has them."""
TRAINED_AND_DRAWN = tuple(name for name, part in PARTS.items() if part.weights)
"""The needed parts that have weights."""
TOKENIZERS = tuple(name for name in PARTS if name.startswith("tokenizer"))
TEXT_PARTS = tuple(name for name in PARTS if name.startswith(("text_encoder", "tokenizer")))
"""The parts that are needed for prompts only."""


class Conditioning(NamedTuple):
    """The inputs of a UNet beside latents and timesteps."""

    prompt_embeds: Tensor
    """(N,S,D)."""
    pooled_prompt_embeds: Tensor | None = None
    """(N,P), for SDXL only."""
    time_ids: Tensor | None = None
    """(N,6) float32, sizes and crops in pixels, for SDXL only."""

    def added(self, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """Return ``added_cond_kwargs`` of diffusers' UNet, in ``dtype``. Return None if the UNet takes only prompts."""
        if self.pooled_prompt_embeds is None or self.time_ids is None:
            return None
        # time_ids stay float32, because bfloat16 cannot represent a size of 765 pixels.
        return {"text_embeds": self.pooled_prompt_embeds.to(dtype), "time_ids": self.time_ids}


def conditioning_shapes(unet: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a UNet's conditioning for one latent, by the fields of :class:`Conditioning`.

    Args:
        unet: the UNet's ``config.json``.
        tokens: length of a prompt.
    """
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (tokens, unet["cross_attention_dim"])}
    if unet.get("addition_embed_type") == "text_time":
        pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        shapes |= {"pooled_prompt_embeds": (pooled,), "time_ids": (6,)}
    return shapes


@dataclass(frozen=True)
class Layout:
    """The tensors that shards hold beside latents. A model can be trained only on shards of its own layout."""

    name: str
    """The name in the settings of shards and of image folders. SD2 has the layout of SD1."""
    prompt: Mapping[str, int]
    """Number of dimensions of each tensor of a prompt."""
    pair: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of each additional float32 tensor of a pair."""


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("sd", {"prompt_embeds": 2}),
        Layout("sdxl", {"prompt_embeds": 2, "pooled": 1}, {"time_ids": (2, 6)}),
    )
}
BATCH_NAMES = {"prompt_embeds": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
"""The names of a prompt's tensors in a batch, by their names in shards. A batch uses diffusers' names."""
PAIR_TENSORS = tuple(dict.fromkeys(name for layout in LAYOUTS.values() for name in layout.pair))
"""The tensors of a pair beside latents, in any layout."""


class TextEncoder(NamedTuple):
    """A text encoder, and its place in a single file of the original code."""

    part: str
    single_file: str
    """The prefix of its weights' names in such a file."""
    open_clip: bool = False
    """Whether open_clip trained it and named its weights in the file, instead of OpenAI's CLIP."""
    layers_read: int | None = None
    """The number of layers that programs read from the file at most. None means all."""


@dataclass(frozen=True)
class Family:
    """The properties of a model that the rest of the project asks for."""

    name: str
    title: str
    pipelines: tuple[str, ...]
    """Class names in ``model_index.json``. The first class is loaded. The image-to-image pipelines have the same parts."""
    text_encoders: tuple[TextEncoder, ...]
    optional: tuple[str, ...]
    """The parts of :data:`OPTIONAL` that its pipeline takes."""
    layout: Layout
    guidance: float
    """The default classifier-free guidance for drawing images."""
    architectures: tuple[str, str]
    """ModelSpec's names for a model that predicts noise, and for a model that predicts v."""
    kohya_bases: tuple[str, str]
    """Names in sd-scripts for the base of an adapter, likewise for noise and for v.

    Programs recognise SDXL's name by its beginning.
    """
    original_adapters: bool = False
    """Whether sd-scripts names the layers of adapters as the original code does.

    Otherwise it names them as diffusers does.
    """
    velocity_keys: bool = False
    """True if a single file can tell programs by its keys that the model predicts v."""
    velocity_warning: str = ""
    """Describe how programs read a single file of a v-prediction model without being told."""
    blocks: tuple[str, ...] = (
        "diffusers.models.attention.BasicTransformerBlock",
        "diffusers.models.resnet.ResnetBlock2D",
    )
    """Classes of the denoiser's blocks. Checkpointing works block by block, and ZeRO-3 gathers a whole block at once."""

    @property
    def encoders(self) -> tuple[str, ...]:
        """Return the names of the parts with weights that make shards."""
        return ("vae", *(text.part for text in self.text_encoders))

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Return the names of the tokenizers."""
        return tuple(text.part.replace("text_encoder", "tokenizer") for text in self.text_encoders)

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of the parts that must exist, beside the scheduler."""
        return ("unet", *self.encoders, *self.tokenizers)

    def pipeline_class(self) -> Any:
        """Return the class of diffusers that loads the pipeline."""
        import diffusers

        return getattr(diffusers, self.pipelines[0])

    def prompt_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a prompt's tensors in shards.

        Args:
            configs: the text encoders' configurations, by part.
        """
        first, last = configs[self.text_encoders[0].part], configs[self.text_encoders[-1].part]
        width = sum(configs[text.part]["hidden_size"] for text in self.text_encoders)
        shapes = {"prompt_embeds": (first["max_position_embeddings"], width)}
        return shapes | ({"pooled": (last["projection_dim"],)} if "pooled" in self.layout.prompt else {})

    def pair_tensors(self, images: Sequence[Any], resolution: int) -> dict[str, Tensor]:
        """Return a pair's tensors beside latents, (2,…) each.

        Args:
            images: winner and loser, as :class:`dde_ds.models.encode.Prepared`.
            resolution: side of the prepared images in pixels.
        """
        import torch

        if not self.layout.pair:
            return {}
        # SDXL's micro-conditioning: original size, crop corner, target size (arXiv 2307.01952, sec. 2.2).
        sizes = [[*image.original_size, *image.crop, resolution, resolution] for image in images]
        return {"time_ids": torch.tensor(sizes, dtype=torch.float32)}


_SD = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
FAMILIES = {
    family.name: family
    for family in (
        Family(
            "sd",
            "Stable Diffusion 1",
            _SD,
            (TextEncoder("text_encoder", _CLIP),),
            tuple(OPTIONAL),
            LAYOUTS["sd"],
            guidance=7.5,
            architectures=("stable-diffusion-v1", "stable-diffusion-v1"),
            kohya_bases=("sd_v1", "sd_v1_v"),
            velocity_warning="programs take a single file of Stable Diffusion 1 for noise prediction: set it there",
        ),
        Family(
            "sd2",
            "Stable Diffusion 2",
            _SD,
            # The original has 24 layers, but the output of the last layer is not used. transformers' model leaves that
            # layer out.
            (TextEncoder("text_encoder", _OPEN_CLIP, open_clip=True, layers_read=23),),
            tuple(OPTIONAL),
            LAYOUTS["sd"],
            guidance=7.5,
            architectures=("stable-diffusion-v2-512", "stable-diffusion-v2-768-v"),
            kohya_bases=("sd_v2", "sd_v2_v"),
            velocity_warning="programs guess that of a single file of Stable Diffusion 2 from its weights: set it there if they draw noise",
        ),
        Family(
            "sdxl",
            "SDXL",
            ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
            (
                TextEncoder("text_encoder", "conditioner.embedders.0.transformer."),
                TextEncoder("text_encoder_2", "conditioner.embedders.1.model.", open_clip=True),
            ),
            ("feature_extractor", "image_encoder"),
            LAYOUTS["sdxl"],
            guidance=5.0,
            architectures=("stable-diffusion-xl-v1-base", "stable-diffusion-xl-v1-base"),
            kohya_bases=("sdxl_base_v1-0", "sdxl_base_v1-0"),
            original_adapters=True,
            velocity_keys=True,
        ),
    )
}
PIPELINES = tuple(dict.fromkeys(kind for family in FAMILIES.values() for kind in family.pipelines))
"""Classes of the pipelines that can be trained."""
BLOCKS = tuple(dict.fromkeys(block for family in FAMILIES.values() for block in family.blocks))
"""Classes of the blocks of all families' denoisers."""


def find_family(pipeline: str, text_encoder: Mapping[str, Any]) -> Family:
    """Return the family of a pipeline's class.

    SD1 and SD2 have the same pipeline class, but different text encoders. open_clip's have the activation ``gelu``, and
    OpenAI's have ``quick_gelu``. transformers also takes ``quick_gelu`` if a configuration names no activation.

    Args:
        pipeline: name of the class.
        text_encoder: ``config.json`` of the first text encoder.
    """
    same = [family for family in FAMILIES.values() if pipeline in family.pipelines]
    open_clip = text_encoder.get("hidden_act") == "gelu"
    return next((family for family in same if family.text_encoders[0].open_clip == open_clip), same[0])


def guidance_defaults() -> str:
    """Return the default guidance of each family as text for help messages."""
    return ", ".join(f"{family.guidance:g} for {family.title}" for family in FAMILIES.values())


def tokenizers_of(pipeline: Any) -> list[Any]:
    """Return the tokenizers of a loaded pipeline."""
    return [part for name in TOKENIZERS if (part := getattr(pipeline, name, None)) is not None]


def encode_prompts(pipeline: Any, prompts: str | list[str], device: Any, negative: bool = False) -> dict[str, Tensor]:
    """Return the embeddings of ``prompts`` by a loaded pipeline's text encoders, by the pipeline's names for them.

    Args:
        pipeline: the loaded pipeline.
        prompts: one or several.
        device: where the encoders run.
        negative: add the embeddings of the empty negative prompt, for guidance.
    """
    embeddings = pipeline.encode_prompt(prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=negative)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    named = zip(names[: len(embeddings)], embeddings, strict=True)  # Stable Diffusion returns two, SDXL four
    return {name: value for name, value in named if negative or not name.startswith("negative")}


def save_adapters(layers: dict[str, Tensor], folder: Path, name: str) -> None:
    """Write a UNet's adapters for ``load_lora_weights``. The format of the file is the same for all families."""
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers={**layers}, weight_name=name)


def rename_adapters(tensors: dict[str, Tensor], unet_config: Any) -> dict[str, Tensor]:
    """Return a UNet's adapters by diffusers' names, from a file with the names of kohya, the original code or diffusers.

    SDXL's pipeline reads the files of all families. Its renaming of original block names needs ``unet_config``.
    """
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=unet_config)[0]


def original_adapter_name(name: str) -> str:
    """Return the name by which programs know a tensor that diffusers named in kohya's style.

    For the layers of SDXL's size conditioning, programs know only the original name. For all other layers they also
    know diffusers' name.
    """
    for number in (1, 2):
        name = name.replace(f"lora_unet_add_embedding_linear_{number}.", f"lora_unet_label_emb_0_{2 * number - 2}.")
    return name


def conversion_of(file: str) -> str:
    """Return the Python command that converts a single file."""
    return f"StableDiffusionPipeline.from_single_file({file!r}).save_pretrained('base'), for SDXL StableDiffusionXLPipeline"


def load_class(name: str) -> type:
    """Return a class by its full name."""
    module, _, kind = name.rpartition(".")
    return getattr(import_module(module), kind)
