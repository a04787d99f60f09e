"""Makes the goldens: what each reference library computes with weights made from their names.

Run in an environment with the `interop` extra, from this folder:

    python make.py [NAME ...]

writes ../goldens/NAME.json: the files beside the weights, every tensor's name, shape and dtype, the
inputs' sizes, and the library's image embeddings, text embeddings and logits.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import named_weights as weights
import open_clip
import transformers

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


def store(name, family, files, manifest, inputs, image, text, logits, **more):
    outputs = {"image": image, "text": text, "logits": logits} | more
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


# OpenAI and OpenCLIP


def open_clip_model(name, family, model, config, mean, std, length, vocab_size, eos, extra=()):
    model = model.eval()
    manifest = fill(model) | dict(extra)
    size = config["vision_cfg"]["image_size"]
    inputs = {"image_size": size, "context_length": length, "vocab_size": vocab_size, "eos": eos}
    ids = torch.from_numpy(weights.texts(N, length, vocab_size, eos)).long()
    with torch.no_grad():
        image = model.encode_image(pixels(size, mean, std), normalize=True)
        text = model.encode_text(ids, normalize=True)
        logits = model.logit_scale.exp() * image @ text.T
        logits = logits if model.logit_bias is None else logits + model.logit_bias
    preprocess = {"mean": mean.tolist(), "std": std.tolist()}
    files = {"open_clip_config.json": {"model_cfg": config, "preprocess_cfg": preprocess}}
    if family == "OpenAI":
        files = {}
    store(
        name, family, files, manifest, inputs, *(x.double().numpy() for x in (image, text, logits))
    )


def open_clip_config(**changes):
    vision = {"image_size": 24, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8}
    text = {"context_length": 12, "vocab_size": 60, "width": 32, "heads": 4, "layers": 2}
    vision |= changes.pop("vision", {})
    if vision["width"] % 12:
        vision["head_width"] = 8
    text |= changes.pop("text", {})
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text} | changes


def open_clip_vit(name, eos, **changes):
    config = open_clip_config(**changes)
    facts = dict(config)
    kind = open_clip.CustomTextCLIP if facts.pop("custom_text", False) else open_clip.CLIP
    open_clip_model(name, kind.__name__, kind(**facts), config, MEAN, STD, 12, 60, eos)


def openai(name, layers, width, size):
    """Built as OpenCLIP builds OpenAI's: from a state dict's shapes alone."""
    config = open_clip_config(quick_gelu=True, embed_dim=16)
    vision = {"layers": layers, "width": width, "image_size": size, "head_width": 64}
    config["vision_cfg"] |= vision
    config["text_cfg"] |= {"width": 64, "heads": 1}
    state = open_clip.CLIP(**config).state_dict()
    model = open_clip.model.build_model_from_openai_state_dict(state, cast_dtype=torch.float32)
    scalars = {n: [[], "int64"] for n in ("input_resolution", "context_length", "vocab_size")}
    open_clip_model(name, "OpenAI", model.float(), config, MEAN, STD, 12, 60, 59, scalars)


def with_timm_tower(config, size=48, **sizes):
    """A CustomTextCLIP whose image tower is timm's, small: width 48, 2 blocks, or as `sizes` say."""
    make = open_clip.timm_model.timm.create_model

    def tiny(name, **settings):
        return make(name, **{"embed_dim": 48, "depth": 2, "img_size": size} | sizes, **settings)

    open_clip.timm_model.timm.create_model = tiny
    model = open_clip.CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"})
    open_clip.timm_model.timm.create_model = make
    return model


def open_clip_timm(name, timm_name, pool, size=48, **changes):
    """A tower of timm's whose own classifier is the projection: PE core, EVA, MobileCLIP 2 L."""
    config = open_clip_config(custom_text=True, **changes)
    config["vision_cfg"] = {"image_size": size, "timm_model_name": timm_name,
                            "timm_model_pretrained": False, "timm_pool": pool,
                            "timm_proj": None}  # fmt: skip
    model = with_timm_tower(config, size)
    open_clip_model(name, "CustomTextCLIP", model, config, MEAN, STD, 12, 60, 59)


