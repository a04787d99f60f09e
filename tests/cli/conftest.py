"""A tiny model as a folder, pictures, and files that a stranger may have put among them."""

import io
import os
import struct
import zlib

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from clipjax import Pretrained, cli
from clipjax.data import BPE, Resize
from clipjax.models import DualEncoder
from clipjax.params import split
from clipjax.towers import TextTransformer, ViT

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "gray": (99, 99, 99)}


def save_model(folder, seed=0, **fields):
    shape = {"width": 16, "depth": 1, "heads": 2}
    model = DualEncoder(
        image=ViT(image_size=16, patch_size=8, **shape),
        text=TextTransformer(vocab_size=280, context_length=12, eos_id=2, **shape),
        embed_dim=8,
        **fields,
    )
    tokenizer = BPE(vocab_size=280).build(["a photo of a red square", "a blue circle"])
    _, params, state = split(model.build(nnx.Rngs(seed)))
    # Weights of a size that tells pictures apart.
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)
    Pretrained(model, params, state, tokenizer, 12, 16, Resize("crop")).save(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "softmax")


@pytest.fixture(scope="session")
def sigmoid_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "sigmoid", 1, logit_bias_init=-3.0)


@pytest.fixture
def pictures(tmp_path):
    """A folder of four plain pictures, one of them in a folder of its own."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for name, color in COLORS.items():
        place = folder / "deep" if name == "gray" else folder
        Image.new("RGB", (20, 16), color).save(place / f"{name}.png")
    return folder


@pytest.fixture(autouse=True)
def quiet_home(monkeypatch, tmp_path):
    """Commands change neither jax's settings here nor the home of who runs the tests."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ.get("JAX_COMPILATION_CACHE_DIR", ""))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys):
    """Runs a command; returns its exit code, stdout and stderr."""

    def run(*arguments):
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def png_header(width, height):
    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """Puts hostile files into a folder; returns what each one's refusal says."""
    programs = tmp_path / "programs"
    programs.mkdir()
    ghostscript = programs / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\nexit 1\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked up in PATH again

    def plant(folder):
        buffer = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(buffer, "PNG")
        files = {
            "bomb.png": (png_header(100_000, 100_000), "pixels"),
            "bomb2.png": (png_header(9_000, 9_000), "9000 x 9000 pixels exceed the limit"),
            "cut.png": (buffer.getvalue()[:2000], "does not decode"),
            "empty.png": (b"", "not an image"),
            "page.png": (b"<html><script>alert(1)</script>", "not an image"),
            "program.png": (
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
                "not an image",
            ),
        }
        for name, (content, _) in files.items():
            (folder / name).write_bytes(content)
        return {name: message for name, (_, message) in files.items()}

    yield plant
    assert not (tmp_path / "executed").exists(), "a picture made Ghostscript run"


@pytest.fixture
def tree():
    """Everything in a folder, with contents: to see that nothing else was written."""

    def tree(folder):
        return {
            str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes()
            for p in sorted(folder.rglob("*"))
            if not p.is_symlink() and (p.is_dir() or p.is_file())
        }

    return tree
