"""Training of a small CLIP on captioned images: from shards to a folder that `teacher.model` takes.

A sample may have several captions, one a line. Each step takes one of each image, and a caption counts as true of every
image that has it among its own.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from open_clip.model import CLIP
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor

from milan_pipe.config.images import IMAGE_LIMITS, ImageSettings
from milan_pipe.config.teacher import ClipSettings
from milan_pipe.errors import DataError, MismatchError, SettingError
from milan_pipe.images.ahead import decoded_ahead, thread_count
from milan_pipe.images.decode import decode_pixels
from milan_pipe.images.shards import expand_shards, index_beside
from milan_pipe.images.tar import Sample, read_shard
from milan_pipe.images.views import View, render_view
from milan_pipe.random_bits import permutation, seed_of
from milan_pipe.storage import local_folder
from milan_pipe.storage.kinds import require_new
from milan_pipe.storage.local import make_folder, write_file
from milan_pipe.student.pixels import normalise
from milan_pipe.teacher.clip_model import WORDS_FILE, ClipInTraining, Words, model_config
from milan_pipe.weights_file import write_weights

_CHUNK = 500
_LARGEST_SCALE = 100.0


@dataclass(frozen=True, kw_only=True)
class ClipProgress:
    """Reported while a CLIP is trained; `zero_shot` is the last accuracy, None before the first and without VAL."""

    step: int
    steps: int
    loss: float
    images_per_second: float
    zero_shot: float | None


@dataclass(frozen=True, kw_only=True)
class ClipReport:
    """What was trained: `captions` that differ, `bad` images of IMAGES and VAL that were skipped.

    `zero_shot` is the accuracy on VAL by the captions of `clip.prompts`; None without VAL.
    """

    folder: str
    images: int
    bad: int
    captions: int
    words: int
    parameters: int
    steps: int
    images_seen: int
    seconds: float
    zero_shot: float | None


@dataclass(frozen=True)
class _Captioned:
    """N images in memory, (N, side, side, 3) uint8, the captions of each, and their classes, -1 for none.

    `bad` more cannot be read.
    """

    pixels_NHWC: NDArray[np.uint8]
    captions: Sequence[Sequence[str]]
    label_N: NDArray[np.int64]
    classes: Sequence[str] | None
    bad: int


def _centre_square(sample: Sample, side: int, limits: ImageSettings) -> tuple[NDArray[np.uint8], Sample]:
    image_HWC = decode_pixels(sample.data, limits=limits)
    height, width, _ = image_HWC.shape
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    return render_view(image_HWC, View(top=top, left=left, height=short, width=short, flip=False), side), sample


def _read(
    images: str | Path,
    settings: ClipSettings,
    limits: ImageSettings,
    on_images: Callable[[int], None],
    *,
    captioned: bool = True,
) -> _Captioned:
    shards, threads = expand_shards(images), thread_count(0)
    pixels, captions, labels = [], [], []
    bad: dict[str, str] = {}
    samples = (sample for shard in shards for sample in read_shard(shard, bad.__setitem__))
    side = settings.image_size
    for view, sample in decoded_ahead(
        samples, lambda found: _centre_square(found, side, limits), threads, 32 * threads, bad.__setitem__
    ):
        lines = [line.strip() for line in (sample.caption or "").splitlines() if line.strip()]
        if captioned and not lines:
            raise DataError(
                f"{images}: image {sample.key!r} has no caption; add a .txt member with one caption a line, or "
                "`caption` in its .json"
            )
        pixels.append(view)
        captions.append(lines)
        labels.append(sample.label)
        on_images(len(pixels))
    seen = len(pixels) + len(bad)
    if not pixels or len(bad) > settings.max_bad_fraction * seen:
        key, reason = next(iter(bad.items()), ("", "there are none"))
        raise DataError(
            f"{len(bad)} of {seen} images of {images} cannot be read, the first is {key!r}: {reason}; repair them, or "
            "raise clip.max_bad_fraction"
        )
    index = index_beside(shards)
    labels_N = np.array(labels, np.int64)
    return _Captioned(np.stack(pixels), captions, labels_N, index.classes if index else None, len(bad))


def _normalised(pixels_BHWC: Tensor) -> Tensor:
    return normalise(pixels_BHWC, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def _moved(pixels_BHWC: NDArray[np.uint8], settings: ClipSettings, rng: np.random.Generator) -> Tensor:
    """Normalised images, each moved by some pixels, edges mirrored, and flipped where the settings allow it."""
    shift, side = settings.shift, pixels_BHWC.shape[1]
    padded = np.pad(pixels_BHWC, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="reflect")
    corners, flips = rng.integers(0, 2 * shift + 1, (len(padded), 2)), rng.random(len(padded)) < settings.flip
    moved = [
        image[top : top + side, left : left + side][:, :: -1 if flip else 1]
        for image, (top, left), flip in zip(padded, corners.tolist(), flips.tolist(), strict=True)
    ]
    return _normalised(torch.from_numpy(np.stack(moved)))


def _batch_words(known: Sequence[NDArray[np.int64]], most: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Ids of `most` words of a batch's captions, (W,), and whether each image has them, (B, W) bool."""
    found_W = np.unique(np.concatenate(known))
    if len(found_W) > most:
        found_W = np.sort(rng.choice(found_W, most, replace=False))
    has_BW = np.stack([np.isin(found_W, words, assume_unique=True) for words in known])
    return torch.from_numpy(found_W), torch.from_numpy(has_BW)


