"""A tokenizer of single characters that fits the tiny models' 97 ids, with a chat template or without one."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["CHAT_TEMPLATE", "character_tokenizer"]

_CHARACTERS = (string.ascii_letters + string.digits + " \n" + string.punctuation)[:92]
CHAT_TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.role }}:{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant:{% endif %}"
)


def character_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Ids 0 to 4 are <pad>, <bos>, <eos>, <turn>, <end>; then 92 characters."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<turn>", "<end>", *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<turn>", "<end>"],
    )
    made.chat_template = chat_template
    return made
