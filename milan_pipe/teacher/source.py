"""Where a teacher's description and weights come from: this package, open_clip's or timm's names, hubs, folders."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
from open_clip.constants import HF_CONFIG_NAME, HF_WEIGHTS_NAME
from open_clip.factory import _find_checkpoint_in_dir, get_model_config, parse_model_name
from open_clip.model import _build_vision_tower
from open_clip.pretrained import _get_safe_alternatives
from torch import nn

from milan_pipe.config.teacher import DEMO, FOLDER, HUB, TIMM
from milan_pipe.errors import DataError, MissingError, SettingError, one_line
from milan_pipe.pretrained.hub import hub_file, license_of_card, license_on_hub, quiet
from milan_pipe.pretrained.source import Asker, ModelSource, require_depth, what_is_wrong
from milan_pipe.pretrained.timm_source import TimmSource, find_timm_source
from milan_pipe.teacher.checkpoint import load_tower_weights
from milan_pipe.teacher.normalization import OPENAI, stated_normalization
from milan_pipe.teacher.timm_tower import TimmTower

_TEACHER = Asker(what="teacher", setting="teacher.model", weights="teacher.pretrained")


@dataclass(frozen=True, kw_only=True)
class ClipSource(ModelSource):
    """An image tower of open_clip.

    Attributes:
        config: `embed_dim`, `vision_cfg` and `quick_gelu`, the activation of the weights, as open_clip has them.
    """

    config: dict[str, Any]

    def _build(self) -> nn.Module:
        # The image tower alone: text towers are never needed, and some ask a model hub for their parts.
        vision = {**self.config["vision_cfg"], "timm_model_pretrained": False}
        quick_gelu = bool(self.config.get("quick_gelu", False))
        visual: nn.Module = _build_vision_tower(self.config["embed_dim"], vision, quick_gelu=quick_gelu)
        return visual

    def load(self, model: nn.Module, path: Path) -> None:
        load_tower_weights(model, path, self.model)


@dataclass(frozen=True, kw_only=True)
class TimmTowerSource(TimmSource):
    """A model of timm as `TimmTower`."""

    def _build(self) -> nn.Module:
        return TimmTower(super()._build())

    def load(self, model: nn.Module, path: Path) -> None:
        assert isinstance(model, TimmTower)
        super().load(model.trunk, path)


DEMO_FOLDER = Path(__file__).parent / "demo"
"""What `milan-pipe train-clip` wrote of the built-in scenes."""


def find_source(model: str, pretrained: str | None) -> ModelSource:
    """Look up a model, and where its weights are; of a model hub only the description is fetched.

    Args:
        model: `demo`, a name of open_clip, `hf-hub:ORG/NAME`, `local-dir:PATH`, or `timm:` before such a name of timm.
        pretrained: tag, path of a local checkpoint, `random`, or None for the model's own weights.

    Raises:
        SettingError: unknown model, or no weights named.
        MissingError: unknown tag, no such file, folder or repository, or the hub is out of reach.
        DataError: the model's description is damaged.
    """
    if model == DEMO:
        return replace(_in_folder(DEMO, DEMO_FOLDER, pretrained), origin="milan-pipe", license=lambda: "apache-2.0")
    if model.startswith(TIMM):
        found = find_timm_source(model, pretrained, _TEACHER, TimmTowerSource)
        # What says nothing of its input is taken for a CLIP model, as open_clip does.
        return found if found.stated else replace(found, stated=OPENAI)
    try:
        schema, name = parse_model_name(model)
    except ValueError as error:
        raise SettingError(
            f"teacher.model {model!r} names nothing, expected hf-hub:ORG/NAME, local-dir:PATH or timm:NAME"
        ) from error
    if schema is None:
        return _known(model, pretrained)
    return _in_folder(model, Path(name), pretrained) if schema == FOLDER else _on_hub(model, name, pretrained)


def _known(model: str, pretrained: str | None) -> ModelSource:
    """A model that open_clip has by name."""
    name = model.replace("/", "-")
    config = get_model_config(name)
    if config is None:
        near = get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.3)
        hint = f"; nearest are {', '.join(near)}" if near else ""
        raise SettingError(
            f"unknown teacher {model!r}, expected `demo`, a model name of open_clip, timm:NAME, hf-hub:ORG/NAME or "
            f"local-dir:PATH{hint}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = ", ".join(tags) or "none"
    if pretrained is None:
        raise SettingError(
            f"teacher {model!r} needs `teacher.pretrained`: a known tag ({known}), the path of a local checkpoint, or "
            "`random`"
        )
    if pretrained in tags:
        preset = open_clip.get_pretrained_cfg(name, pretrained)
        # The activation is the weights' own: open_clip only warns about ViT-B-16 with OpenAI's weights.
        config = {**config, "quick_gelu": preset.get("quick_gelu", False)}
        weights = partial(_of_tag, name, pretrained, preset)
        repository = preset.get("hf_hub", "").rpartition("/")[0]
        return ClipSource(
            model=name,
            asker=_TEACHER,
            config=config,
            tag=pretrained,
            checkpoint=weights,
            origin=f"{HUB}:{repository}" if repository else preset.get("url"),
            license=partial(license_on_hub, repository),
        )
    problem = f"has no pretrained tag {pretrained!r} and no such file is there; known tags are {known}"
    return ClipSource(asker=_TEACHER, model=name, config=config).with_file(pretrained, problem)


def _of_tag(name: str, tag: str, preset: dict[str, Any]) -> Path:
    """The checkpoint that a tag stands for, fetched once."""
    try:
        if preset.get("hf_hub"):
            return _hub_weights(*os.path.split(preset["hf_hub"]))
        with quiet():
            return Path(open_clip.download_pretrained(preset))
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise MissingError(
            f"weights {tag!r} of teacher {name!r} cannot be had ({one_line(error)}). Connect to the model hub once, "
            "or name a local checkpoint with --set teacher.pretrained=PATH"
        ) from error


def _hub_weights(repository: str, file: str = "") -> Path:
    """Weights in a repository, safetensors where it has them."""
    file = file or HF_WEIGHTS_NAME
    return hub_file(repository, *_get_safe_alternatives(file), file)


def _on_hub(model: str, repository: str, pretrained: str | None) -> ModelSource:
    def fetched(fetch: Callable[[], Path]) -> Path:
        try:
            return fetch()
        except MissingError as error:
            raise MissingError(
                f"teacher {model!r} cannot be had: {error}. The folder of a copy will do too: "
                "--set teacher.model=local-dir:PATH"
            ) from error

    description = fetched(lambda: hub_file(repository, HF_CONFIG_NAME))
    source = _described(model, description, pretrained, lambda: fetched(lambda: _hub_weights(repository)))
    return replace(source, origin=f"{HUB}:{repository}", license=partial(license_on_hub, repository))


def _in_folder(model: str, folder: Path, pretrained: str | None) -> ModelSource:
    if not folder.is_dir():
        raise MissingError(f"teacher {model!r}: {folder} is no folder; name it with --set teacher.model=local-dir:PATH")
    description = folder / HF_CONFIG_NAME
    if not description.is_file():
        raise MissingError(f"teacher {model!r}: {folder} has no {HF_CONFIG_NAME}, open_clip's description of a model")

    def weights() -> Path:
        with quiet():
            found = _find_checkpoint_in_dir(folder)
        if found is None:
            raise MissingError(
                f"teacher {model!r}: {folder} has no weights (.safetensors, .bin or .pth); name them with "
                "--set teacher.pretrained=PATH"
            )
        return Path(found)

    source = _described(model, description, pretrained, weights)
    return replace(source, license=partial(license_of_card, folder / "README.md"))


def _described(model: str, path: Path, pretrained: str | None, own: Callable[[], Path]) -> ModelSource:
    """A model by its `open_clip_config.json`, with the weights beside it unless the settings name others."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        config, stated = found["model_cfg"], stated_normalization(found.get("preprocess_cfg") or {})
        if not isinstance(config["embed_dim"], int) or not isinstance(config["vision_cfg"], dict):
            raise TypeError("embed_dim or vision_cfg of another kind")
        if stated is None:
            raise TypeError("mean or std of another kind")
        require_depth(config["vision_cfg"])
        around = [config.get(name) for name in ("embed_dim", "vision_cfg", "quick_gelu")]
        structure = json.dumps(around, sort_keys=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"teacher {model!r}: {path} does not describe a model ({what_is_wrong(error)}); expected model_cfg with "
            "embed_dim and vision_cfg, and three numbers each for mean and std where preprocess_cfg says them"
        ) from error
    source = ClipSource(asker=_TEACHER, model=model, config=config, stated=stated, structure=structure)
    return source.with_own(pretrained, own)