@torch.no_grad()
def zero_shot_accuracy(
    clip: CLIP,
    words: Words,
    pixels_NHWC: NDArray[np.uint8],
    label_N: NDArray[np.int64],
    prompts: Sequence[Sequence[str]],
) -> float:
    """Share of N images whose class has the nearest prompts, by the mean of each class.

    Args:
        prompts: captions of each class.
    """
    texts = [F.normalize(clip.encode_text(words(captions)), dim=-1).mean(dim=0) for captions in prompts]
    text_GT, right = F.normalize(torch.stack(texts), dim=-1), 0
    for start in range(0, len(label_N), _CHUNK):
        pixels_BCHW = _normalised(torch.from_numpy(pixels_NHWC[start : start + _CHUNK]))
        found_B = (clip.encode_image(pixels_BCHW) @ text_GT.T).argmax(dim=1)
        right += int((found_B.numpy() == label_N[start : start + _CHUNK]).sum())
    return right / len(label_N)


def _judge(model: ClipInTraining, words: Words, val: _Captioned, settings: ClipSettings) -> float:
    assert val.classes is not None
    prompts = [[prompt.replace("{}", name.replace("_", " ")) for prompt in settings.prompts] for name in val.classes]
    model.eval()
    accuracy = zero_shot_accuracy(model.clip, words, val.pixels_NHWC, val.label_N, prompts)
    model.train()
    return accuracy


def _optimisers(model: torch.nn.Module, settings: ClipSettings) -> list[torch.optim.Optimizer]:
    decay = settings.weight_decay
    inside = {name: p for name, p in model.named_parameters() if "resblocks" in name and p.ndim == 2}
    outside = [parameter for name, parameter in model.named_parameters() if name not in inside]
    groups = [
        {"params": [parameter for parameter in outside if parameter.ndim > 1], "weight_decay": decay},
        {"params": [parameter for parameter in outside if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(list(inside.values()), lr=settings.muon_lr, weight_decay=decay, momentum=0.95),
        torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98)),
    ]


