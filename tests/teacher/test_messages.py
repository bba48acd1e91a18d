"""What the errors of teachers say, word for word. Each case runs in a folder of its own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from support.hub import hub_of, use_hub
from support.messages import Case, require_message
from support.s3 import free_port
from torch import nn

from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.errors import DataError, MilanError, MismatchError, MissingError, SettingError, ShapeError
from milan_pipe.teacher.clip import load_teacher, require_sound
from milan_pipe.teacher.family import TowerSizes
from milan_pipe.teacher.normalization import normalization_of
from milan_pipe.teacher.source import DEMO_FOLDER, find_source
from milan_pipe.teacher.tower import choose_input_size, family_of

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
DEMO_CONFIG = json.loads((DEMO_FOLDER / CONFIG).read_text())["model_cfg"]


def load(model: str = "demo", **settings: Any) -> None:
    load_teacher(TeacherSettings(model=model, **settings))


def load_large(model: str, pretrained: str) -> None:
    """As `load`, of a model that would take seconds to fill with numbers."""
    with torch.device("meta"):
        load(model, pretrained=pretrained)


def described(folder: str, content: Any = DEMO_CONFIG, *, whole: bool = False) -> Path:
    """A folder with a model's description, which is `content` itself where it is the whole of it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content if whole else {"model_cfg": content})
    Path(folder, CONFIG).write_bytes(text.encode("latin-1"))
    return Path(folder)


def from_description(content: Any) -> Callable[[], None]:
    return lambda: load(f"local-dir:{described('m', content, whole=True)}", pretrained="random")


def from_weights(name: str, write: Callable[[Path], object]) -> Callable[[], None]:
    """Load the bundled model with a checkpoint that was written so."""

    def provoke() -> None:
        described("m")
        write(Path(name))
        load("local-dir:m", pretrained=name)

    return provoke


def from_hub(status: int = 0, code: str = "", repository: str = "org/m", has: str = "") -> Callable[[], None]:
    """Load from a hub, which has one repository with one file, and answers so."""

    def provoke() -> None:
        Path("hub/org/m").mkdir(parents=True)
        if has == CONFIG:
            described("hub/org/m")
        with hub_of(Path("hub")) as hub, pytest.MonkeyPatch.context() as patch:
            use_hub(hub.endpoint, Path("cache"), patch)
            if status:
                hub.behave(refuse={repository: (status, code)})
            load(f"hf-hub:{repository}")

    return provoke


def without_hub(load_one: Callable[[], None]) -> Callable[[], None]:
    def provoke() -> None:
        with pytest.MonkeyPatch.context() as patch:
            use_hub(f"http://127.0.0.1:{free_port()}", Path("cache"), patch)
            load_one()

    return provoke


