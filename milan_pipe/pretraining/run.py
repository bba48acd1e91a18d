"""Pretraining as a task: batches of a target store, the masked student, and what is kept of both."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from milan_pipe.background import Background
from milan_pipe.config.command import command_of
from milan_pipe.config.params import Params, stated_of
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.training import RESUMABLE
from milan_pipe.devices import resolve_precision
from milan_pipe.drawing.sheet import draw_sheet, mask_sheet
from milan_pipe.errors import SettingError
from milan_pipe.extras import needs
from milan_pipe.loader.order import ORDER_VERSION, BatchPlan, Block, EpochOrder, batches_per_epoch
from milan_pipe.loader.stream import Batch, Loader, read_batch
from milan_pipe.pretraining.bad_batch import bad_batch_file, write_bad_batch
from milan_pipe.pretraining.objective import Objective, Teach, build_objective, require_fit, terms_of
from milan_pipe.storage.local import write_file
from milan_pipe.student.objectives import is_taught
from milan_pipe.targets.schema import BLOCK_SAMPLES, StoreHeader, require_stated
from milan_pipe.targets.store import TargetStore, open_targets
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.optim import build_adamw, cosine_lr
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.runner import run_task
from milan_pipe.training.task import NotFiniteError, RunReport, Task

_SECTIONS = ("student", "masking", "decoder", "target", "pretrain")
_AHEAD, _SHOWN = 2, 8


def configuration_of(header: StoreHeader, samples: tuple[int, ...], params: Params) -> dict[str, Any]:
    """All that the weights of a run depend on."""
    # Neither where the store came from nor its format change what is read from it.
    stored = header.model_dump(mode="json", exclude={"package_version", "format", "source"})
    return {
        "order": ORDER_VERSION,
        **params.model_dump(mode="json", include={"student", "decoder", "masking", "target"}),
        "pretrain": params.pretrain.model_dump(mode="json", exclude=RESUMABLE),
        "targets": {
            **{name: stored[name] for name in ("teacher", "views")},
            "codec": hashlib.sha256(json.dumps(stored["codec"], sort_keys=True).encode()).hexdigest(),
            "samples": hashlib.sha256(json.dumps(samples).encode()).hexdigest(),
        },
    }


class PretrainTask(Task[Batch]):
    """A student that learns from a target store."""

    name, section = None, "pretrain"
    settings: PretrainSettings
    advice = "lower pretrain.lr, or check the targets"

    def __init__(
        self,
        run: Path,
        reader: TargetStore,
        params: Params,
        ranks: Ranks,
        teacher_for: Callable[[StoreHeader, torch.device], Teach] | None,
    ) -> None:
        precision = resolve_precision(params.pretrain.precision, ranks.device)
        self.settings = settings = params.pretrain.model_copy(update={"precision": precision})
        self._params = params.model_copy(update={"pretrain": settings})
        self._run, self._reader, self._ranks, self._teacher_for = run, reader, ranks, teacher_for
        terms_of(reader.header, params)
        if settings.parallel == "fsdp" and precision == "float16":
            raise SettingError("pretrain.parallel='fsdp' has no loss scale for precision 'float16'; use bfloat16")
        self._plan = _plan_of(reader, params, ranks)
        self.parallel = settings.parallel
        self.batch_size = settings.batch_size
        self._peak = settings.lr * settings.batch_size / 256
        self.steps_per_epoch = self._plan.steps
        self.steps = self._plan.steps * settings.epochs
        self.configuration = configuration_of(reader.header, self._plan.order.samples, self._params)
        self.record = {
            "epochs": settings.epochs,
            "student": params.student.model_dump(mode="json"),
            "teacher": reader.header.teacher.model_dump(mode="json"),
            "settings": params.model_dump(mode="json", include={"decoder", "masking", "target", "pretrain"}),
            "targets": str(reader.location),
            "command": command_of("pretrain", [reader.location, run], params, _SECTIONS),
        }

    def build(self) -> None:
        params, device = self._params, self._ranks.device
        teach, taught = None, is_taught(params.target)
        if self.settings.targets == "online":
            if self._teacher_for is None or not taught:
                found = f"pretrain.targets is 'online' with target {params.target!r}"
                raise SettingError(f"{found}; it needs one of features, as 'clip', and, from Python, teacher_for")
            teach = self._teacher_for(self._reader.header, device)
        self._with_targets = taught and teach is None
        self.objective: Objective = build_objective(self._reader.header, params, device, teach)
        self.model = student = self.objective.student
        self.modules = {"student": student.encoder, "decoder": student.decoder}
        self._shown: Batch | None = None
        if self.settings.plot_every is not None:
            # What lacks is told now, and not after an epoch.
            with needs("report", "pretrain.plot_every"):
                import matplotlib  # noqa: F401
            samples = self._reader.samples(self._reader.shards[0])
            self._shown = read_batch(self._reader, Block(0, 0, 0, min(_SHOWN, samples)))

    def optimiser(self) -> torch.optim.Optimizer:
        settings = self.settings
        return build_adamw(self.model, lr=self._peak, betas=settings.betas, weight_decay=settings.weight_decay)

    def lr(self, step: int) -> float:
        warmup = round(self.settings.warmup_epochs * self.steps_per_epoch)
        return cosine_lr(step, steps=self.steps, warmup_steps=warmup, peak=self._peak)

    def units(self) -> Iterable[nn.Module]:
        return self.objective.student.units()

    def batches(self, first_step: int) -> Generator[Batch]:
        """This rank's part of every batch, read ahead across the borders of epochs: no epoch begins by waiting."""
        epoch, skip = divmod(first_step, self.steps_per_epoch)
        with (
            Loader(
                self._reader,
                self._plan,
                threads=self.settings.threads,
                with_targets=self._with_targets,
                draw_noise=self.objective.draw_noise,
                pin=self._ranks.device.type == "cuda",
            ) as loader,
            closing(Background(loader.batches(epoch, skip, self.settings.epochs), _AHEAD, "prefetch")) as ahead,
        ):
            yield from ahead

    def parts(self, batch: Batch) -> Sequence[tuple[Batch, float]]:
        return batch.parts(self.settings.accumulate)

    def after_step(self, step: int) -> Path | None:
        """Draw RUN/predictions/epoch-NNNN.png every few epochs, always of the same samples."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        batch, every = self._shown, self.settings.plot_every
        if batch is None or every is None or rest or epoch % every:
            return None
        # On every rank, as each may hold shards of the student.
        split, cosine_BL = self.objective.cosine(batch, epoch - 1)
        if not self._ranks.first:
            return None
        sheet = mask_sheet(
            f"after epoch {epoch}",
            batch.keys,
            batch.pixels_BHWC.numpy(),
            ~split.masked_map().cpu().numpy(),
            cosine_BL.float().cpu().numpy(),
            self._reader.header.teacher.grid,
        )
        file = self._run / "predictions" / f"epoch-{epoch:04d}.png"
        write_file(file, draw_sheet(sheet))
        return file

    def explain(self, error: NotFiniteError, weights: Callable[[], Mapping[str, Mapping[str, Tensor]]]) -> str:
        """Have the first rank write the batch, all ranks' parts of it, with the weights that met it."""
        met, file = weights(), bad_batch_file(self._run, error.step)
        if self._ranks.first:
            epoch, skip = divmod(error.step - 1, self.steps_per_epoch)
            plan = self._plan.of_rank(0, 1)
            with Loader(self._reader, plan, threads=self.settings.threads, with_targets=True) as loader:
                batch = next(loader.batches(epoch, skip))
            metadata = {"step": error.step, "epoch": epoch, "header": self._reader.header.model_dump(mode="json")}
            write_bad_batch(file, batch, met, {**metadata, **self.configuration})
        self._ranks.barrier()
        return f". `milan-pipe replay {file}` computes the batch again, with the weights that met it"


