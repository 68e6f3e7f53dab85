"""A real S3 server on loopback, and a proxy before it that breaks what it is told to break.

The server is versitygw on its posix backend.
"""

from __future__ import annotations

import functools
import http.client
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.golang import installed

VERSION = "v1.8.0"
MODULE = f"github.com/versity/versitygw/cmd/versitygw@{VERSION}"
ACCESS, SECRET = "tester", "tester-secret-key-never-shown"
BODILESS = {"HEAD"}


@functools.cache
def build_server() -> Path | str:
    """The server's program; a reason in words where it cannot be had."""
    return installed(f"versitygw-{VERSION}", MODULE)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds the server before the first test that wants it, outside of any test's time limit."""
    if not session.config.option.collectonly and any(
        {"s3_server", "any_store"} & set(item.fixturenames) for item in session.items
    ):
        build_server()


@dataclass
class Server:
    """A running server: its address, and the folder in which each bucket is a folder."""

    endpoint: str
    root: Path

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def places(self, name: str) -> list[Path]:
        """The folders that hold a bucket: its objects and, where the file system needs that, their metadata."""
        return [base / name for base in (self.root, self.root.with_name("metadata")) if base.is_dir()]

    def copy(self, name: str, to: Path) -> None:
        """Copies a bucket as it is on the disk to a folder, extended attributes included."""
        for place in self.places(name):
            while True:
                try:
                    shutil.copytree(place, to / place.parent.name, symlinks=True)
                    break
                except (shutil.Error, FileNotFoundError):  # something was deleted meanwhile
                    shutil.rmtree(to / place.parent.name, ignore_errors=True)

    def restore(self, state: Path, name: str) -> None:
        """Puts such a copy in the place of a bucket."""
        for place in self.places(name):
            shutil.copytree(state / place.parent.name, place, symlinks=True, dirs_exist_ok=True)


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """versitygw with an empty store below `folder`; skips the test where it cannot be had."""
    program = build_server()
    if isinstance(program, str):
        pytest.skip(program)
    root, port = folder / "root", free_port()
    root.mkdir()
    environment = {"ROOT_ACCESS_KEY": ACCESS, "ROOT_SECRET_KEY": SECRET, "PATH": os.environ["PATH"]}
    command = [program, "--port", f"127.0.0.1:{port}", "--keep-alive", "--quiet", "posix", *_metadata(root), root]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for(port, process)
        yield Server(f"http://127.0.0.1:{port}", root)
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory) -> Iterator[Server]:
    """A server for all tests of the session."""
    with running_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_environment(monkeypatch, tmp_path) -> None:
    """Credentials of the server in the AWS variables, and nothing else of AWS."""
    set_environment(monkeypatch, tmp_path)


def set_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same for longer than a test."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def bucket(s3_server, s3_environment) -> str:
    """A new bucket's name."""
    return new_bucket(s3_server)


def new_bucket(server: Server) -> str:
    """Makes a bucket; returns its name."""
    name = f"bucket-{secrets.token_hex(6)}"
    from common.storage.s3 import make_client

    make_client(server.endpoint).create_bucket(Bucket=name)
    return name


@pytest.fixture
def proxy(s3_server) -> Iterator[Proxy]:
    """A proxy before the server that does no harm until it is told to."""
    with Proxy(s3_server.port) as running:
        yield running