def torchscript(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def beside(description: str) -> None:
    """Ask for the mean and std of a checkpoint that has this description beside it."""
    Path("model.safetensors").touch()
    Path(CONFIG).write_text(description)
    normalization_of("clip", find_source("ViT-L-14", "model.safetensors"), nn.Identity())


def sizes(
    image: tuple[int, int] = (224, 224), patch: tuple[int, int] = (14, 14), grid: tuple[int, int] = (16, 16)
) -> TowerSizes:
    return TowerSizes(image_size=image, patch_size=patch, grid=grid, width=32)


def tower(projection: bool = True, **changes: Any) -> None:
    kinds = {"image_size": 24, "patch_size": 8, "width": 16, "layers": 1, "heads": 2, "mlp_ratio": 1.0}
    found = VisionTransformer(**{**kinds, "output_dim": 8, **changes})
    if not projection:
        found.proj = None
    family_of(found, "thing")


EXPECTED = "expected safetensors, or tensors by name as torch.save writes them"
COPY = "The folder of a copy will do too: --set teacher.model=local-dir:PATH"
FROM_HUB = "teacher 'hf-hub:org/m' cannot be had: {}. " + COPY
DESCRIBES = (
    "teacher 'local-dir:m': m/open_clip_config.json does not describe a model ({}); expected model_cfg with embed_dim "
    "and vision_cfg, and three numbers each for mean and std where preprocess_cfg says them"
)
BUILD = "teacher 'local-dir:m' cannot be built ({}); check its description, or update open_clip_torch and timm"
USED = (
    "teacher '{}' cannot be used: {}; expected a ViT that pools by its CLS token, as ViT-B-16, ViT-L-14, EVA02-B-16 or "
    "timm:vit_small_patch14_dinov2, or by one attention query, as ViT-B-16-SigLIP"
)
SIDECAR = (
    "open_clip_config.json says no mean and std of its checkpoint model.safetensors, expected three numbers each under "
    "preprocess_cfg. Repair it, or move the checkpoint out of its folder"
)
NAMES = "expected `demo`, a model name of open_clip, timm:NAME, hf-hub:ORG/NAME or local-dir:PATH"
FAULTS = (
    "features that are not finite",
    "a token whose feature is all zeros",
    "attention that is not finite",
    "negative attention",
    "attention that is zero for every patch",
)


def described_badly(content: Any, kind: type[MilanError], expected: str) -> Case:
    return from_description(content), kind, expected


CASES: dict[str, Case] = {
    # --- names ----------------------------------------------------------------------------------------------------
    "unknown": (
        lambda: load("ViT-B-23", pretrained="openai"),
        SettingError,
        f"unknown teacher 'ViT-B-23', {NAMES}; nearest are ViT-B-32, ...",
    ),
    "unknown and like no other": (
        lambda: load("zzzz\u20ac", pretrained="x"),
        SettingError,
        f"unknown teacher 'zzzz\u20ac', {NAMES}",
    ),
    "almost the name of a hub": (
        lambda: load("hf_hub:org/name"),
        SettingError,
        f"unknown teacher 'hf_hub:org/name', {NAMES}",
    ),
    "hub without a name": (
        lambda: load("hf-hub:"),
        SettingError,
        "teacher.model 'hf-hub:' names nothing, expected hf-hub:ORG/NAME, local-dir:PATH or timm:NAME",
    ),
    "folder without a name": (
        lambda: load("local-dir:"),
        SettingError,
        "teacher.model 'local-dir:' names nothing, expected hf-hub:ORG/NAME, local-dir:PATH or timm:NAME",
    ),
    "three parts": (
        lambda: load("hf-hub:a/b/c"),
        SettingError,
        "'a/b/c' is no name of a repository, expected ORG/NAME: ...",
    ),
    "space": (
        lambda: load("hf-hub:org/na me"),
        SettingError,
        "'org/na me' is no name of a repository, expected ORG/NAME: ...",
    ),
    "no weights named": (
        lambda: load("EVA02-B-16"),
        SettingError,
        "teacher 'EVA02-B-16' needs `teacher.pretrained`: a known tag (merged2b_s8b_b131k), the path of a local "
        "checkpoint, or `random`",
    ),
    "unknown tag": (
        lambda: load("EVA02-B-16", pretrained="opnai"),
        MissingError,
        "teacher 'EVA02-B-16' has no pretrained tag 'opnai' and no such file is there; known tags are "
        "merged2b_s8b_b131k",
    ),
    "other weights for the bundled one": (
        lambda: load(pretrained="openai"),
        MissingError,
        "teacher 'demo' brings its own weights and has no tags, and there is no file 'openai'; leave "
        "teacher.pretrained out, or name a local checkpoint or `random`",
    ),
    # --- towers ---------------------------------------------------------------------------------------------------
    "no vision transformer": (
        lambda: load_large("RN50", "random"),
        SettingError,
        USED.format("RN50", "its image tower is a ModifiedResNet"),
    ),
    "another one of timm": (
        lambda: load_large("convnext_tiny", "random"),
        SettingError,
        USED.format("convnext_tiny", "its image tower is timm's ConvNeXt"),
    ),
    "timm's mean": (
        lambda: load_large("vit_medium_patch16_gap_256", "random"),
        SettingError,
        USED.format("vit_medium_patch16_gap_256", "its timm tower pools by avg"),
    ),
    "mean": (
        lambda: tower(pool_type="avg"),
        SettingError,
        USED.format("thing", "it pools by avg, so that the query of its CLS token was never trained"),
    ),
    "many queries": (
        lambda: tower(attentional_pool=True, attn_pooler_heads=4),
        SettingError,
        USED.format("thing", "it pools by attention of CoCa's kind, over many queries"),
    ),
    "no projection": (
        lambda: tower(projection=False),
        SettingError,
        USED.format("thing", "its image tower has no output projection"),
    ),
    "no blocks": (
        lambda: tower(layers=0),
        SettingError,
        USED.format("thing", "its image tower has no blocks"),
    ),
    "scaled cosine": (
        lambda: tower(scaled_cosine_attn=True),
        SettingError,
        USED.format("thing", "its blocks attend by scaled cosine"),
    ),
    # --- sizes ----------------------------------------------------------------------------------------------------
    "cut patches": (
        lambda: load(image_size=20),
        SettingError,
        "teacher.image_size is 20, expected a multiple of 8, the patch side of 'demo', as 16 or 24",
    ),
    "less than a patch": (
        lambda: choose_input_size(sizes(), "x", 10),
        SettingError,
        "teacher.image_size is 10, expected a multiple of 14, the patch side of 'x', as 14",
    ),
    "oblong input": (
        lambda: choose_input_size(sizes(image=(32, 24)), "x"),
        SettingError,
        "teacher 'x' reads 32 x 24 pixels, expected square ones",
    ),
    "oblong patches": (
        lambda: choose_input_size(sizes(patch=(8, 16)), "x"),
        SettingError,
        "teacher 'x' has patches of 8 x 16 pixels, expected square ones",
    ),
    "oblong grid": (
        lambda: choose_input_size(sizes(), "x", grid=(14, 7)),
        SettingError,
        "the student has 14 x 7 patches, teacher 'x' can only match a square grid; name its input with "
        "teacher.image_size",
    ),
    # --- checkpoints ----------------------------------------------------------------------------------------------
    "another model's": (
        from_weights("other.pt", lambda path: torch.save({"visual.conv1.weight": torch.zeros(4, 3, 2, 2)}, path)),
        MismatchError,
        "checkpoint other.pt does not fit the image tower of 'local-dir:m': it lacks ...; conv1.weight is "
        "(4, 3, 2, 2), expected (128, 3, 8, 8). Set teacher.model to the model that it was trained as",
    ),
    "list": (
        from_weights("list.pt", lambda path: torch.save([1, 2], path)),
        DataError,
        f"checkpoint list.pt holds a list, {EXPECTED}",
    ),
    "no tensors": (
        from_weights("none.pt", lambda path: torch.save({"a": 1}, path)),
        DataError,
        f"checkpoint none.pt holds no tensors; {EXPECTED}",
    ),
    "empty file": (
        from_weights("empty.pt", lambda path: path.touch()),
        DataError,
        f"checkpoint empty.pt cannot be read (EOFError): it is damaged; {EXPECTED}",
    ),
    "text": (
        from_weights("text.pt", lambda path: path.write_text("not a checkpoint")),
        DataError,
        f"checkpoint text.pt cannot be read (UnpicklingError): it is damaged; {EXPECTED}",
    ),
    "text as safetensors": (
        from_weights("text.safetensors", lambda path: path.write_text("not a checkpoint")),
        DataError,
        f"checkpoint text.safetensors cannot be read (SafetensorError): it is damaged; {EXPECTED}",
    ),
    "cut": (
        from_weights(
            "cut.safetensors",
            lambda path: path.write_bytes((DEMO_FOLDER / WEIGHTS).read_bytes()[:100_000]),
        ),
        DataError,
        f"checkpoint cut.safetensors cannot be read (SafetensorError): it is damaged; {EXPECTED}",
    ),
    "Python objects": (
        from_weights("trap.pt", lambda path: torch.save({"a": torch.zeros(1), "extra": Path("x")}, path)),
        DataError,
        "checkpoint trap.pt holds Python objects beside its tensors (pathlib.PosixPath), which are never unpickled "
        f"here; {EXPECTED}. If you trust its author, load it with torch.load yourself and save the state dict alone",
    ),
    "TorchScript": (
        from_weights("ViT-B-16.pt", torchscript),
        DataError,
        f"checkpoint ViT-B-16.pt is a TorchScript program, {EXPECTED}; for OpenAI's weights set teacher.pretrained to "
        "openai",
    ),
    "no such description beside it": (lambda: beside("{}"), DataError, SIDECAR),
    "damaged description beside it": (lambda: beside("{"), DataError, SIDECAR),
    # --- model hubs -----------------------------------------------------------------------------------------------
    "gated": (
        from_hub(403, "GatedRepo"),
        MissingError,
        FROM_HUB.format(
            "repository org/m is gated: accept its terms at http://127.0.0.1:.../org/m and log in with "
            "`hf auth login`, or set HF_TOKEN"
        ),
    ),
    "gated and logged out": (
        from_hub(401, "GatedRepo"),
        MissingError,
        FROM_HUB.format("repository org/m is gated: ..."),
    ),
    "no such repository": (
        from_hub(404, "RepoNotFound"),
        MissingError,
        FROM_HUB.format(
            "http://127.0.0.1:... has no repository org/m, or keeps it private: check the name, or log in with "
            "`hf auth login`, or set HF_TOKEN"
        ),
    ),
    "private": (
        from_hub(401, "RepoNotFound"),
        MissingError,
        FROM_HUB.format("http://127.0.0.1:... has no repository org/m, or keeps it private: ..."),
    ),
    "refused": (
        from_hub(401),
        MissingError,
        FROM_HUB.format(
            "http://127.0.0.1:... refuses access to repository org/m (401): log in with `hf auth login`, or set "
            "HF_TOKEN"
        ),
    ),
    "forbidden": (
        from_hub(403),
        MissingError,
        FROM_HUB.format("http://127.0.0.1:... refuses access to repository org/m (403): ..."),
    ),
    "another 404": (
        from_hub(404),
        MissingError,
        FROM_HUB.format("http://127.0.0.1:... has no open_clip_config.json of a repository org/m"),
    ),
    "another status": (
        from_hub(410),
        MissingError,
        FROM_HUB.format(
            "open_clip_config.json of repository org/m cannot be fetched from http://127.0.0.1:...: ...410..."
        ),
    ),
    "repository without a description": (
        from_hub(),
        MissingError,
        FROM_HUB.format("repository org/m on http://127.0.0.1:... has no open_clip_config.json"),
    ),
    "repository without weights": (
        from_hub(has=CONFIG),
        MissingError,
        FROM_HUB.format(
            "repository org/m on http://127.0.0.1:... has no open_clip_model.safetensors or open_clip_pytorch_model.bin"
        ),
    ),
    "repository on no hub": (
        without_hub(lambda: load("hf-hub:org/m")),
        MissingError,
        FROM_HUB.format(
            "open_clip_config.json of repository org/m cannot be fetched from http://127.0.0.1:...: ...refused"
        ),
    ),
    "tag on no hub": (
        without_hub(lambda: load_large("ViT-B-32", "laion2b_s34b_b79k")),
        MissingError,
        "weights 'laion2b_s34b_b79k' of teacher 'ViT-B-32' cannot be had (...refused). Connect to the model hub once, "
        "or name a local checkpoint with --set teacher.pretrained=PATH",
    ),
    # --- folders --------------------------------------------------------------------------------------------------
    "no such folder": (
        lambda: load("local-dir:none"),
        MissingError,
        "teacher 'local-dir:none': none is no folder; name it with --set teacher.model=local-dir:PATH",
    ),
    "folder without a description": (
        lambda: (Path("m").mkdir(), load("local-dir:m")),
        MissingError,
        "teacher 'local-dir:m': m has no open_clip_config.json, open_clip's description of a model",
    ),
    "folder without weights": (
        lambda: (described("m"), load("local-dir:m")),
        MissingError,
        "teacher 'local-dir:m': m has no weights (.safetensors, .bin or .pth); name them with "
        "--set teacher.pretrained=PATH",
    ),
    "folder with cut weights": (
        lambda: (described("m"), Path("m", WEIGHTS).write_bytes(b"cut"), load("local-dir:m")),
        DataError,
        f"checkpoint m/{WEIGHTS} cannot be read (SafetensorError): it is damaged; {EXPECTED}",
    ),
    "folder with other weights": (
        lambda: (described("m"), save_file({"visual.a": torch.zeros(1)}, f"m/{WEIGHTS}"), load("local-dir:m")),
        MismatchError,
        f"checkpoint m/{WEIGHTS} does not fit the image tower of 'local-dir:m': it lacks ...; it also has a. ...",
    ),
    "tag of a folder": (
        lambda: (described("m"), load("local-dir:m", pretrained="openai")),
        MissingError,
        "teacher 'local-dir:m' brings its own weights and has no tags, and there is no file 'openai'; leave "
        "teacher.pretrained out, or name a local checkpoint or `random`",
    ),
    # --- descriptions ---------------------------------------------------------------------------------------------
    "cut description": described_badly("{", DataError, DESCRIBES.format("Expecting ...")),
    "description in no encoding": described_badly("\xff", DataError, DESCRIBES.format("'utf-8' codec ...")),
    "endless description": described_badly("[" * 100_000, DataError, DESCRIBES.format("...")),
    "list as description": described_badly([], DataError, DESCRIBES.format("list ...")),
    "empty description": described_badly({}, DataError, DESCRIBES.format("no 'model_cfg'")),
    "number as model": described_badly({"model_cfg": 3}, DataError, DESCRIBES.format("...")),
    "no width": described_badly({"model_cfg": {"vision_cfg": {}}}, DataError, DESCRIBES.format("no 'embed_dim'")),
    "text as tower": described_badly(
        {"model_cfg": {"embed_dim": 8, "vision_cfg": "ViT"}},
        DataError,
        DESCRIBES.format("embed_dim or vision_cfg of another kind"),
    ),
    "one mean": described_badly(
        {"model_cfg": {"embed_dim": 8, "vision_cfg": {}}, "preprocess_cfg": {"mean": [0.5]}},
        DataError,
        DESCRIBES.format("mean or std of another kind"),
    ),
    "misspelt": described_badly(
        {"model_cfg": {"embed_dim": 8, "vision_cfg": {"widht": 8}}},
        DataError,
        BUILD.format("TypeError: ...'widht'"),
    ),
    "none of timm": described_badly(
        {"model_cfg": {"embed_dim": 8, "vision_cfg": {"timm_model_name": "vit_none"}}},
        DataError,
        BUILD.format("RuntimeError: ...vit_none..."),
    ),
    # --- pixels and output ----------------------------------------------------------------------------------------
    "pixels of another kind": (
        lambda: load_teacher(TeacherSettings())(torch.zeros(2, 8, 8, 3)),
        ShapeError,
        "expected (B, H, W, 3) uint8 pixels, found (2, 8, 8, 3) torch.float32",
    ),
    **{
        fault: (
            lambda row=row: require_sound(torch.eye(5, dtype=torch.bool)[[row]], ["view 1 of a"]),  # type: ignore[misc]
            DataError,
            f"view 1 of a: the teacher gave {fault}; check its checkpoint, or set teacher.precision to float32",
        )
        for row, fault in enumerate(FAULTS)
    },
}


@pytest.mark.parametrize("case", CASES)
def test_messages(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_message(CASES[case])
