"""Files of small samples: sample i is gray i % 256, and its label is i."""

import io
import struct
import tarfile

import google_crc32c
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image as Pillow
from tensorflow_datasets.proto import tf_example_pb2

from clipjax.data import BPE

TOKENIZER = BPE(300).build(["number 7"])


def png(i):
    buffer = io.BytesIO()
    Pillow.new("RGB", (8, 8), (i % 256,) * 3).save(buffer, "png")
    return buffer.getvalue()


def example(i):
    made = tf_example_pb2.Example()
    made.features.feature["image"].bytes_list.value.append(png(i))
    made.features.feature["caption"].bytes_list.value.append(b"number %d" % i)
    made.features.feature["label"].int64_list.value.append(i)
    made.features.feature["scores"].float_list.value.extend([0.5, i])
    return made.SerializeToString()


def masked(content):
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def write_tar(path, numbers):
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            for name, content in ((f"{i}.png", png(i)), (f"{i}.cls", b"%d" % i)):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))


def write_tfrecord(path, numbers):
    with open(path, "wb") as file:
        for i in numbers:
            size, content = struct.pack("<Q", len(example(i))), example(i)
            file.write(size + masked(size) + content + masked(content))


def write_array_record(path, numbers):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i in numbers:
        writer.write(example(i))
    writer.close()


def labels(config, steps, start=0, **build):
    loader = config.build(TOKENIZER, 3, **build)
    return np.stack([loader.batch(step)["label"] for step in range(start, start + steps)])