def open_clip_siglip(name, timm_name="vit_base_patch16_siglip_224", **text):
    words = {"width": 32, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
             "norm_kwargs": {"eps": 1e-6}} | text  # fmt: skip
    config = open_clip_config(embed_dim=48, custom_text=True, init_logit_bias=-10, text=words)
    config["vision_cfg"] = {"image_size": 48, "timm_model_name": timm_name,
                            "timm_model_pretrained": False, "timm_pool": "map",
                            "timm_proj": "none"}  # fmt: skip
    model = with_timm_tower(config)
    if name is None:
        return model.eval()
    open_clip_model(name, "CustomTextCLIP", model, config, HALF, HALF, 12, 60, None)
    return model


def open_clip_coca(name, width):
    """`width`: the image tower's; equal to the decoder's, PyTorch packs the pooler's projections."""
    vision = {"width": width, "attentional_pool": True, "attn_pooler_queries": 5,
              "attn_pooler_heads": 4, "output_tokens": True}  # fmt: skip
    config = open_clip_config(
        embed_dim=32, custom_text=True, vision=vision,
        text={"embed_cls": True, "output_tokens": True},
        multimodal_cfg={"context_length": 12, "vocab_size": 60, "width": 32, "heads": 4,
                        "layers": 3, "attn_pooler_heads": 4},
    )  # fmt: skip
    model = open_clip.CoCa(**{k: v for k, v in config.items() if k != "custom_text"}).eval()
    manifest = fill(model)
    ids = torch.from_numpy(weights.texts(N, 12, 60, 59)).long()
    with torch.no_grad():
        out = model(pixels(24, MEAN, STD), ids)
    image, text = out["image_features"], out["text_features"]
    logits = out["logit_scale"] * image @ text.T
    inputs = {"image_size": 24, "context_length": 12, "vocab_size": 60, "eos": 59}
    preprocess = {"mean": MEAN.tolist(), "std": STD.tolist()}
    files = {"open_clip_config.json": {"model_cfg": config, "preprocess_cfg": preprocess}}
    outputs = [x.double().numpy() for x in (image, text, logits)]
    # Of every caption, the logits of the words up to its end; what stands on padding is no one's.
    captions = torch.cat([row[: 9 - i] for i, row in enumerate(out["logits"])]).double().numpy()
    store(name, "CoCa", files, manifest, inputs, *outputs, captions=captions[:, :8])


