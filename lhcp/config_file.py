"""Reading a run configuration from YAML, and writing one. Imports no torch.

Relative paths in a file (`output_dir`, `data.path`, `model.init_from`) are relative to the current directory, not to
the file.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lhcp.checkpoint.folder import published, step_folder
from lhcp.checkpoint.manifest import Checkpoint
from lhcp.config import ConfigError, ModelConfig, RunConfig, written_out
from lhcp.config.validation import annotation_at, sections, shown, validate
from lhcp.presets import MODEL_PRESETS

CONFIG_FILE = "config.yaml"
"""The resolved configuration in a run folder."""


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate the run configuration in the YAML file `path`.

    Args:
        path: the file. `model: {preset: NAME}` starts from that preset; the other keys given override it.
            `model: {init_from: DIR}` takes the keys of the checkpoint in DIR; others given must be equal to those.
        overrides: `a.b=VALUE` strings, applied in order; VALUE is YAML, list items go by index
            (`stages.0.steps=5`).

    Raises:
        ConfigError: with one line per wrong key (key path, what was given, what is valid), or saying why the
            file or an override cannot be read. What depends on several sections is checked by
            `RunConfig.resolve`.
    """
    return from_mapping(read_mapping(path), overrides)


def from_mapping(data: dict[Any, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """As `load`, from what a file holds; `data` may be changed."""
    for override in overrides:
        _apply_override(data, override)
    _expand_preset(data)
    start = _expand_init_from(data)
    config = validate(RunConfig, data)
    if start is not None:
        _check_same_shape(config.model, start)
    return config


def save(config: RunConfig, path: Path) -> None:
    """Write `config`, defaults included, as YAML that `load` reads back to an equal configuration.

    Raises:
        FileExistsError: when there is such a file.
        OSError: when `path` cannot be written; its folder must exist.
    """
    with path.open("x", encoding="utf-8") as file:
        file.write(dump(config))


def dump(config: RunConfig) -> str:
    """`config`, defaults included, as YAML that `load` reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """The safe loader, but a key given twice is an error and not the last one's, and 12:00:00 and 0123 are text."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return node

    def construct_yaml_int(self, node: Any) -> Any:
        text = ":" in node.value or re.fullmatch(r"[-+]?0[0-9_]+", node.value)  # octal to YAML
        return node.value if text else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> Any:
        return node.value if ":" in node.value else super().construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def _parse(text: str, name: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}, line {mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: {_one_line(error.problem or error.context or 'not YAML')}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{name}, line {line}: not YAML (character U+{error.character:04X})") from None
    except (ValueError, RecursionError) as error:  # such as the date 2026-99-99
        raise ConfigError(f"{name}: not YAML ({_one_line(error)})") from None


def read_mapping(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, or it holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    data = _parse(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: given {shown(data)} at the top level, must be a mapping (key: value)")
    return data


def _apply_override(data: dict[Any, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: must be KEY=VALUE, such as optim.lr=0.001")
    name = f"override {override!r}"
    value = _parse(text, name)
    here: dict[Any, Any] | list[Any] = data
    for depth, part in enumerate(parts[:-1], start=1):
        here = _enter(here, part, parts[:depth], name)
    here[_slot(here, parts[-1], parts[:-1], name)] = value


def _enter(here: dict[Any, Any] | list[Any], part: str, path: list[str], name: str) -> Any:
    """The section or list at `part`, created where the file leaves a section out."""
    slot = _slot(here, part, path[:-1], name)
    dotted = ".".join(path)
    if isinstance(here, dict) and slot not in here:
        known = annotation_at(RunConfig, path)
        if known is not None and not sections(known):
            raise ConfigError(f"{name}: {dotted} is not a section or a list in the file; set {dotted} as a whole")
        here[slot] = {}
    inner = here[slot]
    if not isinstance(inner, dict | list):
        raise ConfigError(f"{name}: {dotted} is {shown(inner)}, not a section")
    here[slot] = copy.copy(inner)  # an alias (*name) elsewhere in the file keeps its value
    return here[slot]


def _slot(here: dict[Any, Any] | list[Any], part: str, path: list[str], name: str) -> Any:
    """`part` as a key of `here`: itself, or an index."""
    if isinstance(here, dict):
        return part
    if not part.isdecimal() or int(part) >= len(here):
        valid = f"0 to {len(here) - 1}" if here else "none, it is empty"
        raise ConfigError(f"{name}: {part!r} is not an index of the list {'.'.join(path)}; valid: {valid}")
    return int(part)


def _expand_preset(data: dict[Any, Any]) -> None:
    model = data.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return
    if model.get("init_from") is not None:
        raise ConfigError(
            "model: preset and init_from are both given; init_from brings the whole shape, so leave preset out "
            "(to override a file: --set 'model={init_from: DIR}')"
        )
    given = {key: value for key, value in model.items() if key != "preset"}
    name = model["preset"]
    if not isinstance(name, str) or name not in MODEL_PRESETS:
        close = difflib.get_close_matches(str(name), MODEL_PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"model.preset: given {shown(name)}, must be one of: {', '.join(MODEL_PRESETS)}{hint}")
    data["model"] = MODEL_PRESETS[name].model_dump() | given


def _expand_init_from(data: dict[Any, Any]) -> ModelConfig | None:
    """Fill in the model's keys from the checkpoint that it starts from, and return that checkpoint's model."""
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("init_from"), str):  # validation says what is wrong
        return None
    try:
        folder = written_out(Path(model["init_from"]))
    except ValueError:  # validation says what is wrong
        return None
    try:
        start = Checkpoint.open(folder).manifest.model
    except ConfigError as error:
        if begun := _model_of_begun_run(data, model["init_from"]):
            data["model"] = begun | model
            return None
        steps = published(folder)
        hint = f"; the newest of that run is {step_folder(folder, steps[-1])}" if steps else ""
        if (folder / "config.json").exists():
            hint = "; it is a Hugging Face model: make a checkpoint of it with `lhcp import`"
        raise ConfigError(f"model.init_from: {error}{hint}") from None
    data["model"] = start.model_dump() | model
    return start


def _model_of_begun_run(data: dict[Any, Any], init_from: str) -> dict[str, Any] | None:
    """The model of the run in output_dir, if it began with that checkpoint: such a run needs it no more."""
    path = Path(str(data.get("output_dir"))) / CONFIG_FILE
    model = read_mapping(path).get("model") if path.exists() else None
    return model if isinstance(model, dict) and model.get("init_from") == init_from else None


def _check_same_shape(model: ModelConfig, start: ModelConfig) -> None:
    """Refuse keys that contradict the checkpoint that the weights are from."""
    given = model.model_dump()
    wrong = [
        f"model.{key}: given {shown(given[key])}, but the checkpoint in model.init_from has {shown(value)}; remove it"
        for key, value in start.model_dump().items()
        if key != "init_from" and given[key] != value
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
