"""What a teacher of the built-in scenes knows, on scenes that it never saw, and where it looks.

    python -m benchmarks.teacher [FOLDER ...] [--scenes 2000] [--seed 1000005]

FOLDER is what `milan-pipe train-clip` wrote; none: the bundled teacher. Accuracies are in per cent. The probe of
patches is a linear classifier from a patch's feature to the class that most of its pixels have, fitted on three
quarters of the scenes and judged on the rest; of patches that are one class alone it is given too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from milan_pipe.config.evaluation import LinearProbeSettings
from milan_pipe.config.teacher import DEMO, FOLDER, TeacherSettings
from milan_pipe.evaluation.features import LabelledFeatures
from milan_pipe.evaluation.linear_probe import linear_probe_accuracy
from milan_pipe.images.scenes import LOWER, MASK_CLASSES, THINGS, UPPER, render_scene
from milan_pipe.teacher.clip import load_teacher
from milan_pipe.teacher.clip_model import read_clip
from milan_pipe.teacher.clip_training import zero_shot_accuracy
from milan_pipe.teacher.source import DEMO_FOLDER

_BATCH, _TALL = 250, 10.0
_STUFF = len(UPPER) + len(LOWER)


def _patches(mask_NHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, L, pixels) classes of each patch."""
    rows, columns = grid
    height, width = mask_NHW.shape[1] // rows, mask_NHW.shape[2] // columns
    cut = mask_NHW.view(-1, rows, height, columns, width).transpose(2, 3)
    return cut.reshape(len(mask_NHW), rows * columns, height * width)


def judge(folder: Path | None, count: int, seed: int) -> dict[str, float]:
    """All numbers of one teacher."""
    scenes = [render_scene(seed, index) for index in range(count)]
    pixels_NHWC = np.stack([scene.image for scene in scenes])
    label_N = np.array([scene.label for scene in scenes])
    teacher = load_teacher(TeacherSettings(model=DEMO if folder is None else f"{FOLDER}:{folder}"))
    outputs = [teacher(torch.from_numpy(pixels_NHWC[start : start + _BATCH])) for start in range(0, count, _BATCH)]
    features_NST = torch.cat([output.features_BST for output in outputs])
    row_NL = torch.cat([output.importance_BL for output in outputs])
    share_NL = row_NL / row_NL.sum(dim=1, keepdim=True)
    class_NLP = _patches(torch.from_numpy(np.stack([scene.segmentation for scene in scenes])), teacher.info.grid)
    thing_NL = (class_NLP >= _STUFF).float().mean(dim=2)
    most_NL, pixels_NL = torch.stack([(class_NLP == c).sum(dim=2) for c in range(len(MASK_CLASSES))]).max(dim=0)[::-1]
    fit, whole_NL = count * 3 // 4, pixels_NL == class_NLP.shape[2]

    def patches(part: slice, chosen_NL: Tensor) -> LabelledFeatures:
        kept_NL = chosen_NL[part]
        return LabelledFeatures(features_NF=features_NST[part, 1:][kept_NL], label_N=most_NL[part][kept_NL])

    every_NL = torch.ones_like(whole_NL)
    train, settings = patches(slice(fit), every_NL), LinearProbeSettings(l2=(1e-4,))
    clip, words = read_clip(folder or DEMO_FOLDER)
    tallest_N = share_NL.max(dim=1).values * share_NL.shape[1]
    return {
        "zero-shot": 100 * zero_shot_accuracy(clip, words, pixels_NHWC, label_N, [[f"a {thing}"] for thing in THINGS]),
        "patches": 100 * linear_probe_accuracy(train, patches(slice(fit, None), every_NL), settings).accuracy,
        "patches of one class": 100
        * linear_probe_accuracy(train, patches(slice(fit, None), whole_NL), settings).accuracy,
        "pixels of things": 100 * float(thing_NL.mean()),
        "attention on things": 100 * float((share_NL * thing_NL).sum(dim=1).mean()),
        f"views with a patch above {_TALL:g} times the mean": 100 * float((tallest_N > _TALL).float().mean()),
        "highest patch, median (times the mean)": float(tallest_N.median()),
    }


def main() -> None:
    """Print the numbers of each teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1_000_005)
    options = parser.parse_args()
    for folder in options.folders or [None]:
        print(f"{folder or DEMO}:")
        for name, value in judge(folder, options.scenes, options.seed).items():
            print(f"  {name:45s} {value:6.1f}", flush=True)


if __name__ == "__main__":
    main()
