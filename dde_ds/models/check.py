"""Check that a base pipeline can be trained, used for drawing and exported, without reading its weights.

Each part is built empty from its configuration, and compared with the names and shapes in the headers of its files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dde_ds.errors import UserError
from dde_ds.models.base import (
    are_here,
    family_of,
    find_variant,
    local_folder,
    one_line,
    unloadable,
    weight_files,
)
from dde_ds.models.family import BATCH_NAMES, TRAINED_AND_DRAWN, Conditioning, Family
from dde_ds.models.parts import build_empty, required_parts
from dde_ds.models.unet import load_scheduler_config
from dde_ds.untrusted import open_regular

# Old names in the attention of VAEs that were saved before 2023, and their names today. diffusers reads both.
OLD_NAMES = ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."))


def check_base(path: str, revision: str | None = None, variant: str | None = None, download: bool = True) -> None:
    """Check that a base has all parts, that each can be loaded, and that they fit each other.

    Args:
        path: a diffusers folder or a hub id.
        revision: revision on the hub.
        variant: as ``model.variant``.
        download: download the weights of a hub id. With False, only weights that are already on this machine are
            checked.

    Raises:
        UserError: the message says what is wrong, where, and how to fix it.
    """
    parts = required_parts(path, revision)
    variant = find_variant(path, revision, variant)
    made = {}
    for part in (part for part in parts if part in TRAINED_AND_DRAWN):
        made[part] = build_empty(path, part, revision)
        _, files = weight_files(path, part, revision, variant)
        names = [f"{part}/{name}" for name in files]
        if download or are_here(path, revision, names):
            _compare(path, part, made[part], _shapes(path, local_folder(path, revision, names), names))
    _check_tokenizers(path, revision, parts, made)
    _check_scheduler(path, revision, parts["scheduler"])
    family = family_of(path, revision)
    _check_fit(path, made, family)
    _check_passes(path, made, family)


def _shapes(path: str, folder: Path, names: list[str]) -> dict[str, list[int]]:
    """Return the names and shapes of the tensors in safetensors files, from their headers."""
    shapes: dict[str, list[int]] = {}
    for name in names:
        try:
            open_regular(folder / name).close()  # a pipe would block for ever
            with safe_open(folder / name, framework="pt") as file:
                shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"model.path {path}: {name} is damaged or no safetensors: {one_line(error)}; fetch it again") from None
    return shapes


def _compare(path: str, part: str, empty: torch.nn.Module, shapes: dict[str, list[int]]) -> None:
    """Refuse a part whose files lack tensors of its configuration, or hold them in other shapes."""
    stored = {_plain(name): shape for name, shape in shapes.items()}
    expected = {_plain(name): list(value.shape) for name, value in empty.state_dict().items()}
    if missing := sorted(expected.keys() - stored.keys()):
        raise UserError(
            f"model.path {path}: {part} holds no {missing[0]} ({len(missing)} of {len(expected)} tensors are missing): its weights are not those "
            "that its config.json speaks of"
        )
    for name, shape in expected.items():
        # Old VAEs store their attention as 1×1 convolutions.
        if [size for size in shape if size != 1] != [size for size in stored[name] if size != 1]:
            raise UserError(
                f"model.path {path}: {part} holds {name} of shape {stored[name]}, its config.json speaks of {shape}: not its weights"
            )


def _plain(name: str) -> str:
    """Return the name of a tensor without the parts that differ between versions of the libraries."""
    name = name.removeprefix("text_model.")
    if ".attentions." in name and ".transformer_blocks." not in name:
        for old, new in OLD_NAMES:
            name = name.replace(old, new)
    return name


def _check_tokenizers(path: str, revision: str | None, parts: dict[str, str], made: dict[str, Any]) -> None:
    """Refuse a tokenizer that has more tokens than its text encoder knows, or makes longer prompts than it takes."""
    from transformers import CLIPTokenizer

    for part in (part for part in parts if part.startswith("tokenizer")):
        folder = local_folder(path, revision, [f"{part}/*"])
        with unloadable(path, part):
            tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder=part)
            most, length = len(tokenizer), tokenizer.model_max_length
            tokens = tokenizer("a", padding="max_length", max_length=4, truncation=True).input_ids
        text = made[part.replace("tokenizer", "text_encoder")].config
        if most > text.vocab_size or max(tokens) >= text.vocab_size:
            raise UserError(
                f"model.path {path}: {part} has {most} tokens, its text encoder knows {text.vocab_size}: they are not of one model"
            )
        if not isinstance(length, int) or not 2 <= length <= text.max_position_embeddings:
            raise UserError(
                f"model.path {path}: {part}/tokenizer_config.json: model_max_length is {length}, its text encoder takes "
                f"{text.max_position_embeddings}"
            )


def _check_scheduler(path: str, revision: str | None, name: str) -> None:
    """Refuse a scheduler that diffusers does not have or cannot configure."""
    import diffusers

    config, kind = load_scheduler_config(path, revision), getattr(diffusers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise UserError(
            f"model.path {path}: its model_index.json says that scheduler is {name!r}, which is no scheduler of diffusers"
        )
    with unloadable(path, "scheduler/scheduler_config.json"):
        kind.from_config(config)  # pyright: ignore[reportAttributeAccessIssue]  # every scheduler is configurable
        diffusers.DDIMScheduler.from_config(config).set_timesteps(1)  # pyright: ignore[reportAttributeAccessIssue]  # samples are drawn with it


def _check_fit(path: str, made: dict[str, Any], family: Family) -> None:
    """Refuse a UNet that does not fit both the VAE's latents and the text encoders' embeddings."""
    unet, vae = made["unet"].config, made["vae"].config
    _, width = _prompt_shapes(made, family)["prompt_embeds"]
    for what, value, other in (
        ("in_channels", unet.in_channels, ("the VAE's latents have", vae.latent_channels)),
        ("cross_attention_dim", unet.cross_attention_dim, ("the text encoders' embeddings have", width)),
    ):
        if value != other[1]:
            raise UserError(
                f"model.path {path}: {what} of the UNet is {value}, but {other[0]} {other[1]}: they are not of one model"
            )


def _prompt_shapes(made: dict[str, Any], family: Family) -> dict[str, tuple[int, ...]]:
    return family.prompt_shapes({text.part: made[text.part].config.to_dict() for text in family.text_encoders})


@torch.no_grad()
def _check_passes(path: str, made: dict[str, Any], family: Family) -> None:
    """Run each part once on tensors without data, since some wrong values of a configuration fail only there."""
    unet, vae = made["unet"].eval(), made["vae"].eval()
    texts = {part: made[part].eval() for part in made if part.startswith("text_encoder")}
    with torch.device("meta"):
        for part, text in texts.items():
            with unloadable(path, f"{part}/config.json"):
                text(torch.zeros(1, text.config.max_position_embeddings, dtype=torch.long), output_hidden_states=True)
        side, channels = unet.config.sample_size, unet.config.in_channels
        pixels = side * 2 ** (len(vae.config.block_out_channels) - 1)
        if pixels % 8:
            raise UserError(
                f"model.path {path}: unet/config.json: sample_size {side} makes images of {pixels} pixels: expected a multiple of 8"
            )
        latents = torch.zeros(1, channels, side, side)
        with unloadable(path, "vae/config.json"):
            image = vae.decode(latents).sample
            encoded = vae.encode(image).latent_dist.mean
        if encoded.shape != latents.shape:
            raise UserError(
                f"model.path {path}: vae/config.json makes latents of {list(encoded.shape)} from images of {list(image.shape)}"
            )
        shapes = {BATCH_NAMES[name]: shape for name, shape in _prompt_shapes(made, family).items()}
        shapes |= {name: shape[1:] for name, shape in family.layout.pair.items()}
        told = Conditioning(**{name: torch.zeros(1, *shape) for name, shape in shapes.items()})
        with unloadable(path, "unet/config.json"):
            timestep, added = torch.zeros(1, dtype=torch.long), told.added(torch.float32)
            out = unet(latents, timestep, told.prompt_embeds, added_cond_kwargs=added).sample
        if out.shape != latents.shape:
            raise UserError(
                f"model.path {path}: unet/config.json makes predictions of {list(out.shape)} from latents of {list(latents.shape)}"
            )
