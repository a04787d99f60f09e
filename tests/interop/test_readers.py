"""Hostile and damaged files: refused by name, nothing executed, nothing read past the check."""

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from clipjax import ClipjaxError
from clipjax.interop import tensors, torch_file
from clipjax.interop.tensors import read_tensors

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


def write_safetensors(path, header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_safetensors_come_back(tmp_path):
    import ml_dtypes

    arrays = ARRAYS | {"c": np.array(3, np.int64), "d": np.ones(3, ml_dtypes.bfloat16)}
    save_file(arrays, tmp_path / "x.safetensors", {"format": "pt"})
    read = read_tensors(tmp_path / "x.safetensors")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(ARRAYS, path)
    whole = path.read_bytes()
    for keep, message in [
        (len(whole) - 3, "is truncated: tensor"),
        (40, "is truncated or no safetensors"),
        (5, "is truncated or no safetensors"),
        (0, "is truncated or no safetensors"),
    ]:
        path.write_bytes(whole[:keep])
        with pytest.raises(ClipjaxError, match=message):
            read_tensors(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "'a' and 'b' overlap"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, "overlap"),
        ({"a": entry(0, 8000, (2000,))}, "ends at byte 8,000 of 16"),
        ({"a": entry(0, 16, (2**40, 2**40))}, "does not fill its 16 bytes"),
        ({"a": entry(0, 8, (-2, -1))}, "no whole number"),
        ({"a": entry(8, 0, (2,))}, "does not fill"),
        ({"a": entry(0, 8, (2.0,))}, "no whole number"),
        ({"a": entry(0, 8), "b": entry(8, 12, (1,))}, "the last 4 bytes belong to no tensor"),
        ({"a": entry(8, 16)}, "8 bytes before tensor 'a' are no one's"),
        ({"a": entry(0, 16, (2,), "F128")}, "dtype 'F128'"),
        ({"a": entry(0, 16, (2,), ["F32"])}, "damaged|dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "entry for 'a' is damaged"),
        ({"a": 7}, "entry for 'a' is damaged"),
        ({"a": entry(0, 16, (4, *[1] * 80))}, "tensor 'a' cannot be: "),
        ({"a": entry(0, 0, (0, 2**62)), "b": entry(0, 16, (4,))}, "tensor 'a' cannot be: "),
        (b'{"a": {}, "a": {}}', "names a tensor twice"),
        (b"[1]", "it is no object"),
        (b"\xff\xfe{", "header is damaged"),
        (b"[" * 100_000, "header is damaged"),
    ],
)
def test_hostile_headers_are_refused(header, message, tmp_path):
    path = write_safetensors(tmp_path / "x.safetensors", header, bytes(16))
    with pytest.raises(ClipjaxError, match=message):
        read_tensors(path)


def test_a_huge_header_length_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(ClipjaxError, match="cannot hold a header"):
        read_tensors(path)
    with path.open("wb") as file:  # sparse: it is long, but takes no room
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    with pytest.raises(ClipjaxError, match="header of 100,000,001 bytes exceeds"):
        read_tensors(path)


