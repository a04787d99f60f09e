"""hf://owner/name, against a server of the Hub's protocol on loopback."""

import hashlib
import http.server
import json
import os
import threading
import urllib.parse

import numpy as np
import pytest

from clipjax import ClipjaxError
from clipjax.cli import main
from clipjax.errors import EXIT_UNAVAILABLE
from clipjax.hub import snapshot, wanted
from clipjax.pretrained import read_pretrained
from clipjax.stores import place

SHA = "0123456789abcdef0123456789abcdef01234567"
ERRORS = {
    # owner/name or revision -> (status, the Hub's code for it)
    "someone/missing": (404, "RepoNotFound"),
    "someone/gated": (403, "GatedRepo"),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of the Hub to read a repository's files."""

    files: dict
    asked: list

    def do_GET(self):
        path = urllib.parse.urlparse(self.path).path.strip("/").split("/")
        self.asked.append(self.path)
        if path[:2] == ["api", "models"]:
            return self.api("/".join(path[2:4]), path[4:])
        if path[2] != "resolve" or "/".join(path[4:]) not in self.files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        body = self.files["/".join(path[4:])]
        tag = hashlib.sha1(body).hexdigest()
        return self.reply(200, body, {"ETag": f'"{tag}"', "X-Repo-Commit": SHA})

    do_HEAD = do_GET

    def api(self, repository, rest):
        status, code = ERRORS.get(repository, (200, ""))
        if rest[:1] == ["revision"] and rest[1] not in ("main", "v1", SHA):
            status, code = 404, "RevisionNotFound"
        if status != 200:
            return self.reply(status, b"{}", {"X-Error-Code": code})
        if rest[:1] == ["tree"]:
            facts = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in self.files.items()
            ]
        else:
            siblings = [{"rfilename": n} for n in self.files]
            facts = {"id": repository, "modelId": repository, "sha": SHA, "siblings": siblings}
        return self.reply(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})

    def reply(self, status, body, headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def hub(golden, tmp_path_factory):
    """A server with one repository, hf_xlm_roberta's golden: `(address, files, what was asked)`."""
    folder = golden("hf_xlm_roberta").write(tmp_path_factory.mktemp("repository"))
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    files |= {"pytorch_model.bin": b"the same once more", "README.md": b"# A model"}
    handler = type("Handler", (Hub,), {"files": files, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", files, handler.asked
    server.shutdown()


@pytest.fixture
def on_hub(hub, tmp_path, monkeypatch):
    """This process's client pointed at the server, with a cache of its own; what was asked is kept."""
    from huggingface_hub import constants

    address, _, asked = hub
    asked.clear()
    for name in [n for n in os.environ if n.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return asked


def test_a_model_by_its_address(on_hub, tmp_path, golden, capsys):
    out = tmp_path / "out"
    assert main(["import", "hf://someone/tower@v1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "texts of 13 tokens" in said and "pictures" not in said
    words = read_pretrained(out).params["text"]["embedding"]
    tensors = golden("hf_xlm_roberta").tensors
    types = tensors["embeddings.token_type_embeddings.weight"]
    np.testing.assert_array_equal(words, tensors["embeddings.word_embeddings.weight"] + types[0])


def test_one_set_of_weights_is_fetched_once(on_hub, hub):
    folder = snapshot("hf://someone/tower")
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == hub[1]["model.safetensors"]
    on_hub.clear()
    assert snapshot("hf://someone/tower") == folder
    assert not [path for path in on_hub if "resolve" in path]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://someone/missing", "there is no repository 'someone/missing', or it is private"),
        ("hf://someone/gated", "asks for an agreement first"),
        ("hf://someone/tower@v9", "the repository has no revision 'v9'"),
        ("hf://tower", "is hf://owner/name, or hf://owner/name@revision"),
        ("hf://some one/tower", "is no repository's name"),
    ],
)
def test_what_cannot_be_fetched_is_said(on_hub, address, message):
    with pytest.raises(ClipjaxError, match=message):
        snapshot(address)


def test_without_a_network_the_cache_serves_or_says_so(on_hub, monkeypatch):
    folder = snapshot("hf://someone/tower")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert snapshot("hf://someone/tower") == folder
    with pytest.raises(ClipjaxError, match="cannot be reached and its cache has no copy") as raised:
        snapshot("hf://someone/else")
    assert raised.value.exit_code == EXIT_UNAVAILABLE


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ClipjaxError, match=r"pip install 'clipjax\[hub\]'"):
        snapshot("hf://someone/tower")


def test_of_a_repository_what_is_read_is_taken():
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "model.safetensors.index.json"
    files = [
        "pytorch_model.bin",
        *shards,
        index,
        "config.json",
        "tokenizer.json",
        "onnx/model.onnx",
    ]
    assert wanted("hf://a/b", files) == [*shards, index, "config.json", "tokenizer.json"]
    own = ["model.json", "model.safetensors", "tokenizer/facts.json", "README.md"]
    assert wanted("hf://a/b", own) == own[:3]
    with pytest.raises(ClipjaxError, match="holds no weights under a usual name"):
        wanted("hf://a/b", ["flax_model.msgpack"])


def test_nothing_is_written_to_the_hub():
    with pytest.raises(ClipjaxError, match="models are read from hf://, and nothing else is"):
        place("hf://someone/new")