def train_clip(
    images: str | Path,
    out: str | Path,
    settings: ClipSettings,
    *,
    limits: ImageSettings = IMAGE_LIMITS,
    val: str | Path | None = None,
    on_progress: Callable[[ClipProgress], None] = lambda _: None,
) -> ClipReport:
    """Train both towers on the CPU and write them, with open_clip's description and the words, to `out`.

    Args:
        images: captioned shards, as `expand_shards` takes them; their images are kept in memory.
        out: local folder, for `teacher.model=local-dir:OUT`.
        val: labelled shards with an index, to be told by `clip.prompts`; nothing is chosen by the result.

    Raises:
        MissingError, DataError, StoreError: images are missing, cannot be read or have no captions, or `out` has a
            model or cannot be written.
        SettingError: fewer images than a batch, or `out` is a URL.
        MismatchError: `val` has no classes.
    """
    began, folder = time.monotonic(), local_folder(out, "models")
    require_new(folder, "a teacher")
    if (folder / HF_CONFIG_NAME).exists():
        raise DataError(f"{folder} has a model already; name another folder, or remove it")

    def reading(count: int) -> None:
        rate = count / (time.monotonic() - began)
        on_progress(ClipProgress(step=0, steps=settings.steps, loss=math.nan, images_per_second=rate, zero_shot=None))

    train = _read(images, settings, limits, reading)
    judged = _read(val, settings, limits, lambda _: None, captioned=False) if val is not None else None
    if judged is not None and (judged.classes is None or judged.label_N.min() < 0):
        raise MismatchError(f"{val} has no named classes to tell apart; name shards that `milan-pipe prepare` wrote")
    count = len(train.captions)
    if count < settings.batch_size:
        raise SettingError(f"clip.batch_size is {settings.batch_size}, {images} has {count} images; lower it")
    distinct = list(dict.fromkeys(line for lines in train.captions for line in lines))
    words = Words.of(distinct, settings.vocabulary, settings.context_length)
    if not words.words:
        raise DataError(f"captions of {images} have no words to learn; write what the images show")
    # Before the work, not after it.
    make_folder(folder)
    # Captions that read alike are one, or each would be held to be false of the other's images.
    ids_NC, number_of = torch.unique(words(distinct), dim=0, return_inverse=True)
    numbers = dict(zip(distinct, number_of.tolist(), strict=True))
    own = [[numbers[line] for line in lines] for lines in train.captions]
    ids_WC = words(["", *words.words])
    known = [
        np.array(sorted({word for line in lines for word in words.known(line)}), np.int64) for lines in train.captions
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = ClipInTraining(settings, words)
        loss_of = torch.compile(model.loss) if settings.compile else model.loss
        optimisers = _optimisers(model, settings)

        def factor(done: int) -> float:
            warm = min(1.0, (done + 1) / max(settings.warmup_steps, 1))
            return warm * min(1.0, (settings.steps - done) / (settings.decay_share * settings.steps))

        schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, factor) for optimiser in optimisers]
        per_epoch, accuracy, training = count // settings.batch_size, None, time.monotonic()
        for step in range(settings.steps):
            epoch, position = divmod(step, per_epoch)
            if not position:
                order_N = permutation(count, "clip", settings.seed, epoch)
            rows = order_N[position * settings.batch_size :][: settings.batch_size]
            rng = np.random.Generator(np.random.Philox(key=seed_of("clip", settings.seed, step)))
            lines = [own[row] for row in rows.tolist()]
            chosen = [line[int(share * len(line))] for line, share in zip(lines, rng.random(len(rows)), strict=True)]
            match_BB = torch.tensor([[caption in line for caption in chosen] for line in map(set, lines)])
            word_W, has_BW = _batch_words([known[row] for row in rows.tolist()], settings.batch_size, rng)
            pixels_BCHW = _moved(train.pixels_NHWC[rows], settings, rng)
            loss = loss_of(pixels_BCHW, ids_NC[chosen], match_BB, ids_WC[word_W], has_BW)
            model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for optimiser, schedule in zip(optimisers, schedules, strict=True):
                optimiser.step()
                schedule.step()
            with torch.no_grad():
                model.clip.logit_scale.clamp_(max=math.log(_LARGEST_SCALE))
            done = step + 1
            if judged is not None and (done % settings.evaluate_every == 0 or done == settings.steps):
                accuracy = _judge(model, words, judged, settings)
            rate = done * settings.batch_size / (time.monotonic() - training)
            on_progress(
                ClipProgress(
                    step=done, steps=settings.steps, loss=loss.item(), images_per_second=rate, zero_shot=accuracy
                )
            )
    if not math.isfinite(loss.item()):
        raise DataError(f"the loss is {loss.item()} after step {done}; lower clip.lr and clip.muon_lr")
    description = {
        "model_cfg": model_config(settings, words),
        "preprocess_cfg": {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD},
    }
    write_weights(model.clip.state_dict(), folder / HF_SAFE_WEIGHTS_NAME)
    write_file(folder / WORDS_FILE, "".join(f"{word}\n" for word in words.words))
    # Last: a folder that has it is complete.
    write_file(folder / HF_CONFIG_NAME, json.dumps(description, indent=1) + "\n")
    return ClipReport(
        folder=str(folder),
        images=count,
        bad=train.bad + (judged.bad if judged is not None else 0),
        captions=len(ids_NC),
        words=len(words.words),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        steps=settings.steps,
        images_seen=settings.steps * settings.batch_size,
        seconds=time.monotonic() - began,
        zero_shot=accuracy,
    )
