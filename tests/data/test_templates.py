"""Every template of the table: its text, its mask, its ids, and what it makes of a tokenizer.

In goldens `[…]` is trained; `{…}` at its end is a stop token that is trained but not written.
"""

import importlib.util
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from tests import tiny
from tests.data.chats import CONTROL, SPACES, WORDS, contents
from tests.templates import CHATML
from tunesmith.data.encode import Encoding, encode_batch
from tunesmith.data.render import render, render_prompt
from tunesmith.data.report import Report
from tunesmith.data.templates import ALIASES, NO_BOS, TEMPLATES, named_template, read_template, use_template
from tunesmith.data.tokenize import IGNORE_INDEX, tokenize
from tunesmith.errors import TemplateError
from tunesmith.evaluate.generate import template_stop_id

TWO = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]
SYSTEM = {"role": "system", "content": "S"}
IM = "<|im_start|>"
ROLE = "<|start_of_role|>"
TURN = "<|START_OF_TURN_TOKEN|>"
QWEN = f"{IM}system\nS<|im_end|>\n{IM}user\nQ1<|im_end|>\n{IM}assistant\n[A1<|im_end|>]\n" + (
    f"{IM}user\nQ2<|im_end|>\n{IM}assistant\n[A2<|im_end|>]\n"
)
LLAMA2 = "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST] [A1</s>]<s>[INST] Q2 [/INST] [A2</s>]"

