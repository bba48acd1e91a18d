"""All settings of a project, read from a params file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from milan_pipe.config.base import Settings, shown
from milan_pipe.config.evaluation import (
    AugmentSettings,
    EmbedSettings,
    FinetuneSettings,
    KnnSettings,
    LarsProbeSettings,
    LinearProbeSettings,
    SegmentProbeSettings,
    SegmentSettings,
)
from milan_pipe.config.extraction import ExtractSettings
from milan_pipe.config.images import ImageSettings, PrepareSettings, ViewSettings
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.recipes import About, recipe_file, recipe_names
from milan_pipe.config.student import DecoderSettings, MaskSettings, StudentSettings
from milan_pipe.config.targets import CodecSettings
from milan_pipe.config.teacher import ClipSettings, TeacherSettings
from milan_pipe.config.teachers import TeachersSettings
from milan_pipe.errors import MissingError, SettingError, one_line

DEFAULT_FILE = Path("params.yaml")

# A bare word stands for the choice that names the section: `masking: random`, `codec: float16`.
_SHORTHAND = {"masking": "kind", "decoder": "kind", "codec": "name", "teacher": "model"}


class Params(Settings):
    """Every setting; defaults are those of the built-in scenes and teacher."""

    about: About | None = Field(None, description="what a recipe is for; it changes nothing")
    images: ImageSettings = Field(default_factory=ImageSettings)
    prepare: PrepareSettings = Field(default_factory=PrepareSettings)
    views: ViewSettings = Field(default_factory=ViewSettings)
    teacher: TeacherSettings = Field(default_factory=TeacherSettings)
    codec: CodecSettings = Field(default_factory=CodecSettings)
    extract: ExtractSettings = Field(default_factory=ExtractSettings)
    student: StudentSettings = Field(default_factory=StudentSettings)
    masking: MaskSettings = Field(default_factory=MaskSettings)
    decoder: DecoderSettings = Field(default_factory=DecoderSettings)
    target: str = Field(
        "clip",
        description="what is predicted, of which tokens. clip: the stored features, of all; pixels: MAE's normalised "
        "pixels, hog: histograms of gradients, of masked patches; clip-visible, clip-visible+pixels, clip-masked: see "
        "the page on objectives",
    )
    teachers: TeachersSettings = Field(default_factory=TeachersSettings)
    pretrain: PretrainSettings = Field(default_factory=PretrainSettings)
    embed: EmbedSettings = Field(default_factory=EmbedSettings)
    knn: KnnSettings = Field(default_factory=KnnSettings)
    augment: AugmentSettings = Field(default_factory=AugmentSettings)
    finetune: FinetuneSettings = Field(default_factory=FinetuneSettings)
    lars_probe: LarsProbeSettings = Field(default_factory=LarsProbeSettings)
    segment: SegmentSettings = Field(default_factory=SegmentSettings)
    segment_probe: SegmentProbeSettings = Field(default_factory=SegmentProbeSettings)
    linear_probe: LinearProbeSettings = Field(default_factory=LinearProbeSettings)
    clip: ClipSettings = Field(default_factory=ClipSettings)


NO_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What the library raises for text that is no YAML; of a number, date or truth value that is none, what Python does."""


_MOST_BYTES, _MOST_VALUES = 1 << 20, 100_000
_TOO_MANY = f"it has more than {_MOST_VALUES:,} values, aliases counted as often as they stand"


class _TwiceError(yaml.constructor.ConstructorError):
    pass


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which PyYAML takes the last one, and bounds what is merged by `<<`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._pairs = self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        # Before anything is made of it: a value takes the library 20 µs and a kilobyte.
        self._nodes += 1
        if self._nodes > _MOST_VALUES:
            raise ValueError(_TOO_MANY)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"key {key.value!r} stands twice"
                raise _TwiceError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        self._pairs += len(node.value)
        if self._pairs > _MOST_VALUES:
            raise ValueError(_TOO_MANY)


def read_yaml(path: Path) -> str:
    """The text of a file of settings, which may be a pipe; raises OSError, or ValueError where it is too large."""
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it is larger than {_MOST_BYTES} bytes")
    return data.decode()