def test_parts_are_read_together_and_cannot_climb_out(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": ARRAYS["a"]}, folder / "1.safetensors")
    save_file({"b": ARRAYS["b"]}, folder / "2.safetensors")
    save_file({"b": ARRAYS["b"]}, tmp_path / "2.safetensors")
    index = folder / "model.safetensors.index.json"

    def read(**files):
        index.write_text(json.dumps({"weight_map": files}))
        return read_tensors(index)

    assert read(a="1.safetensors", b="2.safetensors").keys() == {"a", "b"}
    outside = str(tmp_path / "2.safetensors")
    for name in ("../2.safetensors", outside, "..\\2.safetensors", "", "..", 7, None):
        with pytest.raises(ClipjaxError, match="parts must lie beside|no index|only parts in"):
            read(a="1.safetensors", b=name)
    with pytest.raises(ClipjaxError, match="there is no file"):
        read(a="1.safetensors", b="3.safetensors")
    with pytest.raises(ClipjaxError, match="disagree about tensor 'c'"):
        read(a="1.safetensors", b="2.safetensors", c="2.safetensors")
    index.write_text('{"weight_map": 3}')
    with pytest.raises(ClipjaxError, match="no index"):
        read_tensors(index)


def test_npz_comes_back_and_bfloat16_is_recognized(tmp_path):
    import ml_dtypes

    half = np.array([1.5, -2], ml_dtypes.bfloat16)
    transposed = np.asfortranarray(ARRAYS["a"])
    np.savez_compressed(tmp_path / "x.npz", half=half, transposed=transposed, **ARRAYS)
    read = read_tensors(tmp_path / "x.npz")
    np.testing.assert_array_equal(read["half"], half)
    np.testing.assert_array_equal(read["transposed"], ARRAYS["a"])
    assert read["b"].dtype == np.float16


class Payload:
    """Creates a file when unpickled the usual way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_objects_in_npz_are_refused_unread(tmp_path):
    bomb = tmp_path / "executed"
    np.savez(tmp_path / "x.npz", a=np.array([Payload(bomb)], object))
    with pytest.raises(ClipjaxError, match="holds Python objects"):
        read_tensors(tmp_path / "x.npz")
    assert not bomb.exists()


def test_npz_bombs_and_damage_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "FREE_EXPANSION", 2**20)
    path = tmp_path / "x.npz"

    def member(shape, data):
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.npy", buffer.getvalue() + data)

    member((2**50,), b"1234")
    with pytest.raises(ClipjaxError, match="claims shape"):
        read_tensors(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(3 * 2**20))
    with pytest.raises(ClipjaxError, match="that expand to .* are no weights"):
        read_tensors(path)
    member((2,), b"12345678")
    whole = path.read_bytes()
    listed = whole.index(b"PK\x01\x02")
    stream = 30 + len("a.npy")
    for damaged in (
        whole[:-20],
        whole[:stream] + bytes([255] * 20) + whole[stream + 20 :],  # no deflate stream
        _patched(_patched(whole, 6, 1), listed + 8, 1),  # said to be encrypted
        _patched(_patched(whole, 8, 99), listed + 10, 99),  # compressed in an unknown way
    ):
        path.write_bytes(damaged)
        with pytest.raises(ClipjaxError, match="damaged or no npz"):
            read_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a", "a.npy"):
            buffer = io.BytesIO()
            np.save(buffer, np.zeros(2))
            archive.writestr(name, buffer.getvalue())
    with pytest.raises(ClipjaxError, match="holds 'a' twice"):
        read_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"no array")
    with pytest.raises(ClipjaxError, match="'a.npy' is damaged or no array"):
        read_tensors(path)


def _patched(raw, position, byte):
    return raw[:position] + bytes([byte]) + raw[position + 1 :]


# PyTorch's files. `write_torch` makes the zip that torch.save makes; goldens/*.pt are PyTorch's own.


class Pickler(pickle._Pickler):
    """Writes arrays as torch.save writes tensors."""

    def __init__(self, file, storages):
        super().__init__(file, 2)
        self.storages = storages

    def persistent_id(self, value):
        return value.key if isinstance(value, Storage) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Global):
            module, _, name = value.name.rpartition(".")
            self.write(b"c" + f"{module}\n{name}\n".encode())
        else:
            super().save(value, save_persistent_id)


class Global:
    def __init__(self, name):
        self.name = name


class Storage:
    def __init__(self, key):
        self.key = key


class Call:
    """A call of a global, which pickle writes as REDUCE."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


def call(name, *arguments):
    return Call(name, *arguments)


def _save_call(pickler, value):
    pickler.save(Global(value.name))
    pickler.save(value.arguments)
    pickler.write(b"R")


Pickler.dispatch = {**pickle._Pickler.dispatch, Call: _save_call}


def tensor(key, count, size, stride, offset=0, kind="torch.FloatStorage"):
    storage = Storage(("storage", Global(kind), key, "cpu", count))
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", storage, offset, size, stride, False, hooks)


def write_torch(path, value, storages=(), compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    Pickler(buffer, storages).dump(value)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, raw in dict(storages).items():
            archive.writestr(f"archive/data/{key}", raw)
        archive.writestr("archive/version", "3\n")
    return path


DATA = np.arange(6, dtype=np.float32).tobytes()


def test_torch_tensors_are_read_with_strides_and_shared_storages(tmp_path):
    value = {
        "state_dict": {
            "module.a": tensor("0", 6, (2, 3), (3, 1)),
            "module.b": tensor("0", 6, (3, 2), (1, 3)),
            "module.c": tensor("0", 6, (2,), (2,), offset=1),
            "module.d": call("torch._utils._rebuild_parameter", tensor("0", 6, (), ()), True, None),
        },
        "epoch": 7,
        "optimizer": {"lr": 0.1},
    }
    read = read_tensors(write_torch(tmp_path / "x.pt", value, {"0": DATA}))
    whole = np.arange(6, dtype=np.float32)
    a, b, c, d = (read[f"module.{name}"] for name in "abcd")
    np.testing.assert_array_equal(a, whole.reshape(2, 3))
    np.testing.assert_array_equal(b, whole.reshape(2, 3).T)
    np.testing.assert_array_equal(c, [1, 3])
    assert d.shape == () and d == 0 and len(read) == 4


@pytest.mark.parametrize("name", ["saved.pt", "scripted.pt"])
def test_files_that_pytorch_wrote_are_read(name):
    """A saved state_dict and a TorchScript archive of the same tiny module; see reference/make_torch.py."""
    from pathlib import Path

    import named_weights

    read = read_tensors(Path(__file__).parent / "goldens" / name)
    assert read.keys() == {"low.weight", "inner.bias", "inner.weight", "steps"}
    assert read["low.weight"].dtype == np.float16
    for key in ("inner.weight", "inner.bias"):
        np.testing.assert_array_equal(read[key], named_weights.tensor(key, read[key].shape))
    assert read["steps"] == 0 and read["steps"].dtype == np.int64


@pytest.mark.parametrize(
    ("what", "named"),
    [
        (lambda file: call("builtins.open", file, "w"), "builtins.open"),
        (lambda file: call("os.system", f"touch {file}"), "os.system"),
        (lambda file: call("builtins.eval", f"open({file!r}, 'w')"), "builtins.eval"),
        (
            lambda file: call("collections.OrderedDict.fromkeys", file),
            "OrderedDict.fromkeys|fromkeys",
        ),
        (lambda file: call("torch.load", file), "torch.load"),
        (lambda file: call("numpy.core.multiarray.scalar", file), "numpy.core.multiarray.scalar"),
    ],
)
def test_code_in_a_pickle_is_refused_by_name_and_not_run(what, named, tmp_path):
    bomb = tmp_path / "executed"
    value = {"a": tensor("0", 6, (6,), (1,)), "b": what(str(bomb))}
    path = write_torch(tmp_path / "x.pt", value, {"0": DATA})
    with pytest.raises(ClipjaxError, match=f"({named}).*nothing was executed"):
        read_tensors(path)
    assert not bomb.exists()


def test_a_payload_that_really_runs_elsewhere_does_not_run_here(tmp_path):
    bomb = tmp_path / "executed"
    raw = pickle.dumps({"a": Payload(bomb)}, 2)
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", raw)
    with pytest.raises(ClipjaxError, match="nothing was executed"):
        read_tensors(tmp_path / "x.pt")
    assert not bomb.exists()
    pickle.loads(raw)["a"].close()
    assert bomb.exists()  # the payload was live


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": tensor("0", 6, (7,), (1,))}, "past the end"),
        ({"a": tensor("0", 6, (2, 3), (4, 1))}, "past the end"),
        ({"a": tensor("0", 6, (2,), (1,), offset=5)}, "past the end"),
        ({"a": tensor("0", 6, (2,), (-1,), offset=3)}, "past the end"),
        ({"a": tensor("0", 6, (2**40,), (0,))}, "past the end"),
        ({"a": tensor("0", 7, (6,), (1,))}, "24 bytes, but 7"),
        ({"a": tensor("9", 6, (6,), (1,))}, "storage '9' that it does not hold"),
        ({"a": tensor("../version", 6, (6,), (1,))}, "that it does not hold"),
        ({"a": 3}, "holds no tensors"),
    ],
)
def test_tensors_stay_inside_their_storage(value, message, tmp_path):
    with pytest.raises(ClipjaxError, match=message):
        read_tensors(write_torch(tmp_path / "x.pt", value, {"0": DATA}))


