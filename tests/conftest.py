"""Object stores for tests (a real S3 server in a process of its own, or a proxy that disturbs), and a small project."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import typer.main
from support import processes
from support.counts import Counted
from support.project import SETTINGS, Project
from support.s3 import Proxy, create_bucket, proxy_before, s3_server
from support.signals import default_signals

# Before torch is imported. Several workers with a thread for every core wait for each other most of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Commands are run in this process some hundred times, and do not change.
typer.main.get_command = functools.cache(typer.main.get_command)

_FOREIGN = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_SKIP_SIGNATURE", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3")


# Files that take longest begin first, so that the workers end at nearly the same time.
_LONGEST = (
    "extraction/test_killed.py",
    "storage/test_bucket_end_to_end.py",
    "pretraining/test_resume.py",
    "targets/test_store.py",
    "reports/test_report.py",
    "pretraining/test_ranks.py",
    "evaluation/test_finetune.py",
    "targets/test_convert.py",
    "extraction/test_cluster.py",
    "targets/test_verify.py",
    "targets/test_damage.py",
    "cli/test_cli.py",
    "evaluation/test_segment.py",
    "planning/test_plan.py",
    "loader/test_dataset.py",
    "docs/test_commands_run.py",
    "extraction/test_wild_images.py",
    "storage/test_locations.py",
    "extraction/test_many_processes.py",
    "storage/test_hub_end_to_end.py",
    "cli/test_doctor_and_demo.py",
    "teacher/test_timm_source.py",
    "cli/test_verify_and_convert.py",
    "images/test_prepare_tables.py",
    "extraction/test_views_from.py",
    "project/test_processes.py",
    "reports/test_inspect.py",
    "targets/test_untrusted_store.py",
    "loader/test_workers.py",
    "images/test_images.py",
    "storage/test_disturbed.py",
    "extraction/test_faults_of_sources.py",
    "training/test_distributed.py",
    "interop/test_push.py",
    "extraction/test_extraction_goes_on.py",
    "targets/test_two_at_once.py",
    "training/test_lock.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "counted" in getattr(item, "fixturenames", ()):
            item.add_marker("counted")
    place = {Path(__file__).parent / name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session", autouse=True)
def usual_signals() -> Iterator[None]:
    """Signals are not ignored, in this process and in those that it starts, however the tests were started."""
    with default_signals():
        yield


@pytest.fixture(scope="session", autouse=True)
def no_power_cut() -> Iterator[None]:
    """Nothing waits for the disk, which takes longer than all else that is written: the machine stays on.

    The order of flushes can still be watched, and a descriptor that is closed is still an error.
    """

    def not_flushed(handle: int) -> None:
        os.fstat(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", not_flushed)
        yield


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """What a test draws of torch does not depend on the tests before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """A test that fails does not disturb those after it."""
    with processes.none_left():
        yield


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Counted:
    """Notes that go to `--junitxml`, which `benchmarks.faults` makes a table of."""

    def note(fault: str, times: int, held: str) -> None:
        record_property("fault", f"{fault}|{times}|{held}")

    return note


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an S3 server that lives as long as the session."""
    pytest.importorskip("moto.server", reason="moto[s3,server] is not installed")
    pytest.importorskip("flask", reason="moto[s3,server] is not installed")
    with s3_server(tmp_path_factory.mktemp("s3") / "server.log") as endpoint:
        yield endpoint


@pytest.fixture
def aws_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Credentials that the server takes, none of this machine's own, and a scratch folder that goes with the test.

    Processes that a test starts have them too.
    """
    private = tmp_path_factory.mktemp("aws")
    for name in _FOREIGN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(private / "no-credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(private / "no-config"))
    monkeypatch.setenv("TMPDIR", str(private))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")


@pytest.fixture
def bucket(s3_endpoint: str, aws_environment: None, monkeypatch: pytest.MonkeyPatch) -> str:  # noqa: ARG001
    """URL of a new, empty bucket."""
    name = f"test-{uuid.uuid4().hex}"
    create_bucket(s3_endpoint, name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    return f"s3://{name}"


@pytest.fixture
def s3_proxy(s3_endpoint: str) -> Iterator[Proxy]:
    """A proxy before the S3 server, which counts; faults are set on it."""
    with proxy_before(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxied_bucket(bucket: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """As `bucket`, reached through `s3_proxy`."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy.endpoint)
    return bucket


@pytest.fixture
def flaky_bucket(proxied_bucket: str, s3_proxy: Proxy, short_pauses: None) -> str:  # noqa: ARG001
    """As `proxied_bucket`; every third request is answered 500."""
    s3_proxy.fail_every = 3
    return proxied_bucket


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests to an object store are repeated sooner."""
    from milan_pipe.storage import object_store

    pauses = {"init_backoff": timedelta(milliseconds=10), "max_backoff": timedelta(milliseconds=50), "base": 4}
    monkeypatch.setitem(object_store.RETRIES, "backoff", pauses)


@pytest.fixture
def short_patience(short_pauses: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    """And they are for half a second, not for twenty."""
    from milan_pipe.storage import object_store

    monkeypatch.setitem(object_store.RETRIES, "retry_timeout", timedelta(seconds=0.5))


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Scenes, targets, runs of every kind, results of probes; made once for all workers, and not to be changed."""
    from milan_pipe.config.params import load_params

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    root = folder / "project"
    found = Project(
        root,
        load_params(None, SETTINGS),
        (str(root / "images" / "train-*.tar"), str(root / "images" / "test-*.tar")),
        root / "targets",
        tuple(root / name for name in ("runs/milan", "runs/mae", "tuned/milan", "tuned/random", "segmented")),
    )
    with (folder / "project.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "whole").exists():
            shutil.rmtree(root, ignore_errors=True)
            _make(found)
            (root / "whole").touch()
    return found


def _make(project: Project) -> None:
    from milan_pipe import api
    from milan_pipe.config.params import load_params
    from milan_pipe.images.prepare import prepare

    params, images, targets = project.params, project.images, project.targets
    milan, mae, tuned, tuned_random, segmented = project.runs
    prepare("demo", project.root / "images", params.prepare, workers=1)
    api.extract_targets(images[0], targets, params)
    api.pretrain(targets, milan, params)
    api.pretrain(
        targets, mae, load_params(None, [*SETTINGS, "target=pixels", "decoder.kind=plain", "masking.kind=random"])
    )
    api.finetune(milan, *images, tuned, params)
    api.finetune("random", *images, tuned_random, params)
    api.segment(milan, *images, segmented, params)
    api.knn(milan, *images, params)
    api.knn("random", *images, params, keep=project.root / "bounds")
    api.knn("teacher", *images, params, keep=project.root / "bounds")
    api.linear_probe(mae, *images, params)
