"""Segmentation: UperNet on the student, by the recipe that MILAN reports for ADE20K.

Shape suffixes are explained in `milan_pipe.evaluation`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from milan_pipe.config.command import record_of
from milan_pipe.config.evaluation import SegmentSettings
from milan_pipe.config.params import Params
from milan_pipe.config.training import RESUMABLE
from milan_pipe.drawing.sheet import draw_sheet, segmentation_sheet
from milan_pipe.errors import DataError, MismatchError, SettingError
from milan_pipe.evaluation.backbone import backbone_of
from milan_pipe.evaluation.batches import BadImages, StepPlan, bad_file, in_turn, load_batches, share_of_classes
from milan_pipe.evaluation.classify import advice_of
from milan_pipe.evaluation.miou import class_scores, confusion, segmentation_scores
from milan_pipe.evaluation.segment_views import TestMasks, TrainingMasks
from milan_pipe.evaluation.sliding import predict
from milan_pipe.evaluation.upernet import UperNet, build_upernet
from milan_pipe.images.masked import MaskedImages, MaskRule, masked_images, read_classes
from milan_pipe.random_bits import seed_of
from milan_pipe.storage.local import write_file
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.optim import build_adamw, layer_scale, polynomial_lr
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.runner import RunReport, Task, run_task
from milan_pipe.training.step import resolve_precision

PER_CLASS_FILE = "per_class.json"
_IMAGES = 6
_ENCODER = "encoder."


@dataclass(frozen=True)
class MaskBatch:
    """B training images with their masks, -1 for no class."""

    pixels_BCHW: Tensor
    mask_BHW: Tensor
    keys: tuple[str, ...]


class SegmentObjective(nn.Module):
    """Cross-entropy over the pixels that have a class, plus that of the auxiliary head by its weight."""

    def __init__(self, model: UperNet, auxiliary: float) -> None:
        super().__init__()
        self.model = model
        self.auxiliary = auxiliary

    def forward(self, batch: MaskBatch, epoch: int) -> Tensor:
        """Scalar mean over labelled pixels; 0 where there are none."""
        del epoch
        logits, auxiliary = self.model(batch.pixels_BCHW)
        loss = _pixel_loss(logits, batch.mask_BHW)
        return loss if auxiliary is None else loss + self.auxiliary * _pixel_loss(auxiliary, batch.mask_BHW)


def _pixel_loss(logits_BGHW: Tensor, mask_BHW: Tensor) -> Tensor:
    total = F.cross_entropy(logits_BGHW.float(), mask_BHW, ignore_index=-1, reduction="sum")
    return total / (mask_BHW >= 0).sum().clamp(min=1)


def _rule_and_names(
    train: MaskedImages, val: MaskedImages, config: SegmentSettings
) -> tuple[MaskRule, tuple[str, ...]]:
    if train.classes is not None and val.classes is not None and train.classes != val.classes:
        raise MismatchError(
            f"TRAIN and VAL have different class lists: {train.where} {_described(train.classes)}, {val.where} "
            f"{_described(val.classes)}"
        )
    given = config.classes if config.classes is not None else train.classes or val.classes
    if given is None:
        raise SettingError(
            f"the classes of {train.where} are not known; set segment.classes to a file with their names, one a "
            "line, or to their number, or put a classes.txt beside the folders"
        )
    if isinstance(given, str):
        given = read_classes(given)
    names = tuple(f"class {number}" for number in range(given)) if isinstance(given, int) else given
    if len(names) < 2:
        raise SettingError(f"there is one class, {names[0]!r}; a segmentation needs two at least")
    reduce = config.reduce_zero_label
    rule = MaskRule(
        classes=len(names),
        ignore_index=config.ignore_index,
        zero_is_ignored=train.zero_is_ignored if reduce is None else reduce,
    )
    return rule, names


def _described(classes: tuple[str, ...] | int) -> str:
    return f"{classes} classes" if isinstance(classes, int) else f"{len(classes)} classes ({', '.join(classes[:5])})"


class SegmentTask(Task[MaskBatch]):
    """Training of UperNet, and its scores by sliding windows."""

    name = section = "segment"
    main_score = "miou"
    settings: SegmentSettings

    def __init__(
        self,
        *,
        run: Path,
        ranks: Ranks,
        train: MaskedImages,
        val: MaskedImages,
        rule: MaskRule,
        names: tuple[str, ...],
        model: UperNet,
        side: int,
        settings: SegmentSettings,
        configuration: dict[str, Any],
        record: dict[str, Any],
        bad: Sequence[tuple[str, str]],
    ) -> None:
        self.settings = settings
        self.config = settings
        self.model = self._net = model
        self.modules = {"model": model}
        self.objective = SegmentObjective(model, settings.auxiliary)
        self.advice = advice_of(self.section)
        if settings.compile:
            model.compile()
        self.record = record
        self.batch_size = settings.batch_size
        self.steps = settings.steps
        self._run_folder = run
        self._ranks = ranks
        self._train, self._val, self._names = train, val, names
        self._side = side
        self._short = settings.short_side or side
        self._stride = settings.stride or max(1, round(side * 341 / 512))
        least = settings.batch_size // ranks.count // settings.accumulate
        if least < 2:
            raise SettingError(
                f"segment.batch_size {settings.batch_size} over {ranks.count} ranks with accumulate="
                f"{settings.accumulate} leaves {least} images at a time; the batch norms of UperNet need two"
            )
        if not 0 < settings.ratio[0] <= settings.ratio[1]:
            raise SettingError(f"segment.ratio must be two numbers with 0 < least <= greatest, found {settings.ratio}")
        number_N = share_of_classes(np.zeros(len(train), dtype=np.int64), settings.train_fraction, settings.seed)
        if len(number_N) < settings.batch_size:
            raise SettingError(
                f"segment.batch_size is {settings.batch_size}, {train.where} has {len(number_N)} images to train on; "
                "set a smaller batch_size"
            )
        self._steps = StepPlan(
            number_N=number_N, batch_size=settings.batch_size, seed=settings.seed, rank=ranks.rank, ranks=ranks.count
        )
        self.steps_per_epoch = self._steps.steps_per_epoch
        self._take = TrainingMasks(train, rule, side=side, short=self._short, ratio=settings.ratio, seed=settings.seed)
        self._show = TestMasks(val, rule)
        self._bad = BadImages(
            len(train) + len(val) + len(bad),
            settings.max_bad_fraction,
            bad_file(run) if ranks.first else lambda *_: None,
        )
        for key, reason in bad:
            self._bad.add(key, reason)
        self._shown: list[tuple[str, Image.Image, NDArray[np.int64], NDArray[np.int64]]] = []
        self.configuration = {
            **configuration,
            "data": {"train": train.fingerprint, "val": val.fingerprint, "classes": list(names), "rule": asdict(rule)},
        }

    def optimiser(self) -> torch.optim.Optimizer:
        """AdamW with a rate that falls from each block to the one below."""
        config, model = self.config, self._net
        depth = len(model.encoder.blocks)
        return build_adamw(
            model,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            scale_of=lambda name: (
                layer_scale(name.removeprefix(_ENCODER), depth, config.layer_decay)
                if name.startswith(_ENCODER)
                else 1.0
            ),
        )

    def before_step(self, step: int) -> None:
        """Drop path draws from the device's global generator."""
        torch.manual_seed(seed_of(self.settings.seed, step, self._ranks.rank))

    def lr(self, step: int) -> float:
        """Polynomial per step after a linear warm-up."""
        config = self.config
        return polynomial_lr(
            step, steps=config.steps, warmup_steps=config.warmup_steps, peak=config.lr, power=config.power
        )

    def batches(self, first_step: int) -> Iterator[MaskBatch]:
        """This rank's crops."""
        for batch in load_batches(
            self._take,
            default_collate,
            self._train.keys,
            self._steps.batches(first_step, self.steps),
            workers=self.settings.workers,
            bad=self._bad,
        ):
            pixels_BCHW, mask_BHW = batch.value
            yield MaskBatch(pixels_BCHW, mask_BHW, batch.keys)

    def parts(self, batch: MaskBatch) -> Sequence[tuple[MaskBatch, float]]:
        """On the device, cut for accumulation."""
        device, count, size = self._ranks.device, self.settings.accumulate, len(batch.keys)
        pixels_BCHW, mask_BHW = batch.pixels_BCHW.to(device), batch.mask_BHW.to(device)
        cuts = [slice(number * size // count, (number + 1) * size // count) for number in range(count)]
        return [
            (MaskBatch(pixels_BCHW[cut], mask_BHW[cut], batch.keys[cut]), (cut.stop - cut.start) / size) for cut in cuts
        ]

    def due(self, step: int) -> bool:
        """Every few steps."""
        return step % self.config.eval_every == 0

    def evaluate(self, *, last: bool) -> dict[str, float]:
        """mIoU, aAcc and mAcc by windows at one scale; at the end also over scales and mirrors, as `ms_...`."""
        counts_GG = self._confusion((1.0,), flip=False)
        scores = segmentation_scores(counts_GG)
        table = [asdict(score) for score in class_scores(counts_GG, self._names)]
        if last and self.config.scales:
            multi_GG = self._confusion(self.config.scales, flip=True)
            scores |= {f"ms_{name}": value for name, value in segmentation_scores(multi_GG).items()}
            for row, score in zip(table, class_scores(multi_GG, self._names), strict=True):
                row |= {"ms_iou": score.iou, "ms_acc": score.acc}
        if self._ranks.first:
            write_file(self._run_folder / PER_CLASS_FILE, json.dumps(table, indent=1, ensure_ascii=False) + "\n")
        return scores

    @torch.inference_mode()
    def _confusion(self, scales: Sequence[float], *, flip: bool) -> Tensor:
        ranks, classes = self._ranks, len(self._names)
        counts_GG = torch.zeros((classes, classes), dtype=torch.int64)
        self._shown.clear()
        for shown in load_batches(
            self._show,
            list,
            self._val.keys,
            in_turn(len(self._val), 1, ranks.rank, ranks.count),
            workers=self.settings.workers,
            bad=self._bad,
        ):
            for key, (image, mask_HW) in zip(shown.keys, shown.value, strict=True):
                predicted_HW = predict(
                    self._classify,
                    image,
                    window=self._side,
                    stride=self._stride,
                    short=self._short,
                    scales=scales,
                    flip=flip,
                    device=ranks.device,
                ).cpu()
                counts_GG += confusion(predicted_HW, torch.from_numpy(mask_HW), classes)
                if ranks.first and len(self._shown) < _IMAGES:
                    self._shown.append((key, image, mask_HW, predicted_HW.numpy()))
        counts_GG = (ranks.all_reduce_mean(counts_GG.double()) * ranks.count).round().long()
        if not counts_GG.sum():
            raise DataError(f"not one pixel of {self._val.where} has a class; check its masks and segment.ignore_index")
        return counts_GG

    def _classify(self, windows_BCHW: Tensor) -> Tensor:
        precision = self.settings.precision
        mixed = precision not in ("auto", "float32")
        with torch.autocast(
            windows_BCHW.device.type, dtype=getattr(torch, precision) if mixed else None, enabled=mixed
        ):
            logits: Tensor = self.model(windows_BCHW)[0]
        return logits

    def plot(self, run: Path, step: int) -> Path | None:
        """The first images of VAL, their masks and what was predicted, as RUN/images/step-NNNNNNNN.png."""
        if not self._shown:
            return None
        keys, images, truths, predictions = zip(*self._shown, strict=True)
        file = run / "images" / f"step-{step:08d}.png"
        arrays = [np.asarray(image) for image in images]
        sheet = segmentation_sheet(f"step {step}", keys, arrays, truths, predictions, len(self._names))
        write_file(file, draw_sheet(sheet))
        return file

    def bad(self) -> int:
        """Images that could not be read, on this rank."""
        return len(self._bad.keys)


def segment(
    checkpoint: str | Path,
    train: str | Path,
    val: str | Path,
    run: str | Path,
    params: Params,
    *,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
) -> RunReport:
    """Train UperNet on the student; writes RUN/checkpoints, RUN/best, RUN/metrics, RUN/images and RUN/per_class.json.

    A run that was interrupted goes on; on a CPU its curve and weights are then those of an unbroken run, to the bit.

    Args:
        checkpoint: as `backbone_of` takes it.
        train, val: as `masked_images` takes them.
        params: `student` has the sizes of a student with fresh weights.

    Raises:
        LabelError: a mask is of another size than its image, in colours, or has a value that is no class.
        MissingError, DataError, MismatchError, SettingError, StoreError: as `backbone_of`, `masked_images` and
            `run_task`.
    """

    config = params.segment
    record = record_of("segment", [checkpoint, train, val, run], params, ("segment",), data=f"{train} -> {val}")

    def build(ranks: Ranks, folder: Path) -> SegmentTask:
        settings = config.model_copy(update={"precision": resolve_precision(config.precision, ranks.device)})
        backbone = backbone_of(checkpoint, params.student, config.seed)
        bad: list[tuple[str, str]] = []
        first = masked_images(train, "train", lambda key, reason: bad.append((key, reason)))
        second = masked_images(val, "val", lambda key, reason: bad.append((key, reason)))
        rule, names = _rule_and_names(first, second, config)
        sizes, model = build_upernet(
            backbone,
            classes=len(names),
            crop=config.crop,
            blocks=config.blocks,
            channels=config.channels,
            drop_path=config.drop_path,
            seed=seed_of(config.seed, "head") % 2**63,
        )
        model.encoder.set_grad_checkpointing(config.checkpoint_activations)
        model.to(ranks.device)
        return SegmentTask(
            run=folder,
            ranks=ranks,
            train=first,
            val=second,
            rule=rule,
            names=names,
            model=model,
            side=sizes.image_size,
            settings=settings,
            configuration={
                "segment": settings.model_dump(mode="json", exclude=RESUMABLE | {"classes"}),
                "student": {**sizes.model_dump(mode="json"), "weights": backbone.digest()},
            },
            record={
                "student": sizes.model_dump(mode="json"),
                "classes": list(names),
                "backbone": backbone.name,
                **record,
            },
            bad=bad,
        )

    return run_task(run, config.device, build, on_progress)