# The chat S, Q1, A1, Q2, A2 (without S where the template has no place for it).
GOLDENS = {
    "vanilla": "<s>Q2[A2</s>]",
    "default": "<s>S\nHuman: Q1\nAssistant: [A1</s>]\n<s>Human: Q2\nAssistant: [A2</s>]",
    "llama2": LLAMA2,
    "llama2_zh": LLAMA2,
    "alpaca": "<s>S\n\n### Instruction:\nQ1\n\n### Response:\n[A1</s>]"
    "\n\n<s>### Instruction:\nQ2\n\n### Response:\n[A2</s>]",
    "vicuna": "<s>SUSER: Q1 ASSISTANT: [A1</s>]<s>USER: Q2 ASSISTANT: [A2</s>]",
    "belle": "<s>S\n\nHuman: Q1\n\nBelle: [A1</s>]\n\n<s>Human: Q2\n\nBelle: [A2</s>]",
    "linly": "<s>S\nUser: Q1\nBot: [A1</s>]\n<s>User: Q2\nBot: [A2</s>]",
    "billa": "<s>S\nHuman: Q1\nAssistant: [A1</s>]\n<s>Human: Q2\nAssistant: [A2</s>]",
    "ziya": "<s>S\n<human>:Q1\n<bot>:[A1</s>]\n<s><human>:Q2\n<bot>:[A2</s>]",
    "aquila": "<s>S###Human: Q1###Assistant: [A1</s>]###<s>Human: Q2###Assistant: [A2</s>]",
    "intern": "<s>S<eoa>\n<|User|>:Q1<eoh>\n<|Bot|>:[A1<eoa>]\n<s><|User|>:Q2<eoh>\n<|Bot|>:[A2<eoa>]",
    "baichuan": "<s>S<reserved_102>Q1<reserved_103>[A1{</s>}]<s><reserved_102>Q2<reserved_103>[A2</s>]",
    "baichuan2": "<s>S<reserved_106>Q1<reserved_107>[A1{</s>}]<s><reserved_106>Q2<reserved_107>[A2</s>]",
    "starchat": "<s><|system|>\nS<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>[A1<|end|>]"
    "\n<s><|user|>\nQ2<|end|>\n<|assistant|>[A2<|end|>]",
    "chatml": f"<s>{IM}system\nS<|im_end|>\n{IM}user\nQ1<|im_end|>\n{IM}assistant\n[A1<|im_end|>]"
    f"\n<s>{IM}user\nQ2<|im_end|>\n{IM}assistant\n[A2<|im_end|>]",
    "chatglm2": "<s>[gMASK]sopS\n\n[Round 0]\n\n问：Q1\n\n答：[A1{</s>}]\n\n<s>[Round 1]\n\n问：Q2\n\n答：[A2</s>]",
    "xverse": "<s>SHuman: Q1\n\nAssistant: [A1</s>]<s>Human: Q2\n\nAssistant: [A2</s>]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[A1<|eot_id|>]"
    "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[A2<|eot_id|>]",
    "llama4": "<s><|header_start|>system<|header_end|>\n\nS<|eot|><|header_start|>user<|header_end|>\n\nQ1<|eot|>"
    "<|header_start|>assistant<|header_end|>\n\n[A1<|eot|>]<|header_start|>user<|header_end|>\n\nQ2<|eot|>"
    "<|header_start|>assistant<|header_end|>\n\n[A2<|eot|>]",
    "qwen": QWEN,
    "qwen3": f"{IM}system\nS<|im_end|>\n{IM}user\nQ1<|im_end|>\n{IM}assistant\nA1<|im_end|>\n"
    f"{IM}user\nQ2<|im_end|>\n{IM}assistant\n[<think>\n\n</think>\n\nA2<|im_end|>]\n",  # the last turn only
    "qwen3_nothink": QWEN,
    "smollm": QWEN,
    "smollm2": QWEN,
    "yi": QWEN,
    "gemma": "<s><start_of_turn>user\nS\n\nQ1<end_of_turn>\n<start_of_turn>model\n[A1<end_of_turn>]\n"
    "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n[A2<end_of_turn>]\n",
    "mistral": "<s>[INST] S\n\nQ1[/INST][ A1</s>][INST] Q2[/INST][ A2</s>]",
    "ministral": "<s>[INST]S\n\nQ1[/INST][A1</s>][INST]Q2[/INST][A2</s>]",
    "phi": "<|system|>\nS<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\n[A1<|end|>]\n"
    "<|user|>\nQ2<|end|>\n<|assistant|>\n[A2<|end|>]\n",
    "phi4": f"{IM}system<|im_sep|>S<|im_end|>{IM}user<|im_sep|>Q1<|im_end|>{IM}assistant<|im_sep|>[A1<|im_end|>]"
    f"{IM}user<|im_sep|>Q2<|im_end|>{IM}assistant<|im_sep|>[A2<|im_end|>]",
    "deepseek": "<s>S\n\nUser: Q1\n\nAssistant:[ A1</s>]User: Q2\n\nAssistant:[ A2</s>]",
    "deepseek3": "<s>S<｜User｜>Q1<｜Assistant｜>[A1</s>]<｜User｜>Q2<｜Assistant｜>[A2</s>]",
    "glm4": "[gMASK]<sop><|system|>\nS<|user|>\nQ1<|assistant|>[\nA1{</s>}]<|user|>\nQ2<|assistant|>[\nA2</s>]",
    "granite3": f"{ROLE}system<|end_of_role|>S<|end_of_text|>\n{ROLE}user<|end_of_role|>Q1<|end_of_text|>\n"
    f"{ROLE}assistant<|end_of_role|>[A1<|end_of_text|>]\n{ROLE}user<|end_of_role|>Q2<|end_of_text|>\n"
    f"{ROLE}assistant<|end_of_role|>[A2<|end_of_text|>]\n",
    "cohere": f"<s>{TURN}<|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|>{TURN}<|USER_TOKEN|>Q1<|END_OF_TURN_TOKEN|>"
    f"{TURN}<|CHATBOT_TOKEN|>[A1<|END_OF_TURN_TOKEN|>]{TURN}<|USER_TOKEN|>Q2<|END_OF_TURN_TOKEN|>"
    f"{TURN}<|CHATBOT_TOKEN|>[A2<|END_OF_TURN_TOKEN|>]",
    "exaone": "[|system|]S[|endofturn|]\n[|user|]Q1\n[|assistant|][A1[|endofturn|]]\n"
    "[|user|]Q2\n[|assistant|][A2[|endofturn|]]\n",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nQ1</s>\n<|assistant|>\n[A1</s>]\n"
    "<|user|>\nQ2</s>\n<|assistant|>\n[A2</s>]\n",
}
CURIOUS = (
    "A chat between a curious {} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
)
# What stands before `Q1` in a conversation without a system turn.
BEGINNINGS = {
    "default": f"<s>{CURIOUS.format('user', 'user')}\nHuman: ",
    "llama2": "<s>[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer as helpfully as "
    "possible, while being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, "
    "dangerous, or illegal content. Please ensure that your responses are socially unbiased and positive in nature."
    "\n\nIf a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
    "\n<</SYS>>\n\n",
    "llama2_zh": "<s>[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\n",
    "alpaca": "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n",
    "vicuna": f"<s>{CURIOUS.format('user', 'user')}USER: ",
    "aquila": f"<s>{CURIOUS.format('human', 'human')}###Human: ",
    "belle": "<s>Human: ",
    "baichuan2": "<s><reserved_106>",
    "starchat": "<s><|system|>\n<|end|>\n<|user|>\n",
    "chatml": f"<s>{IM}system\nYou are a helpful assistant.<|im_end|>\n{IM}user\n",
    "chatglm2": "<s>[gMASK]sop\n\n[Round 0]\n\n问：",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\n",
    "qwen": f"{IM}system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n{IM}user\n",
    "qwen3": f"{IM}user\n",
    "qwen3_nothink": f"{IM}user\n",
    "smollm": f"{IM}user\n",
    "smollm2": f"{IM}system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    f"{IM}user\n",
    "gemma": "<s><start_of_turn>user\n",
    "mistral": "<s>[INST] ",
}


