"""Captions: words to ids, which caption is true of which image, and the loss over them."""

from __future__ import annotations

import math

import pytest
import torch

from milan_pipe.images.scenes import render_scene
from milan_pipe.teacher.demo_training import (
    CONTEXT_LENGTH,
    END_TOKEN,
    VOCABULARY_SIZE,
    caption_matches,
    contrastive_loss,
    shorten_caption,
    tokenize,
)

FULL = "a small red star on a plain background"


def test_tokens_close_and_pad():
    ids = tokenize(["a star", FULL, ""])
    assert ids.shape == (3, CONTEXT_LENGTH)
    assert (ids == END_TOKEN).sum(dim=1).tolist() == [1, 1, 1]
    # open_clip's text tower pools at the largest id.
    assert ids.argmax(dim=1).tolist() == [2, 8, 0]
    assert ids[0, 3:].eq(0).all()
    assert ids.max() < VOCABULARY_SIZE
    assert torch.equal(tokenize(["A STAR"]), ids[:1])


def test_every_scene_caption_is_read():
    captions = [render_scene(5, index).caption for index in range(100)]
    short = [shorten_caption(caption, (False, False, False)) for caption in captions]
    assert caption_matches(tokenize(short), tokenize(captions)).diagonal().all()


@pytest.mark.parametrize(
    ("keep", "short"),
    [
        ((True, True, True), FULL),
        ((False, False, False), "a star"),
        ((True, False, False), "a small star"),
        ((False, True, False), "a red star"),
        ((False, False, True), "a star on a plain background"),
    ],
)
def test_shorten(keep, short):
    assert shorten_caption(FULL, keep) == short


def test_matches_by_hand():
    full = [FULL, "a large red star on a noisy background", "a small blue ring on a plain background"]
    short = ["a star", "a large star", "a ring on a plain background"]
    match = caption_matches(tokenize(short), tokenize(full))
    # Row: image, column: caption.
    assert match.tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_loss_by_hand():
    eye, scale = torch.eye(2), torch.tensor(2.0)
    alone = contrastive_loss(3 * eye, 5 * eye, scale, torch.eye(2, dtype=torch.bool))
    assert alone.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)
    # Both captions true of both images: half of the target lies on the cosine of 0.
    shared = contrastive_loss(eye, eye, scale, torch.ones(2, 2, dtype=torch.bool))
    assert shared.item() == pytest.approx(math.log(math.exp(2) + 1) - 1, abs=1e-6)


def test_loss_is_symmetric_in_image_and_text():
    torch.manual_seed(0)
    image, text = torch.randn(4, 6), torch.randn(4, 6)
    match = torch.eye(4, dtype=torch.bool)
    match[0, 2] = True
    one = contrastive_loss(image, text, torch.tensor(3.0), match)
    assert one.item() == pytest.approx(contrastive_loss(text, image, torch.tensor(3.0), match.T).item(), abs=1e-6)
    assert one.item() != pytest.approx(contrastive_loss(image, text, torch.tensor(3.0), match.T).item(), abs=1e-4)
