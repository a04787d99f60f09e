"""What an open_clip_config.json may say: every field that was looked at, as `huggingface_fields` has them."""

from __future__ import annotations

from typing import Any

from clipjax.interop.family import ANY

_EITHER: dict[str, tuple[Any, ...]] = {
    # What OpenCLIP's towers can be, and ours cannot.
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner"), (False,)),
    **dict.fromkeys(("scale_attn", "scale_fc", "final_ln_after_pool"), (False,)),
    "ls_init_value": (None,),
    "block_type": (None, "default"),
    "pool_type": ("tok", "argmax", "eos", "last"),
    # What is read.
    **dict.fromkeys(("width", "layers", "mlp_ratio", "act_kwargs", "norm_kwargs"), ANY),
    "output_tokens": ANY,
}
VISION = _EITHER | {
    "pos_embed_type": ("learnable",),
    "attentional_pool": (False,),
    "global_average_pool": (False,),  # this and the next are of releases before 2.20
    "input_patchnorm": (False,),
    "timm_pool": ("map", "token"),
    "timm_proj": ("none", "linear", "", None),
    **dict.fromkeys(("head_width", "patch_size", "image_size", "no_ln_pre"), ANY),
    **dict.fromkeys(("timm_model_name", "timm_proj_bias"), ANY),
    **dict.fromkeys(("attn_pooler_queries", "attn_pooler_heads"), ANY),
    # What only training sees.
    **dict.fromkeys(("patch_dropout", "timm_model_pretrained", "timm_drop"), ANY),
    "timm_drop_path": ANY,
}
TEXT = _EITHER | {
    "embed_cls": (False,),
    "hf_model_name": (None, ""),
    "tokenizer_mode": (None, ""),
    **dict.fromkeys(("context_length", "vocab_size", "heads", "pad_id", "eos_id"), ANY),
    **dict.fromkeys(("no_causal_mask", "proj_bias", "proj_type"), ANY),
    **dict.fromkeys(("hf_tokenizer_name", "tokenizer_kwargs"), ANY),
    # What says something of hf_model_name alone.
    **dict.fromkeys(("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"), ANY),
}
DECODER = TEXT | {
    "mlp_ratio": (4,),
    **dict.fromkeys(("dim_head", "n_queries", "attn_pooler_heads"), ANY),
}
MODEL = {
    "nonscalar_logit_scale": (False,),
    "quick_gelu": (False, True),
    **dict.fromkeys(("embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg"), ANY),
    **dict.fromkeys(("custom_text", "init_logit_scale", "init_logit_bias"), ANY),
    **dict.fromkeys(("cast_dtype", "output_dict", "preprocess_cfg"), ANY),
}
PREPROCESS = {
    "mode": ("RGB",),
    **dict.fromkeys(("size", "mean", "std", "interpolation", "resize_mode"), ANY),
    "fill_color": ANY,  # of a resize_mode that is refused
}
