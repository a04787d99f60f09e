"""Servers of S3 (moto) and Google Cloud Storage (gcp-storage-emulator) on loopback, and faults on the way to them."""

import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

# Read when gcsfs is imported: without credentials it would ask for the bucket's kind before every request.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

pytest.importorskip("moto")
pytest.importorskip("gcp_storage_emulator")
pytest.importorskip("s3fs")
pytest.importorskip("gcsfs")

BUCKET = "bucket"


class Faults:
    """What goes wrong on the way, as shares of the requests; `seen` counts them.

    refused: 503. cut: the connection ends before the server has the request. lost: after that, so that only the
    answer is missing. half: in the middle of the answer. slow: it takes its time.
    """

    KINDS = ("refused", "cut", "lost", "half", "slow")

    def __init__(self):
        self.shares = dict.fromkeys(self.KINDS, 0.0)
        self.seen = dict.fromkeys(("requests", *self.KINDS), 0)
        self._random, self._lock = random.Random(0), threading.Lock()

    @contextlib.contextmanager
    def at(self, seed=0, **shares):
        before, self.shares = self.shares, dict.fromkeys(self.KINDS, 0.0) | shares
        self._random.seed(seed)
        try:
            yield self
        finally:
            self.shares = before

    def failed(self):
        """How many requests did not get their answer."""
        return sum(self.seen[kind] for kind in self.KINDS if kind != "slow")

    def draw(self):
        with self._lock:
            self.seen["requests"] += 1
            number = self._random.random()
            for kind, share in self.shares.items():
                if number < share:
                    self.seen[kind] += 1
                    return kind
                number -= share
        return None


class Proxy(BaseHTTPRequestHandler):
    """Hands requests on, or not."""

    protocol_version = "HTTP/1.1"
    port, faults = 0, Faults()

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.faults.draw()
        if fault == "refused":
            return self.answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
        if fault == "cut":
            return self.hang_up()
        if fault == "slow":
            time.sleep(0.3)
        found = self.serve(body)
        if fault == "lost":
            return self.hang_up()
        return self.answer(*found, half=fault == "half")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = handle_any

    def serve(self, body):
        """(status, headers, content) of the server's answer."""
        headers = {
            k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")
        }
        return self.ask(self.command, self.path, body, headers)

    def ask(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers or {"Host": "localhost"})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), content

    def hang_up(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status, headers, content, half=False):
        ours = ("transfer-encoding", "connection", "content-length", "date", "server")
        length = {k.lower(): v for k, v in headers}.get("content-length")
        head = self.command == "HEAD" and length is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # they have hung up
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ours:
                    self.send_header(name, value)
            self.send_header("Content-Length", length if head else str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self.hang_up()

    def log_message(self, *args):
        pass


class GoogleProxy(Proxy):
    """What Google's servers do and the emulator does not: generations that requests are conditional on, also for
    reads, and a finished upload that is asked for again."""

    exclusive, finished = threading.RLock(), {}

    def serve(self, body):
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        path = urllib.parse.urlsplit(self.path).path
        upload = query.get("upload_id", [""])[0]
        reads = query.get("alt") == ["media"]
        wanted = query.get("ifGenerationMatch")
        unwanted = query.get("ifGenerationNotMatch")
        if not (upload or reads or wanted or unwanted):
            return super().serve(body)
        with self.exclusive:
            if upload in self.finished:
                return self.finished[upload]
            now = "0"
            if not upload:
                name = path.partition("/o/")[2] or self._name(query, body)
                now = self._generation(name)
            if wanted and wanted != [now]:
                return 412, [], b'{"error": {"code": 412, "message": "conditionNotMet"}}'
            if unwanted == [now]:
                return 304, [], b""
            status, headers, content = super().serve(body)
            if upload and status == 200:
                self.finished[upload] = status, headers, content
            return status, [*headers, ("x-goog-generation", now)] if reads else headers, content

    def _name(self, query, body):
        """The quoted name of the object that an upload makes."""
        if "name" in query:
            return urllib.parse.quote(query["name"][0], safe="")
        facts = next(line for line in body.splitlines() if line.startswith(b"{"))  # the first part
        return urllib.parse.quote(json.loads(facts)["name"], safe="")

    def _generation(self, name):
        status, _, content = self.ask("GET", f"/storage/v1/b/{BUCKET}/o/{name}")
        return json.loads(content)["generation"] if status == 200 else "0"


def _port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _wait_for(port, process):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, "the server did not start"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise AssertionError("the server did not start")


@pytest.fixture(scope="session")
def servers():
    """Scheme -> (address, faults): both servers, each behind a proxy, for this process and its children."""
    commands = {
        "s3": ("moto.server", "-H", "127.0.0.1", "-p"),
        "gs": ("gcp_storage_emulator", "start", "--in-memory", f"--default-bucket={BUCKET}",
               "--host=127.0.0.1", "--port"),
    }  # fmt: skip
    started, found = [], {}
    with pytest.MonkeyPatch.context() as patch:
        for scheme, command in commands.items():
            port = _port()
            process = subprocess.Popen(
                [sys.executable, "-m", *command, str(port)],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            started.append(process)
            _wait_for(port, process)
            base = GoogleProxy if scheme == "gs" else Proxy
            proxy = type("P", (base,), {"port": port, "faults": Faults()})
            server = ThreadingHTTPServer(("127.0.0.1", 0), proxy)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            found[scheme] = (f"http://127.0.0.1:{server.server_port}", proxy.faults)
        environment = {
            "STORAGE_EMULATOR_HOST": found["gs"][0],
            "TENSORSTORE_GCS_HTTP_URL": found["gs"][0],
            "GCE_METADATA_ROOT": "127.0.0.1:1",
            "AWS_ENDPOINT_URL": found["s3"][0],
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
        for name, value in environment.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem().mkdir(BUCKET)
        yield found
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(params=["gs", "s3"])
def store(request, servers):
    """(an empty folder in a bucket, the faults on the way to it)."""
    from clipjax.stores import place

    name = request.node.name.split("[")[0]
    return place(f"{request.param}://{BUCKET}/{name}"), servers[request.param][1]