def make_tokenizer(name: str = "", adds_bos: bool = True):
    """Bytes, `<s>`, `</s>`, and the control tokens of a template."""
    tokenizer = tiny.make_byte_tokenizer("mistral")
    tokenizer.chat_template = None
    template = named_template(name)
    if template is not None:
        tokenizer.add_tokens(list(template.tokens), special_tokens=True)
    if adds_bos:
        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", special_tokens=[bos]
        )
    return tokenizer


def made_for(name: str, adds_bos: bool = True):
    return use_template(make_tokenizer(name, adds_bos), name)


made_once = cache(made_for)


def options_of(name: str) -> dict:
    return {"train_on": "last_turn"} if name == "qwen3" else {}


def chat_for(name: str) -> list[dict]:
    return TWO if name == "vanilla" else [SYSTEM, *TWO]


def as_messages(system, turns) -> list[dict]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def marked(messages, tokenizer, **options) -> str:
    """The text of the ids, with marks, from the labels."""
    (tokens,) = tokenize([render({"messages": messages}, tokenizer, **options)], tokenizer)
    text, is_trained = "", False
    for index, label in zip(tokens["input_ids"], tokens["labels"]):
        piece = tokenizer.decode([index]) if index >= 256 else chr(index)
        if label not in (index, IGNORE_INDEX):
            text, is_trained = text + f"{{{tokenizer.decode([label])}}}]{piece}", False
            continue
        if (label != IGNORE_INDEX) != is_trained:
            text, is_trained = text + ("]" if is_trained else "["), not is_trained
        text += piece
    text = text + "]" if is_trained else text
    return "".join(map(chr, text.encode("latin1"))) if text.isascii() else decoded(text)


def decoded(text: str) -> str:
    """Bytes written as characters → the text; control tokens may hold other characters."""
    runs = re.split("([^\x00-\xff]+)", text)
    return "".join(run if odd % 2 else run.encode("latin1").decode() for odd, run in enumerate(runs))


# ---- the table -----------------------------------------------------------------------------------------------------


# workflow: T4
def test_every_template_has_a_golden():
    assert set(GOLDENS) == set(TEMPLATES)
    assert set(ALIASES.values()) <= set(TEMPLATES)
    assert not set(ALIASES) & set(TEMPLATES)


# workflow: T2 T4 P8
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_mask_of_a_template(name):
    assert marked(chat_for(name), made_for(name), **options_of(name)) == GOLDENS[name]


# workflow: T3 T4
@pytest.mark.parametrize("name", BEGINNINGS)
def test_what_a_template_writes_without_a_system_turn(name):
    text = render_prompt(TWO[:1], made_for(name)).text
    assert text.partition("Q1")[0] == BEGINNINGS[name]
    assert all(name in BEGINNINGS for name, template in TEMPLATES.items() if template.default_system)


# ---- 2023, by its own rules ----------------------------------------------------------------------------------------

# prefix, prompt, separator, whether the stop token stands only at the very end; a set is one token
ERA = {
    "vanilla": ([], ["{query}"], [], False),
    "default": (["{system}"], ["Human: {query}\nAssistant: "], ["\n"], False),
    "alpaca": (["{system}"], ["### Instruction:\n{query}\n\n### Response:\n"], ["\n\n"], False),
    "vicuna": (["{system}"], ["USER: {query} ASSISTANT: "], [], False),
    "belle": (["{system}"], ["Human: {query}\n\nBelle: "], ["\n\n"], False),
    "linly": (["{system}"], ["User: {query}\nBot: "], ["\n"], False),
    "billa": (["{system}"], ["Human: {query}\nAssistant: "], ["\n"], False),
    "ziya": (["{system}"], [{"<human>"}, ":{query}\n", {"<bot>"}, ":"], ["\n"], False),
    "aquila": (["{system}"], ["Human: {query}###Assistant: "], ["###"], False),
    "intern": (["{system}"], ["<|User|>:{query}", {"<eoh>"}, "\n<|Bot|>:"], [{"<eoa>"}, "\n"], True),
    "baichuan": (["{system}"], [{"<reserved_102>"}, "{query}", {"<reserved_103>"}], [], True),
    "baichuan2": (["{system}"], [{"<reserved_106>"}, "{query}", {"<reserved_107>"}], [], True),
    "starchat": (
        [{"<|system|>"}, "\n{system}"],
        [{"<|user|>"}, "\n{query}", {"<|end|>"}, "\n", {"<|assistant|>"}],
        [{"<|end|>"}, "\n"],
        True,
    ),
    "chatml": (
        [{IM}, "system\n{system}"],
        [{IM}, "user\n{query}", {"<|im_end|>"}, "\n", {IM}, "assistant\n"],
        [{"<|im_end|>"}, "\n"],
        True,
    ),
    "chatglm2": ([{"[gMASK]"}, {"sop"}, "{system}"], ["[Round {idx}]\n\n问：{query}\n\n答："], ["\n\n"], True),
    "xverse": (["{system}"], ["Human: {query}\n\nAssistant: "], [], False),
    "llama2": (["<<SYS>>\n{system}\n<</SYS>>\n\n"], ["[INST] {query} [/INST] "], [], False),
    "llama2_zh": (["<<SYS>>\n{system}\n<</SYS>>\n\n"], ["[INST] {query} [/INST] "], [], False),
}


