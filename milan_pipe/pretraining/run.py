"""Pretraining as a task: batches of a target store, the masked student, and what is kept of both."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from milan_pipe.background import Background
from milan_pipe.config.command import command_of
from milan_pipe.config.params import Params, stated_of
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.training import RESUMABLE
from milan_pipe.devices import resolve_precision
from milan_pipe.digests import sha256_of
from milan_pipe.drawing.sheet import draw_sheet, mask_sheet
from milan_pipe.errors import SettingError, without_secrets
from milan_pipe.extras import needs
from milan_pipe.loader.order import ORDER_VERSION, BatchPlan, Block, EpochOrder, batches_per_epoch
from milan_pipe.loader.stream import Batch, Loader, read_batch
from milan_pipe.loader.workers import WorkerLoader
from milan_pipe.pretraining.bad_batch import bad_batch_file, write_bad_batch
from milan_pipe.pretraining.objective import Objective, Teach, build_objective, outputs_of, require_fit
from milan_pipe.pretraining.start import keep_start, kept_start, load_decoder, start_from
from milan_pipe.pretraining.statistics import Statistics, keep_statistics, statistics_of
from milan_pipe.storage.local import write_file
from milan_pipe.student.encoder import Encoder
from milan_pipe.student.objectives import is_taught
from milan_pipe.student.standardise import standardise_of
from milan_pipe.targets.schema import BLOCK_SAMPLES, StoreHeader, require_stated
from milan_pipe.targets.several import SeveralStores, open_several
from milan_pipe.training.checkpoint import checkpoints_of
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.optim import build_adamw, cosine_lr
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.runner import run_task
from milan_pipe.training.state import gathered
from milan_pipe.training.task import NotFiniteError, RunReport, Task
from milan_pipe.weights_file import weights_digest

_SECTIONS = ("student", "masking", "decoder", "target", "teachers", "pretrain")
_AHEAD, _SHOWN = 2, 8


class Probe(Protocol):
    """Judges the student while it learns, as `milan_pipe.evaluation.probe.Probe`; `facts` are JSON data about it."""

    facts: dict[str, int]
    bad: int

    def __call__(self, weights: Mapping[str, Tensor]) -> float:
        """A score of the encoder with these weights, which are on the CPU."""


ProbeFor = Callable[[torch.device], Probe]


def configuration_of(
    headers: Sequence[StoreHeader],
    samples: tuple[int, ...],
    params: Params,
    statistics: Sequence[Statistics] = (),
    views: Sequence[str | None] = (),
) -> dict[str, Any]:
    """All that the weights of a run depend on; `views` has the digest of the views of each shard."""
    # Neither where a store came from nor its format change what is read from it.
    stored = [header.model_dump(mode="json", exclude={"package_version", "format", "source"}) for header in headers]
    codecs = [sha256_of(json.dumps(one["codec"], sort_keys=True).encode()) for one in stored]
    found = {
        "order": ORDER_VERSION,
        **params.model_dump(mode="json", include={"student", "decoder", "masking", "target", "teachers"}),
        "pretrain": params.pretrain.model_dump(mode="json", exclude=RESUMABLE),
        "targets": {
            **{name: stored[0][name] for name in ("teacher", "views")},
            "codec": codecs[0],
            "samples": sha256_of(json.dumps(samples).encode()),
        },
    }
    # Stores of earlier versions have none.
    if views and None not in views:
        found["targets"]["views_sha256"] = sha256_of(json.dumps(views).encode())
    for number, (one, codec) in enumerate(zip(stored[1:], codecs[1:], strict=True), 2):
        found[f"targets_{number}"] = {"teacher": one["teacher"], "codec": codec}
    if statistics:
        found["statistics"] = {str(number): weights_digest(one) for number, one in enumerate(statistics)}
    return found


class PretrainTask(Task[Batch]):
    """A student that learns from a target store."""

    name, section = None, "pretrain"
    settings: PretrainSettings
    record: dict[str, Any]
    advice = "lower pretrain.lr, or check the targets"

    def __init__(
        self,
        run: Path,
        reader: SeveralStores,
        params: Params,
        ranks: Ranks,
        teacher_for: Callable[[StoreHeader, torch.device], Teach] | None,
        probe_for: ProbeFor | None = None,
    ) -> None:
        precision = resolve_precision(params.pretrain.precision, ranks.device)
        self.settings = settings = params.pretrain.model_copy(update={"precision": precision})
        self._params = params.model_copy(update={"pretrain": settings})
        self._run, self._reader, self._ranks = run, reader, ranks
        self._teacher_for, self._probe_for = teacher_for, probe_for
        self._probe: Probe | None = None
        if settings.probe_every is not None:
            self.main_score, self.scores_in = "knn", "probe"
            images = {name: without_secrets(str(getattr(settings, name))) for name in ("probe_train", "probe_test")}
            self.judged_on = {**images, "probe_images": settings.probe_images}
        self._statistics: list[Statistics] = []
        if params.teachers.standardise != "none" or params.teachers.weights == "balanced":
            if ranks.first:
                self._statistics = [statistics_of(store, run, number) for number, store in enumerate(reader.stores)]
            self._statistics = ranks.broadcast(self._statistics)
        # An empty list where features stay as they are.
        self._standardise = [
            standardise_of(params.teachers.standardise, one, store.header.teacher.width)
            for one, store in zip(self._statistics, reader.stores, strict=False)
        ]
        # Settings that do not fit the stores are refused before anything is written.
        outputs_of(reader.headers, params, self._standardise)
        if settings.parallel == "fsdp" and precision == "float16":
            raise SettingError("pretrain.parallel='fsdp' has no loss scale for precision 'float16'; use bfloat16")
        self._plan = _plan_of(reader, params, ranks)
        self.parallel = settings.parallel
        self.batch_size = settings.batch_size
        self._peak = settings.lr * settings.batch_size / 256
        self.steps_per_epoch = self._plan.steps
        self.steps = self._plan.steps * settings.epochs
        views = [reader.stores[0].views_sha256(shard) for shard in reader.shards]
        self.configuration = configuration_of(
            reader.headers, self._plan.order.samples, self._params, self._statistics, views
        )
        self.record = {
            "epochs": settings.epochs,
            "student": params.student.model_dump(mode="json"),
            "teacher": reader.header.teacher.model_dump(mode="json"),
            "settings": params.model_dump(mode="json", include={*_SECTIONS} - {"student"}),
            "targets": str(reader.location),
            "command": command_of(
                "pretrain", [*(store.location for store in reader.stores), run], params, (*_SECTIONS, "images")
            ),
        }
        for name in ("probe_train", "probe_test"):
            if (images := getattr(settings, name)) is not None:
                self.record["settings"]["pretrain"][name] = without_secrets(images)
        if len(reader.stores) > 1:
            self.record["others"] = [
                {"targets": str(store.location), "teacher": store.header.teacher.model_dump(mode="json")}
                for store in reader.stores[1:]
            ]

    def build(self) -> None:
        params, device = self._params, self._ranks.device
        if self._ranks.first:
            for number, (one, store) in enumerate(zip(self._statistics, self._reader.stores, strict=False)):
                keep_statistics(one, store, self._run, number)
        teach, taught = None, is_taught(params.target)
        if self.settings.targets == "online":
            if self._teacher_for is None or not taught or len(self._reader.stores) > 1 or self._statistics:
                found = f"pretrain.targets is 'online' with target {params.target!r}"
                raise SettingError(
                    f"{found}; it needs one of features, as 'clip', one store as it is, and, from Python, teacher_for"
                )
            teach = self._teacher_for(self._reader.header, device)
        self._with_targets = taught and teach is None
        self.objective: Objective = build_objective(
            self._reader.header,
            params,
            device,
            teach,
            others=self._reader.headers[1:],
            standardise=self._standardise,
        )
        self.model = student = self.objective.student
        if params.student.init is not None:
            self._begin_with(params.student.init, params.student.model, student.encoder)
        if params.decoder.init is not None and not checkpoints_of(self._run):
            load_decoder(params.decoder.init, student.decoder, params.decoder.heads)
        self.modules = {"student": student.encoder, "decoder": student.decoder}
        if self.settings.probe_every is not None:
            if self._probe_for is None:
                raise SettingError("pretrain.probe_every needs, from Python, probe_for")
            if self._ranks.first:
                self._probe = self._probe_for(device)
                self.record["probe"] = dict(self._probe.facts)
        self._shown: Batch | None = None
        if self.settings.plot_every is not None:
            # What lacks is told now, and not after an epoch.
            with needs("report", "pretrain.plot_every"):
                import matplotlib  # noqa: F401
            samples = self._reader.samples(self._reader.shards[0])
            self._shown = read_batch(self._reader, Block(0, 0, 0, min(_SHOWN, samples)))

    def _begin_with(self, init: str, model: str, encoder: Encoder) -> None:
        """Load the weights that the run begins with; a run that goes on has its own, and need not find them."""
        if not checkpoints_of(self._run):
            start = start_from(init, model, encoder)
            if self._ranks.first:
                keep_start(self._run, start)
        else:
            start = kept_start(self._run)
            if encoder.pos_embed is not None:
                encoder.pos_embed.requires_grad_(start.trains_positions)
        self.record["init"] = asdict(start)

    def optimiser(self) -> torch.optim.Optimizer:
        settings = self.settings
        return build_adamw(
            self.model,
            lr=self._peak,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay,
        )

    def lr(self, step: int) -> float:
        warmup = round(self.settings.warmup_epochs * self.steps_per_epoch)
        return cosine_lr(step, steps=self.steps, warmup_steps=warmup, peak=self._peak)

    def units(self) -> Iterable[nn.Module]:
        return self.objective.student.units()

    def batches(self, first_step: int) -> Generator[Batch]:
        """This rank's part of every batch, read ahead across the borders of epochs: no epoch begins by waiting."""
        epoch, skip = divmod(first_step, self.steps_per_epoch)
        kind = partial(WorkerLoader, workers=self.settings.workers) if self.settings.workers else Loader
        with (
            kind(
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

    def due(self, step: int) -> bool:
        """At the end of every few epochs."""
        every = self.settings.probe_every
        return every is not None and step % (every * self.steps_per_epoch) == 0

    def evaluate(self, *, last: bool) -> dict[str, float]:
        """k-NN accuracy of the student, computed by the first rank while the others wait."""
        del last
        weights = gathered(self.modules["student"].state_dict(), keep=self._ranks.first)
        return {"knn": self._ranks.broadcast(0.0 if self._probe is None else self._probe(weights))}

    def bad(self) -> int:
        """Images of the probe that could not be read."""
        return 0 if self._probe is None else self._probe.bad

    def explain(self, error: NotFiniteError, weights: Callable[[], Mapping[str, Mapping[str, Tensor]]]) -> str:
        """Have the first rank write the batch, all ranks' parts of it, with the weights that met it."""
        met, file = weights(), bad_batch_file(self._run, error.step)
        if self._ranks.first:
            epoch, skip = divmod(error.step - 1, self.steps_per_epoch)
            plan = self._plan.of_rank(0, 1)
            with Loader(self._reader, plan, threads=self.settings.threads, with_targets=True) as loader:
                batch = next(loader.batches(epoch, skip))
            headers = [header.model_dump(mode="json") for header in self._reader.headers]
            metadata = {"step": error.step, "epoch": epoch, "header": headers[0], "others": headers[1:]}
            buffers = {f"{n}/{name}": value for n, one in enumerate(self._statistics) for name, value in one.items()}
            write_bad_batch(file, batch, {**met, "statistics": buffers}, {**metadata, **self.configuration})
        self._ranks.barrier()
        return f". `milan-pipe replay {file}` computes the batch again, with the weights that met it"


def _plan_of(reader: SeveralStores, params: Params, ranks: Ranks) -> BatchPlan:
    settings = params.pretrain
    if ranks.count > 1 and settings.batch_size // ranks.count < settings.accumulate:
        wanted = f"{ranks.count} ranks with pretrain.accumulate={settings.accumulate}"
        least = ranks.count * settings.accumulate
        raise SettingError(f"pretrain.batch_size is {settings.batch_size}: {wanted} need at least {least}")
    readers = ranks.count * max(1, settings.workers)
    if ranks.first and settings.canonical_streams < readers:
        each = f" of {settings.workers} workers" if settings.workers else ""
        found = f"pretrain.canonical_streams is {settings.canonical_streams} for {ranks.count} ranks{each}"
        todo = f"some read what others use; set it to a multiple of {readers} for a new run"
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
    targets: str | Path | Sequence[str | Path],
    run: str | Path,
    params: Params,
    *,
    teacher_for: Callable[[StoreHeader, torch.device], Teach] | None = None,
    probe_for: ProbeFor | None = None,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
) -> RunReport:
    """Train a student on a target store and write RUN/checkpoints and RUN/metrics; see `run_task`.

    Under torchrun all ranks call it: each takes its part of every batch, the first one writes, all return the report.

    Args:
        targets: folder or URL of the target store; several are read side by side, of the same images and views.
        params: the store must have its teacher and views, where they are stated; see `require_stated`.
        teacher_for: gives the teacher of a store on a device; for `pretrain.targets: online`.
        probe_for: gives what judges the student on a device; for `pretrain.probe_every`.

    Raises:
        MissingError, DataError: the store is missing or damaged, or the loss is not finite.
        MismatchError: a store does not fit the student, the settings or the first store, or RUN holds a run of another
            configuration.
        SettingError: the store has fewer samples than a batch, RUN is a URL, or there is no online teacher or probe.
        StoreError, StoppedError, RankLostError, ReportedElsewhereError: as `run_task`.
    """

    def task_of(ranks: Ranks, folder: Path) -> PretrainTask:
        wheres = [targets] if isinstance(targets, str | Path) else list(targets)
        reader = open_several(wheres, params.teachers.importance)
        require_stated(reader.header, stated_of(params), wheres[0])
        require_fit(reader.header, params.student, wheres[0])
        return PretrainTask(folder, reader, params, ranks, teacher_for, probe_for)

    return run_task(run, params.pretrain.device, task_of, on_progress)
