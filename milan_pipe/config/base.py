"""Base of all settings: keyword-only, immutable; an unknown key is an error that names the nearest known one."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from milan_pipe.errors import SettingError
from milan_pipe.units import some

# No count is as large, and native code overflows at some more.
_ENDLESS = 2**53
_TYPE = re.compile(r"int|float|str|bool|.*\[.*", re.DOTALL)


class Settings(BaseModel):
    """Settings of one part, checked when built. `renamed` maps former keys to their names now."""

    renamed: ClassVar[Mapping[str, str]] = {}

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            cls.require_known(values, f"{cls.__name__} settings")
        return values

    @model_validator(mode="after")
    def _reject_endless(self) -> Self:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            bounded = any(hasattr(rule, "lt") or hasattr(rule, "le") for rule in field.metadata)
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, int) and not bounded and abs(one) > _ENDLESS:
                    raise ValueError(f"{name} should be between -{_ENDLESS} and {_ENDLESS}, found {one}")
        return self

    @classmethod
    def require_known(cls, keys: Iterable[object], where: str) -> None:
        """Raise SettingError for an unknown key, with its new name or the nearest known one."""
        for key in map(str, keys):
            if key in cls.renamed:
                raise SettingError(f"unknown key {key!r} in {where}: it is now {cls.renamed[key]!r}")
            if key not in cls.model_fields:
                names = sorted(cls.model_fields)
                near = [f"{name}.{key}" for name, section in cls.sections().items() if key in section.model_fields]
                near = near or [repr(name) for name in difflib.get_close_matches(key, names, n=1, cutoff=0.5)]
                hint = f"did you mean {' or '.join(near)}?" if near else f"known are {some(names, 24)}"
                raise SettingError(f"unknown key {key!r} in {where}; {hint}")

    @classmethod
    def sections(cls) -> dict[str, type[Settings]]:
        """Fields that are settings themselves, with their classes."""
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Settings)}

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Self:
        """Build from plain data; `where` is for messages, as "params.yaml, pretrain".

        Raises:
            SettingError: a key is unknown, or a value is of the wrong type or out of its range.
        """
        cls.require_known(values, where)
        try:
            return cls(**values)
        except ValidationError as error:
            # Of several types that a value may have, the one that fits it best.
            first = max(error.errors(), key=lambda one: len(one["loc"]))
            # Among them stand words for which of several types was tried.
            keys = ".".join(str(part) for part in first["loc"] if not _TYPE.fullmatch(str(part)))
            # `where` ends with a section, or is all the settings.
            name = f"{where}{'.' if ', ' in where else ', '}{keys}" if keys else where
            # The message of a rule over several fields quotes what it found; its input is the whole section.
            found = "" if isinstance(first["input"], Mapping) else f", found {shown(first['input'])}"
            raise SettingError(f"{name}: {_said(first)}{found}") from None


def _said(error: ErrorDetails) -> str:
    """What pydantic says, in words of YAML."""
    if error["type"] == "missing":
        return "is missing"
    said = re.sub(r"^(Value error, |Input |Tuple )", "", error["msg"])
    said = re.sub(r"a valid dictionary or instance of \w+", "keys and values", said)
    return said.replace("a valid tuple", "a list").replace(" after validation", "")


def shown(value: Any) -> str:
    """A value as it is written in a params file, not too long."""
    text = (
        repr(value)
        if isinstance(value, str | float)
        else json.dumps(value, default=str, skipkeys=True, ensure_ascii=False)
    )
    return text[:200]