def ids_of_elements(tokenizer, elements, **values) -> list[int]:
    ids = []
    for element in elements:
        if isinstance(element, set):
            ids.append(tokenizer.convert_tokens_to_ids(*element))
        else:
            for key, value in values.items():
                element = element.replace(f"{{{key}}}", value, 1)
            ids += tokenizer(element, add_special_tokens=False)["input_ids"]
    return ids


def era_ids_and_labels(name, tokenizer, system, pairs) -> tuple[list[int], list[int]]:
    """Turn 0: bos, prefix, separator, query, answer, eos; later ones: separator, bos, query, answer, eos."""
    prefix, prompt, separator, is_efficient = ERA[name]
    bos, eos, ids, labels = [tokenizer.bos_token_id], [tokenizer.eos_token_id], [], []
    for turn, (query, answer) in enumerate(pairs):
        if "llama2" in name:
            begin, query = bos, (prefix[0].replace("{system}", system) if turn == 0 else "") + query
        elif turn == 0:
            begin = ids_of_elements(tokenizer, prefix, system=system)
            begin = bos + (begin + ids_of_elements(tokenizer, separator) if begin else [])
        else:
            begin = ids_of_elements(tokenizer, separator) + bos
        source = begin + ids_of_elements(tokenizer, prompt, query=query, idx=str(turn))
        target = ids_of_elements(tokenizer, [answer]) + ([] if is_efficient else eos)
        ids += source + target
        labels += (eos if is_efficient and turn else [IGNORE_INDEX]) + [IGNORE_INDEX] * (len(source) - 1) + target
    return (ids + eos, labels + eos) if is_efficient else (ids, labels)


# workflow: T1 T2 T3 T4 P4 P8
@pytest.mark.parametrize("name", ERA)
def test_ids_and_labels_are_those_of_2023(name):
    tokenizer, pairs = made_for(name), [("Q1 问", "A1 答"), ("Q2", "A2"), ("Q3", "A3")]
    messages = as_messages(None if name == "vanilla" else "S", pairs)
    (tokens,) = tokenize([render({"messages": messages}, tokenizer)], tokenizer)
    expected = era_ids_and_labels(name, tokenizer, "S", pairs if TEMPLATES[name].use_history else pairs[-1:])
    assert (tokens["input_ids"], tokens["labels"]) == expected
    assert tokens["input_ids"][-1] == tokens["labels"][-1] == tokenizer.eos_token_id


# workflow: T3
def test_the_last_turns_prompt_holds_the_history_and_the_system_text_of_the_row():
    tokenizer = made_for("alpaca")
    ids = tokenize([render_prompt([SYSTEM, *TWO[:-1]], tokenizer)], tokenizer)[0]["input_ids"]
    (whole,) = tokenize([render({"messages": [SYSTEM, *TWO]}, tokenizer)], tokenizer)
    assert whole["input_ids"] == ids + tokenizer("A2</s>", add_special_tokens=False)["input_ids"]
    assert "Below is an instruction" not in tokenizer.decode(ids)


# workflow: T3
def test_an_empty_system_turn_leaves_the_templates_own_text():
    empty = [{"role": "system", "content": ""}, *TWO]
    tokenizer = made_for("default")
    assert render({"messages": empty}, tokenizer) == render({"messages": TWO}, tokenizer)


# workflow: T3
def test_vanilla_writes_the_last_exchange_and_the_report_counts_the_others():
    tokenizer, report = made_for("vanilla"), Report()
    encoded = encode_batch([{"messages": TWO, "source": "a.jsonl", "line": 7}], tokenizer, Encoding(), report)
    assert tokenizer.decode(encoded[0].tokens["input_ids"]) == "<s>Q2A2</s>"
    assert render_prompt(TWO[:-1], tokenizer).text == "<s>Q2"
    assert [(row.reason, row.line) for row in report.changes] == [("history-left-out", 7)]
    with pytest.raises(TemplateError, match=r"does not write turn 1 \(system\)"):
        render({"messages": [SYSTEM, *TWO]}, tokenizer)
    with pytest.raises(TemplateError, match=r"does not write turn 1 \(developer\)"):
        render({"messages": [{**SYSTEM, "role": "developer"}, *TWO]}, tokenizer)


def test_the_report_counts_rows_whose_thoughts_the_template_leaves_out():
    tokenizer, report = made_for("chatml"), Report()
    thinks = [TWO[0], {**TWO[1], "reasoning_content": "Because."}]
    encode_batch([{"messages": thinks, "source": "a.jsonl", "line": 7}], tokenizer, Encoding(), report)
    assert [(row.reason, row.line) for row in report.changes] == [("thoughts-left-out", 7)]


