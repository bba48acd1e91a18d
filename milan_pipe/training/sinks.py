"""Where the points of a run's metrics go: always files, TensorBoard and Weights & Biases on request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from milan_pipe.config.training import SinkName
from milan_pipe.digests import sha256_of
from milan_pipe.extras import needs
from milan_pipe.storage.local import real_path
from milan_pipe.training.metrics import MetricWriter, metrics_written, require_own_metrics

if TYPE_CHECKING:
    from dvclive.live import Live


class Sink(Protocol):
    """Takes points of the metrics and images."""

    def point(self, step: int, values: Mapping[str, float]) -> None:
        """Values by name, measured after `step` steps."""

    def image(self, step: int, file: Path) -> None:
        """A PNG that was drawn after `step` steps."""


@dataclass
class _Dvclive:
    live: Live
    folder: Path

    def point(self, step: int, values: Mapping[str, float]) -> None:
        with metrics_written(self.folder):
            self.live.step = step
            for name, value in values.items():
                self.live.log_metric(name, value)
            self.live.sync()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        with metrics_written(self.folder):
            self.live.end()  # type: ignore[no-untyped-call]

    def image(self, step: int, file: Path) -> None:
        """The run's folder has it already."""


@dataclass
class _TensorBoard:
    writer: Any

    def point(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def image(self, step: int, file: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(file) as opened:
            self.writer.add_image("images", np.asarray(opened), step, dataformats="HWC")


@dataclass
class _Wandb:
    run: Any
    module: Any

    def point(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, file: Path) -> None:
        self.run.log({"images": self.module.Image(str(file))}, step=step)


def _open_files(folder: Path, resume: bool, stack: ExitStack) -> Sink:
    """dvclive where it is installed, which also tells DVC of a run in its projects; else the same files without it."""
    try:
        from dvclive.live import Live  # only processes that write need it: a quarter of a second
    except ModuleNotFoundError:
        return MetricWriter(folder, resume=resume)
    require_own_metrics(folder)
    quiet: Any = {"save_dvc_exp": False, "dvcyaml": None, "report": None, "monitor_system": False}
    with metrics_written(folder):
        live = Live(str(folder), resume=resume, **quiet)
    if live._dvc_repo is not None:
        # dvclive leaves it open, and its databases hold a dozen descriptors.
        stack.callback(live._dvc_repo.close)
    sink = _Dvclive(live, folder)
    stack.callback(sink.end)
    return sink


@contextmanager
def open_sinks(
    folder: Path, names: Sequence[SinkName], first_step: int, configuration: Mapping[str, Any]
) -> Iterator[list[Sink]]:
    """Open the files of a run, and the named sinks; Weights & Biases keeps the configuration.

    Raises:
        MissingError: a sink's package is not installed.
        StoreError: the files cannot be written, also at the end.
    """
    with ExitStack() as stack:
        sinks = [_open_files(folder, first_step > 0, stack)]
        if "tensorboard" in names:
            with needs("sinks", "the sink 'tensorboard'"):
                from torch.utils.tensorboard import SummaryWriter
            # Purged: points after the checkpoint are measured again.
            purge = first_step + 1 if first_step else None
            writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
            stack.callback(writer.close)
            sinks.append(_TensorBoard(writer))
        if "wandb" in names:
            with needs("sinks", "the sink 'wandb'"):
                import wandb
            run = wandb.init(
                project="milan-pipe",
                dir=str(folder),
                config=dict(configuration),
                resume="allow",
                id=sha256_of(str(real_path(folder)).encode())[:16],  # one for all parts of an interrupted run
                name=folder.parent.name,
            )
            stack.callback(run.finish)
            sinks.append(_Wandb(run, wandb))
        yield sinks
