"""Both stages against an object store, by the command line: killed, failing, damaged, and the same bytes in the end."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import torch
from support import processes
from support.s3 import Proxy, free_port
from support.targets import tree
from support.wild import Command, encoded, scene

from milan_pipe.api import extract_targets
from milan_pipe.config.images import PrepareSettings
from milan_pipe.config.params import load_params
from milan_pipe.images.index import read_index
from milan_pipe.images.prepare import prepare
from milan_pipe.storage import location_of

SETTINGS = {
    "views.count": 2,
    "extract.batch_size": 8,
    "extract.threads": 1,
    "extract.teacher_threads": 1,
    "extract.device": "cpu",
}
STUDENT = {
    "student.width": 32,
    "student.depth": 1,
    "decoder.depth": 1,
    "pretrain.epochs": 2,
    "pretrain.batch_size": 8,
    "pretrain.log_every": 1,
    "pretrain.device": "cpu",
}
SHARDS, SAMPLES = 4, 24
FORMATS = ("zarr", "webdataset")
# Of many small objects, for which each request takes its time.
SLOW_ZARR = (pytest.param("zarr", marks=pytest.mark.slow), "webdataset")


def words(settings: dict[str, object]) -> list[str]:
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # As the processes that are started: the teacher's last bit depends on it.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, and their targets in both formats."""
    root = tmp_path_factory.mktemp("local")
    sizes = PrepareSettings(train_scenes=SAMPLES, test_scenes=0, samples_per_shard=SAMPLES // SHARDS)
    prepare("demo", root / "images", sizes, workers=1)
    threads = torch.get_num_threads()
    for store_format in FORMATS:
        settings = [f"{name}={value}" for name, value in (SETTINGS | {"extract.format": store_format}).items()]
        extract_targets(root / "images", root / store_format, load_params(None, settings))
    torch.set_num_threads(threads)
    return root


@pytest.fixture
def milan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """`milan-pipe` in this process, in an empty folder."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return Command(capsys, monkeypatch)


def upload(folder: Path, where: str) -> str:
    location = location_of(where)
    for path, data in tree(folder).items():
        location.write(path, data)
    return where


def nothing_left(where: str) -> None:
    """Neither in the bucket, unfinished names and parts included, nor in the folder for temporary files."""
    location = location_of(where)
    paths = [entry["path"] for batch in obstore.list(location._root) for entry in batch]
    assert sorted(paths) == sorted(location.sizes())
    assert sorted(Path(tempfile.gettempdir()).iterdir()) == []


def losses(run: Path) -> str:
    text = (run / "metrics" / "plots" / "metrics" / "train" / "loss.tsv").read_text()
    assert len(text.splitlines()) == 1 + 2 * (SAMPLES // 8)
    return text


def weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("checkpoints/*/*.safetensors")}


def begin(*arguments: object) -> subprocess.Popen[str]:
    return processes.Popen(
        [sys.executable, "-m", "milan_pipe", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended_well(process: subprocess.Popen[str]) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def until(condition: object, process: subprocess.Popen[str]) -> None:
    """Wait until a condition holds or the process ends."""
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None:  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.001)


# --- killed -------------------------------------------------------------------------------------------------------


def kill_and_go_on(local: Path, bucket: str, proxy: Proxy, store_format: str, kills: int, seed: int) -> None:
    images, targets = upload(local / "images", f"{bucket}/images"), f"{bucket}/targets"
    expected = tree(local / store_format)
    command = ("extract-targets", images, targets, "--format", store_format, *words(SETTINGS))
    rng = np.random.default_rng(seed)
    for _ in range(kills):
        left = len(expected) - len(location_of(targets).sizes())
        # Seven objects, say, are there before the first shard is committed, or between two commits.
        stop = proxy.count("PUT") + int(rng.integers(1, max(2, left // 2)))
        process = begin(*command)
        until(lambda stop=stop: proxy.count("PUT") >= stop, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
        assert "manifest.json" not in location_of(targets).sizes()
    ended_well(begin(*command))
    assert tree(targets) == expected
    nothing_left(bucket)


@pytest.mark.ci
def test_killed_while_it_writes_to_a_bucket(local: Path, proxied_bucket: str, s3_proxy: Proxy) -> None:
    kill_and_go_on(local, proxied_bucket, s3_proxy, "zarr", 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("store_format", FORMATS)
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_many_times(local: Path, proxied_bucket: str, s3_proxy: Proxy, store_format: str, seed: int) -> None:
    kill_and_go_on(local, proxied_bucket, s3_proxy, store_format, 3, seed)


@pytest.mark.slow
@pytest.mark.parametrize("store_format", FORMATS)
def test_processes_that_share_a_bucket(local: Path, bucket: str, store_format: str) -> None:
    images = upload(local / "images", f"{bucket}/images")
    command = ("extract-targets", images, f"{bucket}/targets", "--format", store_format, *words(SETTINGS))
    both = [begin(*command, "--shards", share) for share in ("0/2", "1/2")]
    for process in both:
        ended_well(process)
    # The last one may have ended before the other's last shard was there.
    ended_well(begin(*command))
    assert tree(f"{bucket}/targets") == tree(local / store_format)
    nothing_left(bucket)


# --- the whole way ------------------------------------------------------------------------------------------------


@pytest.mark.ci
@pytest.mark.parametrize("store_format", FORMATS)
def test_from_images_in_a_bucket_to_a_student(
    local: Path, bucket: str, milan: Command, tmp_path: Path, store_format: str
) -> None:
    images, targets = upload(local / "images", f"{bucket}/images"), f"{bucket}/targets"
    extract = ("extract-targets", images, targets, "--format", store_format, *words(SETTINGS))
    first = milan(*extract, "--shards", "0/2", "--json")
    assert (first.code, first.report["complete"], first.report["shards"]) == (0, False, 2)
    # Everything up to here was another's: the rest is done on the disk's own copy of the same images.
    second = milan("extract-targets", local / "images", *extract[2:], "--shards", "1/2", "--json")
    assert (second.code, second.report["complete"], second.report["skipped"]) == (0, True, 2)
    assert second.report["bytes"] == sum(location_of(targets).sizes().values())
    expected = tree(local / store_format)
    assert tree(targets) == expected
    assert milan("verify-targets", targets, "--against-teacher", 1, *words(SETTINGS)).code == 0

    for where, run in ((local / store_format, "local"), (targets, "remote")):
        done = milan("pretrain", where, tmp_path / run, *words(SETTINGS | STUDENT))
        assert done.code == 0, done.err
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert weights(tmp_path / "remote") == weights(tmp_path / "local") != {}

    # A byte of one object, a part of another, and a third one that is gone.
    location = location_of(targets)
    paths = {
        shard: max(name for name in expected if name.startswith(f"shards/{shard}/")) for shard in ("000001", "000002")
    }
    spoilt = bytearray(expected[paths["000001"]])
    spoilt[len(spoilt) // 2] ^= 1
    location.write(paths["000001"], bytes(spoilt))
    location.write(paths["000002"], expected[paths["000002"]][:-9])
    gone = min(name for name in expected if name.startswith("shards/000003/"))
    location.remove(gone)
    done = milan("verify-targets", targets, "--json")
    assert done.code == 1
    assert [found["shard"] for found in done.report["problems"]] == ["000001", "000002", "000003"]
    assert [
        name.removeprefix("shards/").partition("/")[2] in found["what"]
        for name, found in zip((*paths.values(), gone), done.report["problems"], strict=True)
    ] == [True] * 3
    repair = done.report["problems"][0]["repair"]
    assert repair == f"milan-pipe extract-targets IMAGES {targets} --redo 000001"
    refused = milan("pretrain", targets, tmp_path / "refused", *words(SETTINGS | STUDENT))
    assert "--redo 00000" in refused.error
    repaired = milan(*extract, "--redo", "000001,000002,000003", "--json")
    assert (repaired.code, repaired.report["skipped"]) == (0, 1)
    assert tree(targets) == expected
    assert milan("verify-targets", targets).code == 0

    other = FORMATS[1 - FORMATS.index(store_format)]
    assert milan("convert-targets", targets, f"{bucket}/other", "--format", other).code == 0
    assert tree(f"{bucket}/other") == tree(local / other)
    seen = milan("extract-targets", "--views-from", f"{bucket}/other", f"{bucket}/seen", *extract[3:])
    assert seen.code == 0, seen.err
    assert tree(f"{bucket}/seen") == expected
    nothing_left(bucket)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("store_format", SLOW_ZARR)
def test_requests(
    local: Path, proxied_bucket: str, s3_proxy: Proxy, milan: Command, tmp_path: Path, store_format: str
) -> None:
    images = upload(local / "images", f"{proxied_bucket}/images")
    counts = {}

    def counted(name: str, *command: object) -> None:
        s3_proxy.requests.clear()
        done = milan(*command)
        assert done.code == 0, done.err
        methods = [request.method for request in s3_proxy.requests]
        counts[name] = {method: methods.count(method) for method in sorted(set(methods))}

    targets = f"{proxied_bucket}/{store_format}"
    extract = ("extract-targets", images, targets, "--format", store_format, *words(SETTINGS))
    files = len(tree(local / store_format))
    counted("extract", *extract)
    assert counts["extract"]["PUT"] == files
    # Of a shard: its images' size and bytes, then a look for strays; of the store: header, records, its size.
    assert sum(counts["extract"].values()) - files < 6 * SHARDS + 20
    counted("again", *extract)
    assert "PUT" not in counts["again"] or counts["again"]["PUT"] <= 2
    # Of a shard: its record at the beginning and at the end, and which files it has.
    assert sum(counts["again"].values()) < SHARDS * 3 + 15
    counted("verify", "verify-targets", targets)
    assert counts["verify"].keys() == {"GET", "HEAD"}
    counted("pretrain", "pretrain", targets, tmp_path / store_format, *words(SETTINGS | STUDENT))
    assert sum(counts["pretrain"].values()) < 2 * 2 * 20 * SHARDS


# --- stores that fail ---------------------------------------------------------------------------------------------


def test_every_third_request_fails(
    local: Path, flaky_bucket: str, s3_proxy: Proxy, milan: Command, tmp_path: Path
) -> None:
    images, targets = upload(local / "images", f"{flaky_bucket}/images"), f"{flaky_bucket}/targets"
    extract = ("extract-targets", images, targets, "--format", "webdataset", *words(SETTINGS))
    done = milan(*extract)
    assert done.code == 0, done.err
    assert milan("verify-targets", targets).code == 0
    assert milan("pretrain", targets, tmp_path / "remote", *words(SETTINGS | STUDENT)).code == 0
    assert milan(*extract, "--redo", "000002").code == 0
    assert sum(request.status == 500 for request in s3_proxy.requests) > 30
    s3_proxy.fail_every = 0
    assert tree(targets) == tree(local / "webdataset")
    assert milan("pretrain", local / "webdataset", tmp_path / "local", *words(SETTINGS | STUDENT)).code == 0
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    nothing_left(flaky_bucket)


@pytest.mark.usefixtures("short_patience")
def test_a_store_that_is_lost_in_mid_run(
    local: Path,
    proxied_bucket: str,
    s3_proxy: Proxy,
    milan: Command,
) -> None:
    targets = f"{proxied_bucket}/targets"
    extract = ("extract-targets", local / "images", targets, *words(SETTINGS))
    files = len(tree(local / "zarr"))
    over = threading.Event()

    def lose() -> None:
        while s3_proxy.count("PUT") < files // 2 and not over.is_set():
            over.wait(0.001)
        s3_proxy.fail_every = 1

    thread = threading.Thread(target=lose)
    thread.start()
    lost = milan(*extract)
    over.set()
    thread.join()
    assert "answered 500" in lost.error
    assert "of 4 shards are whole; the same command goes on from there" in lost.error
    s3_proxy.fail_every = 0
    committed = {path for path in location_of(targets).sizes() if path.startswith("manifest/")}
    done = milan(*extract, "--json")
    assert (done.code, done.report["skipped"]) == (0, len(committed))
    assert len(committed) < SHARDS
    assert tree(targets) == tree(local / "zarr")
    nothing_left(proxied_bucket)


@pytest.mark.usefixtures("short_patience")
def test_nobody_at_the_endpoint(
    local: Path,
    bucket: str,
    milan: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for command in (
        ("extract-targets", f"{bucket}/images", tmp_path / "t", *words(SETTINGS)),
        ("extract-targets", local / "images", f"{bucket}/t", *words(SETTINGS)),
        ("verify-targets", f"{bucket}/t"),
        ("convert-targets", local / "zarr", f"{bucket}/t", "--format", "webdataset"),
        ("pretrain", f"{bucket}/t", tmp_path / "run", *words(STUDENT)),
    ):
        message = milan(*command).error
        assert bucket in message
        assert f"no answer from {endpoint}: " in message, message
        assert len(message) < 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cwd"]
    assert list(Path(os.environ["TMPDIR"]).iterdir()) == []


def test_a_bucket_that_is_not_there(local: Path, bucket: str, milan: Command) -> None:
    message = milan("extract-targets", local / "images", f"{bucket}-not/t", *words(SETTINGS)).error
    assert f"there is no bucket {bucket.removeprefix('s3://')}-not; make it, or correct its name" in message
    message = milan("extract-targets", f"{bucket}/nothing", f"{bucket}/t", *words(SETTINGS)).error
    assert f"{bucket}/nothing is not there" in message
    upload(local / "images", f"{bucket}/images")
    message = milan("extract-targets", local / "images", f"{bucket}/images", *words(SETTINGS)).error
    assert "is not a target store and not empty (it holds index.json)" in message


# --- web servers, and what stays on a disk ------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    """Silent about readers that hang up before a file's end, as those do that wanted a part of it."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def plain_server(folder: Path, certificate: Path | None = None) -> Iterator[str]:
    """The standard library's server of a folder, which sends files as a whole only."""
    server = _Server(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def own_certificate(folder: Path) -> tuple[Path, Path]:
    """Files of an issuer that nobody knows, and of key and certificate that it gave to 127.0.0.1."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def signed(name: str, key: Any, issuer: str, issuer_key: Any, extension: Any) -> Any:
        now = datetime.now(UTC)
        subject, by = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in (name, issuer))
        builder = x509.CertificateBuilder(by, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        return builder.add_extension(extension, critical=False).sign(issuer_key, hashes.SHA256())

    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = signed("root", root_key, "root", root_key, x509.BasicConstraints(ca=True, path_length=None))
    host = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    leaf = signed("leaf", key, "root", root_key, host)
    pem = serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "root.pem").write_bytes(root.public_bytes(pem))
    (folder / "leaf.pem").write_bytes(key.private_bytes(pem, *plain) + leaf.public_bytes(pem))
    return folder / "root.pem", folder / "leaf.pem"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.mark.parametrize("store_format", SLOW_ZARR)
def test_a_web_server_is_read_and_not_written_to(
    local: Path, bucket: str, s3_proxy: Proxy, milan: Command, tmp_path: Path, store_format: str
) -> None:
    s3_proxy.sign = True
    web = f"{s3_proxy.endpoint}/{bucket.removeprefix('s3://')}"
    upload(local / "images", f"{bucket}/images")
    shards = f"{web}/images/train-{{000000..{SHARDS - 1:06d}}}.tar"
    message = milan("extract-targets", f"{web}/images", tmp_path / "t", *words(SETTINGS)).error
    assert "name its shards one by one or by braces" in message
    assert milan("extract-targets", shards, tmp_path / "t", *words(SETTINGS)).code == 0
    assert tree(tmp_path / "t") == tree(local / "zarr")
    targets = f"{web}/{store_format}"
    upload(local / store_format, f"{bucket}/{store_format}")
    assert milan("verify-targets", targets).code == 0
    for where, run in ((local / store_format, "local"), (targets, "remote")):
        done = milan("pretrain", where, tmp_path / store_format / run, *words(SETTINGS | STUDENT))
        assert done.code == 0, done.err
    assert losses(tmp_path / store_format / "remote") == losses(tmp_path / store_format / "local")
    for command in (
        ("extract-targets", local / "images", f"{web}/new", *words(SETTINGS)),
        ("extract-targets", local / "images", f"{web}/{store_format}", *words(SETTINGS)),
        ("convert-targets", local / "zarr", f"{web}/new", "--format", "webdataset"),
    ):
        message = milan(*command).error
        assert "can only be read; write to a local folder, s3://" in message
    assert {request.method for request in s3_proxy.requests} == {"GET", "HEAD"}
    location = location_of(f"{bucket}/{store_format}")
    location.remove(max(path for path in location.sizes() if path.startswith("shards/000002/")))
    done = milan("verify-targets", targets, "--json")
    assert (done.code, {found["shard"] for found in done.report["problems"]}) == (1, {"000002"})
    assert list(Path.cwd().iterdir()) == []
    assert list(Path(os.environ["TMPDIR"]).iterdir()) == []


def test_a_web_server_that_sends_whole_files_only(local: Path, milan: Command, tmp_path: Path) -> None:
    with plain_server(local / "images") as web:
        message = milan("extract-targets", f"{web}/train-000000.tar", tmp_path / "t", *words(SETTINGS)).error
    assert "its server does not send parts of files; copy it to a disk" in message


@pytest.mark.usefixtures("short_patience")
def test_https_with_an_issuer_of_ones_own(
    local: Path,
    milan: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, leaf = own_certificate(tmp_path)
    with plain_server(local / "zarr", leaf) as web:
        message = milan("verify-targets", web).error
        assert "its certificate is not accepted (UnknownIssuer); set SSL_CERT_FILE" in message
        monkeypatch.setenv("SSL_CERT_FILE", str(root))
        assert location_of(web).read("shards/zarr.json") == (local / "zarr" / "shards" / "zarr.json").read_bytes()
        assert location_of(web).present(["header.json", "manifest.json"]).keys() == {"manifest.json"}


def test_what_is_written_to_a_disk_only(local: Path, milan: Command, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(scene()))
    for source in ("demo", tmp_path / "in"):
        message = milan("prepare", source, "s3://bucket/images").error
        assert "s3://bucket/images is a URL, and shards are written to a local folder only" in message
    message = milan("pretrain", local / "zarr", "s3://bucket/run", *words(STUDENT)).error
    assert "s3://bucket/run is a URL, and checkpoints and metrics are written to a local folder only" in message
    message = milan("extract-targets", local / "images", Path("s3://bucket/t"), *words(SETTINGS)).error
    assert "has lost a slash of its URL" in message
    assert "s3://bucket/t" in message
    assert list(Path.cwd().iterdir()) == []
    assert read_index(local / "images").source == {"kind": "demo", "seed": 0}
