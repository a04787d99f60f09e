"""Servers of S3 (moto) and Google Cloud Storage (gcp-storage-emulator) on loopback, and faults on the way to them."""

import contextlib
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("moto")
pytest.importorskip("gcp_storage_emulator")
pytest.importorskip("s3fs")
pytest.importorskip("gcsfs")

BUCKET = "bucket"


class Faults:
    """What goes wrong on the way, as shares of the requests; `seen` counts them."""

    def __init__(self):
        self.refused = self.cut = self.slow = 0.0
        self.seen = {"requests": 0, "refused": 0, "cut": 0, "slow": 0}
        self._random, self._lock = random.Random(0), threading.Lock()

    @contextlib.contextmanager
    def at(self, refused=0.0, cut=0.0, slow=0.0):
        before = self.refused, self.cut, self.slow
        self.refused, self.cut, self.slow = refused, cut, slow
        try:
            yield self
        finally:
            self.refused, self.cut, self.slow = before

    def draw(self):
        with self._lock:
            self.seen["requests"] += 1
            number = self._random.random()
            for kind in ("refused", "cut", "slow"):
                share = getattr(self, kind)
                if number < share:
                    self.seen[kind] += 1
                    return kind
                number -= share
        return None


class Proxy(BaseHTTPRequestHandler):
    """Hands requests on, or not; and keeps `ifGenerationMatch=0`, which the emulator does not know."""

    protocol_version = "HTTP/1.1"
    port, faults, exclusive = 0, Faults(), threading.Lock()

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.faults.draw()
        if fault == "refused":
            return self._answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
        if fault == "cut":
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return None
        if fault == "slow":
            time.sleep(0.3)
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        if query.get("ifGenerationMatch") == ["0"]:
            with self.exclusive:
                if self._name(query, body) and self._there(self._name(query, body)):
                    return self._answer(
                        412, [], b'{"error": {"code": 412, "message": "conditionNotMet"}}'
                    )
                return self._hand_on(body)
        return self._hand_on(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = handle_any

    def _hand_on(self, body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {
            k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")
        }
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        self._answer(answer.status, answer.getheaders(), content)
        connection.close()

    def _name(self, query, body):
        if "name" in query:
            return query["name"][0]
        for line in body.splitlines():  # the first part of a multipart upload
            if line.startswith(b"{"):
                return json.loads(line).get("name")
        return None

    def _there(self, name):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        quoted = urllib.parse.quote(name, safe="")
        connection.request(
            "GET", f"/storage/v1/b/{BUCKET}/o/{quoted}", headers={"Host": "localhost"}
        )
        status = connection.getresponse().status
        connection.close()
        return status == 200

    def _answer(self, status, headers, content):
        self.send_response(status)
        length = {k.lower(): v for k, v in headers}.get("content-length")
        for name, value in headers:
            if name.lower() not in (
                "transfer-encoding",
                "connection",
                "content-length",
                "date",
                "server",
            ):
                self.send_header(name, value)
        head = self.command == "HEAD" and length is not None
        self.send_header("Content-Length", length if head else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


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
            proxy = type(
                "P", (Proxy,), {"port": port, "faults": Faults(), "exclusive": threading.Lock()}
            )
            server = ThreadingHTTPServer(("127.0.0.1", 0), proxy)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            found[scheme] = (f"http://127.0.0.1:{server.server_port}", proxy.faults)
        environment = {
            "STORAGE_EMULATOR_HOST": found["gs"][0],
            "TENSORSTORE_GCS_HTTP_URL": found["gs"][0],
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
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