def test_endless_trees_and_compressed_storages_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_NODES", 10_000)
    node = {"leaf": tensor("0", 6, (6,), (1,))}
    for _ in range(60):
        node = {"left": node, "right": node}
    with pytest.raises(ClipjaxError, match="without end"):
        read_tensors(write_torch(tmp_path / "x.pt", node, {"0": DATA}))
    value = {"a": tensor("0", 2**20, (2**20,), (1,))}
    storages = {"0": bytes(2**22)}
    path = write_torch(tmp_path / "y.pt", value, storages, zipfile.ZIP_DEFLATED)
    with pytest.raises(ClipjaxError, match="compressed or overlap"):
        read_tensors(path)


def test_what_is_no_pytorch_file_is_named(tmp_path):
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ClipjaxError, match="no zip file, as PyTorch has written since 1.6"):
        read_tensors(tmp_path / "old.pt")
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as archive:
        archive.writestr("a/b", "c")
    with pytest.raises(ClipjaxError, match=r"no data.pkl"):
        read_tensors(tmp_path / "other.bin")
    path = write_torch(tmp_path / "x.pt", {"a": tensor("0", 6, (6,), (1,))}, {"0": DATA})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ClipjaxError, match="damaged"):
        read_tensors(path)
    with pytest.raises(ClipjaxError, match="weights are read from"):
        read_tensors(__file__)
    with pytest.raises(ClipjaxError, match="there is no file"):
        read_tensors(tmp_path / "none.safetensors")
