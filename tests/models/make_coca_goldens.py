"""Makes goldens/coca.npz with open_clip: tiny CoCas of random weights, inputs and what comes out.

Run with a Python that has torch and open_clip_torch: `python tests/models/make_coca_goldens.py`.
Weights are rounded to float16 first, so that they are stored exactly and small.
"""

import sys
from pathlib import Path

import numpy as np

CASES = {
    # name: (attentional_pool, width of the image tower, whether the mask of the class token is right)
    "single_legacy": (True, 24, False),
    "single": (True, 24, True),
    "parallel": ("parallel", 16, True),  # open_clip's poolers apart need equal widths
    "cascade": ("cascade", 16, True),
}


def main():
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "interop" / "reference"))
    import stub

    stub.install()
    from open_clip.coca_model import CoCa

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    text = rng.integers(3, 64, (3, 8)).astype(np.int64)
    text[:, 0] = 1
    for row, end in enumerate((4, 6, 7)):
        text[row, end], text[row, end + 1 :] = 2, 0
    out = {"image": image, "text": text.astype(np.int32)}
    pixels = torch.from_numpy((image / 255.0 - 0.5).astype(np.float32) / 0.5).permute(0, 3, 1, 2)
    for name, (pool, width, right_mask) in CASES.items():
        torch.manual_seed(0)
        model = CoCa(
            embed_dim=16,
            multimodal_cfg={"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2},
            text_cfg={"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2,
                      "embed_cls": True, "output_tokens": True},
            vision_cfg={"image_size": 16, "patch_size": 8, "width": width, "layers": 2, "head_width": 8,
                        "attentional_pool": pool, "attn_pooler_queries": 6, "attn_pooler_heads": 4,
                        "output_tokens": True},
        ).eval()  # fmt: skip
        model.text.correct_cls_mask = right_mask
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.ndim and key != "logit_scale":
                    # Norms and biases too are random, or a wrong place for them would go unseen.
                    centre = 1.0 if "ln_" in key and key.endswith("weight") else 0.0
                    noise = torch.randn_like(parameter) * 0.25 + centre
                    parameter.copy_(noise.half().float())
            result = model(pixels, torch.from_numpy(text))
        for key, value in model.state_dict().items():
            out[f"{name}/weights/{key}"] = value.numpy().astype(np.float16)
        out[f"{name}/image_features"] = result["image_features"].reshape(3, -1).numpy()
        out[f"{name}/text_features"] = result["text_features"].numpy()
        out[f"{name}/logits"] = result["logits"].numpy()
    target = Path(__file__).parent / "goldens" / "coca.npz"
    np.savez_compressed(target, **out)
    print(target, target.stat().st_size)


if __name__ == "__main__":
    main()
