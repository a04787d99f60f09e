"""Makes the goldens of Hugging Face's further models: MetaCLIP 2, TIPS v2, DINOv3, and text towers.

As make.py, in the same environment: python make_towers.py [NAME ...]

Of a text tower the golden is its mean over the tokens that are no padding (Gemma in one direction: its last),
of DINOv3 its class token; all of unit length.
"""

import json
import sys

import numpy as np
import torch
import transformers
from make import MEAN, OUT, STD, N, fill, hf, pixels, unit, weights

WORDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 58, "eos_token_id": 57}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def store(name, model, manifest, preprocessor, inputs, **outputs):
    files = {"config.json": json.loads(model.config.to_json_string(use_diff=False))}
    if preprocessor is not None:
        files["preprocessor_config.json"] = preprocessor
    golden = {
        "family": type(model).__name__,
        "files": files,
        "tensors": manifest,
        "inputs": {"image_size": None, "context_length": None, "vocab_size": 60, "eos": 57} | inputs,
        "outputs": {k: [[float(f"{x:.8g}") for x in row] for row in v] for k, v in outputs.items()},
    }  # fmt: skip
    text = json.dumps(golden, separators=(",", ":")).replace('],"', '],\n"')
    (OUT / f"{name}.json").write_text(text + "\n")
    print(name, f"{(OUT / f'{name}.json').stat().st_size:,} bytes")


def text(name, config, length=12, last=False):
    model = transformers.AutoModel.from_config(config).eval()
    if config.model_type in ("mt5", "t5"):
        model = (transformers.MT5EncoderModel if config.model_type == "mt5" else
                 transformers.T5EncoderModel)(config).eval()  # fmt: skip
    manifest = fill(model)
    ids = torch.from_numpy(weights.texts(N, length, 60, 57)).long()
    mask = (ids != 0).long()
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    if last:
        pooled = hidden[torch.arange(N), mask.sum(1) - 1]
    else:
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    store(name, model, manifest, None, {"context_length": length}, text=unit(pooled))


def xlm_roberta(name):
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 14, "type_vocab_size": 1}
    text(name, transformers.XLMRobertaConfig(**SHAPE, **WORDS | {"pad_token_id": 0}, **sizes))


def jina(name):
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 64, "type_vocab_size": 1}
    text(name, transformers.JinaEmbeddingsV3Config(**SHAPE, **WORDS, **sizes))


def mt5(name):
    # Distances beyond the last bucket, and heads that are not width / heads.
    text(name, transformers.MT5Config(
        vocab_size=60, d_model=32, d_kv=6, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=57, relative_attention_num_buckets=8, relative_attention_max_distance=16,
    ), length=24)  # fmt: skip


def modernbert(name):
    text(name, transformers.ModernBertConfig(
        **SHAPE, **WORDS, cls_token_id=58, sep_token_id=57, num_hidden_layers=4, local_attention=6,
        max_position_embeddings=64,
    ), length=24)  # fmt: skip


def gemma(name):
    text(name, transformers.GemmaConfig(
        **SHAPE, **WORDS, num_hidden_layers=2, num_key_value_heads=1, head_dim=12,
        max_position_embeddings=64,
    ), last=True)  # fmt: skip


def gemma3(name, two_ways):
    text(name, transformers.Gemma3TextConfig(
        **SHAPE, **WORDS, num_hidden_layers=3, num_key_value_heads=2, head_dim=12,
        query_pre_attn_scalar=10, sliding_window=6, max_position_embeddings=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        use_bidirectional_attention=two_ways,
    ), length=24, last=not two_ways)  # fmt: skip


def dinov3(name, **changes):
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        patch_size=8, image_size=24, num_register_tokens=2, **changes,
    )).eval()  # fmt: skip
    manifest = fill(model)
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    std = np.array([0.229, 0.224, 0.225], np.float32)
    with torch.no_grad():
        image = model(pixel_values=pixels(24, mean, std)).pooler_output
    preprocessor = {"image_mean": mean.tolist(), "image_std": std.tolist()}
    store(name, model, manifest, preprocessor, {"image_size": 24}, image=unit(image))


def metaclip2(name):
    """With 2 as the number of the end token, which CLIP's own class takes for the highest."""
    text = {"vocab_size": 60, "num_hidden_layers": 2, "max_position_embeddings": 12,
            "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1, **SHAPE}  # fmt: skip
    vision = {"num_hidden_layers": 2, "image_size": 24, "patch_size": 8, **SHAPE}
    config = transformers.MetaClip2Config(text_config=text, vision_config=vision, projection_dim=16)
    hf(name, transformers.MetaClip2Model(config), MEAN, STD, 24, 12, 60, 2)


def tips(name):
    text = {"vocab_size": 60, "num_hidden_layers": 2, "max_position_embeddings": 12, **SHAPE}
    vision = {"hidden_size": 32, "num_attention_heads": 4, "mlp_ratio": 3, "num_hidden_layers": 2,
              "image_size": 24, "patch_size": 8, "num_register_tokens": 2}  # fmt: skip
    config = transformers.Tipsv2Config(text_config=text, vision_config=vision)
    model = transformers.Tipsv2Model(config).eval()
    manifest = fill(model)
    ids = torch.from_numpy(weights.texts(N, 12, 60, None)).long()
    ids[1, 7:] = 0
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    with torch.no_grad():
        out = model(
            input_ids=ids, pixel_values=pixels(24, zero, one), attention_mask=(ids != 0).long()
        )
    inputs = {"image_size": 24, "context_length": 12, "eos": None, "cut": [1, 7]}
    preprocessor = {"do_normalize": False}
    store(name, model, manifest, preprocessor, inputs, image=unit(out.image_embeds),
          text=unit(out.text_embeds), logits=out.logits_per_image.double().numpy())  # fmt: skip


GOLDENS = {
    "hf_metaclip2": metaclip2,
    "hf_tips": tips,
    "hf_dinov3": dinov3,
    "hf_dinov3_gated": lambda name: dinov3(name, use_gated_mlp=True, hidden_act="silu"),
    "hf_xlm_roberta": xlm_roberta,
    "hf_jina": jina,
    "hf_mt5": mt5,
    "hf_modernbert": modernbert,
    "hf_gemma": gemma,
    "hf_gemma3": lambda name: gemma3(name, False),
    "hf_embeddinggemma": lambda name: gemma3(name, True),
}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or GOLDENS:
        GOLDENS[name](name)