# workflow: P4
@pytest.mark.parametrize(
    ("limit", "ends"), [(None, ["A1 long</s>", "A2</s>"]), (2, ["A1", "A2"]), (3, ["A1 ", "A2</s>"])]
)
def test_a_cut_answer_does_not_teach_to_stop_there_though_no_stop_token_is_written(limit, ends):
    tokenizer, messages = made_for("baichuan"), as_messages(None, [("Q1", "A1 long"), ("Q2", "A2")])
    how = Encoding(max_target_length=limit, max_source_length=99)
    (encoded,) = encode_batch([{"messages": messages}], tokenizer, how, Report())
    trained = [label for label in encoded.tokens["labels"] if label != IGNORE_INDEX]
    assert tokenizer.decode(trained) == "".join(ends)


# workflow: T3
def test_vanilla_with_limits_knows_its_last_answer():
    how = Encoding(max_target_length=1, max_source_length=99)
    example = {"messages": TWO, "source": "a.jsonl", "line": 1}
    (encoded,) = encode_batch([example], made_for("vanilla"), how, Report())
    assert made_for("vanilla").decode(encoded.tokens["input_ids"]) == "<s>Q2A"


# workflow: T3
def test_vanilla_trains_the_completion_alone_although_the_prompt_is_cut():
    row = render({"prompt": TWO[:3], "completion": TWO[3:]}, made_for("vanilla"))
    assert (row.text, [tuple(span[:2]) for span in row.spans]) == ("<s>Q2A2</s>", [(5, 11)])


# ---- what must hold for all ----------------------------------------------------------------------------------------


def chats_of(name: str):
    """Generated conversations that the template has a place for."""
    text = contents(WORDS + SPACES + CONTROL + ["<reserved_102>", "soprano", "###"])
    turns = st.lists(st.tuples(text, text), min_size=1, max_size=1 if name == "qwen3" else 3)
    system = st.just(None) if name == "vanilla" else st.none() | text
    return st.tuples(system, turns)


