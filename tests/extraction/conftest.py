"""Twenty-four scenes in three shards, their targets from one unbroken run, and helpers to compare whole folders."""

from __future__ import annotations

import pytest
from support import processes
from support.extraction import every_file

from milan_pipe.config.extraction import ExtractSettings
from milan_pipe.config.images import PrepareSettings, ViewSettings
from milan_pipe.config.params import Params
from milan_pipe.config.student import StudentSettings
from milan_pipe.config.targets import CodecSettings
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.extraction.run import extract_targets
from milan_pipe.images.prepare import prepare

VIEWS = ViewSettings(count=2, seed=5)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "images"
    prepare("demo", folder, PrepareSettings(train_scenes=24, test_scenes=0, samples_per_shard=10), workers=1)
    return folder


@pytest.fixture(scope="session")
def extract():
    """`extract_targets` with this folder's settings; keywords replace them."""

    def run(images, targets, *, codec="int8", views=VIEWS, view_size=64, teacher=None, **changes):
        arguments = ("on_progress", "shards", "redo", "verify_sources", "views_from")
        more = {name: changes.pop(name) for name in arguments if name in changes}
        settings = ExtractSettings(**{"batch_size": 8, "threads": 2, "teacher_threads": 1, "device": "cpu", **changes})
        with processes.forked_workers():
            return extract_targets(
                images,
                targets,
                Params(
                    teacher=teacher or TeacherSettings(),
                    views=views,
                    # As many patches as the teacher has, whatever the size.
                    student=StudentSettings(image_size=view_size, patch_size=view_size // 8),
                    codec=CodecSettings(name=codec),
                    extract=settings,
                ),
                **more,
            )

    return run


@pytest.fixture(scope="session")
def tree():
    """Path and bytes of every file below a folder."""
    return every_file


@pytest.fixture(scope="session")
def whole(images, extract, tmp_path_factory):
    """The store of an unbroken run."""
    targets = tmp_path_factory.mktemp("whole") / "targets"
    return targets, extract(images, targets)
