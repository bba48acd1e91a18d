"""A small CLIP trained on captioned shards: words, the loss over captions, and a folder that is a teacher."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.images import png, write_tar

from milan_pipe.config.teacher import ClipSettings, TeacherSettings
from milan_pipe.errors import DataError, MismatchError, SettingError, StoreError
from milan_pipe.images.index import ImageIndex, ShardRecord, write_index
from milan_pipe.teacher.clip import load_teacher
from milan_pipe.teacher.clip_model import Words, contrastive_loss, peak_loss, word_loss
from milan_pipe.teacher.clip_training import train_clip

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}
SMALL = ClipSettings(
    image_size=16, patch_size=4, width=32, layers=2, head_width=16, embed_dim=16, text_width=32, text_layers=1,
    context_length=8, batch_size=24, steps=40, lr=3e-3, warmup_steps=5, evaluate_every=20, shift=1,
)  # fmt: skip


def shards(folder: Path, count: int, *, captions: bool = True, index: bool = True) -> Path:
    """Cards of three colours, noisy; captions name the colour, and some more."""
    members: dict[str, bytes] = {}
    rng = np.random.default_rng(0)
    for number in range(count):
        label, key = number % 3, f"card-{number:03d}"
        name, rgb = list(COLOURS.items())[label]
        members[f"{key}.png"] = png(np.clip(np.array(rgb) + rng.normal(0, 25, (20, 16, 3)), 0, 255).astype(np.uint8))
        members[f"{key}.cls"] = str(label).encode()
        if captions:
            members[f"{key}.txt"] = f"a {name} card\nA card, {name}!\n".encode()
    folder.mkdir()
    write_tar(folder / "train-000000.tar", members)
    if index:
        record = ShardRecord(name="train-000000.tar", split="train", samples=count, bytes=1, sha256="")
        write_index(folder, ImageIndex(source={"kind": "test"}, classes=tuple(COLOURS), shards=(record,)))
    return folder


def test_ids_close_pad_and_are_cut() -> None:
    words = Words.of(["A red car.", "a red, red boat"], most=4, context=4)
    assert words.words == ("a", "boat", "car", "red")
    ids = words(["a red car", "boat", "", "a unknown red car boat"])
    end = len(words) - 1
    assert ids.tolist() == [[1, 4, 3, end], [2, end, 0, 0], [end, 0, 0, 0], [1, 4, 3, end]]
    # open_clip's text tower pools at the highest id.
    assert ids.argmax(dim=1).tolist() == [3, 1, 0, 3]


def test_the_most_frequent_words_are_known() -> None:
    assert Words.of(["b b b a a c", "d"], most=2, context=4).words == ("a", "b")


def test_loss_by_hand() -> None:
    eye, scale = torch.eye(2), torch.tensor(2.0)
    alone = contrastive_loss(3 * eye, 5 * eye, scale, torch.eye(2, dtype=torch.bool))
    assert alone.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)
    # Both captions true of both images: half of the target lies on the cosine of 0.
    shared = contrastive_loss(eye, eye, scale, torch.ones(2, 2, dtype=torch.bool))
    assert shared.item() == pytest.approx(math.log(math.exp(2) + 1) - 1, abs=1e-6)


def test_loss_is_symmetric_in_image_and_text() -> None:
    torch.manual_seed(0)
    image, text = torch.randn(4, 6), torch.randn(4, 6)
    match = torch.eye(4, dtype=torch.bool)
    match[0, 2] = True
    one = contrastive_loss(image, text, torch.tensor(3.0), match)
    assert one.item() == pytest.approx(contrastive_loss(text, image, torch.tensor(3.0), match.T).item(), abs=1e-6)
    assert one.item() != pytest.approx(contrastive_loss(image, text, torch.tensor(3.0), match.T).item(), abs=1e-4)


def test_word_loss_asks_for_one_patch_alone() -> None:
    eye, scale, bias = torch.eye(3), torch.tensor(50.0), torch.tensor(-30.0)
    has = torch.tensor([[True, False, False]])
    one = torch.stack([eye[0], *[eye[2]] * 7])[None]  # one of eight patches shows word 0, no one word 1
    words = eye[:2]
    assert word_loss(one, words, scale, bias, has[:, :2]) < 0.01
    assert word_loss(one, words, scale, bias, ~has[:, :2]) > 10
    assert word_loss(eye[2:].expand(1, 8, 3), words, scale, bias, has[:, :2]) > 10


def test_word_loss_does_not_depend_on_the_number_of_patches() -> None:
    torch.manual_seed(0)
    patches, words, has = torch.randn(2, 4, 8), torch.randn(3, 8), torch.rand(2, 3) < 0.5
    given = words, torch.tensor(9.0), torch.tensor(-1.0), has
    torch.testing.assert_close(word_loss(patches, *given), word_loss(patches.repeat(1, 5, 1), *given))


def test_peak_loss_by_hand() -> None:
    share = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    assert peak_loss(share, 2.0).item() == pytest.approx((4 * 0.7 - 2) ** 2 / 8)
    assert peak_loss(share, 3.0).item() == 0


def test_it_learns_from_captions_and_the_folder_is_a_teacher(tmp_path: Path) -> None:
    images, reports = shards(tmp_path / "images", 96), []
    report = train_clip(images, tmp_path / "clip", SMALL, val=images, on_progress=reports.append)
    # Labels are told by captions that training never saw: chance is 1/3.
    assert report.zero_shot is not None
    assert report.zero_shot > 0.9
    assert (report.images, report.captions, report.words) == (96, 6, 5)
    assert [one.step for one in reports if one.step] == list(range(1, 41))
    assert [one.zero_shot is None for one in reports if one.step] == [True] * 19 + [False] * 21
    teacher = load_teacher(TeacherSettings(model=f"local-dir:{tmp_path / 'clip'}"))
    assert teacher.info.grid == (4, 4)
    assert teacher.info.width == 16
    output = teacher(torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8))
    assert output.features_BST.shape == (2, 17, 16)
    described = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())
    assert "patch_dropout" not in described["model_cfg"]["vision_cfg"]
    assert (tmp_path / "clip" / "words.txt").read_text().split() == ["a", "blue", "card", "green", "red"]


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    images = shards(tmp_path / "images", 48)
    settings = SMALL.model_copy(update={"steps": 3})
    for name in ("one", "other"):
        torch.rand(7)  # what was drawn before does not count
        train_clip(images, tmp_path / name, settings)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "other"))
    assert first == second
    assert sorted(first) == ["open_clip_config.json", "open_clip_model.safetensors", "words.txt"]


def test_an_image_whose_words_are_all_unknown_is_no_trouble(tmp_path: Path) -> None:
    images = shards(tmp_path / "images", 48)
    # "a" and "card" are the most frequent words, and the last image has neither.
    members = {"odd.png": png(np.zeros((16, 16, 3), np.uint8)), "odd.txt": b"strange"}
    write_tar(images / "train-000001.tar", members)
    settings = SMALL.model_copy(update={"steps": 3, "vocabulary": 2, "batch_size": 49})
    assert train_clip(str(images / "train-*.tar"), tmp_path / "clip", settings).words == 2


def test_what_it_cannot_learn_from(tmp_path: Path) -> None:
    silent = shards(tmp_path / "silent", 48, captions=False)
    with pytest.raises(DataError, match="no caption"):
        train_clip(silent, tmp_path / "clip", SMALL)
    wordless = tmp_path / "wordless"
    wordless.mkdir()
    blank = png(np.zeros((16, 16, 3), np.uint8))
    members = {f"{number}.{end}": data for number in range(24) for end, data in (("png", blank), ("txt", b"!!!"))}
    write_tar(wordless / "train-000000.tar", members)
    with pytest.raises(DataError, match="no words"):
        train_clip(wordless, tmp_path / "clip", SMALL)
    few = shards(tmp_path / "few", 9)
    with pytest.raises(SettingError, match=r"clip\.batch_size"):
        train_clip(few, tmp_path / "clip", SMALL)
    nameless = shards(tmp_path / "nameless", 48, index=False)
    with pytest.raises(MismatchError, match="named classes"):
        train_clip(nameless, tmp_path / "clip", SMALL, val=nameless)
    with pytest.raises(SettingError, match="URL"):
        train_clip(few, "s3://bucket/clip", SMALL)
    assert not (tmp_path / "clip").exists()


def test_images_that_cannot_be_read_are_counted_and_too_many_stop_it(tmp_path: Path) -> None:
    images = shards(tmp_path / "images", 48)
    write_tar(images / "train-000001.tar", {"cut.png": b"\x89PNG", "cut.txt": b"a card"})
    few = SMALL.model_copy(update={"steps": 1})
    report = train_clip(str(images / "train-*.tar"), tmp_path / "clip", few)
    assert (report.images, report.bad) == (48, 1)
    none = few.model_copy(update={"max_bad_fraction": 0.0})
    with pytest.raises(DataError, match=r"1 of 49 .*'cut'.*clip\.max_bad_fraction"):
        train_clip(str(images / "train-*.tar"), tmp_path / "other", none)


def test_val_needs_labels_alone(tmp_path: Path) -> None:
    images, val = shards(tmp_path / "images", 48), shards(tmp_path / "val", 9, captions=False)
    few = SMALL.model_copy(update={"steps": 1})
    assert train_clip(images, tmp_path / "clip", few, val=val).zero_shot is not None


def test_captions_that_read_alike_are_one(tmp_path: Path) -> None:
    images = shards(tmp_path / "images", 48)
    # "a" and "card" are known: all captions of three colours are "a card" then.
    few = SMALL.model_copy(update={"steps": 1, "vocabulary": 2})
    assert train_clip(images, tmp_path / "clip", few).captions == 1


def test_a_model_is_not_overwritten(tmp_path: Path) -> None:
    images, few = shards(tmp_path / "images", 48), SMALL.model_copy(update={"steps": 1})
    train_clip(images, tmp_path / "clip", few)
    with pytest.raises(DataError, match="has a model already"):
        train_clip(images, tmp_path / "clip", few)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file/clip cannot be made"):
        train_clip(images, tmp_path / "file" / "clip", few)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 7}, "patch_size 7 must divide image_size"),
        ({"text_width": 100}, "head_width 32 must divide text_width 100"),
        ({"prompts": ["a {}", "it"]}, "prompt 'it' has no {}"),
        ({"layers": 1}, "layers"),
    ],
)
def test_settings_that_make_no_model(change: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        ClipSettings.parse(change, "clip")