# workflow: T1 T3
# reliability: 41, 42, 43
@pytest.mark.parametrize("name", TEMPLATES)
@given(data=st.data())
@settings(max_examples=15)
def test_ids_before_an_answer_are_those_of_its_prompt_and_trained_is_the_answer_with_its_end(name, data):
    tokenizer = made_once(name)
    system, turns = data.draw(chats_of(name))
    messages = as_messages(system, turns)
    (tokens,) = tokenize([render({"messages": messages}, tokenizer)], tokenizer)
    (prompt,) = tokenize([render_prompt(messages[:-1], tokenizer)], tokenizer)
    assert tokens["input_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]
    trained = [label for label in tokens["labels"] if label != IGNORE_INDEX]
    answers = [written(name, answer) for _, answer in (turns[-1:] if name == "vanilla" else turns)]
    assert tokenizer.decode(trained) == "".join(answer + tokenizer.eos_token for answer in answers)
    assert trained.count(tokenizer.eos_token_id) == len(answers)  # what a person wrote is no stop token


MAKERS = {
    "bpe": lambda: tiny.make_bpe_tokenizer("mistral"),
    "sentencepiece": tiny.make_sentencepiece_like_tokenizer,
    "sentencepiece-first": lambda: tiny.make_sentencepiece_like_tokenizer(prefix="first"),
}


# workflow: T1 T3
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_beginnings_of_training_for_tokenizers_that_merge_and_add_spaces(name, maker):
    tokenizer = MAKERS[maker]()
    tokenizer.chat_template = None
    tokenizer.add_tokens(list(TEMPLATES[name].tokens), special_tokens=True)
    tokenizer = use_template(tokenizer, name)
    for answer in ("yes", " the answer is 42\n", "\n\n", "sop"):
        messages = as_messages(None, [("hello there,", "the answer"), (" how are you?\n", answer)])
        (tokens,) = tokenize([render({"messages": messages}, tokenizer, **options_of(name))], tokenizer)
        (prompt,) = tokenize([render_prompt(messages[:-1], tokenizer)], tokenizer)
        length = len(prompt["input_ids"])
        assert (tokens["input_ids"][:length], tokens["labels"][length - 1]) == (prompt["input_ids"], IGNORE_INDEX)
        assert tokens["labels"][length] == tokens["input_ids"][length]
        assert tokens["labels"].count(tokenizer.eos_token_id) == len(turns_of(name))


PLAIN = (  # no control token stands between a header and its answer, which may begin with the same token's rest
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("train_on", ["assistant", "last_turn", "all"])
@pytest.mark.parametrize("template", [PLAIN, TEMPLATES["default"].jinja])
def test_the_history_has_the_same_tokens_in_a_prompt_however_its_turns_were_trained(template, train_on):
    tokenizer = tiny.make_bpe_tokenizer("mistral")
    messages = as_messages(None, [("hello", "the answer"), ("how are you?", "the answer is 42")])
    row = render({"messages": messages}, tokenizer, chat_template=template, train_on=train_on)
    prompt = render_prompt(messages[:-1], tokenizer, chat_template=template)
    (tokens,), (asked,) = tokenize([row], tokenizer), tokenize([prompt], tokenizer)
    assert tokens["input_ids"][: len(asked["input_ids"])] == asked["input_ids"]
    assert "".join(tokenizer.batch_decode([[i] for i in asked["input_ids"]])) == prompt.text


def turns_of(name: str) -> range:
    """One for each answer that is trained, of two."""
    return range(1 if name in ("vanilla", "qwen3") else 2)


def written(name: str, answer: str) -> str:
    """What a template makes of an answer, but for its end."""
    answer = answer.strip() if TEMPLATES[name].trim else answer
    before = {"mistral": " ", "deepseek": " ", "glm4": "\n", "qwen3": "<think>\n\n</think>\n\n"}
    return before.get(name, "") + (answer.lstrip("\n") if name == "qwen3" else answer)


# workflow: T5
@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_stops_where_training_taught_to_stop(name):
    tokenizer = made_for(name)
    (tokens,) = tokenize([render({"messages": TWO[:2]}, tokenizer)], tokenizer)
    last = [label for label in tokens["labels"] if label != IGNORE_INDEX][-1]
    assert last == tokenizer.eos_token_id
    assert template_stop_id(tokenizer) in (last, None)
    assert (template_stop_id(tokenizer) is None) == (name in {"baichuan", "baichuan2", "chatglm2", "glm4"})


# workflow: T1
@pytest.mark.parametrize("name", TEMPLATES)
def test_control_tokens_are_one_id_each_and_bos_is_written_once(name):
    tokenizer = made_for(name)
    messages = TWO if name == "vanilla" else [SYSTEM, *TWO[:2]]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert set(tokenizer.convert_tokens_to_ids(list(TEMPLATES[name].tokens))) <= set(ids)
    assert ids.count(tokenizer.bos_token_id) <= 1


# workflow: T4
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_saved_renders_as_what_trained(name, tmp_path):
    tokenizer = made_for(name)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert marked(chat_for(name), again, **options_of(name)) == GOLDENS[name]
    assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    assert template_stop_id(again) == template_stop_id(tokenizer)


# ---- thoughts, tools, and the models' own templates ------------------------------------------------------------

THINKS = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}
ASKED = {"role": "user", "content": "2+2?"}
HEAD = f"{IM}user\n2+2?<|im_end|>\n{IM}assistant\n"


# workflow: T4
# reliability: 44
@pytest.mark.parametrize(
    ("answer", "kwargs", "expected"),
    [
        ({"content": "4"}, {}, "[<think>\n\n</think>\n\n4<|im_end|>]"),
        ({"content": "4"}, {"enable_thinking": True}, "[<think>\n\n</think>\n\n4<|im_end|>]"),
        ({"content": "4"}, {"enable_thinking": False}, "<think>\n\n</think>\n\n[4<|im_end|>]"),
        ({"content": THINKS["content"]}, {}, "[<think>\nhm\n</think>\n\n4<|im_end|>]"),
        ({"content": "4", "reasoning_content": "hm"}, {}, "[<think>\nhm\n</think>\n\n4<|im_end|>]"),
    ],
)
def test_qwen3_trains_what_it_has_to_write_with_and_without_thinking(answer, kwargs, expected):
    messages = [ASKED, {"role": "assistant", **answer}]
    assert marked(messages, made_once("qwen3"), chat_template_kwargs=kwargs) == f"{HEAD}{expected}\n"
    prompt = render_prompt(messages[:1], made_once("qwen3"), chat_template_kwargs=kwargs).text
    assert (HEAD + expected).startswith(prompt + "[")


# workflow: T4
# reliability: 44
def test_qwen3_drops_past_thoughts_and_refuses_to_train_such_turns():
    messages, tokenizer = [ASKED, THINKS, ASKED, THINKS], made_once("qwen3")
    past = f"{HEAD}4<|im_end|>\n"
    assert render_prompt(messages[:3], tokenizer).text == past + HEAD
    with pytest.raises(TemplateError, match=r"turn 2 is rendered differently .* Set train_on: last_turn"):
        render({"messages": messages}, tokenizer)
    last = marked(messages, tokenizer, train_on="last_turn")
    assert last == f"{past}{HEAD}[<think>\nhm\n</think>\n\n4<|im_end|>]\n"


# workflow: T4
def test_qwen3_refuses_thoughts_where_thinking_is_off():
    with pytest.raises(TemplateError, match="turn 2 does not begin with the template's own generation prompt"):
        render({"messages": [ASKED, THINKS]}, made_once("qwen3"), chat_template_kwargs={"enable_thinking": False})


# workflow: T4
def test_a_rows_own_variables_win_over_the_options():
    tokenizer, how = made_once("qwen3"), Encoding(chat_template_kwargs={"enable_thinking": False})
    row = {"messages": [ASKED, {"role": "assistant", "content": "4"}]}
    own = {**row, "chat_template_kwargs": {"enable_thinking": True}}
    spans = [[item.text[span.start : span.end] for span in item.spans] for item in (how.render(row, tokenizer),)]
    assert spans == [["4<|im_end|>"]]
    assert how.render(own, tokenizer) == Encoding().render(row, tokenizer)


TOOL = {"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "é"}}}
WITH_TOOLS = [
    {"role": "system", "content": "S"},
    ASKED,
    {"role": "assistant", "content": "Well", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "4"},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "4!"},
    ASKED,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"},
]
LONG = [SYSTEM, *TWO, {"role": "user", "content": "Q3\n"}]
# Ours → the model's own as TRL ships it, and the conversations in which both must agree.
OWN = {
    "llama3": ("llama3", [TWO, LONG]),
    "gemma": ("gemma3", [TWO, LONG]),
    "qwen": ("qwen2_5", [TWO, LONG, WITH_TOOLS, WITH_TOOLS[1:]]),
    "qwen3": ("qwen3", [TWO, LONG, WITH_TOOLS, WITH_TOOLS[1:], [ASKED, THINKS, ASKED, THINKS]]),
    "qwen3_nothink": ("qwen3_instruct_2507", [TWO, LONG, WITH_TOOLS, WITH_TOOLS[1:]]),
    "cohere": ("cohere", [TWO, LONG]),
    "phi": ("phi3", [LONG]),
}


# workflow: T4
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
def test_a_template_writes_what_the_models_own_writes(name, kwargs):
    file, conversations = OWN[name]
    trl = importlib.util.find_spec("trl") or pytest.skip("needs TRL's copies of the models' templates")
    own = Path(trl.origin).with_name("chat_templates").joinpath(f"{file}.jinja").read_text(encoding="utf-8")
    for messages in conversations:
        for tools in (None, [TOOL]) if messages[-1] is WITH_TOOLS[-1] else (None,):
            options = {"tools": tools, "tokenize": False, "add_generation_prompt": messages[-1]["role"] == "user"}
            ours = made_once(name).apply_chat_template(messages, **options, **kwargs)
            assert ours == made_once(name).apply_chat_template(messages, chat_template=own, **options, **kwargs)


# workflow: T4
def test_qwens_calls_are_trained_and_results_are_not():
    row = render({"messages": WITH_TOOLS[:6], "tools": [TOOL]}, made_once("qwen"))
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": "é"}}\n</tool_call>'
    trained = [row.text[span.start : span.end] for span in row.spans]
    assert trained == [f"Well\n{call}\n{call}<|im_end|>", "4!<|im_end|>"]


@pytest.mark.parametrize("name", ["alpaca", "llama3", "mistral"])
def test_a_template_without_tools_refuses_their_turns(name):
    with pytest.raises(TemplateError, match=r"alternate|no place for a turn of role tool"):
        render({"messages": WITH_TOOLS[1:6]}, made_once(name))


# ---- on a tokenizer ------------------------------------------------------------------------------------------------


# workflow: T5
def test_the_callers_tokenizer_stays_and_a_template_that_is_there_changes_nothing():
    tokenizer = make_tokenizer("chatml")
    other = use_template(tokenizer, "chatml")
    assert (tokenizer.chat_template, tokenizer.eos_token, other.eos_token) == (None, "</s>", "<|im_end|>")
    assert use_template(other, "chatml") is other
    assert "</s>" in other.all_special_tokens or other.added_tokens_decoder[257].special


# workflow: T2
def test_bos_of_2023_follows_the_tokenizers_habit():
    assert marked(TWO[:2], made_for("belle", adds_bos=False)) == "Human: Q1\n\nBelle: [A1</s>]"
    assert made_for("belle", adds_bos=False).chat_template.startswith(NO_BOS)
    assert marked(TWO[:2], made_for("llama3", adds_bos=False)).startswith("<s><|start_header_id|>user")


# workflow: T5
def test_a_missing_stop_token_becomes_endoftext_and_pads():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|endoftext|>"], special_tokens=True)
    tokenizer.eos_token = tokenizer.pad_token = None
    known = len(tokenizer)
    other = use_template(tokenizer, "default")
    assert (other.eos_token, other.pad_token, len(other)) == ("<|endoftext|>", "<|endoftext|>", known)
    assert marked(TWO[:2], other).endswith("[A1<|endoftext|>]")


# workflow: T5
def test_a_stop_token_that_the_vocabulary_lacks_is_added_and_said():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    known = len(tokenizer)
    with pytest.warns(UserWarning, match=r"no eos_token, and no <\|endoftext\|>: it is added"):
        other = use_template(tokenizer, "default")
    assert (other.eos_token_id, other.pad_token) == (known, "<|pad|>")


# workflow: T5
def test_stop_words_of_the_vocabulary_become_single_tokens_without_a_new_row():
    tokenizer = tiny.make_byte_tokenizer("mistral")
    tokenizer.add_tokens(["<eoa>", "<eoh>"])  # words like others so far
    known, plain = len(tokenizer), dict(tokenizer.added_tokens_decoder)
    other = use_template(tokenizer, "intern")
    assert (len(other), other.eos_token) == (known, "<eoa>")
    assert not any(token.special for token in list(plain.values())[-2:])
    assert all(token.special for token in list(other.added_tokens_decoder.values())[-2:])


# workflow: T1 T5
def test_a_template_for_other_models_is_said_and_its_stop_word_stays_text():
    with pytest.warns(UserWarning, match=r"chatml is made for Qwen.* writes <\|im_start\|>, <\|im_end\|>, which"):
        tokenizer = use_template(make_tokenizer(), "chatml")
    assert len(tokenizer) == 259
    text = marked(TWO, tokenizer)
    assert text.endswith("assistant\n[A2<|im_end|></s>]")
    assert "assistant\n[A1<|im_end|>{</s>}]\n" in text


# workflow: T1
@pytest.mark.parametrize(("name", "token"), [("baichuan", "<reserved_102>"), ("chatglm2", r"\[gMASK\]")])
def test_tokens_that_only_their_model_has_are_named(name, token):
    with pytest.warns(UserWarning, match=f"{token}.* which this tokenizer does not have"):
        use_template(make_tokenizer(), name)


def test_a_fitting_tokenizer_brings_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in TEMPLATES:
            made_for(name)


# ---- names ---------------------------------------------------------------------------------------------------------


# workflow: T5
def test_an_unknown_name_gets_the_nearest_and_the_way_without():
    with pytest.raises(TemplateError, match=r"no template 'lama3', .*Did you mean 'llama3'\? Leave chat_template"):
        read_template("lama3")
    with pytest.raises(TemplateError, match=r"there is no file nowhere.jinja"):
        read_template("nowhere.jinja")


def test_a_name_wins_over_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama3").write_text("{{ messages[0].content }}")
    assert read_template("llama3") == TEMPLATES["llama3"].jinja
    assert read_template("./llama3") == "{{ messages[0].content }}"
    assert read_template(CHATML) == CHATML


def test_another_tokenizers_template_can_be_taken(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "bare")
    tiny.make_byte_tokenizer().save_pretrained(tmp_path / "chatml")
    assert read_template(str(tmp_path / "chatml")) == CHATML
    with pytest.raises(TemplateError, match="bare has no chat template"):
        read_template(str(tmp_path / "bare"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TemplateError, match="holds no tokenizer that can be loaded"):
        read_template(str(tmp_path / "empty"))


OF_LLAMA_FACTORY = """
alpaca aquila atom baichuan baichuan2 bailing bailing_v2 belle bluelm breeze chatglm2 chatglm3 chatml chatml_de
codegeex2 codegeex4 cohere cpm cpm3 cpm4 dbrx deepseek deepseek3 deepseekr1 deepseekcoder default dots_ocr empty ernie
ernie_nothink ernie_vl exaone falcon falcon_h1 fewshot gemma gemma2 gemma3 gemma3n glm4 glm4_moe glm4v glm4_5v glmz1
gpt_oss granite3 granite3_vision granite4 index hunyuan intern intern2 intern_vl intern_s1 keye_vl kimi_vl llama2
llama2_zh llama3 llama4 mllama moonlight llava llava_next llava_next_llama3 llava_next_mistral llava_next_qwen
llava_next_yi llava_next_video llava_next_video_mistral llava_next_video_yi marco mimo mimo_v2 mimo_vl minicpm_v
minicpm_o minimax1 minimax2 ministral mistral mistral_small ministral3 olmo openchat openchat-3.6 opencoder orion
paligemma paligemma_chat phi phi_small phi4 pixtral qwen qwen3 qwen3_nothink qwen2_audio qwen2_omni qwen3_omni
qwen3_omni_nothink qwen2_vl qwen3_vl qwen3_vl_nothink sailor seed_coder seed_oss skywork_o1 smollm smollm2 solar
starchat telechat telechat2 vicuna video_llava xuanyuan xverse yayi yi yi_vl yuan zephyr ziya
"""


@pytest.mark.parametrize("name", OF_LLAMA_FACTORY.split())
def test_llama_factorys_names_are_known_or_say_what_to_do(name):
    if named_template(name) is None:
        with pytest.raises(TemplateError, match=f"no template '{name}'.* Leave chat_template .*own tokenizer"):
            read_template(name)
    else:
        assert "{%" in read_template(name)
