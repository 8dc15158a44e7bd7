"""Tokenizers and a model small enough to build in a test, in milliseconds and without a file."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from tests.templates import FAMILIES

PAD = "<|pad|>"
CORPUS = [
    "system\nYou are a helpful assistant.\n",
    "user\nHow many legs has a spider?\n\nassistant\nA spider has eight legs.\n",
    "user\n\nassistant\n\n  the answer is 42 and the answer is yes \n\n",
    "[INST] What is the capital of France? [/INST] The capital of France is Paris.",
    "[INST] hello [/INST] hello there, how are you today?\n\n\n",
] * 4


def make_byte_tokenizer(family: str = "chatml") -> PreTrainedTokenizerFast:
    """Id b is byte b; 256 is BOS, 257 EOS, 258 padding, then come the family's other control tokens."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    _make_byte_level(backend)
    return _wrap(backend, family)


@cache
def _bpe_backend() -> str:
    backend = Tokenizer(models.BPE())
    _make_byte_level(backend)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


def make_bpe_tokenizer(family: str = "chatml") -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges cross white space, so that tokens straddle turns; offsets are trimmed as in GPT-2."""
    return _wrap(Tokenizer.from_str(_bpe_backend()), family)


@cache
def _sentencepiece_backend() -> str:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str().replace('"special":true', '"special":false')  # bytes are no control tokens


def make_sentencepiece_like_tokenizer(family: str = "mistral", prefix: str = "legacy") -> PreTrainedTokenizerFast:
    """BPE over `▁` with byte fallback that begins texts with a space and adds BOS.

    `prefix`: "legacy" puts the space after every control token, too (Llama 2); "first" only at the beginning.
    """
    backend = Tokenizer.from_str(_sentencepiece_backend())
    if prefix == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = _wrap(backend, family, unk_token="<unk>")
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    return tokenizer


def make_tiny_model(**overrides) -> LlamaForCausalLM:
    """A seeded float32 Llama with grouped-query attention: 29,024 parameters, 20,736 with `tie_word_embeddings=True`."""
    config = LlamaConfig(
        **{
            "vocab_size": len(make_byte_tokenizer()),
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "pad_token_id": 258,
            "attn_implementation": "sdpa",
            **overrides,
        }
    )
    set_seed(0)
    return LlamaForCausalLM(config)


def _wrap(backend: Tokenizer, family: str, **special) -> PreTrainedTokenizerFast:
    template, controls = FAMILIES[family]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=controls[0],
        eos_token=controls[1],
        additional_special_tokens=controls[2:],
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = template
    return tokenizer


def _make_byte_level(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else the next free character from 256 on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    free = iter(range(256, 512))
    return [chr(byte) if byte in prints else chr(next(free)) for byte in range(256)]
