"""Contrastive training of the small CLIP that ships with the package: images of scenes and their captions, no labels.

Captions leave words out, and match every image of a batch whose full caption has all of their words.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.model import CLIP
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor

from milan_pipe.config.teacher import DemoTeacherSettings
from milan_pipe.errors import DataError
from milan_pipe.images.scenes import BACKGROUNDS, COLOURS, SCENE_SIZE, SHAPES, SIZES, render_scene
from milan_pipe.teacher.source import DEMO_FOLDER, DEMO_NAME
from milan_pipe.weights_file import write_weights

logger = logging.getLogger(__name__)

CONTEXT_LENGTH = 12
_WORDS = ("a", "on", "background", *SIZES, *COLOURS, *BACKGROUNDS, *SHAPES)
_IDS = {word: 1 + position for position, word in enumerate(_WORDS)}
# The text tower reads its output at the largest id of a row, so the end token must be the last of the vocabulary.
END_TOKEN = 1 + len(_WORDS)
VOCABULARY_SIZE = END_TOKEN + 1
WEIGHTS_NAME = f"{DEMO_NAME}.safetensors"
_RENDER_CHUNK = 2000


def _render(seed: int, count: int) -> tuple[NDArray[np.uint8], list[str], list[int]]:
    images = np.empty((count, SCENE_SIZE, SCENE_SIZE, 3), np.uint8)
    captions, labels = [], []
    with ProcessPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        scenes = pool.map(partial(render_scene, seed), range(count), chunksize=_RENDER_CHUNK)
        for index, scene in enumerate(scenes):
            images[index] = scene.image
            captions.append(scene.caption)
            labels.append(scene.label)
    return images, captions, labels


def tokenize(captions: Sequence[str]) -> Tensor:
    """Ids of captions' words: (len(captions), 12) int64; 0 pads, `END_TOKEN` closes each caption.

    Raises:
        DataError: a word is not in the vocabulary of scenes, or a caption is longer than 11 words.
    """
    ids = torch.zeros(len(captions), CONTEXT_LENGTH, dtype=torch.int64)
    for row, caption in enumerate(captions):
        words = caption.lower().split()
        unknown = [word for word in words if word not in _IDS]
        if unknown or len(words) >= CONTEXT_LENGTH:
            raise DataError(
                f"the scenes' text tower reads at most {CONTEXT_LENGTH - 1} of its {len(_WORDS)} words, "
                f"found {caption!r}" + (f" with unknown {', '.join(unknown)}" if unknown else "")
            )
        ids[row, : len(words) + 1] = torch.tensor([*(_IDS[word] for word in words), END_TOKEN])
    return ids


def shorten_caption(caption: str, keep: tuple[bool, bool, bool]) -> str:
    """Leave size, colour and background out of a full caption where `keep` says False."""
    _, size, colour, shape, _, _, background, _ = caption.split()
    words = ["a", *([size] if keep[0] else []), *([colour] if keep[1] else []), shape]
    return " ".join(words) + (f" on a {background} background" if keep[2] else "")


def caption_matches(short_ids: Tensor, full_ids: Tensor) -> Tensor:
    """(B, B) bool: does image i's full caption have all words of caption j?"""

    def bag(ids: Tensor) -> Tensor:
        words = torch.zeros(len(ids), VOCABULARY_SIZE).scatter_(1, ids, 1.0)
        words[:, [0, END_TOKEN]] = 0
        return words

    short, full = bag(short_ids), bag(full_ids)
    return full @ short.T == short.sum(dim=1)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, match: Tensor) -> Tensor:
    """Symmetric cross-entropy over cosine logits; the target is uniform over all matches of a row or column."""
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    target = match.float()
    by_image = F.cross_entropy(logits, target / target.sum(dim=1, keepdim=True))
    by_text = F.cross_entropy(logits.T, target.T / target.T.sum(dim=1, keepdim=True))
    return (by_image + by_text) / 2


def _augmented(images: NDArray[np.uint8], shift: int, rng: np.random.Generator) -> Tensor:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    padded = F.pad(pixels.float(), (shift,) * 4, mode="reflect") if shift else pixels.float()
    moves = rng.integers(0, 2 * shift + 1, (len(images), 2))
    mirrored = rng.random(len(images)) < 0.5
    out = torch.empty(pixels.shape)
    for row, ((top, left), mirror) in enumerate(zip(moves.tolist(), mirrored, strict=True)):
        view = padded[row, :, top : top + SCENE_SIZE, left : left + SCENE_SIZE]
        out[row] = view.flip(-1) if mirror else view
    return _normalised(out)


