"""The device that these tests run on: a CUDA device, or the one that MILAN_PIPE_GPU_TESTS_ON names, to try them."""

from __future__ import annotations

import os

import pytest
import torch

ON = os.environ.get("MILAN_PIPE_GPU_TESTS_ON", "cuda")


@pytest.fixture(params=[pytest.param(ON, marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """A device that is there."""
    found = torch.device(request.param)
    if found.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; MILAN_PIPE_GPU_TESTS_ON=cpu tries the tests without one")
    return found
