"""What the errors of pretraining say, word for word. Each case runs in a folder of its own, on four images."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.messages import Case, require_message
from support.targets import header, random_blocks, write_blocks

from milan_pipe.config.params import Params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, MaskSettings, StudentSettings
from milan_pipe.errors import DataError, MismatchError, MissingError, SettingError, StoppedError
from milan_pipe.pretraining import run
from milan_pipe.pretraining.bad_batch import replay
from milan_pipe.pretraining.objective import require_fit
from milan_pipe.targets.several import open_several
from milan_pipe.training.distributed import Ranks
from milan_pipe.training.recorder import TrainProgress

HEAD = header(views=1)
STUDENT = StudentSettings(image_size=16, patch_size=8, width=16, depth=1, heads=2)
FILE = "run/not-finite/step-00000001.safetensors"


def store(scale: float = 1.0) -> str:
    """Four samples, whose features are `scale` times what they were."""
    blocks = random_blocks(HEAD, 4, keys=["a", "b", "c", "d"])
    assert blocks[0].scale_KNS is not None
    blocks[0].scale_KNS[:] *= scale
    write_blocks("t", HEAD, [blocks])
    return "t"


def params(sections: dict[str, Any], **recipe: Any) -> Params:
    defaults = {"epochs": 2, "batch_size": 4, "warmup_epochs": 0, "log_every": 1, "device": "cpu", "threads": 1}
    fixed = {"student": STUDENT, "decoder": DecoderSettings(width=16, depth=1, heads=2)}
    return Params(**{**fixed, **sections, "pretrain": PretrainSettings(**{**defaults, **recipe})})


def train(
    source: str, on_progress: Callable[[TrainProgress], None] = lambda _: None, *, target: str = "clip", **recipe: Any
) -> None:
    run.pretrain(source, "run", params({"target": target}, **recipe), on_progress=on_progress)


def other_settings() -> None:
    stated = {"teacher": {"model": "ViT-B-16"}, "views": {"count": 3}}
    run.pretrain(store(), "run", params(stated))


def too_many_parts() -> None:
    ranks = Ranks(0, 4, torch.device("cpu"))
    run.PretrainTask(Path("run"), open_several([store()]), params({}, batch_size=7, accumulate=2), ranks, None)


def canonical_streams() -> None:
    ranks, reader, too_few = Ranks(0, 4, torch.device("cpu")), open_several([store()]), params({}, canonical_streams=3)
    with warnings.catch_warnings(action="error"):
        run.PretrainTask(Path("run"), reader, too_few, ranks, None)


def stop(_now: TrainProgress) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def other_order() -> None:
    """Go on with a run that another version began."""
    true = run.configuration_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "configuration_of", lambda *given: {**true(*given), "order": 1})
        with pytest.raises(StoppedError):
            train(store(), stop, epochs=3)
    train("t", epochs=3)


def replay_of(write: Callable[[Path], object]) -> None:
    write(Path("x"))
    replay("x")


def batch_of_version(version: str) -> Callable[[Path], object]:
    return lambda path: save_file({"a": torch.ones(1)}, path, {"milan_pipe": json.dumps({"version": version})})


EXPECTED = "expected a file that a run wrote under RUN/not-finite"
ADVICE = "lower pretrain.lr, or check the targets"
REPLAY = "computes the batch again, with the weights that met it"
CASES: dict[str, Case] = {
    # --- what does not fit ------------------------------------------------------------------------------------------
    "views of another size": (
        lambda: require_fit(HEAD, STUDENT.model_copy(update={"image_size": 32}), "t"),
        MismatchError,
        "t has views of 16 pixels, the student reads 32; set student.image_size=16, or extract with "
        "student.image_size=32",
    ),
    "another grid": (
        lambda: require_fit(HEAD, STUDENT.model_copy(update={"patch_size": 4}), "t"),
        MismatchError,
        "t has a grid of 2 x 2 patches (teacher 'demo' at 16 pixels), the student has 4 x 4; change "
        "student.patch_size, or extract with another teacher.image_size",
    ),
    "other settings than the store's": (
        other_settings,
        MismatchError,
        "t does not fit the settings: teacher.model: store has 'demo', the settings say 'ViT-B-16'; views.count: store "
        "has 1, the settings say 3. Change the settings, or extract the targets that they describe",
    ),
    "no loss scale": (
        lambda: train(store(), parallel="fsdp", precision="float16"),
        SettingError,
        "pretrain.parallel='fsdp' has no loss scale for precision 'float16'; use bfloat16",
    ),
    "parts without a sample": (
        too_many_parts,
        SettingError,
        "pretrain.batch_size is 7: 4 ranks with pretrain.accumulate=2 need at least 8",
    ),
    "ranks that read what others use": (
        canonical_streams,
        RuntimeWarning,
        "pretrain.canonical_streams is 3 for 4 ranks: some read what others use; set it to a multiple of 4 for a new "
        "run",
    ),
    "no teacher online": (
        lambda: train(store(), targets="online"),
        SettingError,
        "pretrain.targets is 'online' with target 'clip'; it needs one of features, as 'clip', one store as it is, "
        "and, from Python, teacher_for",
    ),
    "pixels online": (
        lambda: train(store(), targets="online", target="pixels"),
        SettingError,
        "pretrain.targets is 'online' with target 'pixels'; it needs one of features, as 'clip', one store as it is, "
        "and, from Python, teacher_for",
    ),
    "no such target": (
        lambda: train(store(), target="hogs"),
        SettingError,
        "target: there is no objective 'hogs'; known are clip, pixels, hog, clip-visible, clip-visible+pixels, "
        "clip-masked",
    ),
    "a decoder that has nothing to predict": (
        lambda: train(store(), target="clip-visible"),
        SettingError,
        "decoder 'prompting' has nothing to predict in this target; set decoder=none",
    ),
    "no decoder for masked tokens": (
        lambda: run.pretrain(store(), "run", params({"decoder": DecoderSettings(kind="none")})),
        SettingError,
        "decoder 'none' predicts visible tokens alone, and the target has others; name a decoder",
    ),
    "nothing masked": (
        lambda: run.pretrain(store(), "run", params({"target": "pixels", "masking": MaskSettings(ratio=0)})),
        SettingError,
        "target 'pixels' predicts masked patches, and masking.ratio is 0; raise it, or take a target of visible tokens",
    ),
    # --- a run that ends early --------------------------------------------------------------------------------------
    "loss not finite": (
        lambda: train(store(float("inf"))),
        DataError,
        f"the loss is nan at step 1 (batch of 4: ... ... ...); {ADVICE}. No checkpoint was written. `milan-pipe replay "
        f"{FILE}` {REPLAY}",
    ),
    "loss not finite later on": (
        lambda: train(store(), lr=1e38, checkpoint_every=1),
        DataError,
        f"the loss is nan at step 2 (batch of 4: ... ... ...); {ADVICE}. The last good checkpoint is "
        f"run/checkpoints/step-00000001. `milan-pipe replay {FILE.replace('1', '2')}` {REPLAY}",
    ),
    "stopped": (
        lambda: train(store(), stop, epochs=3),
        StoppedError,
        "by SIGTERM after step 1 of 3; run/checkpoints/step-00000001 was written, and the same command goes on from it",
    ),
    "another order of samples": (
        other_order,
        MismatchError,
        "run was begun by another version of milan-pipe, which takes samples in another order (version 1, here 2); "
        "train in another folder. step-00000001 can still be evaluated and exported",
    ),
    # --- a batch to compute again -----------------------------------------------------------------------------------
    "no batch": (lambda: replay("x"), MissingError, f"x is not there; {EXPECTED}"),
    "no batch but a folder": (lambda: replay_of(Path.mkdir), MissingError, f"x is not there; {EXPECTED}"),
    "empty file": (
        lambda: replay_of(Path.touch),
        DataError,
        f"x is damaged (...); {EXPECTED}",
    ),
    "other weights": (
        lambda: replay_of(lambda path: save_file({"a": torch.ones(1)}, path)),
        DataError,
        f"x holds no batch of a run; {EXPECTED}",
    ),
    "batch of another version": (
        lambda: replay_of(batch_of_version("99")),
        DataError,
        "x has version 99, this milan-pipe reads 1",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_messages(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_message(CASES[case])
