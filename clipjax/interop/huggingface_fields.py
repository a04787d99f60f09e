"""What a config.json and a preprocessor_config.json may say: every field that was looked at.

A field that is not here is refused by name (`family.refuse_unknown`), since it may change what a model
computes. `ANY` is a field that is read, or one that changes no output.
"""

from __future__ import annotations

from typing import Any

from clipjax.interop.family import ANY

GENERIC: dict[str, tuple[Any, ...]] = {
    # What transformers writes of any configuration, and (up to its release 4.30) of generation.
    **dict.fromkeys(
        (
            *("_name_or_path", "_commit_hash", "_attn_implementation_autoset", "architectures"),
            *("attn_implementation", "bad_words_ids", "begin_suppress_tokens", "bos_token_id"),
            *("chunk_size_feed_forward", "decoder_start_token_id", "diversity_penalty"),
            *("do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size"),
            *("eos_token_id", "exponential_decay_length_penalty", "finetuning_task"),
            *("forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label"),
            *("is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length"),
            *("model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams"),
            *("num_return_sequences", "output_attentions", "output_hidden_states"),
            *("output_scores", "pad_token_id", "prefix", "problem_type", "remove_invalid_values"),
            *("repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id"),
            *("suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss"),
            *("tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p"),
            *("torch_dtype", "torchscript", "transformers_version", "typical_p"),
            *("use_bfloat16", "use_cache"),
            # How weights are drawn at the start.
            *("initializer_range", "initializer_factor", "logit_scale_init_value"),
        ),
        ANY,
    ),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "pruned_heads": ({}, None),
}

MODEL = GENERIC | dict.fromkeys(
    (
        *("text_config", "vision_config", "text_config_dict", "vision_config_dict"),
        *("projection_dim", "hidden_size"),
    ),
    ANY,
)
_TOWER = GENERIC | dict.fromkeys(
    (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("hidden_act", "layer_norm_eps", "projection_dim", "projection_size"),
        *("attention_dropout", "dropout", "hidden_dropout_prob"),  # of training alone
    ),
    ANY,
)
TEXT = _TOWER | dict.fromkeys(("vocab_size", "max_position_embeddings"), ANY)
VISION = _TOWER | {
    "vision_use_head": (True,),
    "num_channels": (3,),
    **dict.fromkeys(("image_size", "patch_size", "num_patches"), ANY),
}

PREPROCESSOR = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "rescale_factor": (1 / 255, 0.00392156862745098),
    "resample": (2, 3),
    "do_pad": (False, None),
    **dict.fromkeys(("size", "crop_size", "do_center_crop", "do_normalize"), ANY),
    **dict.fromkeys(("image_mean", "image_std"), ANY),
    **dict.fromkeys(("patch_size", "max_num_patches"), ANY),  # Siglip2's, which the weights say too
    # How the library goes about it.
    **dict.fromkeys(("image_processor_type", "feature_extractor_type", "processor_class"), ANY),
    **dict.fromkeys(("do_convert_rgb", "data_format", "input_data_format", "device"), ANY),
    **dict.fromkeys(("default_to_square", "disable_grouping", "return_tensors"), ANY),
    **dict.fromkeys(("pad_size", "image_seq_length", "use_fast", "backend"), ANY),
    **dict.fromkeys(("image_processor", "tokenizer"), ANY),
}
