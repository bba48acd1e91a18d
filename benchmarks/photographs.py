"""Labelled photographs in place of scenes: a small CLIP of their own, MILAN and MAE with one budget, several seeds.

    python -m benchmarks.photographs PHOTOS WORK [--seeds 0 1 2] [--set section.key=value ...]

PHOTOS has shards train-*.tar and test-*.tar of CIFAR-10 (KEY.jpg, KEY.cls) and classes.json, the names of the classes.
Captions are made of the names, several to an image; the teacher learns from those of the train split alone. WORK gets
the captioned shards, the teacher, one target store, the runs and a file of results for each; what is there already is
not done again. The table is printed at the end.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from webdataset import TarWriter

from benchmarks.ablation import do_row, evaluate, spread
from milan_pipe import api
from milan_pipe.config.params import Params, load_params
from milan_pipe.config.subjects import BOUNDS, MAE, MILAN, RANDOM, TEACHER, UNTRAINED
from milan_pipe.digests import sha256_of_file
from milan_pipe.images.index import ImageIndex, ShardRecord, write_index
from milan_pipe.images.shards import expand_shards
from milan_pipe.images.tar import read_shard

TEMPLATES = (
    "a photo of a {}",
    "a {}",
    "a small photo of a {}",
    "this is a {}",
    "a blurry photo of one {}",
    "{}",
)
SETTINGS = [
    "student.image_size=32",
    "student.patch_size=4",
    "clip.image_size=32",
    "clip.patch_size=4",
    "clip.shift=4",
    "clip.flip=0.5",
    "clip.prompts=[" + ", ".join(f"'{template}'" for template in TEMPLATES) + "]",
]
STUDENTS = {RANDOM: UNTRAINED, "mae": MAE, "milan": MILAN}
FRACTIONS = {0.1: 20, 1.0: 5}
"""Shares of the labels, and epochs of fine-tuning on them."""

COLUMNS = {
    "knn_cls": "k-NN",
    "probe_cls": "linear probe",
    **{f"top1_{fraction:g}": f"fine-tuned, {100 * fraction:g} %" for fraction in FRACTIONS},
}


def caption(photos: Path, images: Path) -> None:
    """Write the shards again, with captions made of the names of their classes, and an index."""
    names = json.loads((photos / "classes.json").read_text(encoding="utf-8"))
    images.mkdir(parents=True, exist_ok=True)
    records = []
    for split in ("train", "test"):
        for shard in expand_shards(str(photos / f"{split}-*.tar")):
            path, count = images / shard.name, 0
            with TarWriter(str(path), encoder=False) as writer:
                for sample in read_shard(shard, lambda *_: None):
                    lines = "\n".join(template.format(names[sample.label]) for template in TEMPLATES)
                    label = str(sample.label).encode()
                    writer.write({"__key__": sample.key, "jpg": sample.data, "cls": label, "txt": lines.encode()})
                    count += 1
            size, digest = path.stat().st_size, sha256_of_file(path)
            records.append(ShardRecord(name=shard.name, split=split, samples=count, bytes=size, sha256=digest))
    write_index(images, ImageIndex(source={"kind": "photographs"}, classes=tuple(names), shards=tuple(records)))


def judge(work: Path, checkpoint: str, seed: int, params: Params) -> dict[str, float]:
    """Frozen and fine-tuned scores in per cent; the teacher is not fine-tuned."""
    values = evaluate(checkpoint, work / "images", params)
    if checkpoint == TEACHER:
        return values
    for fraction, epochs in FRACTIONS.items():
        recipe = {"epochs": epochs, "eval_every": epochs, "train_fraction": fraction, "seed": seed}
        tuned = params.model_copy(update={"finetune": params.finetune.model_copy(update=recipe)})
        run = work / "tuned" / f"{Path(checkpoint).name}-{fraction:g}-{seed}"
        train, test = (str(work / "images" / f"{split}-*.tar") for split in ("train", "test"))
        values[f"top1_{fraction:g}"] = 100 * api.finetune(checkpoint, train, test, run, tuned).scores["top1"]
    return values


def main() -> None:
    """Do what is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    work: Path = arguments.work
    overrides = [*SETTINGS, f"teacher.model=local-dir:{work / 'teacher'}", *arguments.overrides]
    params = load_params(None, overrides)
    train, test = (str(work / "images" / f"{split}-*.tar") for split in ("train", "test"))
    if not (work / "images" / "index.json").is_file():
        caption(arguments.photos, work / "images")
    if not (work / "teacher").is_dir():
        print(api.train_clip(train, work / "teacher", params, val=test), flush=True)
    api.extract_targets(train, work / "targets", params)
    for seed in arguments.seeds:
        for row in STUDENTS:
            do_row(work, row, seed, overrides, partial(judge, work))
    do_row(work, TEACHER, arguments.seeds[0], overrides, partial(judge, work))
    print("| | " + " | ".join(COLUMNS.values()) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for row, title in {**STUDENTS, TEACHER: BOUNDS[TEACHER]}.items():
        found = [json.loads(path.read_text()) for path in sorted((work / "results").glob(f"{row}-*.json"))]
        cells = [spread([one[key] for one in found]) if key in found[0] else "" for key in COLUMNS]
        print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
