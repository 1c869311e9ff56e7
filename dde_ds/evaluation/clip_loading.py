"""CLIP models from local folders or the hub, as safetensors or ``weights_only``: nothing that is loaded here can run code."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dde_ds.errors import UserError
from dde_ds.files import sha256_of

CONFIG = ("config.json",)
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
PROCESSOR = ("preprocessor_config.json", "processor_config.json", *TOKENIZER)
# Raise it when a formula or a preprocessing of a scorer changes: cached scores of before are then not taken.
FORMULA = 1


def resolve(source: str, patterns: Sequence[str], key: str) -> Path:
    """A local folder or file as it is, or the files of a hub id (``owner/name[@revision]``) that match ``patterns``.

    Raises:
        UserError: neither; ``key`` names the option in its message.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"{key} {source}: no such file or folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{key} {source}: neither a local folder nor to be had from the hub: {' '.join(str(error).split())}"
        ) from None


def files_digest(folder: Path, patterns: Sequence[str]) -> str:
    """SHA-256 over the names and contents of the files that are there, whatever else lies beside them."""
    files = [folder] if folder.is_file() else sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return hashlib.sha256("".join(f"{file.name} {sha256_of(file)}\n" for file in files).encode()).hexdigest()


def scorer_digest(*parts: str) -> str:
    """Of a scorer's name and its files' digests, and of :data:`FORMULA`."""
    return hashlib.sha256(json.dumps([FORMULA, *parts]).encode()).hexdigest()


def require(folder: Path, patterns: Sequence[str], key: str, mend: str) -> None:
    """Raises: UserError where no file matches any of ``patterns``."""
    if not any(any(folder.glob(pattern)) for pattern in patterns):
        raise UserError(f"{key} {folder}: holds no {' or '.join(patterns)}; {mend}")


def load_clip(folder: Path, key: str) -> Any:
    """A transformers ``CLIPModel`` in float32."""
    from transformers import CLIPModel

    try:
        return CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{key} {folder}: no CLIP model: {' '.join(str(error).split())[:300]}") from None


def load_processors(folder: Path, key: str) -> tuple[Any, Any]:
    """Tokenizer and image processor. The latter by PIL, as the scores were published; torchvision's would differ a little."""
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder), load_image_processor(folder, key)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{key} {folder}: no CLIP processor: {' '.join(str(error).split())[:300]}") from None


def load_image_processor(folder: Path, key: str) -> Any:
    """CLIP's, by PIL."""
    import transformers

    # Where there are two, the name without a suffix is torchvision's.
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    try:
        return kind.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{key} {folder}: no CLIP processor: {' '.join(str(error).split())[:300]}") from None


def load_aesthetic(folder: Path, key: str) -> tuple[Any, torch.nn.Sequential]:
    """LAION's aesthetic predictor: a transformers ``CLIPVisionModelWithProjection``, and the linear layers behind its embedding.

    ``predictor`` is the one layer of version 1; ``layers`` are the five of version 2, whose dropouts between them do nothing here.

    Raises:
        UserError: weights of something else; of version 2 with ReLUs as well, whose numbers between the layers are others.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    weights = read_weights(folder / "model.safetensors", key)
    heads = {}
    for name in [name for name in weights if name.startswith(("layers.", "predictor."))]:
        layer, _, kind = name.rpartition(".")
        heads.setdefault(layer, {})[kind] = weights.pop(name)
    weights.pop("vision_model.embeddings.position_ids", None)  # of older transformers; a range, no weight
    if list(heads) not in (["predictor"], [f"layers.{number}" for number in (0, 2, 4, 6, 7)]):
        raise UserError(f"{key} {folder}: is no linear aesthetic predictor: its head is {', '.join(heads) or 'not there'}")
    try:
        model = CLIPVisionModelWithProjection(CLIPVisionConfig.from_pretrained(folder)).eval()
        model.load_state_dict(weights)
        layers = []
        for own in heads.values():
            layers.append(torch.nn.Linear(*own["weight"].T.shape))
            layers[-1].load_state_dict(own)
    except (RuntimeError, KeyError, OSError) as error:
        raise UserError(
            f"{key} {folder}: does not hold the weights of its config.json: {' '.join(str(error).split())[:300]}"
        ) from None
    return model.requires_grad_(False), torch.nn.Sequential(*layers).requires_grad_(False)


def load_open_clip(weights: Path, config_folder: Path, key: str) -> Any:
    """A transformers ``CLIPModel`` of ``config_folder``'s architecture with the weights of an open_clip checkpoint.

    The same network under other names: a test compares the two numerically. It spares open_clip, timm and torchvision.

    Raises:
        UserError: a file that is no plain table of tensors, or weights of another architecture.
    """
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig.from_pretrained(config_folder)).eval()
    try:
        model.load_state_dict(_renamed(read_weights(weights, key)))
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"{key} {weights}: does not hold the weights of {config_folder}/config.json: {' '.join(str(error).split())[:300]}"
        ) from None
    return model


def read_weights(path: Path, key: str) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        import safetensors.torch
        from safetensors import SafetensorError

        try:
            return safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{key} {path}: not readable as safetensors: {error}") from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"{key} {path}: not loadable as plain weights: {str(error).splitlines()[0]}; it is not loaded in any other way"
        ) from None
    return found["state_dict"] if isinstance(found, dict) and "state_dict" in found else found


PLACES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
}
PREFIXES = {
    "ln_final.": "text_model.final_layer_norm.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
IN_BLOCK = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names → transformers'. Projections are stored transposed there, and q, k, v as one matrix."""
    found = {}
    for name, tensor in weights.items():
        name = name.removeprefix("module.")  # of a model saved inside DistributedDataParallel
        if name == "attn_mask":
            continue
        if name in PLACES:
            found[PLACES[name]] = tensor.T if name in ("text_projection", "visual.proj") else tensor
            continue
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            raise KeyError(f"unknown weight {name}")
        target = PREFIXES[prefix] + name[len(prefix) :]
        if ".attn.in_proj_" in target:
            block, kind = target.split(".attn.in_proj_")
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{block}.self_attn.{part}_proj.{kind}"] = piece
            continue
        for old, new in IN_BLOCK.items():
            target = target.replace(old, new)
        found[target] = tensor
    return found
