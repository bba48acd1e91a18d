"""What makes two runs the same run."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from milan_pipe.config.params import Params
from milan_pipe.config.training import RESUMABLE
from milan_pipe.loader.order import ORDER_VERSION
from milan_pipe.targets.schema import StoreHeader


def configuration_of(header: StoreHeader, samples: tuple[int, ...], params: Params) -> dict[str, Any]:
    """All that the weights of a run depend on."""
    # Neither where the store came from nor its format change what is read from it.
    stored = header.model_dump(mode="json", exclude={"package_version", "format", "source"})
    return {
        "order": ORDER_VERSION,
        "student": params.student.model_dump(mode="json"),
        "decoder": params.decoder.model_dump(mode="json"),
        "masking": params.masking.model_dump(mode="json"),
        "target": params.target,
        "pretrain": params.pretrain.model_dump(mode="json", exclude=RESUMABLE),
        "targets": {
            **{name: stored[name] for name in ("teacher", "views")},
            "codec": hashlib.sha256(json.dumps(stored["codec"], sort_keys=True).encode()).hexdigest(),
            "samples": hashlib.sha256(json.dumps(samples).encode()).hexdigest(),
        },
    }
