"""HOG against scikit-image, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.feature import hog

from milan_pipe.errors import ShapeError
from milan_pipe.student.hog import BINS, cell_side, hog_target, hog_width


def sample(height: int, width: int, channels: int = 3) -> torch.Tensor:
    rng = np.random.default_rng(height * width)
    return torch.from_numpy(rng.normal(size=(2, channels, height, width)))


@pytest.mark.parametrize(
    ("patch", "height", "width"), [(8, 32, 32), (16, 32, 64), (14, 56, 28), (4, 16, 8), (12, 24, 36)]
)
def test_it_is_scikit_images(patch: int, height: int, width: int) -> None:
    images = sample(height, width)
    side = cell_side(patch)
    found = hog_target(images, patch)
    assert found.shape == (2, height // patch * (width // patch), hog_width(patch))
    inside = patch // side
    cells = found.reshape(2, height // patch, width // patch, inside, inside, 3, BINS)
    cells = cells.permute(0, 1, 3, 2, 4, 5, 6).reshape(2, height // side, width // side, 3, BINS)
    for number, image in enumerate(images.numpy()):
        for channel in range(3):
            expected = hog(
                image[channel],
                orientations=BINS,
                pixels_per_cell=(side, side),
                cells_per_block=(1, 1),
                block_norm="L2",
                feature_vector=False,
            ).reshape(height // side, width // side, BINS)
            # Directions on the border of two bins, and scikit-image's eps in the norm, move a vote now and then.
            difference = np.abs(cells[number, :, :, channel].numpy() - expected)
            assert np.quantile(difference, 0.99) < 1e-4
            assert difference.max() < 0.1


@pytest.mark.parametrize(("degrees", "number"), [(10, 0), (30, 1), (90, 4), (170, 8), (190, 0), (350, 8)])
def test_a_ramp_votes_for_its_direction(degrees: float, number: int) -> None:
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    ramp = x * math.cos(math.radians(degrees)) + y * math.sin(math.radians(degrees))
    middle = hog_target(ramp.expand(1, 3, 24, 24), 8)[0, 4].reshape(3, BINS)
    expected = torch.zeros(3, BINS)
    expected[:, number] = 1
    assert torch.allclose(middle, expected, atol=1e-6)


def test_scale_and_shift_of_a_channel_cancel_out_and_a_flat_image_has_none() -> None:
    images = sample(16, 16).float()
    scaled = images * torch.tensor([2.0, 0.1, 7.0])[:, None, None] + torch.tensor([5.0, -1.0, 0.5])[:, None, None]
    assert torch.allclose(hog_target(images, 8), hog_target(scaled, 8), atol=1e-4)
    assert not hog_target(torch.full((1, 3, 16, 16), 0.3), 8).any()


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 3, 16, 12), (1, 3, 12, 16)])
def test_what_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="multiples of 8"):
        hog_target(torch.zeros(shape), 8)
