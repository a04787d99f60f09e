"""Makes the goldens: what each reference library computes with weights made from their names.

Run in an environment with the `interop` extra, from this folder:

    python make.py [NAME ...]

writes ../goldens/NAME.json: the files beside the weights, every tensor's name, shape and dtype, the
inputs' sizes, and the library's image embeddings, text embeddings and logits.
"""

import json
import sys
from pathlib import Path

import numpy as np
import stub
import torch

stub.install()
sys.path.insert(0, str(Path(__file__).parent.parent))
import transformers  # noqa: E402
import named_weights as weights  # noqa: E402

OUT = Path(__file__).parent.parent / "goldens"
N = 3
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
HALF = np.full(3, 0.5, np.float32)


def fill(model):
    """Gives every tensor of a model its weights; returns the manifest."""
    state = model.state_dict()
    manifest = {}
    with torch.no_grad():
        for name, tensor in state.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            tensor.copy_(torch.from_numpy(weights.tensor(name, tuple(tensor.shape), dtype)))
            manifest[name] = [list(tensor.shape), dtype]
    return manifest


def pixels(size, mean, std):
    images = weights.pictures(N, size).astype(np.float32) / 255
    return torch.from_numpy(((images - mean) / std).transpose(0, 3, 1, 2).copy())


def store(name, family, files, manifest, inputs, image, text, logits):
    outputs = {"image": image, "text": text, "logits": logits}
    golden = {
        "family": family,
        "files": files,
        "tensors": manifest,
        "inputs": inputs,
        "outputs": {k: [[float(f"{x:.8g}") for x in row] for row in v] for k, v in outputs.items()},
    }
    text = json.dumps(golden, separators=(",", ":")).replace('],"', '],\n"')
    (OUT / f"{name}.json").write_text(text + "\n")
    print(name, f"{(OUT / f'{name}.json').stat().st_size:,} bytes")


def unit(x):
    return (x / x.norm(dim=-1, keepdim=True)).detach().numpy().astype(np.float64)


# Hugging Face


def hf_clip(name, act, eos):
    text = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 12, "hidden_act": act,
            "eos_token_id": eos, "bos_token_id": 0, "pad_token_id": 1}  # fmt: skip
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
              "num_attention_heads": 3, "image_size": 24, "patch_size": 8, "hidden_act": act}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    hf(name, transformers.CLIPModel(config), MEAN, STD, 24, 12, 60, 59 if eos == 2 else eos)


def hf_siglip(name):
    text = {"vocab_size": 60, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 12, "projection_size": 32}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3,
              "num_attention_heads": 4, "image_size": 24, "patch_size": 8}  # fmt: skip
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    hf(name, transformers.SiglipModel(config), HALF, HALF, 24, 12, 60, None)


def hf_siglip2(name):
    text = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 12, "projection_size": 32}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_patches": 9, "patch_size": 8}  # fmt: skip
    config = transformers.Siglip2Config(text_config=text, vision_config=vision)
    hf(name, transformers.Siglip2Model(config), HALF, HALF, 24, 12, 60, None, patch=8)


def hf(name, model, mean, std, size, length, vocab_size, eos, patch=None):
    model = model.eval()
    manifest = fill(model)
    inputs = {"image_size": size, "context_length": length, "vocab_size": vocab_size, "eos": eos}
    ids = torch.from_numpy(weights.texts(N, length, vocab_size, eos)).long()
    arguments = {"input_ids": ids, "pixel_values": pixels(size, mean, std)}
    if patch is not None:  # transformers' processor cuts into patches
        grid = size // patch
        x = arguments["pixel_values"].permute(0, 2, 3, 1).reshape(N, grid, patch, grid, patch, 3)
        arguments["pixel_values"] = x.permute(0, 1, 3, 2, 4, 5).reshape(N, grid * grid, -1)
        arguments["pixel_attention_mask"] = torch.ones(N, grid * grid, dtype=torch.long)
        arguments["spatial_shapes"] = torch.tensor([[grid, grid]] * N)
    with torch.no_grad():
        out = model(**arguments)
    files = {"config.json": json.loads(model.config.to_json_string(use_diff=True))}
    files["preprocessor_config.json"] = {"image_mean": mean.tolist(), "image_std": std.tolist()}
    image, text = unit(out.image_embeds), unit(out.text_embeds)
    store(name, type(model).__name__, files, manifest, inputs, image, text,
          out.logits_per_image.double().numpy())  # fmt: skip


GOLDENS = {
    "hf_clip_quick": lambda name: hf_clip(name, "quick_gelu", 2),
    "hf_clip_exact": lambda name: hf_clip(name, "gelu", 57),
    "hf_siglip": hf_siglip,
    "hf_siglip2": hf_siglip2,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or GOLDENS:
        GOLDENS[name](name)