@pytest.fixture
def impatient(monkeypatch) -> None:
    """Backoff without waiting."""
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture(params=["folder", "s3"])
def any_store(request, tmp_path):
    """An empty store, once a folder and once a bucket on a server."""
    from common.storage import open_store

    if request.param == "folder":
        return open_store(tmp_path / "store")
    server = request.getfixturevalue("s3_server")
    return open_store(f"s3://{request.getfixturevalue('bucket')}/some/prefix", endpoint_url=server.endpoint)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB; yields its folder and a function that mounts it otherwise (read-only by default)."""
    with mounted(tmp_path / "small", "size=1m") as folder:
        mount = ("mount", "-o")
        yield folder, lambda options="ro": subprocess.run([*mount, f"remount,{options}", folder], check=True)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory at a new folder, while the block runs; skips the test where that is not allowed."""
    folder.mkdir()
    mount = shutil.which("mount")
    if not mount or os.geteuid() or subprocess.run([mount, "-t", "tmpfs", "-o", options, "none", folder]).returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Returns when the port answers."""
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert process.poll() is None, "the server ended"
            time.sleep(0.05)
    raise AssertionError("the server does not answer")


def _metadata(root: Path) -> list[str | Path]:
    """Where the file system has no extended attributes, they go to a folder of their own."""
    try:
        os.setxattr(root, "user.probe", b"1")
        os.removexattr(root, "user.probe")
        return []
    except OSError:
        beside = root.with_name("metadata")
        beside.mkdir()
        return ["--sidecar", beside]


@dataclass
class Fault:
    """What happens to the next requests that match.

    Attributes:
        kind: `status` answers with `value` and an S3 error `code`; `truncate` breaks the answer's body off after
            `value` bytes; `cut` breaks the whole reply off after `value` bytes, headers included; `lose` passes the
            request on and drops the answer; `drop` closes before passing on; `flip` inverts a bit of the answer's byte
            `value`; `delay` waits `value` seconds.
        times: how many requests.
        every: of those that match, only each n-th.
        length, head: bytes of the whole reply that was cut, and of its headers alone.
        method, path: the request's method, and a part of its path; empty for any.
    """

    kind: str
    value: float = 0
    times: int = 1
    method: str = ""
    path: str = ""
    code: str = "InternalError"
    every: int = 1
    asked: int = 0
    length: int = 0
    head: int = 0

    def matches(self, method: str, path: str) -> bool:
        if self.times <= 0 or self.method not in ("", method) or self.path not in path:
            return False
        self.asked += 1
        return self.asked % self.every == 0


@dataclass
class Proxy:
    """Passes requests to a server on loopback, one by one, and keeps account of them."""

    target: int
    faults: list[Fault] = field(default_factory=list)
    seen: list[tuple[str, str, int]] = field(default_factory=list)  # method, path, bytes of the answer's body
    hidden: frozenset[str] = frozenset()  # headers that are not passed on
    instead: bytes | None = None  # the body of every reply, with status 200: as a page that asks to sign in
    lock: threading.Lock = field(default_factory=threading.Lock)

    def break_next(self, kind: str, value: float = 0, **options) -> Fault:
        """Adds a fault; its `times` says later how often it was not needed."""
        fault = Fault(kind, value, **options)
        self.faults.append(fault)
        return fault

    def take(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.matches(method, path):
                    fault.times -= 1
                    return fault
        return None

    def __enter__(self) -> Proxy:
        handler = type("Handler", (_Handler,), {"proxy": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        fault = self.proxy.take(self.command, self.path)
        kind = fault.kind if fault else ""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if kind == "drop":
            self.close_connection = True
            return
        if kind == "status":
            self.refuse(int(fault.value), fault.code)
            return
        if kind == "delay":
            time.sleep(fault.value)
        status, headers, answer = self.forward(body)
        self.proxy.seen.append((self.command, self.path, len(answer)))
        if kind == "lose":
            self.close_connection = True
            return
        if kind == "flip" and answer:
            at = min(int(fault.value), len(answer) - 1)
            answer = answer[:at] + bytes([answer[at] ^ 1]) + answer[at + 1 :]
        if self.proxy.instead is not None:
            status, answer = 200, self.proxy.instead
            headers = [("Content-Length", str(len(answer)))]
        if kind == "truncate":
            answer, self.close_connection = answer[: int(fault.value)], True
        lines = [
            f"HTTP/1.1 {status} {self.responses.get(status, ('',))[0]}",
            *(f"{n}: {v}" for n, v in headers),
            "",
            "",
        ]
        reply = "\r\n".join(lines).encode("latin-1") + answer
        if kind == "cut":
            fault.length, fault.head = len(reply), len(reply) - len(answer)
            reply, self.close_connection = reply[: int(fault.value)], True
        self.wfile.write(reply)

    def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.target, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        dropped = {"transfer-encoding", "connection", *self.proxy.hidden}
        kept = [(n, v) for n, v in response.getheaders() if n.lower() not in dropped]
        if self.command not in BODILESS and not any(n.lower() == "content-length" for n, _ in kept):
            kept.append(("Content-Length", str(len(answer))))
        return response.status, kept, answer

    def refuse(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command not in BODILESS:
            self.wfile.write(text)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def log_message(self, *_) -> None:
        pass
