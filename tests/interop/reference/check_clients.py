"""Figures and embeddings of other programs against the command line's: python check_clients.py FOLDER

After export_all.py, with the `interop` extra: CLIP_benchmark's zero-shot classification and retrieval (several
captions a picture) against `clipjax eval`, OpenCLIP's embeddings and probabilities of files against `clipjax embed`
and `clipjax classify`, sentence-transformers against the same. Figures must be equal to the digit, numbers within 1e-5.
"""

import contextlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from sentence_transformers import SentenceTransformer

sys.path.insert(0, str(Path(__file__).parent.parent))
import photos

from clipjax.cli import main as clipjax

CLASSES = ("apple", "blue pen", "cat’s mat", "dog", "égg", "ﬁsh", "grape &amp; glass", "hat")
TEMPLATES = ("a photo of a {}.", "“{}” – seen from above")
EVALS = """
from clipjax.data import WebDataset
from clipjax.evals import Retrieval

def evals():
    return (Retrieval(source=WebDataset({tar!r}, lines=True), ties="first"),)
"""


def command(*arguments):
    """What `clipjax ...` prints last."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = clipjax([str(a) for a in arguments])
    assert code == 0, arguments
    return out.getvalue().strip().splitlines()[-1]


def write_data(folder):
    """(files, label of each, captions of each): 64 pictures, PNG and JPEG by turns, three captions each."""
    pixels = list(photos.pictures())
    files, labels, captions = [], [], []
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for i in range(64):
            label = i * 5 % len(CLASSES)
            picture = np.roll(pixels[i % len(pixels)], (3 * i, 5 * i, i), (0, 1, 2))
            name, kind = f"{i:03}", ("png", "jpg")[i % 2]
            path = folder / "classes" / CLASSES[label] / f"{name}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
            lines = [
                f"picture {i} of {CLASSES[label]}",
                f"{i * i} things",
                f"№ {i}: “{CLASSES[i % 8]}”",
            ]
            text = folder / f"{name}.txt"
            text.write_text("\n".join(lines))
            tar.add(path, f"{name}.{kind}")
            tar.add(text, f"{name}.txt")
            files.append(path)
            labels.append(label)
            captions.append(lines)
    return files, labels, captions


class Pairs(torch.utils.data.Dataset):
    """What CLIP_benchmark's loaders give: a picture ready for the model, and its label or captions."""

    classes = sorted(CLASSES)

    def __init__(self, files, targets, transform):
        self.items = list(zip(files, targets, strict=True))
        self.transform = transform

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        file, target = self.items[i]
        return self.transform(Image.open(file)), target


def collate(items):
    pictures, targets = zip(*items, strict=True)
    return torch.stack(pictures), list(targets)


def accuracy(output, target, topk):
    """CLIP_benchmark's, which makes a float of an array of one: NumPy 2.4 refuses that."""
    hits = output.topk(max(topk), 1, True, True)[1].eq(target[:, None])
    return [hits[:, :k].any(1).float().mean().item() for k in topk]


