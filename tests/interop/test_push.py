"""What is pushed to a hub (a real server on loopback) is there for timm, for commands and for readers of cards."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import DatasetCard, ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from support.hub import Hub, hub_of, use_hub
from support.messages import require_message
from support.project import Project
from support.s3 import free_port
from support.targets import header, write_store

from milan_pipe import api
from milan_pipe.config.student import StudentSettings
from milan_pipe.drawing.sheet import printable_lines
from milan_pipe.errors import DataError, MismatchError, MissingError, SettingError, StoreError
from milan_pipe.interop.card import Score, dataset_card, model_card, public, public_command
from milan_pipe.interop.timm_layout import load_student
from milan_pipe.storage import location_of
from milan_pipe.targets.store import TargetStoreWriter, open_targets
from milan_pipe.training.checkpoint import Checkpoint

MODEL, DATA = "org/student", "org/targets"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_of(tmp_path / "hub") as hub:
        use_hub(hub.endpoint, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


def features(model: torch.nn.Module) -> torch.Tensor:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.eval().forward_features(images)


def tree(folder: Path | str) -> dict[str, bytes]:
    location = location_of(folder)
    return {path: location.read(path) for path in location.sizes()}


def test_a_student_loads_by_its_name(hub: Hub, project: Project, tmp_path: Path) -> None:
    run, tuned = project.runs[0], project.runs[2]
    report = api.push(run, MODEL, license="apache-2.0", scores=[tuned])
    assert report.kind == "model"
    assert hub.content(MODEL).keys() == report.files.keys() == {"README.md", "config.json", "model.safetensors"}
    api.export(run, tmp_path / "here")
    here = timm.create_model(f"local-dir:{tmp_path / 'here'}", pretrained=True)
    there = timm.create_model(f"hf-hub:{MODEL}", pretrained=True)
    assert torch.equal(features(there), features(here))

    card = ModelCard.load(hub.content(MODEL)["README.md"])
    assert str(card) == report.card
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "timm")
    assert card.data.pipeline_tag == "image-feature-extraction"
    for expected in (
        f'timm.create_model("hf-hub:{MODEL}"',
        "# student\n",
        "- model: `demo`\n- source: `milan-pipe`\n- licence: `apache-2.0`",
        "milan-pipe pretrain targets milan --set student.width=32",
        "neighbours=[1, 5]",
        "| `finetune` | `train-*.tar → test-*.tar` |",
        "milan-pipe finetune milan",
        "  ratio: 0.75",
    ):
        assert expected in report.card
    # Where it lay on this machine is nobody's business.
    assert str(project.root) not in report.card

    # An export that a person has worked on goes as it is.
    (tmp_path / "here" / "README.md").write_text("---\nlicense: mit\n---\n\n# Ours\n\nhf-hub:ORG/NAME\n")
    api.push(tmp_path / "here", MODEL, revision="v2")
    assert hub.content(MODEL, "v2")["README.md"].read_text().endswith(f"# Ours\n\nhf-hub:{MODEL}\n")
    assert str(ModelCard.load(hub.content(MODEL)["README.md"])) == report.card


def test_a_classifier_names_the_teacher_of_its_student(hub: Hub, project: Project) -> None:
    report = api.push(project.runs[2] / "best", MODEL)
    assert timm.create_model(f"hf-hub:{MODEL}", pretrained=True).num_classes == 12
    assert ModelCard.load(hub.content(MODEL)["README.md"]).data.pipeline_tag == "image-classification"
    for expected in (
        "- licence: `apache-2.0`",
        "milan-pipe pretrain targets milan",
        "milan-pipe finetune milan",
        "top1",
    ):
        assert expected in report.card


@pytest.mark.parametrize("store_format", ["zarr", "webdataset"])
def test_a_store_is_read_where_it_was_pushed(hub: Hub, project: Project, tmp_path: Path, store_format: str) -> None:
    store, url = project.targets, f"hf://datasets/{DATA}"
    if store_format == "webdataset":
        api.convert_targets(project.targets, tmp_path / "tars", format="webdataset")
        store = tmp_path / "tars"
    # Of an earlier store, and not of this one.
    for stray in ("000007/view-0.tar", "shards/000007/zarr.json"):
        (hub.folder / "datasets" / DATA / stray).parent.mkdir(parents=True)
        (hub.folder / "datasets" / DATA / stray).write_bytes(b"\0")
    report = api.push(store, DATA)
    assert tree(url) == {**tree(store), "README.md": report.card.encode()}
    assert api.verify_targets(url).problems == ()
    card = DatasetCard.load(hub.content(f"datasets/{DATA}")["README.md"])
    assert card.data.size_categories == "n<1K"
    assert store_format in card.data.tags
    assert str(project.root) not in report.card
    assert f"milan-pipe pretrain {url} run" in report.card
    # The manifest, which says that it is whole, comes after all else.
    *_, before, last = (path for method, path in hub.requests if "/commit/" in path and method == "POST")
    assert before == last
    hub.forget()
    api.push(store, DATA)
    assert not [path for method, path in hub.requests if method == "PUT"]


def test_nothing_is_pushed_that_a_link_leads_to(hub: Hub, project: Project, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    api.export(project.runs[0], tmp_path / "here")
    for name in ("README.md", "config.json", "model.safetensors"):
        shutil.copytree(tmp_path / "here", tmp_path / name)
        (tmp_path / name / name).unlink()
        (tmp_path / name / name).symlink_to(secret)
        for dry_run in (True, False):
            with pytest.raises(DataError, match=rf"{name} is a link to {secret}, out of its folder; put a copy"):
                api.push(tmp_path / name, MODEL, dry_run=dry_run)
    shutil.copytree(project.targets, tmp_path / "t")
    (tmp_path / "t" / "shards" / "000000" / "id").symlink_to(secret)
    with pytest.raises(DataError, match=rf"id is a link to {secret}, out of its folder"):
        api.push(tmp_path / "t", DATA, license="mit")
    assert not hub.requests


def test_what_is_cut_is_not_pushed(hub: Hub, project: Project, tmp_path: Path) -> None:
    api.export(project.runs[0], tmp_path / "student")
    shutil.copytree(project.targets, tmp_path / "t")
    record = json.loads((tmp_path / "t" / "manifest" / "000001.json").read_text())
    cut = {
        tmp_path / "student": tmp_path / "student" / "model.safetensors",
        tmp_path / "t": tmp_path / "t" / "shards" / "000001" / min(record["files"]),
    }
    for folder, file in cut.items():
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(DataError, match=r"damaged|--redo 000001"):
            api.push(folder, MODEL if folder.name == "student" else DATA, license=None, dry_run=True)
    assert not hub.requests


def test_a_student_with_a_flipped_bit_is_neither_pushed_nor_loaded(hub: Hub, project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    weights = Path(api.export(project.runs[0], folder).weights)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    for use in (lambda: api.push(folder, MODEL), lambda: load_student(folder)):
        with pytest.raises(DataError, match=r"model\.safetensors does not fit its digest in config\.json"):
            use()
    assert not hub.requests
    # An owner who changed them says so.
    described = json.loads((folder / "config.json").read_text())
    del described["milan_pipe"]["weights_sha256"]
    (folder / "config.json").write_text(json.dumps(described))
    assert api.push(folder, MODEL, dry_run=True).commit is None
    for damaged in ("{", "[]", '{"milan_pipe": 3}', "[" * 100_000):
        (folder / "config.json").write_text(damaged)
        with pytest.raises(DataError, match=r"config\.json"):
            api.push(folder, MODEL, dry_run=True)


def test_private_and_dry(hub: Hub, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    dry = api.push(project.targets, DATA, dry_run=True)
    assert hub.requests == []
    assert (dry.commit, dry.url) == (None, f"{hub.endpoint}/datasets/{DATA}")
    api.push(project.targets, DATA, private=True)
    assert dry.files.keys() == hub.content(f"datasets/{DATA}").keys()
    assert api.verify_targets(f"hf://datasets/{DATA}").problems == ()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(StoreError, match="private"):
        api.verify_targets(f"hf://datasets/{DATA}")


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/home/me/a b.tar", "a b.tar"),
        ("/home/me/my data/run/", "run"),
        ("/data/x/run-{000..009}.tar", "run-{000..009}.tar"),
        ("/data/{a/x,b/y}-0.tar", "{a/x,b/y}-0.tar"),
        ("{/home/me/a,../b,c/d}.tar", "{a,b,c/d}.tar"),
        ("~/runs/a", "a"),
        ("~you/runs/it's", "it's"),
        ("../a/b", "b"),
        ("runs/../../me/b*", "b*"),
        ("a.b=/w/my m.pt", "a.b=my m.pt"),
        ("a.b=", "a.b="),
        ("a.b=[1, \"/w/m.pt\"]", "a.b=[1, \"m.pt\"]"),
        ("a.b={\"c\": \"~/m.pt\"}", "a.b={\"c\": \"m.pt\"}"),
        ("teacher.model=local-dir:/home/me/a clip", "teacher.model=local-dir:a clip"),
        ("teacher.model=timm:local-dir:~/clip/", "teacher.model=timm:local-dir:clip"),
        *((same, same) for same in (
            "s3://bucket/a/b.tar", "hf://datasets/o/n@refs/pr/1/a", "https://h/a/../b", "runs/a/b", "runs/a b/*.tar",
            "1e-3", "teacher.model=hf-hub:org/name", "a.b=1.50", "a.b=null", "--set", "/", "..", "x..y",
        )),
    ],
)  # fmt: skip
def test_paths_of_this_machine_are_left_out_of_commands(word: str, shown: str) -> None:
    """What is left is a command to paste, with the same words otherwise."""
    command = public_command(shlex.join(["milan-pipe", "knn", word, "b"]))
    assert shlex.split(command) == ["milan-pipe", "knn", shown, "b"]
    assert public_command("milan-pipe 'knn") == ""


def test_paths_of_this_machine_are_left_out_of_settings_and_data(tmp_path: Path) -> None:
    command = "milan-pipe finetune /home/me/run '/home/me/my data' ../me/val tuned"
    settings = {"weights": "/home/me/w.pt", "parts": [{"file": "~/me/a b"}, 1, None]}
    record = {"step": 1, "data": "/home/me/my data -> ../me/val", "command": command, "settings": settings}
    scores = [Score("knn", {"top1": 0.5}, "~/me/train -> /home/me/test", "milan-pipe knn /home/me/run ~/me/train test")]
    card = model_card(Checkpoint(path=tmp_path, record=record), StudentSettings(), 0, scores, None)
    assert not re.search(r"\bme\b", card)
    for expected in (
        "- data: `my data -> val`",
        "milan-pipe finetune run 'my data' val tuned",
        "weights: w.pt\nparts:\n- file: a b\n- 1\n- null",
        "| `knn` | `train → test` | `top1 0.5` |",
        "milan-pipe knn run train test",
    ):
        assert expected in card


ATTACK = (
    "\r\n---\n# Head\n\n```\n~~~\n<script>x</script> <img src=x onerror=x> ``x`` | --- | [x](javascript:x) ![x](x) "
    "**x** ORG/NAME http://x.y <http://x.y>\n\n- x\n\u2028\u202e\0: {a: !!x}"
)
PIECES = (
    "`",
    "```",
    "~~~",
    "\n",
    "\r",
    "---",
    "# ",
    "|",
    "\\",
    "<b>",
    "<!--",
    "[x](y)",
    "*",
    "_",
    "x",
    " ",
    "\u2028",
    "\0",
)


def card_of(text: str) -> str:
    """The card of a student whose checkpoint and results say a text wherever they may say what they like."""
    teacher = dict.fromkeys(("model", "pretrained", "source", "license", "weights_sha256"), text)
    views = {"count": text, "size": text}
    record = {
        "step": text, "epochs": text, "package_version": text, "data": text, "command": shlex.join(["a", text]),
        "settings": {text: [text], "target": "clip"}, "teacher": teacher,
        "configuration": {"targets": {"views": views}},
    }  # fmt: skip
    scores = [Score(text, {text: 0.5}, text, shlex.join(["b", text]))]
    return model_card(Checkpoint(path=Path("x"), record=record), StudentSettings(), 0, scores, text)


def structure(card: str) -> tuple[set[str], list[tuple[str, str]]]:
    """Names in a card's front matter, and the elements of its text with what they are."""
    loaded = ModelCard(card)
    elements = MarkdownIt("commonmark").enable("table").parse(loaded.text)
    parts = [part for one in elements for part in (one, *(one.children or ()))]
    names = set(loaded.data.to_dict()) - {"license"}
    return names, [(part.type, part.info) for part in parts if part.type != "code_inline" or part.content]


