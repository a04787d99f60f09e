"""Second half of the round trip, with the `interop` extra: python check_all.py FOLDER

Loads every folder that export_all.py made with the library that it is for, and compares what that
library computes with the goldens (for our own models: with what clipjax computed).
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import named_weights as weights
import open_clip
import transformers
from PIL import Image

OURS = ("source", "model", "pictures")
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1).double().numpy()


def features(x):
    return x if isinstance(x, torch.Tensor) else x.pooler_output


def inputs_of(golden, mean, std):
    facts = golden["inputs"]
    images = weights.pictures(3, facts["image_size"]).astype(np.float32) / 255
    pixels = ((images - np.float32(mean)) / np.float32(std)).transpose(0, 3, 1, 2).copy()
    ids = weights.texts(3, facts["context_length"], facts["vocab_size"], facts["eos"])
    return torch.from_numpy(pixels), torch.from_numpy(ids).long()


def check_hf(folder, golden):
    model = transformers.AutoModel.from_pretrained(folder).eval()
    facts = json.loads((folder / "preprocessor_config.json").read_text())
    pixels, ids = inputs_of(golden, facts["image_mean"], facts["image_std"])
    extra = {}
    if model.config.model_type == "siglip2":
        patch = model.config.vision_config.patch_size
        grid = pixels.shape[-1] // patch
        x = pixels.permute(0, 2, 3, 1).reshape(3, grid, patch, grid, patch, 3)
        pixels = x.permute(0, 1, 3, 2, 4, 5).reshape(3, grid * grid, -1)
        extra["pixel_attention_mask"] = torch.ones(3, grid * grid, dtype=torch.long)
        extra["spatial_shapes"] = torch.tensor([[grid, grid]] * 3)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels, **extra)
    return unit(out.image_embeds), unit(out.text_embeds), out.logits_per_image.double().numpy()


def check_open_clip(folder, golden):
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    preprocess = json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]
    pixels, ids = inputs_of(golden, preprocess["mean"], preprocess["std"])
    with torch.no_grad():
        image, text = model.encode_image(pixels), model.encode_text(ids)
    return unit(image), unit(text), None


def check_openai(folder, golden):
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    model = open_clip.model.build_model_from_openai_state_dict(state, cast_dtype=torch.float32)
    pixels, ids = inputs_of(golden, *OPENAI)
    model = model.float()  # it has been through float16
    scalars = ("input_resolution", "context_length", "vocab_size")
    state = load_file(folder / "model.safetensors")
    model.load_state_dict({k: v for k, v in state.items() if k not in scalars})
    with torch.no_grad():
        return unit(model.encode_image(pixels)), unit(model.encode_text(ids)), None


def check_own(folder, to):
    """Files and strings through the other library, against what clipjax made of them.

    Returns:
      by what was compared, the largest difference.
    """
    ours = np.load(folder / "ours.npz")
    facts = json.loads((folder / "facts.json").read_text())
    pictures = [Image.open(file).convert("RGB") for file in facts["files"]]
    # Where the export said that its library cuts pictures otherwise.
    cuts = {"clip_down": "open_clip", "clip_even": "hf"}.get(folder.name) == to
    found = {}
    with torch.no_grad():
        if to == "open_clip":
            model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder / to}")
            model.eval()
            ids = open_clip.get_tokenizer(f"local-dir:{folder / to}")(facts["captions"])
            image = unit(model.encode_image(torch.stack([preprocess(p) for p in pictures])))
            text = unit(model.encode_text(ids))
        elif to == "hf-siglip2":
            image, text = siglip2(folder / to, facts, pictures)
        else:
            image, text, found["pipeline"] = hugging_face(folder / to, facts, pictures, ours)
    found["text"] = np.abs(text - ours["text"]).max()
    found["image"] = np.abs(image - ours["image"]).max()
    if cuts:
        del found["image"]
        found.pop("pipeline", None)
    return found


def hugging_face(path, facts, pictures, ours):
    model = transformers.AutoModel.from_pretrained(path).eval()
    images = {}
    for backend in ("pil", "torchvision"):
        processor = transformers.AutoProcessor.from_pretrained(path, backend=backend)
        batch = processor(text=facts["captions"], images=pictures, padding="max_length",
                          truncation=True, return_tensors="pt")  # fmt: skip
        out = model(**batch)
        images[backend] = unit(out.image_embeds)
    gap = np.abs(images["torchvision"] - ours["image"]).max()
    print(f"{'':42} torchvision's backend: {gap:.1e}")
    processor = transformers.AutoProcessor.from_pretrained(path, backend="pil")
    classify = transformers.pipeline(
        "zero-shot-image-classification", model=model, tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )  # fmt: skip
    answers = classify(facts["files"], candidate_labels=facts["labels"], hypothesis_template="{}")
    scores = [[next(a["score"] for a in row if a["label"] == label) for label in facts["labels"]]
              for row in answers]  # fmt: skip
    return images["pil"], unit(out.text_embeds), np.abs(scores - ours["probabilities"]).max()


def siglip2(path, facts, pictures):
    """As the notes of the export tell: squares, the folder's numbers, its own tokenizer's class."""
    model = transformers.AutoModel.from_pretrained(path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")
    side = int(model.config.vision_config.num_patches**0.5) * processor.patch_size
    squares = [picture.resize((side, side), processor.resample) for picture in pictures]
    numbers = {"patch_size": processor.patch_size, "max_num_patches": processor.max_num_patches}
    batch = processor(squares, return_tensors="pt", **numbers)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    texts = tokenizer(facts["captions"], padding="max_length", truncation=True, max_length=64,
                      return_tensors="pt")  # fmt: skip
    out = model(**texts, **batch)
    return unit(out.image_embeds), unit(out.text_embeds)


def main(root):
    checks = {"hf": check_hf, "hf-siglip2": check_hf, "openai": check_openai}
    failed = 0
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        own = (folder / "ours.npz").exists()
        for path in sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in OURS):
            if path.name.startswith("big_vision"):
                continue  # big_vision's reader is load_big_vision_weights, which made the golden
            if own:
                found = check_own(folder, path.name)
                worst = max(found.values())
                print(f"{'':42} " + "  ".join(f"{k} {v:.1e}" for k, v in found.items()))
            else:
                goldens = Path(__file__).parent.parent / "goldens"
                golden = json.loads((goldens / f"{folder.name}.json").read_text())
                outputs = checks.get(path.name, check_open_clip)(path, golden)
                wanted = [np.array(golden["outputs"][k]) for k in ("image", "text", "logits")]
                pairs = zip(outputs, wanted, strict=True)
                worst = max(np.abs(a - b).max() for a, b in pairs if a is not None)
            print(f"{folder.name:22} {path.name:18} {worst:.1e}")
            failed += worst > 1e-4
    print("failed:", failed)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
