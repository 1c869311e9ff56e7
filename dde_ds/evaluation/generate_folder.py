"""Fill a folder with a pipeline's images, over any number of ranks, resumable image by image.

Three things depend on neither ranks nor batches. The prompts are embedded one by one. The initial noise is a function of seed,
prompt and image index. The VAE decodes the images one by one. But the UNet's kernels may round differently for another batch
size. So an image is the same bit for bit in a batch of the same images, and the same within rounding in any other batch.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dde_ds.distributed.collectives import barrier, first_does
from dde_ds.distributed.environment import DistributedEnv
from dde_ds.errors import UserError, nearest
from dde_ds.evaluation.generate import decode, initial_noise, load_pipeline
from dde_ds.evaluation.pictures import ImageFolder, claim
from dde_ds.models.base import family_of
from dde_ds.models.encode import cut_captions
from dde_ds.models.family import TRAINED_AND_DRAWN, encode_prompts, tokenizers_of
from dde_ds.models.unet import DTYPES, load_component_config, load_unet_config

# Samplers that draw no random numbers, so that an image is a function of its initial noise.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}


@dataclass(frozen=True)
class DrawOptions:
    """Hold the options of drawing. The defaults are those of the Diffusion-DPO family of papers."""

    images_per_prompt: int = 8
    seed: int = 0
    scheduler: str = "ddim"
    steps: int = 50
    guidance: float | None = None
    """The scale of guidance. None takes the model family's own."""
    resolution: int | None = None
    """The side in pixels. None takes the model's own."""
    precision: str | None = None
    """The UNet's precision. None takes fp16 on a GPU and fp32 on the CPU. VAE and text encoders stay in float32."""

    def __post_init__(self):
        for name, low in (("images_per_prompt", 1), ("steps", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise UserError(f"{name} {getattr(self, name)}: must be {low} or more")
        if self.scheduler not in SCHEDULERS:
            raise UserError(f"scheduler {self.scheduler!r}{nearest(self.scheduler, SCHEDULERS)}")
        if self.precision is not None and self.precision not in DTYPES:
            raise UserError(f"precision {self.precision!r}{nearest(self.precision, DTYPES)}")
        if self.guidance is not None and not 1 <= self.guidance < 1000:
            raise UserError(f"guidance {self.guidance}: must be 1 (none) or more")


def generate_folder(
    model: str,
    revision: str | None,
    prompts: Sequence[str],
    folder: Path,
    options: DrawOptions,
    ranks: DistributedEnv,
    device: torch.device,
    batch: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    variant: str | None = None,
) -> ImageFolder:
    """Make every image of the folder that is missing or damaged. Every rank calls this.

    Args:
            model: diffusers folder or hub id.
        revision: branch, tag or commit of a hub id.
        batch: images drawn at a time. Take as many as fit into memory.
        on_progress: called with the number of this rank's images that are done, and the number of all its images.
        variant: of the weights' files, such as ``fp16``. None finds it.

    Raises:
        UserError: the model cannot be loaded or cannot draw the resolution, or the folder was begun with other settings.
    """
    if batch < 1:
        raise UserError(f"batch {batch}: must be 1 or more")
    import diffusers

    family = family_of(model, revision)
    side = side_of(model, revision, options)
    pipeline = load_pipeline(model, revision, variant)
    weights = first_does(lambda: weights_digest(pipeline))
    pipeline.scheduler = getattr(diffusers, SCHEDULERS[options.scheduler]).from_config(pipeline.scheduler.config)
    precision = options.precision or ("fp32" if device.type == "cpu" else "fp16")
    settings = {
        "model": model,
        "revision": revision,
        "weights": weights,
        "family": family.layout.name,
        "images_per_prompt": options.images_per_prompt,
        "seed": options.seed,
        "scheduler": options.scheduler,
        "steps": options.steps,
        "guidance": family.guidance if options.guidance is None else float(options.guidance),
        "resolution": side,
        "precision": precision,
    }
    pictures = ImageFolder(Path(folder), list(prompts), settings)
    if ranks.is_main and (cut := int(cut_captions(tokenizers_of(pipeline), prompts).sum())):
        print(
            f"{cut} of {len(prompts)} prompts have more tokens than the text encoder takes: their ends are cut off",
            file=sys.stderr,
        )
    # No rank writes before the folder is known to belong to these settings.
    pictures = replace(pictures, settings=first_does(lambda: claim(pictures).settings))

    # Share out all images, also those that are there: otherwise a share would depend on what another rank has just made.
    share = list(pictures.items())[ranks.rank :: ranks.world_size]
    missing = [item for item in share if not pictures.is_whole(*item)]
    on_progress(len(share) - len(missing), len(share))
    if missing:
        pipeline.to(device)
        pipeline.unet.to(dtype=DTYPES[precision])
        if device.type == "cuda":
            pipeline.unet.to(memory_format=torch.channels_last)
    for low in range(0, len(missing), batch):
        chunk = missing[low : low + batch]
        images = _draw(pipeline, pictures, chunk, side // pipeline.vae_scale_factor, device, DTYPES[precision])
        for item, image in zip(chunk, images, strict=True):
            pictures.save(*item, image.permute(1, 2, 0).numpy())
        on_progress(len(share) - len(missing) + low + len(chunk), len(share))
    barrier(ranks, device)  # from here on, every rank finds all images
    return pictures


def side_of(model: str, revision: str | None, options: DrawOptions) -> int:
    """Return the side of the images in pixels. Loads no weights.

    Raises:
        UserError: the model cannot draw images of this side.
    """
    unet, vae = load_unet_config(model, revision), load_component_config(model, "vae", revision)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    side = unet["sample_size"] * factor if options.resolution is None else options.resolution
    multiple = factor * 2 ** (len(unet["block_out_channels"]) - 1)
    if side < 1 or side % multiple:
        raise UserError(f"resolution {side}: must be a multiple of {multiple} for {model}")
    return side


def weights_digest(pipeline: Any) -> str:
    """Return the SHA-256 of all weights, so that another model under the same path is not taken for this one."""
    digest = hashlib.sha256()
    for name in TRAINED_AND_DRAWN:
        part = getattr(pipeline, name, None)
        for key, tensor in sorted(part.state_dict().items()) if part is not None else ():
            digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def _draw(
    pipeline: Any, pictures: ImageFolder, items: Sequence[tuple[int, int]], side: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Draw the images of ``items``, (N,3,H,W) uint8 on the CPU. ``side`` is that of the latents."""
    wanted = dict.fromkeys(item[0] for item in items)
    embedded = {prompt: encode_prompts(pipeline, pictures.prompts[prompt], device, negative=True) for prompt in wanted}
    conditions = {key: torch.cat([embedded[prompt][key] for prompt, _ in items]).to(dtype) for key in next(iter(embedded.values()))}
    shape = (pipeline.unet.config.in_channels, side, side)
    settings = pictures.settings
    noise = torch.stack([initial_noise(settings["seed"], pictures.prompts[prompt], index, shape) for prompt, index in items])
    latents = pipeline(
        **conditions,
        latents=noise.to(device, dtype),
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance"],
        height=side * pipeline.vae_scale_factor,
        width=side * pipeline.vae_scale_factor,
        output_type="latent",
    ).images
    return decode(pipeline.vae, latents)