def _plan_of(reader: TargetStore, params: Params, ranks: Ranks) -> BatchPlan:
    settings = params.pretrain
    if ranks.count > 1 and settings.batch_size // ranks.count < settings.accumulate:
        wanted = f"{ranks.count} ranks with pretrain.accumulate={settings.accumulate}"
        least = ranks.count * settings.accumulate
        raise SettingError(f"pretrain.batch_size is {settings.batch_size}: {wanted} need at least {least}")
    if ranks.first and settings.canonical_streams < ranks.count:
        found = f"pretrain.canonical_streams is {settings.canonical_streams} for {ranks.count} ranks"
        todo = f"some read what others use; set it to a multiple of {ranks.count} for a new run"
        warnings.warn(f"{found}: {todo}", RuntimeWarning, stacklevel=2)
    order = EpochOrder(
        samples=tuple(reader.samples(shard) for shard in reader.shards),
        views=reader.header.views.count,
        block=BLOCK_SAMPLES,
        shuffle_blocks=settings.shuffle_blocks,
        seed=settings.seed,
    )
    batches_per_epoch(sum(order.samples), settings.batch_size)
    return BatchPlan(
        order=order,
        batch_size=settings.batch_size,
        canonical_streams=settings.canonical_streams,
        rank=ranks.rank,
        ranks=ranks.count,
    )


def pretrain(
    targets: str | Path,
    run: str | Path,
    params: Params,
    *,
    teacher_for: Callable[[StoreHeader, torch.device], Teach] | None = None,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
) -> RunReport:
    """Train a student on a target store and write RUN/checkpoints and RUN/metrics; see `run_task`.

    Under torchrun all ranks call it: each takes its part of every batch, the first one writes, all return the report.

    Args:
        targets: folder or URL of the target store.
        params: the store must have its teacher and views, where they are stated; see `require_stated`.
        teacher_for: gives the teacher of a store on a device; for `pretrain.targets: online`.

    Raises:
        MissingError, DataError: the store is missing or damaged, or the loss is not finite.
        MismatchError: the store does not fit the student or the settings, or RUN holds a run of another configuration.
        SettingError: the store has fewer samples than a batch, RUN is a URL, or there is no online teacher.
        StoreError, StoppedError, RankLostError, ReportedElsewhereError: as `run_task`.
    """

    def task_of(ranks: Ranks, folder: Path) -> PretrainTask:
        reader = open_targets(targets)
        require_stated(reader.header, stated_of(params), targets)
        require_fit(reader.header, params.student, targets)
        return PretrainTask(folder, reader, params, ranks, teacher_for)

    return run_task(run, params.pretrain.device, task_of, on_progress)