def benchmark(root, folder):
    """Figures by CLIP_benchmark of OpenCLIP's model, and by `clipjax eval` of ours: name -> (theirs, ours)."""
    exported = f"local-dir:{root / 'open_clip'}"
    model, _, transform = open_clip.create_model_and_transforms(exported)
    model.eval()
    tokenizer = open_clip.get_tokenizer(exported)
    files, labels, captions = write_data(folder)
    order = {label: sorted(CLASSES).index(name) for label, name in enumerate(CLASSES)}
    targets = torch.tensor([order[label] for label in labels])
    zeroshot_classification.accuracy = accuracy
    data = torch.utils.data.DataLoader(Pairs(files, targets, transform), 16)
    names = [t.replace("{}", "{c}") for t in TEMPLATES]
    theirs = zeroshot_classification.evaluate(
        model, data, tokenizer, sorted(CLASSES), names, "cpu", amp=False
    )
    pairs = Pairs(files, captions, transform)
    data = torch.utils.data.DataLoader(pairs, 16, collate_fn=collate)
    theirs |= zeroshot_retrieval.evaluate(
        model, data, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    (folder / "templates.txt").write_text("\n".join(TEMPLATES))
    (folder / "evals.py").write_text(EVALS.format(tar=str(folder / "pairs.tar")))
    told = ["eval", root / "model", "--json"]
    ours = json.loads(
        command(*told, "--dataset", folder / "classes", "--task", "zeroshot",
                "--templates", folder / "templates.txt", "--ties", "first")
    )  # fmt: skip
    ours |= json.loads(command(*told, "--evals", folder / "evals.py"))
    ours = {name.split("zeroshot/")[-1].split("retrieval/")[-1]: v for name, v in figures(ours)}
    pairs = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_per_class"}
    for k in (1, 5, 10):
        pairs |= {f"image_retrieval_recall@{k}": f"text_to_image/R@{k}"}
        pairs |= {f"text_retrieval_recall@{k}": f"image_to_text/R@{k}"}
    found = {name: (theirs[name], ours[mine]) for name, mine in pairs.items()}
    return found, files, model, transform, tokenizer


def figures(facts, prefix=""):
    """All numbers of what `eval --json` printed, by their names."""
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from figures(value)
        elif isinstance(value, (int, float)):
            yield name, value


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1).numpy()


def commands(root, folder, files, model, transform, tokenizer):
    """`clipjax embed` and `clipjax classify` against OpenCLIP on the same files: name -> largest difference."""
    with torch.no_grad():
        images = unit(model.encode_image(torch.stack([transform(Image.open(f)) for f in files])))
        texts = unit(model.encode_text(tokenizer([f"a photo of a {c}." for c in CLASSES])))
        logits = model.logit_scale.exp().item() * images @ texts.T
    wanted = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    command("embed", folder / "classes", "--out", folder / "e.parquet", "--model", root / "model")
    table = pyarrow.parquet.read_table(folder / "e.parquet").to_pydict()
    key = next(k for k in ("key", "path", "file", "name") if k in table)
    rows = {
        Path(name).name.split(".")[0]: row
        for name, row in zip(table[key], table["embedding"], strict=True)
    }
    ours = np.array([rows[f.stem] for f in files])
    said = json.loads(
        command("classify", *files, "--labels", ",".join(CLASSES), "--templates", "a photo of a {}.",
                "--top", len(CLASSES), "--json", "--model", root / "model")
    )  # fmt: skip
    return {
        "embed": np.abs(ours - images).max(),
        "classify": np.abs(probabilities(said) - wanted).max(),
    }


def probabilities(said):
    """[images, classes], in the order of CLASSES."""
    rows = [{x["label"]: x["probability"] for x in row["labels"]} for row in said["images"]]
    return np.array([[row[name] for name in CLASSES] for row in rows])


def sentence_transformers(root):
    """Texts and files through SentenceTransformer, against `encode_text` and `encode_image`."""
    ours, facts = np.load(root / "ours.npz"), json.loads((root / "facts.json").read_text())
    model = SentenceTransformer(str(root / "hf"), device="cpu", processor_kwargs={"backend": "pil"})
    text = model.encode(facts["captions"], normalize_embeddings=True)
    opened = [Image.open(f).convert("RGB") for f in facts["files"]]
    image = model.encode(opened, normalize_embeddings=True)
    return {"text": np.abs(text - ours["text"]).max(), "image": np.abs(image - ours["image"]).max()}


def main(root):
    folder = root / "clip_even" / "data"
    folder.mkdir()
    found, *rest = benchmark(root / "clip_even", folder)
    failed = 0
    for name, (theirs, ours) in found.items():
        equal = abs(theirs - ours) < 1e-6  # CLIP_benchmark's means are float32
        print(f"{'CLIP_benchmark ' + name:45} {theirs:.6f}  clipjax eval {ours:.6f}")
        failed += not equal
    gaps = {f"clipjax {k}": v for k, v in commands(root / "clip_even", folder, *rest).items()}
    gaps |= {
        f"sentence-transformers {k}": v
        for k, v in sentence_transformers(root / "clip_down").items()
    }
    for name, gap in gaps.items():
        print(f"{name:45} {gap:.1e}")
        failed += not gap < 1e-5
    print("failed:", failed)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
