"""inspect-targets and inspect-student: what is drawn is what is stored and predicted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import png, write_tar
from support.project import Project
from support.targets import header, write_store

from milan_pipe import api, cli
from milan_pipe.config.params import load_params
from milan_pipe.config.student import MaskSettings
from milan_pipe.drawing.sheet import Panel, Row, Sheet, draw_sheet, mask_sheet
from milan_pipe.errors import StoreError
from milan_pipe.loader.dataset import open_targets
from milan_pipe.loader.stream import read_batch
from milan_pipe.reports.gallery import write_gallery
from milan_pipe.reports.inspect_student import pretrained_objective
from milan_pipe.reports.report import write_report
from milan_pipe.reports.samples import choose_samples
from milan_pipe.training.checkpoint import open_checkpoint


@pytest.mark.parametrize("store_format", ["zarr", "webdataset"])
def test_samples_are_spread_and_found_by_key(tmp_path: Path, store_format: str) -> None:
    written = write_store(tmp_path / "t", header(format=store_format, shards=3), [5, 1, 140])
    store = open_targets(tmp_path / "t")
    every = [(shard, row) for shard, n in enumerate((5, 1, 140)) for row in range(n)]
    assert [store.location(s) for s in choose_samples(store, (), 1000)] == every
    assert [store.location(s) for s in choose_samples(store, (), 2)] == [(2, 30), (2, 103)]
    blocks = [block for blocks in written.values() for block in blocks]
    keys = [key for block in blocks for key in block.keys]
    assert [store[s].key for s in choose_samples(store, (), 1000)] == keys
    wanted = [keys[140], keys[2], keys[5]]
    assert [store.location(s) for s in choose_samples(store, wanted, 1)] == [(2, 134), (0, 2), (1, 0)]
    view = store[keys[140], 1]
    row = 134 - 128
    assert view.crop == tuple(blocks[3].crop_KN4[1, row])
    assert np.array_equal(view.attention_L, blocks[3].attention_KNL[1, row].astype(np.float32))


@pytest.mark.parametrize(("grid", "size"), [((2, 3), 24), ((3, 2), 16), ((7, 7), 224), ((5, 4), 33)])
def test_any_grid_and_size_is_drawn(tmp_path: Path, grid: tuple[int, int], size: int) -> None:
    write_store(tmp_path / "t", header(size=size, views=3, grid=grid, image_size=size), [4])
    report = api.inspect_targets(tmp_path / "t", tmp_path / "o", load_params(None, ["masking.ratio=0.5"]), count=2)
    assert (report.views, len(report.images)) == (3, 2)
    assert [Path(name).name for name in report.images] == [f"dir%2Fk%C3%A9y-0-{row}.png" for row in (1, 3)]
    for image in report.images:
        Image.open(image).verify()
    page = Path(report.page).read_text(encoding="utf-8")
    assert page.count("<figure>") == 2 * 4 * 3
    assert page.count('src="data:image/') == 2 * 4 * 3
    assert "dir/kéy-0-1" in page


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    """OUT may be the folder of the photographs, whose keys are their names."""
    params, out = load_params(None, ["masking.ratio=0.5"]), tmp_path / "o"
    write_store(tmp_path / "t", header(), [4])
    first, second = api.inspect_targets(tmp_path / "t", out, params, count=2).images
    pages = {path: path.read_bytes() for path in out.iterdir()}
    api.inspect_targets(tmp_path / "t", out, params, count=2)
    assert {path: path.read_bytes() for path in out.iterdir()} == pages
    # As after a kill before the page.
    (out / "index.html").unlink()
    Path(first).unlink()
    api.inspect_targets(tmp_path / "t", out, params, count=2)
    assert {path: path.read_bytes() for path in out.iterdir()} == pages
    for theirs in (Path(second), out / "index.html"):
        theirs.write_text("<!doctype html>\n<title>mine</title>" * 20)
        before = {path: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(StoreError, match=f"{re.escape(str(theirs))} is there, and does not say that milan-pipe"):
            api.inspect_targets(tmp_path / "t", out, params, count=2)
        assert {path: path.read_bytes() for path in out.iterdir()} == before
        theirs.write_bytes(pages[theirs])
    with pytest.raises(StoreError, match=r"is there, and does not say that milan-pipe"):
        write_report([tmp_path / "run"], tmp_path / "t" / "bad_samples.jsonl")


@pytest.mark.parametrize("key", ["../../x", "..", "", "\0", "\ud800", "/etc/x", "a\\b", "<b>", "x" * 5000, "é" * 200])
def test_every_key_is_the_name_of_one_file_in_the_folder(tmp_path: Path, key: str) -> None:
    panel = Panel(np.zeros((1, 1, 3), np.uint8), key)
    _, (image,) = write_gallery(tmp_path / "o", key, {}, [Sheet(key, [Row(key, [panel])])])
    assert {path.name for path in tmp_path.rglob("*")} == {"o", "index.html", Path(image).name}
    assert Path(image).parent == tmp_path / "o"


def test_keys_that_do_not_print_are_shown_escaped(project: Project, tmp_path: Path) -> None:
    strange = {
        "two\nlines": r"two\nlines",
        "esc\x1b[31m\r": r"esc\x1b[31m\r",
        "csi\x9b2J": r"csi\x9b2J",
        "left\u202egnp": r"left\u202egnp",
        "long" * 3000: "long" * 3000,
        "<b>&": "&lt;b&gt;&amp;",
    }
    pixels = png(np.random.default_rng(0).integers(0, 256, (70, 80, 3), np.uint8))
    shard = write_tar(tmp_path / "images" / "a.tar", {f"{key}.png": pixels for key in strange})
    api.extract_targets(shard, tmp_path / "t", project.params)
    drawn = [
        api.inspect_targets(tmp_path / "t", tmp_path / "o", project.params, count=len(strange)),
        api.inspect_student(project.runs[0], tmp_path / "t", tmp_path / "s", count=len(strange)),
    ]
    for report in drawn:
        assert report.keys == tuple(strange)
        page = Path(report.page).read_text(encoding="utf-8")
        assert all(f"<h3>{shown}</h3>" in page for shown in strange.values())
        for image in report.images:
            Image.open(image).verify()
    page = api.report(project.runs[:1], tmp_path / "r.html", targets=tmp_path / "t").page
    assert r"csi\x9b2J</h3>" in Path(page).read_text(encoding="utf-8")
    pixels_NHWC, visible_NL = np.zeros((6, 8, 8, 3), np.uint8), np.ones((6, 4), np.bool_)
    draw_sheet(mask_sheet("title", tuple(strange), pixels_NHWC, visible_NL, np.ones((6, 4)), (2, 2)))


def test_masks_drawn_are_those_of_a_run(project: Project, tmp_path: Path) -> None:
    pages = {}
    for name, settings, epoch in (("a", [], 0), ("b", [], 0), ("c", [], 1), ("d", ["masking.seed=1"], 0)):
        params = load_params(None, settings)
        pages[name] = Path(
            api.inspect_targets(project.targets, tmp_path / "o", params, count=1, epoch=epoch).page
        ).read_bytes()
    assert pages["a"] == pages["b"]
    assert len(set(pages.values())) == 3


def test_predictions_drawn_are_those_of_the_student(project: Project, tmp_path: Path) -> None:
    store = open_targets(project.targets)
    sample = choose_samples(store, (), 1)[0]
    report = api.inspect_student(
        project.runs[0], project.targets, tmp_path / "o", keys=[store[sample].key], view=1, epoch=3
    )
    checkpoint = open_checkpoint(project.runs[0])
    objective, _ = pretrained_objective(checkpoint, store.header, torch.device("cpu"))
    split, cosine = objective.cosine(read_batch(store.store, store.block(sample, 1)), 3)
    assert report.step == checkpoint.record["step"] == 6
    assert report.cosine[0] == pytest.approx(float(cosine.mean()), abs=1e-6)
    assert report.masked_cosine[0] == pytest.approx(float(cosine.gather(1, split.masked_BM).mean()), abs=1e-6)
    assert objective.masking == MaskSettings()
    assert Path(report.page).read_text().count("<figure>") == 6


def test_a_student_of_pixels_takes_views_of_any_teacher(project: Project, tmp_path: Path) -> None:
    write_store(tmp_path / "t", header(size=64, grid=(8, 8), width=128), [3])
    assert api.inspect_student(project.runs[1], tmp_path / "t", tmp_path / "o", count=1).images


def test_the_commands(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = open_targets(project.targets)
    key = targets[choose_samples(targets, (), 1)[0]].key
    cli.inspect_targets(str(project.targets), str(tmp_path / "a"), keys=f"{key},", as_json=True)
    assert json.loads(capsys.readouterr().out)["keys"] == [key]
    cli.inspect_student(str(project.runs[0]), str(project.targets), str(tmp_path / "b"), count=3, as_json=True)
    assert len(json.loads(capsys.readouterr().out)["masked_cosine"]) == 3
