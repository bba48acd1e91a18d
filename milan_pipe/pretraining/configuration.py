"""What makes two runs the same run."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from milan_pipe.pretraining.settings import FREE, PretrainSettings, Target
from milan_pipe.student.settings import DecoderSettings, MaskSettings, StudentSettings
from milan_pipe.targets.schema import StoreHeader


def configuration_of(
    header: StoreHeader,
    samples: tuple[int, ...],
    student: StudentSettings,
    decoder: DecoderSettings,
    masking: MaskSettings,
    target: Target,
    config: PretrainSettings,
) -> dict[str, Any]:
    """All that the weights of a run depend on."""
    # Neither where the store came from nor its format change what is read from it.
    stored = header.model_dump(mode="json", exclude={"package_version", "format", "source"})
    return {
        "student": student.model_dump(mode="json"),
        "decoder": decoder.model_dump(mode="json"),
        "masking": masking.model_dump(mode="json"),
        "target": target,
        "pretrain": config.model_dump(mode="json", exclude=FREE),
        "targets": {
            **{name: stored[name] for name in ("teacher", "views")},
            "codec": hashlib.sha256(json.dumps(stored["codec"], sort_keys=True).encode()).hexdigest(),
            "samples": hashlib.sha256(json.dumps(samples).encode()).hexdigest(),
        },
    }
