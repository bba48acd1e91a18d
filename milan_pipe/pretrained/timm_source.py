"""Models of timm: its names and tags, and folders and repositories in its layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import timm
from timm.models import get_pretrained_cfg, is_model, list_pretrained, split_model_name_tag
from timm.models._hub import load_model_config_from_path
from torch import nn

from milan_pipe.config.teacher import FOLDER, HUB, TIMM
from milan_pipe.errors import DataError, MismatchError, MissingError, SettingError, one_line
from milan_pipe.pretrained.hub import hub_file, license_of_card, license_on_hub
from milan_pipe.pretrained.source import Asker, ModelSource, mean_std, require_depth, what_is_wrong
from milan_pipe.weights_file import read_weights

_NOT_OF_A_DESCRIPTION = frozenset(
    ("cache_dir", "checkpoint_path", "model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")
)
_WEIGHTS, _CONFIG = ("model.safetensors", "pytorch_model.bin"), "config.json"


@dataclass(frozen=True, kw_only=True)
class TimmSource(ModelSource):
    """A model of timm, without its classifier.

    Attributes:
        name: timm's name of the model, without a tag.
        described: what timm says of the weights (`pretrained_cfg`).
        arguments: of the model, beside its name.
    """

    name: str
    described: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def _create(self, **weights: Any) -> nn.Module:
        # The weights are given below, wherever they come from.
        places = dict.fromkeys(("source", "file", "url", "hf_hub_id"))
        arguments = {**self.arguments, "num_classes": 0}
        described = {**self.described, **places, **weights}
        model: nn.Module = timm.create_model(self.name, pretrained=bool(weights), pretrained_cfg=described, **arguments)
        return model

    def _build(self) -> nn.Module:
        return self._create()

    def load(self, model: nn.Module, path: Path) -> None:
        weights = read_weights(path)
        try:
            # timm's own way of loading renames what authors named otherwise.
            model.load_state_dict(self._create(state_dict=weights).state_dict())
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
            advice = f". Set {self.asker.setting} to the model that it was trained as" if self.asker.weights else ""
            raise MismatchError(
                f"checkpoint {path} does not fit {self.asker.what} {self.model!r}: {one_line(error)}{advice}"
            ) from error


S = TypeVar("S", bound=TimmSource)


def is_timm_folder(path: str | Path) -> bool:
    """Whether this is a local folder in timm's layout, as `milan-pipe export` and `timm.models.save_for_hf` write."""
    return (Path(path) / _CONFIG).is_file()


def find_timm_source(model: str, pretrained: str | None, asker: Asker, kind: type[S]) -> S:
    """Look up `timm:NAME`, `timm:hf-hub:ORG/NAME` or `timm:local-dir:PATH`; of a hub only the description is fetched.

    `source.untrained()` builds the model, `source.trained()` also fetches its weights and loads them.

    Args:
        pretrained: tag, path of a local checkpoint, `random`, or None for the weights that the model brings.
        asker: who is named in errors.
        kind: `TimmSource`, or a subclass that wraps what is built.

    Raises:
        SettingError: unknown model, or no weights named.
        MissingError: no such tag, file, folder or repository, or the hub is out of reach.
        DataError: the model's description is damaged.
    """
    form, _, name = (rest := model.removeprefix(TIMM)).partition(":")
    new = partial(kind, model=model, asker=asker)
    if form == FOLDER:
        return _in_folder(new, Path(name), pretrained)
    return _on_hub(new, name, pretrained) if form == HUB else _known(new, rest, pretrained)


def _who(new: partial[S]) -> tuple[str, Asker]:
    return new.keywords["model"], new.keywords["asker"]