def big_vision_siglip(name, scanned):
    """Weights under big_vision's names, brought into OpenCLIP's model by OpenCLIP's own reader."""
    width, text, heads, depth = 48, 32, 16, 2
    model = open_clip_siglip(None, "vit_giantopt_patch16_siglip_256",
                             act_kwargs={"approximate": "tanh"})  # fmt: skip
    shapes = {"t": [1], "b": [1]}

    def dense(prefix, *shape):
        shapes[f"{prefix}/kernel"], shapes[f"{prefix}/bias"] = list(shape), [shape[-1]]

    def norm(prefix, width):
        shapes[f"{prefix}/scale"], shapes[f"{prefix}/bias"] = [width], [width]

    def attention(prefix, width, heads):
        for n in ("query", "key", "value"):
            shapes[f"{prefix}/{n}/kernel"] = [width, heads, width // heads]
            shapes[f"{prefix}/{n}/bias"] = [heads, width // heads]
        dense(f"{prefix}/out", heads, width // heads, width)

    def mlp(prefix, width):
        dense(f"{prefix}/Dense_0", width, 4 * width)
        dense(f"{prefix}/Dense_1", 4 * width, width)

    def encoder(prefix, width, heads):
        for i in range(depth):
            block = f"{prefix}/encoderblock_{i}"
            norm(f"{block}/LayerNorm_0", width)
            norm(f"{block}/LayerNorm_1", width)
            attention(f"{block}/MultiHeadDotProductAttention_0", width, heads)
            mlp(f"{block}/MlpBlock_0", width)
        norm(f"{prefix}/encoder_norm", width)

    dense("img/embedding", 16, 16, 3, width)
    shapes["img/pos_embedding"] = [1, 9, width]
    encoder("img/Transformer", width, heads)
    shapes["img/MAPHead_0/probe"] = [1, 1, width]
    attention("img/MAPHead_0/MultiHeadDotProductAttention_0", width, heads)
    norm("img/MAPHead_0/LayerNorm_0", width)
    mlp("img/MAPHead_0/MlpBlock_0", width)
    shapes["txt/Embed_0/embedding"] = [60, text]
    shapes["txt/pos_embedding"] = [1, 12, text]
    encoder("txt/Encoder_0", text, 4)
    dense("txt/head", text, width)
    if scanned:
        for key in [k for k in shapes if "encoderblock_0/" in k]:
            rest = [
                shapes.pop(key.replace("encoderblock_0/", f"encoderblock_{i}/"))
                for i in range(depth)
            ]
            shapes[key.replace("encoderblock_0/", "encoderblock/")] = [depth, *rest[0]]
    manifest = {f"params/{k}": [shape, "float32"] for k, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "weights.npz")
        np.savez(path, **{k: weights.tensor(k, tuple(s), d) for k, (s, d) in manifest.items()})
        open_clip.convert.load_big_vision_weights(model, path)
    inputs = {"image_size": 48, "context_length": 12, "vocab_size": 60, "eos": None}
    with torch.no_grad():
        image = model.encode_image(pixels(48, HALF, HALF), normalize=True)
        ids = torch.from_numpy(weights.texts(N, 12, 60, None)).long()
        text = model.encode_text(ids, normalize=True)
        logits = model.logit_scale.exp() * image @ text.T + model.logit_bias
    outputs = (x.double().numpy() for x in (image, text, logits))
    store(name, "big_vision", {}, manifest, inputs, *outputs)


GOLDENS = {
    "hf_clip_quick": lambda name: hf_clip(name, "quick_gelu", 2),
    "hf_clip_exact": lambda name: hf_clip(name, "gelu", 57),
    "hf_siglip": hf_siglip,
    "hf_siglip2": hf_siglip2,
    "openai_vit": lambda name: openai(name, 2, 64, 24),
    "openai_resnet": lambda name: openai(name, [2, 1, 2, 1], 8, 64),
    "open_clip_vit": lambda name: open_clip_vit(
        name, 59, vision={"mlp_ratio": 2.7}, text={"act_kwargs": {"approximate": "tanh"}}
    ),
    "open_clip_quick_eos": lambda name: open_clip_vit(
        name, 2, quick_gelu=True, init_logit_bias=-10, text={"pool_type": "eos", "eos_id": 2}
    ),
    "open_clip_custom": lambda name: open_clip_vit(
        name, None, custom_text=True, vision={"no_ln_pre": True, "norm_kwargs": {"eps": 1e-6}},
        text={"pool_type": "last", "no_causal_mask": True, "proj_bias": True},
    ),
    "open_clip_siglip": open_clip_siglip,
    "open_clip_siglip2": lambda name: open_clip_siglip(
        name, "vit_giantopt_patch16_siglip_256", act_kwargs={"approximate": "tanh"}
    ),
    "open_clip_pe": lambda name: open_clip_timm(name, "vit_pe_core_base_patch16_224", "map"),
    "open_clip_eva02": lambda name: open_clip_timm(name, "eva02_base_patch16_clip_224", "token"),
    "open_clip_eva": lambda name: open_clip_timm(name, "eva_giant_patch14_clip_224", "token", 42),
    "open_clip_eva02_e": lambda name: open_clip_timm(
        name, "eva02_enormous_patch14_clip_224", "token", 42
    ),
    "open_clip_mobile2_l": lambda name: open_clip_timm(
        name, "vit_large_patch14_clip_224", "token", 42, text={"no_causal_mask": True}
    ),
    "open_clip_coca": lambda name: open_clip_coca(name, 48),
    "open_clip_coca_packed": lambda name: open_clip_coca(name, 32),
    "big_vision_siglip": lambda name: big_vision_siglip(name, scanned=False),
    "big_vision_scanned": lambda name: big_vision_siglip(name, scanned=True),
}  # fmt: skip

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or GOLDENS:
        GOLDENS[name](name)