@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
@settings(max_examples=40, deadline=None)
@example(ATTACK)
@example("-->" * 5_000)
@example("\x85")
def test_what_a_checkpoint_says_is_no_markup_of_its_card(text: str) -> None:
    card = card_of(f"x{text}")
    assert structure(card) == structure(card_of("x"))
    assert ModelCard(card).data.license == f"x{text}"
    assert printable_lines(ModelCard(card).text) == ModelCard(card).text


def test_scores_and_settings_that_nobody_has_are_no_crash() -> None:
    record: dict[str, Any] = {"step": 1}
    many = {"top1": 0.5, "huge": 10**400, "yes": "no", "inf": float("inf")}
    checkpoint = Checkpoint(path=Path("x"), record=record)
    card = model_card(checkpoint, StudentSettings(), 0, [Score("knn", many, "d", "c")], None)
    assert "| `knn` | `d` | `top1 0.5, inf inf` |" in card
    assert public_command(shlex.join(["a", "b=" + "[" * 100_000])) == shlex.join(["a", "b=" + "[" * 100_000])
    deep = "[" * 600 + "]" * 600
    assert public_command(f"a b={deep}") == shlex.join(["a", f"b={deep}"])
    record["settings"] = {"a": json.loads(deep)}
    with pytest.raises(DataError, match="nested deeper"):
        model_card(checkpoint, StudentSettings(), 0, [], None)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "path", ["a/" * 300_000 + "b", "/" * 300_000 + "b", "/a" * 300_000 + "/b", "{}" * 10**5 + "/b"]
)
def test_a_long_path_takes_no_square_of_its_length(path: str) -> None:
    assert public(path) == ("b" if path[0] == "/" else path)


