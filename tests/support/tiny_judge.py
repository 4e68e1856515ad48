"""A judge of VideoScore2's class, tiny and random: what its folder holds, with a tokenizer of single bytes."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
SPECIAL = [f"<|{name}|>" for name in NAMES]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_judge(folder: Path) -> Path:
    """Write a random Qwen2.5-VL of one block, with its processor, and return the folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: number for number, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    ids = dict(zip(NAMES, fast.convert_tokens_to_ids(SPECIAL), strict=True))
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1, "rope_parameters": rope}
    text |= {"vocab_size": len(fast), "bos_token_id": None, "eos_token_id": ids["endoftext"], "pad_token_id": 0}
    seeing = {"depth": 1, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4, "window_size": 16}
    sizes = {"hidden_size": 16, "intermediate_size": 32}
    places = ("image", "video", "vision_start", "vision_end")
    config = Qwen2_5_VLConfig(
        text_config=sizes | text,
        vision_config=sizes | seeing | {"fullatt_block_indexes": [0]},
        **{f"{name}_token_id": ids.get(name, ids.get(f"{name}_pad")) for name in places},
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    area = {"size": {"shortest_edge": 64, "longest_edge": 4096}, "patch_size": 4}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**area), fast, Qwen2VLVideoProcessor(**area), chat_template=TEMPLATE
    )
    processor.save_pretrained(folder)
    return folder
