"""Second half of the round trip, with the `interop` extra: python check_all.py FOLDER

Loads every folder that export_all.py made with the library that it is for, and compares what that
library computes with the goldens (for our own models: with what clipjax computed).
"""

import json
import sys
from pathlib import Path

import numpy as np
import stub
import torch

stub.install()
sys.path.insert(0, str(Path(__file__).parent.parent))
import named_weights as weights  # noqa: E402
import open_clip  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402

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
    ours = np.load(folder / "ours.npz")
    captions = json.loads((folder / "captions.json").read_text())
    pictures = [Image.fromarray(ours[f"picture{i}"]) for i in range(len(ours["image"]))]
    path = folder / to
    image = None
    if to == "hf":
        model = transformers.AutoModel.from_pretrained(path).eval()
        processor = transformers.AutoProcessor.from_pretrained(path, backend="pil")
        batch = processor(text=captions, images=pictures, padding="max_length", truncation=True,
                          return_tensors="pt")  # fmt: skip
        with torch.no_grad():
            image = unit(features(model.get_image_features(pixel_values=batch["pixel_values"])))
            text = unit(features(model.get_text_features(input_ids=batch["input_ids"])))
    else:
        model = open_clip.create_model(f"local-dir:{path}").eval()
        ids = open_clip.get_tokenizer(f"local-dir:{path}")(captions)
        with torch.no_grad():
            text = unit(model.encode_text(ids))
    worst = np.abs(text - ours["text"]).max()
    if image is not None:
        worst = max(worst, np.abs(image - ours["image"]).max())
    return worst


def main(root):
    checks = {"hf": check_hf, "hf-siglip2": check_hf, "openai": check_openai}
    failed = 0
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        own = (folder / "ours.npz").exists()
        for path in sorted(p for p in folder.iterdir() if p.is_dir() and p.name != "source"):
            if path.name.startswith("big_vision"):
                continue  # its reader is load_big_vision_weights, which made the golden
            if own:
                worst = check_own(folder, path.name)
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