def _known(new: partial[S], full_name: str, pretrained: str | None) -> S:
    model, asker = _who(new)
    name, tag = split_model_name_tag(full_name)
    if not is_model(name):
        near = timm.list_models(f"{name}*")[:3] if name else []
        near = near or get_close_matches(name, timm.list_models(), n=3, cutoff=0.3)
        hint = f"; nearest are {', '.join(near)}" if near else ""
        raise SettingError(f"unknown {asker.what} {model!r}, timm has no model {name!r}{hint}")
    tags = [known.partition(".")[2] for known in list_pretrained(f"{name}.*")]
    known = ", ".join(tags) or "none"
    if pretrained in tags:
        if tag and pretrained != tag:
            raise SettingError(
                f"{asker.setting} {model!r} names tag {tag!r}, {asker.weights} names {pretrained!r}; leave one out"
            )
        tag, pretrained = pretrained, None
    if tag and tag not in tags:
        raise MissingError(f"{asker.what} {model!r}: timm has no weights {tag!r} of {name!r}; known tags are {known}")
    described = get_pretrained_cfg(f"{name}.{tag}" if tag else name)
    source = new(name=name, described=_plain(described), stated=mean_std(_plain(described)))
    if pretrained is not None:
        problem = f"has no tag {pretrained!r} and no such file is there; known tags are {known}"
        return source.with_file(pretrained, problem)
    if not tags or described is None or not described.has_weights:
        if asker.weights is None:
            raise MissingError(f"{asker.what} {model!r}: timm has no weights of it. {asker.instead}")
        raise SettingError(f"{asker.what} {model!r} needs `{asker.weights}`: the path of a checkpoint, or `random`")
    repository, license_ = described.hf_hub_id, described.license
    if not repository:
        raise MissingError(
            f"weights of {asker.what} {model!r} are not on the model hub, but at {described.url or 'another place'}. "
            f"{asker.instead}"
        )
    files = (described.hf_hub_filename,) if described.hf_hub_filename else _WEIGHTS
    fetch = partial(_fetched, new, partial(hub_file, repository, *files))
    return replace(source, checkpoint=fetch, origin=f"{HUB}:{repository}", license=lambda: license_)


def _plain(described: Any) -> dict[str, Any]:
    return dict(described.to_dict()) if described is not None else {}


def _fetched(new: partial[S], fetch: Callable[[], Path]) -> Path:
    model, asker = _who(new)
    try:
        return fetch()
    except MissingError as error:
        raise MissingError(f"{asker.what} {model!r} cannot be had: {error}. {asker.instead}") from error


def _on_hub(new: partial[S], repository: str, pretrained: str | None) -> S:
    description = _fetched(new, partial(hub_file, repository, _CONFIG))
    fetch = partial(_fetched, new, partial(hub_file, repository, *_WEIGHTS))
    source = _described(new, description).with_own(pretrained, fetch)
    return replace(source, origin=f"{HUB}:{repository}", license=partial(license_on_hub, repository))


def _in_folder(new: partial[S], folder: Path, pretrained: str | None) -> S:
    model, asker = _who(new)
    if not is_timm_folder(folder):
        raise MissingError(f"{asker.what} {model!r}: {folder} has no {_CONFIG}, timm's description of a model")

    def weights() -> Path:
        present = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
        if not present:
            raise MissingError(f"{asker.what} {model!r}: {folder} has none of {', '.join(_WEIGHTS)}")
        return present[0]

    source = _described(new, folder / _CONFIG).with_own(pretrained, weights)
    return replace(source, license=partial(license_of_card, folder / "README.md"))


def _described(new: partial[S], path: Path) -> S:
    model, asker = _who(new)
    try:
        described, name, arguments = load_model_config_from_path(path.parent)
        if not is_model(name) or not isinstance(arguments, dict):
            raise ValueError(f"timm has no model {name!r}")
        # A description from elsewhere says what is built, and not where files come from.
        if wrong := _NOT_OF_A_DESCRIPTION & arguments.keys():
            raise ValueError(f"model_args has {min(wrong)!r}")
        require_depth(arguments)
        structure = json.dumps([name, arguments], sort_keys=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{asker.what} {model!r}: {path} does not describe a model of timm ({what_is_wrong(error)}); expected "
            "`architecture` with `pretrained_cfg`"
        ) from error
    return new(name=name, described=described, arguments=arguments, stated=mean_std(described), structure=structure)