def load_yaml(text: str) -> Any:
    """What YAML holds; raises one of `NO_YAML`."""
    content = yaml.load(text, _Loader)  # noqa: S506
    # Aliases of aliases are few bytes and more values than can be looked at, or values in themselves.
    left, values = [content], 1
    while left:
        value = left.pop()
        if isinstance(value, str):
            # Half of a surrogate pair can be neither written nor shown.
            value.encode()
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | set | tuple) else ()
        values += len(inside)
        if values > _MOST_VALUES:
            raise ValueError(_TOO_MANY)
        left += inside
    return content


def _problem(error: yaml.MarkedYAMLError) -> str:
    # PyYAML writes what it expected as `<block end>`.
    return re.sub("<([a-z][a-z ]*)>", r"\1", str(error.problem))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(read_yaml(path))
    except FileNotFoundError:
        raise MissingError(f"params file {path} is not there") from None
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise SettingError(f"params file {path} is not valid YAML: {where}{_problem(error)}") from error
    except (OSError, *NO_YAML) as error:
        raise SettingError(f"params file {path} cannot be read: {one_line(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingError(f"params file {path} holds a {type(content).__name__}, expected sections with keys")
    return content


def _expanded(section: str, value: Any) -> Any:
    return {_SHORTHAND[section]: value} if isinstance(value, str) and section in _SHORTHAND else value


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise SettingError(f"--set {override!r} is not understood, expected section.key=value")
    try:
        value = load_yaml(text)
    except _TwiceError as error:
        raise SettingError(f"--set {override!r}: {error.problem}") from None
    except NO_YAML:
        raise SettingError(f"--set {override!r}: the value is not valid YAML") from None
    section, dot, key = name.partition(".")
    given = {key: value} if dot else _expanded(section, value)
    inside = _expanded(section, values.get(section))
    # A bare word chooses the kind; other keys of the section stay.
    values[section] = value if given is value else {**(inside if isinstance(inside, dict) else {}), **given}


def _build(values: Mapping[str, Any], where: str) -> Params:
    Params.require_known(values, where)
    parts = {section: _expanded(section, value) for section, value in values.items()}
    for section, value in parts.items():
        if kind := Params.sections().get(section):
            if not isinstance(value, Mapping):
                raise SettingError(f"{where}: section {section!r} holds {shown(value)}, expected keys and values")
            parts[section] = kind.parse({str(key): entry for key, entry in value.items()}, f"{where}, {section}")
    return Params.parse(parts, where)


def _file_of(path: str | Path) -> Path:
    file = Path(path)
    named = file.name == str(path) and not file.suffix
    if not file.is_file() and named and (recipe := recipe_file(str(path))):
        return recipe
    if file.is_dir():
        raise SettingError(f"params file {path} is a folder, expected a file or the name of a recipe")
    if named and not file.exists():
        near = difflib.get_close_matches(str(path), recipe_names(), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"recipes are {', '.join(recipe_names())}"
        raise MissingError(f"params file {path} is not there, and no recipe has that name; {hint}")
    return file


def load_params(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Params:
    """Read settings.

    Args:
        path: a params file, or the name of a recipe; none: `./params.yaml` if it exists, else the defaults.
        overrides: `section.key=value` each, the value in YAML; later ones win.

    Raises:
        MissingError: the named file is not there, nor a recipe of that name.
        SettingError: an unknown key (names the nearest known one), or a value of the wrong kind or range.
    """
    file = _file_of(path) if path is not None else DEFAULT_FILE
    values = _read_yaml(file) if path is not None or file.is_file() else {}
    where = str(file) if values else "the settings"
    for override in overrides:
        _apply_override(values, override)
    return _build(values, where)


def stated_of(params: Params) -> dict[str, dict[str, Any]]:
    """Settings of teacher and views that are not left to defaults, as a store's header has them."""
    teacher = params.teacher.model_dump(mode="json", include=params.teacher.model_fields_set)
    teacher.update((name, value) for name, value in params.teacher.header_fields().items() if name in teacher)
    if teacher.get("precision") == "auto":
        del teacher["precision"]
    return {"teacher": teacher, "views": params.views.model_dump(mode="json", include=params.views.model_fields_set)}
