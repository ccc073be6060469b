"""Tiny text models in folders, with tokenizers, and rows of differing length."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from support.pretrained import settle

WORDS = "my card is lost where new how do i pay with it not why was there a fee".split()
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; texts, and pairs of texts, are framed by [CLS] and [SEP]."""
    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=32,
    )


def tiny_bert(folder: Path, layers: int = 4) -> Path:
    """Saves a BERT of a few layers, and its tokenizer."""
    set_seed(0)
    config = BertConfig(
        vocab_size=len(_SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    settle(BertForSequenceClassification(config)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_llama(folder: Path, layers: int = 4) -> Path:
    """Saves a Llama of a few layers, and its tokenizer."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(_SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    settle(LlamaForCausalLM(config)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sentences(count: int) -> list[str]:
    """Texts of 2 to 9 words."""
    return [" ".join(WORDS[(3 * row + word) % len(WORDS)] for word in range(2 + row % 8)) for row in range(count)]
