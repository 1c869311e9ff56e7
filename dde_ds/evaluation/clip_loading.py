"""Load CLIP models from local folders or the hub, as safetensors or by ``weights_only``, so that no file can run code."""

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
from dde_ds.warn import reason

CONFIG = ("config.json",)
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
PROCESSOR = ("preprocessor_config.json", "processor_config.json", *TOKENIZER)
# Raise this number when a formula or a preprocessing of a scorer changes. Then older cached scores are not used.
FORMULA = 1


def resolve(source: str, patterns: Sequence[str], key: str) -> Path:
    """Return the path of a local folder or file, or of the downloaded files of a hub id that match ``patterns``.

    Args:
        source: a local path, or a hub id ``owner/name[@revision]``.
        key: names the option in error messages.

    Raises:
        UserError: the source is neither, or cannot be downloaded.
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
    """Return the SHA-256 of the names and contents of the files that match. Other files beside them do not count."""
    files = [folder] if folder.is_file() else sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return hashlib.sha256("".join(f"{file.name} {sha256_of(file)}\n" for file in files).encode()).hexdigest()


def scorer_digest(*parts: str) -> str:
    """Return the digest of :data:`FORMULA` and of ``parts``: a scorer's name and the digests of its files."""
    return hashlib.sha256(json.dumps([FORMULA, *parts]).encode()).hexdigest()


def require(folder: Path, patterns: Sequence[str], key: str, mend: str) -> None:
    """Refuse a folder in which no file matches any of ``patterns``.

    Raises:
        UserError: no file matches. ``mend`` ends the message and says what to do.
    """
    if not any(any(folder.glob(pattern)) for pattern in patterns):
        raise UserError(f"{key} {folder}: holds no {' or '.join(patterns)}; {mend}")


def load_clip(folder: Path, key: str) -> Any:
    """Load a transformers ``CLIPModel`` in float32."""
    from transformers import CLIPModel

    try:
        return CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{key} {folder}: no CLIP model: {reason(error)[:300]}") from None


def load_processors(folder: Path, key: str) -> tuple[Any, Any]:
    """Load the tokenizer and the image processor.

    The image processor uses PIL, as for the published scores. The one that uses torchvision would differ a little.
    """
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder), load_image_processor(folder, key)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{key} {folder}: no CLIP processor: {_words(error)}") from None


def load_image_processor(folder: Path, key: str) -> Any:
    """Load CLIP's image processor, the one that uses PIL."""
    import transformers

    # Where transformers has two, the name without a suffix is the one that uses torchvision.
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    try:
        return kind.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{key} {folder}: no CLIP processor: {_words(error)}") from None


def _words(error: Exception) -> str:
    wrong = "a value in it is of the wrong type: " if isinstance(error, TypeError) else ""  # Python's own words say what, not where
    return wrong + reason(error)[:300]


def load_aesthetic(folder: Path, key: str) -> tuple[Any, torch.nn.Sequential]:
    """Load LAION's aesthetic predictor: a transformers ``CLIPVisionModelWithProjection``, and the linear layers on its embedding.

    Version 1 has one layer, ``predictor``. Version 2 has five, ``layers``; the dropouts between them do nothing here.

    Raises:
        UserError: the weights are of another model. Version 2 with ReLUs is another model too: its layers have other numbers.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    weights = read_weights(folder / "model.safetensors", key)
    heads = {}
    for name in [name for name in weights if name.startswith(("layers.", "predictor."))]:
        layer, _, kind = name.rpartition(".")
        heads.setdefault(layer, {})[kind] = weights.pop(name)
    weights.pop("vision_model.embeddings.position_ids", None)  # older transformers saved this range, which is no weight
    if list(heads) not in (["predictor"], [f"layers.{number}" for number in (0, 2, 4, 6, 7)]):
        raise UserError(f"{key} {folder}: is no linear aesthetic predictor: its head is {', '.join(heads) or 'not there'}")
    try:
        model = CLIPVisionModelWithProjection(CLIPVisionConfig.from_pretrained(folder)).eval()
        model.load_state_dict(weights)
        layers = []
        for tensors in heads.values():
            layers.append(torch.nn.Linear(*tensors["weight"].T.shape))
            layers[-1].load_state_dict(tensors)
    except (RuntimeError, KeyError, OSError) as error:
        raise UserError(f"{key} {folder}: does not hold the weights of its config.json: {reason(error)[:300]}") from None
    return model.requires_grad_(False), torch.nn.Sequential(*layers).requires_grad_(False)


def load_open_clip(weights: Path, config_folder: Path, key: str) -> Any:
    """Load an open_clip checkpoint into a transformers ``CLIPModel``. The architecture is that of ``config_folder``.

    Both libraries have the same network under different names; a test compares the two numerically. So open_clip, timm and
    torchvision are not needed.

    Raises:
        UserError: the file is no plain table of tensors, or its weights are of another architecture.
    """
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig.from_pretrained(config_folder)).eval()
    try:
        model.load_state_dict(_renamed(read_weights(weights, key)))
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"{key} {weights}: does not hold the weights of {config_folder}/config.json: {reason(error)[:300]}"
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
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"{key} {path}: not loadable as plain weights: {str(error).splitlines()[0]}; it is not loaded in any other way"
        ) from None
    return weights["state_dict"] if isinstance(weights, dict) and "state_dict" in weights else weights


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
    """Rename open_clip's weights as transformers does. open_clip stores projections transposed, and q, k, v as one matrix."""
    renamed = {}
    for name, tensor in weights.items():
        name = name.removeprefix("module.")  # the prefix of a model that was saved inside DistributedDataParallel
        if name == "attn_mask":
            continue
        if name in PLACES:
            renamed[PLACES[name]] = tensor.T if name in ("text_projection", "visual.proj") else tensor
            continue
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            raise KeyError(f"unknown weight {name}")
        target = PREFIXES[prefix] + name[len(prefix) :]
        if ".attn.in_proj_" in target:
            block, kind = target.split(".attn.in_proj_")
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{block}.self_attn.{part}_proj.{kind}"] = piece
            continue
        for old, new in IN_BLOCK.items():
            target = target.replace(old, new)
        renamed[target] = tensor
    return renamed
