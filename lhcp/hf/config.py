"""A model's configuration as the `config.json` of a Hugging Face Llama, and back. Imports no torch.

transformers 4 has RoPE in `rope_theta` and `rope_scaling`, transformers 5 in `rope_parameters`: both are written, and
either is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lhcp.config import ConfigError, LinearRopeScaling, Llama3RopeScaling, ModelConfig, RopeScaling

CONFIG_FILE = "config.json"
_KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
"""Ours to Hugging Face's, of what both say in the same way."""
_VALID: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
"""What a Hugging Face Llama can vary and ours cannot; None where a key may be left out."""
_ROPE_TYPES: dict[str, type[RopeScaling]] = {"linear": LinearRopeScaling, "llama3": Llama3RopeScaling}
_DEFAULT_THETA = 10_000.0
_DEFAULT_NORM_EPS = 1e-6
"""transformers' own, where a config.json leaves them out."""


def to_hf(model: ModelConfig, seq_len: int, dtype: str, eos_id: int | None) -> dict[str, Any]:
    """The content of config.json.

    Args:
        model: its configuration.
        seq_len: positions that it has been trained for.
        dtype: of the weights beside it, by its name in torch.
        eos_id: token that ends a document; None where no tokenizer is known.
    """
    values, scaling = model.model_dump(), model.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        rope = {"rope_type": scaling.type, **scaling.model_dump(exclude={"type"})}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: values[ours] for ours, theirs in _KEYS.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": seq_len,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": {"rope_theta": model.rope_theta, **rope},
        # Where these are left out, transformers takes those of Llama 2's tokenizer.
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def from_hf(values: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """The model that the content of a Llama's config.json describes, and the positions it has been trained for.

    Raises:
        ConfigError: with one line per key that is missing, wrong, or of a model that lhcp cannot compute.
    """
    for key, valid in _VALID.items():
        if values.get(key) not in valid:
            raise ConfigError(f"{key}: given {_shown(values.get(key))}, must be {_shown(valid[0])}")
    seq_len = values.get("max_position_embeddings")
    if not isinstance(seq_len, int) or seq_len < 1:
        raise ConfigError(f"max_position_embeddings: given {_shown(seq_len)}, must be a whole number of at least 1")
    given = {ours: values[theirs] for ours, theirs in _KEYS.items() if values.get(theirs) is not None}
    heads, dim = given.get("num_heads"), given.get("dim")
    given = {"norm_eps": _DEFAULT_NORM_EPS, "num_kv_heads": heads} | given
    if "head_dim" not in given and isinstance(heads, int) and isinstance(dim, int) and heads > 0 and dim % heads == 0:
        given["head_dim"] = dim // heads
    theta, scaling = _rope(values, seq_len)
    try:
        return ModelConfig.model_validate(given | {"rope_theta": theta, "rope_scaling": scaling}), seq_len
    except ValidationError as error:
        raise _refusal(error, _KEYS) from None


def read_config(hf_dir: Path) -> tuple[ModelConfig, int]:
    """As `from_hf`, of `hf_dir`/config.json.

    Raises:
        ConfigError: there is no such file, or as `from_hf`.
    """
    path = hf_dir / CONFIG_FILE
    if not path.exists():
        raise ConfigError(f"no {CONFIG_FILE} in {hf_dir}; name the folder of a Hugging Face model")
    try:
        return from_hf(read_json(path))
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: something else is in it.
    """
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError("must hold a JSON object")
    return values


def _rope(values: Mapping[str, Any], seq_len: int) -> tuple[Any, RopeScaling | None]:
    """Base and scaling of the frequencies, in either spelling."""
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    given = values.get(key) or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{key}: given {_shown(given)}, must be an object with a rope_type")
    theta = given.get("rope_theta", values.get("rope_theta", _DEFAULT_THETA))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    if not isinstance(kind, str) or kind not in _ROPE_TYPES:
        valid = ", ".join(map(_shown, ("default", *_ROPE_TYPES)))
        raise ConfigError(f"{key}.rope_type: given {_shown(kind)}, must be one of {valid}")
    known = {"original_max_position_embeddings": seq_len} | given  # left out, transformers takes the same
    fields = _ROPE_TYPES[kind].model_fields
    try:
        return theta, _ROPE_TYPES[kind].model_validate({name: known[name] for name in fields if name in known})
    except ValidationError as error:
        raise _refusal(error, {name: f"{key}.{name}" for name in fields}) from None


def _refusal(error: ValidationError, names: Mapping[str, str]) -> ConfigError:
    """pydantic's errors, one a line, about keys by their names in config.json."""
    lines = []
    for one in error.errors(include_url=False):
        key = ".".join(names.get(str(part), str(part)) for part in one["loc"])
        lines.append(_describe(one, key))
    return ConfigError("\n".join(lines))


def _describe(error: ErrorDetails, key: str) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{key}: required"
    return f"{key}: given {_shown(error['input'])}, {error['msg'].replace('Input should', 'must')}"


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