def _normalised(pixels: Tensor) -> Tensor:
    return (pixels / 255 - torch.tensor(OPENAI_CLIP_MEAN)[:, None, None]) / torch.tensor(OPENAI_CLIP_STD)[:, None, None]


@torch.no_grad()
def zero_shot_accuracy(model: CLIP, images: NDArray[np.uint8], labels: list[int]) -> float:
    """Share of images whose nearest caption among "a circle", "a square", ... names the main shape."""
    model.eval()
    text = F.normalize(model.encode_text(tokenize([f"a {shape}" for shape in SHAPES])), dim=-1)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    logits = torch.cat([model.encode_image(_normalised(part.float())) @ text.T for part in torch.split(pixels, 500)])
    model.train()
    return int((logits.argmax(dim=1) == torch.tensor(labels)).sum()) / len(images)


def _optimisers(model: CLIP, settings: DemoTeacherSettings) -> list[torch.optim.Optimizer]:
    decay, inside = (
        settings.weight_decay,
        {n: p for n, p in model.named_parameters() if "resblocks" in n and p.ndim == 2},
    )
    outside = [p for n, p in model.named_parameters() if n not in inside]
    groups = [
        {"params": [p for p in outside if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in outside if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(list(inside.values()), lr=settings.muon_lr, weight_decay=decay, momentum=0.95),
        torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98)),
    ]


def train_demo_teacher(out_dir: Path, settings: DemoTeacherSettings) -> dict[str, float]:
    """Train the scenes' CLIP and write its weights, both towers, to `out_dir`.

    Returns:
        zero-shot accuracy on unseen scenes, images seen, seconds.
    """
    began = time.monotonic()
    torch.manual_seed(settings.seed)
    model = CLIP(**json.loads((DEMO_FOLDER / f"{DEMO_NAME}.json").read_text()))
    images, captions, _ = _render(settings.seed, settings.scenes)
    test_images, _, test_labels = _render(settings.seed + 1, settings.test_scenes)
    full_ids = tokenize(captions)
    logger.info("rendered %d scenes in %.0f s", settings.scenes, time.monotonic() - began)

    def towers(pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return model.encode_image(pixels), model.encode_text(ids)

    forward = torch.compile(towers) if settings.compile else towers
    optimisers = _optimisers(model, settings)

    def factor(done: int) -> float:
        step = done + 1
        warm = min(1.0, step / max(settings.warmup_steps, 1))
        return warm * min(1.0, (settings.steps - step + 1) / (settings.decay_share * settings.steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, factor) for optimiser in optimisers]
    rng = np.random.default_rng(settings.seed)
    order = rng.permutation(settings.scenes)
    position = 0
    out_dir.mkdir(parents=True, exist_ok=True)
    accuracy = 0.0
    for step in range(1, settings.steps + 1):
        if position + settings.batch_size > settings.scenes:
            order, position = rng.permutation(settings.scenes), 0
        rows = np.sort(order[position : position + settings.batch_size])
        position += settings.batch_size
        keep = rng.random((len(rows), 3)) < settings.keep_word
        short_ids = tokenize([shorten_caption(captions[r], tuple(k)) for r, k in zip(rows, keep, strict=True)])
        image, text = forward(_augmented(images[rows], settings.shift, rng), short_ids)
        match = caption_matches(short_ids, full_ids[rows])
        loss = contrastive_loss(image.float(), text.float(), model.logit_scale.exp(), match)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        if step % settings.evaluate_every == 0 or step == settings.steps:
            accuracy = zero_shot_accuracy(model, test_images, test_labels)
            rate = step * settings.batch_size / (time.monotonic() - began)
            scores = f"loss {loss.item():.3f}  zero-shot {100 * accuracy:.2f} %  {rate:.0f} images/s"
            logger.info("step %d of %d  %s", step, settings.steps, scores)
            write_weights(model.state_dict(), out_dir / WEIGHTS_NAME)
    seen, seconds = float(settings.steps * settings.batch_size), time.monotonic() - began
    return {"zero_shot_accuracy": accuracy, "images_seen": seen, "seconds": seconds}
