"""Where the points of a run's metrics go: always dvclive, TensorBoard and Weights & Biases on request."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from milan_pipe.config.training import SinkName
from milan_pipe.errors import SettingError

if TYPE_CHECKING:
    from dvclive.live import Live


class Sink(Protocol):
    """Takes points of the metrics and images."""

    def point(self, step: int, values: Mapping[str, float]) -> None:
        """Values by name, measured after `step` steps."""

    def image(self, step: int, file: Path) -> None:
        """A PNG that was drawn after `step` steps."""


class _Dvclive:
    def __init__(self, live: Live) -> None:
        self._live = live

    def point(self, step: int, values: Mapping[str, float]) -> None:
        self._live.step = step
        for name, value in values.items():
            self._live.log_metric(name, value)
        self._live.sync()  # type: ignore[no-untyped-call]

    def image(self, step: int, file: Path) -> None:
        """The run's folder has it already."""


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def point(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, step: int, file: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(file) as opened:
            self._writer.add_image("images", np.asarray(opened), step, dataformats="HWC")


class _Wandb:
    def __init__(self, run: Any, module: Any) -> None:
        self._run = run
        self._module = module

    def point(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, file: Path) -> None:
        self._run.log({"images": self._module.Image(str(file))}, step=step)


def _module(name: str, package: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise SettingError(f"`sinks` has {package!r}, which is not installed; pip install {package}") from error


@contextmanager
def open_sinks(
    folder: Path, names: Sequence[SinkName], *, goes_on: int, configuration: Mapping[str, Any]
) -> Iterator[list[Sink]]:
    """Open FOLDER for dvclive and the named sinks.

    Args:
        goes_on: steps that were recorded before; 0 in a fresh run.
        configuration: for Weights & Biases.

    Raises:
        SettingError: a sink's package is not installed.
    """
    from dvclive.live import Live  # only processes that write need it: a quarter of a second

    with ExitStack() as stack:
        live = Live(
            str(folder), resume=goes_on > 0, save_dvc_exp=False, dvcyaml=None, report=None, monitor_system=False
        )
        if live._dvc_repo is not None:
            # dvclive leaves it open, and its databases hold a dozen descriptors.
            stack.callback(live._dvc_repo.close)
        sinks: list[Sink] = [_Dvclive(stack.enter_context(live))]
        if "tensorboard" in names:
            module = _module("torch.utils.tensorboard", "tensorboard")
            # Purged: points after the checkpoint are measured again.
            writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=goes_on + 1 if goes_on else None)
            stack.callback(writer.close)
            sinks.append(_TensorBoard(writer))
        if "wandb" in names:
            wandb = _module("wandb", "wandb")
            # One name for all parts of an interrupted run.
            identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
            run = wandb.init(
                project="milan-pipe",
                dir=str(folder),
                id=identity,
                name=folder.parent.name,
                config=dict(configuration),
                resume="allow",
            )
            stack.callback(run.finish)
            sinks.append(_Wandb(run, wandb))
        yield sinks
