"""Generated conversations, and what a model must learn to write from them."""

from hypothesis import strategies as st

from tests import tiny

WORDS = ["a", "legs", "the answer is 42", "é", "世界", "👩‍👩‍👧", "שלום", "e\u0301", "\u2028", "\u00a0", "{{ name }}", "\\n"]
SPACES = [" ", "  ", "\n", "\n\n", "\t", "\r\n"]
CONTROL = ["<|im_end|>", "<|im_start|>", "</s>", "<s>", "<|eot_id|>", "<end_of_turn>", "<|pad|>", "<|im_", "end|>", "[INST]"]

# tokenizer × template, where they meet in practice
PAIRS = {
    "byte-chatml": lambda: tiny.make_byte_tokenizer("chatml"),
    "byte-generation": lambda: tiny.make_byte_tokenizer("chatml-generation"),
    "byte-llama3": lambda: tiny.make_byte_tokenizer("llama3"),
    "bpe-chatml": lambda: tiny.make_bpe_tokenizer("chatml"),
    "bpe-generation": lambda: tiny.make_bpe_tokenizer("chatml-generation"),
    "bpe-llama3": lambda: tiny.make_bpe_tokenizer("llama3"),
    "bpe-mistral": lambda: tiny.make_bpe_tokenizer("mistral"),
    "bpe-gemma": lambda: tiny.make_bpe_tokenizer("gemma"),
    "sentencepiece-mistral": lambda: tiny.make_sentencepiece_like_tokenizer("mistral"),
    "sentencepiece-gemma": lambda: tiny.make_sentencepiece_like_tokenizer("gemma"),
    "sentencepiece-first-mistral": lambda: tiny.make_sentencepiece_like_tokenizer("mistral", prefix="first"),
    "sentencepiece-first-gemma": lambda: tiny.make_sentencepiece_like_tokenizer("gemma", prefix="first"),
}


def contents(fragments: list[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(fragments), max_size=6).map("".join)


@st.composite
def chats(draw, family: str, fragments: list[str]):
    """A conversation that the family's template accepts: perhaps a system turn, tool turns where it has them."""
    messages = []
    if family != "gemma" and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(contents(fragments))})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(contents(fragments))})
        if family == "chatml" and draw(st.booleans()):
            call = {"function": {"name": "find", "arguments": {"query": draw(contents(fragments))}}}
            messages.append({"role": "assistant", "content": draw(contents(fragments)), "tool_calls": [call]})
            messages.append({"role": "tool", "content": draw(contents(fragments))})
        messages.append({"role": "assistant", "content": draw(contents(fragments))})
    return messages


def family_of(tokenizer) -> str:
    """The family by its stop token."""
    return {"<|im_end|>": "chatml", "<|eot_id|>": "llama3", "</s>": "mistral", "<eos>": "gemma"}[tokenizer.eos_token]


def answer(message: dict, family: str) -> str:
    """What the family's template leaves the model to write for an assistant turn, stop token included."""
    if family == "chatml":
        import json

        calls = [f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>" for call in message.get("tool_calls", [])]
        return message["content"] + "".join(calls) + "<|im_end|>"
    if family == "llama3":
        return message["content"].strip() + "<|eot_id|>"
    if family == "gemma":
        return message["content"].strip() + "<end_of_turn>"
    return " " + message["content"] + "</s>"