def test_what_a_store_says_is_no_markup_of_its_card(tmp_path: Path) -> None:
    def card(text: str, where: Path) -> str:
        said = dict.fromkeys(("model", "pretrained", "source", "license"), text)
        write_store(where, header(**said), [3])
        return dataset_card(open_targets(where), text)

    assert structure(card(ATTACK, tmp_path / "a")) == structure(card("x", tmp_path / "b"))


# --- one line for each mistake ------------------------------------------------------------------------------------


def incomplete(_: Hub, __: Project) -> None:
    TargetStoreWriter("begun", header())
    api.push("begun", DATA)


def cut(_: Hub, project: Project) -> None:
    shutil.copytree(project.targets, "cut")
    Path("cut/manifest.json").unlink()
    Path("cut/manifest/000001.json").unlink()
    with pytest.warns(RuntimeWarning):
        api.push("cut", DATA)


def other_token(_: Hub, project: Project) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_of_somebody")
        api.push(project.targets, DATA)


def no_token(_: Hub, project: Project) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_TOKEN")
        api.push(project.targets, DATA)


def nobody(hub: Hub, project: Project) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use_hub(f"http://127.0.0.1:{free_port()}", hub.folder, patch)
        patch.setenv("HF_TOKEN", "hf_x")
        api.push(project.targets, DATA)


