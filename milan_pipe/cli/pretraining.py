"""Commands that pretrain, and explain a run that stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import milan_pipe
from milan_pipe.cli.base import DeviceOption, JsonOption, ParamsOption, RunArgument, SetOption, app, as_typed
from milan_pipe.cli.console import progress, show
from milan_pipe.cli.training import run_training, scored_rows, training_rows
from milan_pipe.errors import SettingError

_WORST = 8


@app.command()
def pretrain(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGETS...",
            default_factory=list,
            help="Folder or URL of the target store; several: see below.",
        ),
    ],
    run: RunArgument,
    params: ParamsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> Any:
    """Train the student on stored targets.

    On several devices or machines: torchrun --nproc-per-node 8 -m milan_pipe pretrain targets run. The batch and the
    learning rate are those of pretrain.batch_size, whatever the number of ranks.

    The same command goes on after an interruption, from the last checkpoint: they are written every
    pretrain.checkpoint_minutes or pretrain.checkpoint_every steps, on SIGTERM, Ctrl-C and when the terminal is closed.
    A run of another configuration is refused, with a list of what differs. So is a second process in the same RUN.

    Several stores of the same views, of one teacher each (extract-targets --views-from), are read side by side, and
    the student predicts all of them: pretrain targets-a targets-b run. See the settings `teachers`.

    Other objectives are recipes and settings: --params mr-mae, masking=random, decoder=plain, target=pixels. With
    pretrain.targets=online the teacher runs in every step, on the stored views: what stored targets are measured by.

    With pretrain.probe_every, .probe_train and .probe_test the student is judged by nearest neighbours while it learns;
    RUN/best has the best one.

    Example: milan-pipe pretrain targets run --set pretrain.epochs=20
    """
    if not targets:
        raise SettingError(f"expected TARGETS... RUN; found {as_typed(None, [run])}: name a folder for the run")
    settings = milan_pipe.load_params(params, overrides or ())
    return run_training(
        milan_pipe.pretrain,
        targets if len(targets) > 1 else targets[0],
        run,
        settings,
        title=f"{', '.join(targets)} -> {run}",
        rows=lambda report: scored_rows(report, {"knn": "k-NN"}) if report.scores else training_rows(report),
        as_json=as_json,
    )


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="RUN/not-finite/step-NNNNNNNN.safetensors.")],
    device: DeviceOption = "auto",
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--precision", help="Of the forward pass. Default: the run's."),
    ] = None,
    as_json: JsonOption = False,
) -> Any:
    """Compute the batch again that stopped a run.

    When a loss or a gradient is not finite, pretrain writes the batch and its weights to a file. This says which
    samples, stored values and gradients are not finite; another --precision shows whether that was the cause.

    Example: milan-pipe replay run/not-finite/step-00001234.safetensors --precision float32
    """
    with progress() as update:
        report = milan_pipe.replay(file, device=device, precision=precision, on_progress=update)
    worst = [f"{key}: {loss:.4g}" for key, loss in list(report.loss_by_key.items())[:_WORST]]
    broken = [f"{count} in {name}" for name, count in report.stored.items() if count]
    first = ", ".join(report.gradient[:_WORST]) + (" ..." if len(report.gradient) > _WORST else "")
    rows = {
        "step": f"{report.step}, epoch {report.epoch + 1}, {report.precision}",
        "loss": f"{report.loss:.6g}",
        "gradient": f"norm {report.grad_norm:.6g}" + (f"; not finite in {first}" if first else ""),
        "not finite": ", ".join(broken) or "nothing in the batch or the weights",
        "largest losses": ", ".join(worst),
    }
    return show(str(file), rows, report, as_json)