def public_already(_: Hub, project: Project) -> None:
    api.push(project.runs[0], MODEL)
    api.push(project.runs[0], MODEL, private=True)


def failing(hub: Hub, project: Project) -> None:
    hub.behave(refuse={f"datasets/{DATA}": (500, "")})
    api.push(project.targets, DATA)


def without_card(_: Hub, project: Project) -> None:
    api.export(project.runs[0], "old")
    Path("old/README.md").unlink()
    api.push("old", MODEL)


def worked_on(_: Hub, project: Project) -> None:
    api.export(project.runs[0], "new")
    api.push("new", MODEL, license="mit")


MESSAGES: dict[str, tuple[Callable[[Hub, Project], object], type[Exception], str]] = {
    "no token": (no_token, MissingError,
                 "there is no token to push with; log in with `hf auth login`, or set HF_TOKEN"),
    "other token": (other_token, StoreError,
                    f"{DATA} cannot be pushed: http://... does not let this token write to org (403); use one that "
                    "may, or another name"),
    "nobody": (nobody, StoreError, f"{DATA} cannot be pushed: no good answer from http://...: ...refused"),
    "failing": (failing, StoreError, f"{DATA} cannot be pushed: http://... answered 500: ..."),
    "public already": (public_already, StoreError,
                       f"{MODEL} is there and is public; name another repository, or leave --private out"),
    "no organization": (lambda _, project: api.push(project.targets, "targets"), SettingError,
                        "'targets' is no name of a repository; expected ORG/NAME"),
    "odd name": (lambda _, project: api.push(project.targets, "org/a..b"), SettingError,
                 "'org/a..b' is no name of a repository: ..."),
    "nothing there": (lambda *_: api.push("gone", MODEL), MissingError,
                      "gone is not there; expected a run, a checkpoint, an exported student or a target store"),
    "other folder": (lambda _, project: api.push(project.root / "images", MODEL), DataError,
                     ".../images is a folder of images; expected a run or a checkpoint or an exported student or a "
                     "target store"),
    "URL": (lambda *_: api.push("s3://bucket/targets", DATA), SettingError,
            "s3://bucket/targets is a URL, and what is pushed is read from this machine; copy it to a folder first"),
    "begun": (incomplete, DataError, "begun has no committed shard; run extract-targets again to finish it"),
    "cut": (cut, DataError,
            "cut is not complete, 1 of its 2 shards are there; finish it with `milan-pipe extract-targets IMAGES cut`"),
    "segment": (lambda _, project: api.push(project.runs[4], MODEL), DataError,
                ".../segmented/... holds what `milan-pipe segment` trained; name one that `milan-pipe pretrain` wrote"),
    "scores of another": (lambda _, project: api.push(project.runs[1], MODEL, scores=[project.runs[2]]), MismatchError,
                          ".../tuned/milan did not begin with this student; name runs that did, or push without it"),
    "scores of a store": (lambda _, project: api.push(project.targets, DATA, scores=["x"]), SettingError,
                          ".../targets is a target store, which has no scores; leave --scores out"),
    "scores of a classifier": (lambda _, project: api.push(project.runs[2], MODEL, scores=["x"]), SettingError,
                               ".../step-... is fine-tuned, and no run begins with it; leave --scores out"),
    "no card": (without_card, DataError, "old has no README.md, which `milan-pipe export` writes; export it again"),
    "own card": (worked_on, SettingError,
                 "new has its card already: edit its README.md, and leave --license and --scores out"),
}  # fmt: skip


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case: str, hub: Hub, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    provoke, kind, expected = MESSAGES[case]
    require_message((lambda: provoke(hub, project), kind, expected))
