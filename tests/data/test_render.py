"""Texts and spans, written out: `[…]` marks what the loss covers."""

import json

import pytest

from tests import tiny
from tests.templates import CHATML, GEMMA, MISTRAL
from tunesmith.data.render import Rendered, Span, drop_oldest_turns, render, render_prompt
from tunesmith.data.rows import RowError
from tunesmith.errors import ConfigError, TemplateError

HI = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
TOOLS = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]},
    {"role": "tool", "content": "r"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]
THINKS = (  # as Qwen3: only the last answer keeps its reasoning
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"  # ignores add_generation_prompt
NO_STOP = HEADERS + "{% if add_generation_prompt %}### assistant:\n{% endif %}"


def marked(example, tokenizer, **options) -> str:
    """The rendered text with `[` and `]` around each span."""
    row = render(example, tokenizer, **options)
    text = row.text
    for start, end, _ in reversed(row.spans):
        text = f"{text[:start]}[{text[start:end]}]{text[end:]}"
    return text


def test_an_answer_is_trained_from_behind_its_header_to_its_stop_token(byte_tokenizer):
    expected = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[4<|im_end|>]\n"
    assert marked({"messages": HI}, byte_tokenizer) == expected


@pytest.mark.parametrize(
    ("train_on", "answers"),
    [
        ("assistant", ['<tool_call>{"name": "f"}</tool_call><|im_end|>', "a<|im_end|>", "a2<|im_end|>"]),
        ("last_turn", ["a2<|im_end|>"]),
        ("completion", ["a2<|im_end|>"]),
    ],
)
def test_train_on_chooses_turns(byte_tokenizer, train_on, answers):
    row = render({"messages": TOOLS}, byte_tokenizer, train_on=train_on)
    assert [row.text[start:end] for start, end, _ in row.spans] == answers


def test_completion_takes_every_answer_behind_the_last_question(byte_tokenizer):
    row = render({"messages": TOOLS[:5]}, byte_tokenizer, train_on="completion")
    assert [row.text[start:end] for start, end, _ in row.spans] == [
        '<tool_call>{"name": "f"}</tool_call><|im_end|>',
        "a<|im_end|>",
    ]


def test_all_covers_the_text_without_a_leading_bos():
    tokenizer = tiny.make_byte_tokenizer("llama3")
    start = "<|start_header_id|>"
    expected = f"{start}user<|end_header_id|>\n\n2+2?<|eot_id|>{start}assistant<|end_header_id|>\n\n4<|eot_id|>"
    assert marked({"messages": HI}, tokenizer, train_on="all") == f"<|begin_of_text|>[{expected}]"


def test_a_turn_can_be_left_out_or_weighted(byte_tokenizer):
    messages = [HI[0], {**HI[1], "train": False}, HI[0], {**HI[1], "weight": 0.5}]
    row = render({"messages": messages}, byte_tokenizer)
    assert [span.weight for span in row.spans] == [0.5]
    assert row.text[: row.spans[0].start].endswith("2+2?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("flags", "options", "reason"),
    [
        ({"train": True}, {}, "train-not-assistant"),
        ({"weight": 2}, {}, "train-not-assistant"),
        ({"weight": 1.0}, {}, "train-not-assistant"),
        ({"weight": -1}, {}, "bad-weight"),
        ({"weight": "high"}, {}, "bad-weight"),
        ({"train": False}, {"train_on": "all"}, "train-flag-with-all"),
    ],
)
def test_flags_that_cannot_hold_are_refused(byte_tokenizer, flags, options, reason):
    example = {"messages": [{**HI[0], **flags}, HI[1]], "source": "a.jsonl", "line": 7}
    with pytest.raises(RowError, match=r"a.jsonl:7: turn 1 ") as caught:
        render(example, byte_tokenizer, **options)
    assert caught.value.reason == reason


def test_a_question_may_say_that_it_is_not_trained(byte_tokenizer):
    messages = [{**HI[0], "train": False, "weight": None}, HI[1]]
    assert render({"messages": messages}, byte_tokenizer) == render({"messages": HI}, byte_tokenizer)


@pytest.mark.parametrize("train_on", ["assistant", "completion", "last_turn"])
def test_of_prompt_and_completion_only_the_completion_is_trained(byte_tokenizer, train_on):
    row = render({"prompt": [*HI, HI[0]], "completion": [HI[1]]}, byte_tokenizer, train_on=train_on)
    assert [row.text[start:end] for start, end, _ in row.spans] == ["4<|im_end|>"]
    assert row.spans[0].end == len(row.text) - 1


def test_prompt_and_completion_strings_are_a_user_and_an_assistant_turn(byte_tokenizer):
    expected = render({"messages": HI}, byte_tokenizer)
    assert render({"prompt": "2+2?", "completion": "4"}, byte_tokenizer) == expected


def test_without_a_template_strings_are_laid_end_to_end():
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.chat_template = None
    example = {"prompt": "2+2=", "completion": "4"}
    assert marked(example, tokenizer) == "2+2=[4<|im_end|>]"
    assert marked(example, tokenizer, train_on="all") == "[2+2=4<|im_end|>]"
    assert render(example, tokenizer).add_bos


@pytest.mark.parametrize("text", ["once", "once<|im_end|>"])
def test_text_is_trained_whole_and_ends_once(byte_tokenizer, text):
    assert marked({"text": text}, byte_tokenizer) == "[once<|im_end|>]"


def test_generation_tags_give_the_same_spans_as_differences():
    with_tags = marked({"messages": [*HI, *HI]}, tiny.make_byte_tokenizer("chatml-generation"))
    assert with_tags == marked({"messages": [*HI, *HI]}, tiny.make_byte_tokenizer())


def test_a_stop_token_outside_the_generation_tag_is_trained(byte_tokenizer):
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    expected = "user:2+2?<|im_end|>\nassistant:[4<|im_end|>]\n"
    assert marked({"messages": HI}, byte_tokenizer, chat_template=template) == expected


def test_single_turns_cannot_be_chosen_from_tags_that_do_not_match_the_turns(byte_tokenizer):
    template = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>{% endgeneration %}"
    with pytest.raises(TemplateError, match=r"marks 1 parts .* for 2 assistant turns"):
        render({"messages": [*HI, *HI]}, byte_tokenizer, chat_template=template, train_on="last_turn")


# reliability: 44
def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_way_out(byte_tokenizer):
    example = {"messages": [*HI, *HI], "source": "a.jsonl", "line": 2}
    with pytest.raises(TemplateError, match=r"a.jsonl:2: turn 2 is rendered differently once later turns follow"):
        render(example, byte_tokenizer, chat_template=THINKS)
    row = render(example, byte_tokenizer, chat_template=THINKS, train_on="last_turn")
    assert [row.text[start:end] for start, end, _ in row.spans] == ["<think>\n\n</think>\n\n4<|im_end|>"]


def test_a_generation_prompt_that_the_turn_does_not_begin_with_is_refused(byte_tokenizer):
    template = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    with pytest.raises(TemplateError, match="turn 2 does not begin with the template's own generation prompt"):
        render({"messages": HI}, byte_tokenizer, chat_template=template)


def test_a_header_is_not_trained_where_the_template_knows_no_generation_prompt(byte_tokenizer):
    expected = "### user:\n2+2?\n### assistant:\n[4\n<|im_end|>]"
    assert marked({"messages": HI}, byte_tokenizer, chat_template=HEADERS) == expected


def test_without_a_stop_token_the_last_answer_gets_eos(byte_tokenizer):
    expected = "### user:\n2+2?\n### assistant:\n[4\n]### user:\n2+2?\n### assistant:\n[4\n<|im_end|>]"
    assert marked({"messages": [*HI, *HI]}, byte_tokenizer, chat_template=NO_STOP) == expected
    assert marked({"messages": HI}, byte_tokenizer, chat_template=NO_STOP, train_on="all").endswith("4\n<|im_end|>]")


def test_a_stop_token_that_a_person_wrote_does_not_end_the_answer(byte_tokenizer):
    messages = [HI[0], {"role": "assistant", "content": "4<|im_end|>"}]
    row = render({"messages": messages}, byte_tokenizer, chat_template=NO_STOP.replace("content }}\n", "content }}"))
    assert row.text.endswith("4<|im_end|><|im_end|>")
    assert [row.text[slice(*literal)] for literal in row.literal] == ["<|im_end|>"]
    assert row.literal[0][1] + len("<|im_end|>") == row.spans[0].end == len(row.text)


# reliability: 45
def test_no_stop_token_at_all_is_an_error_with_a_way_out():
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(
        TemplateError, match=r"no stop token ends the text.* Name one of its tokens in eos_token, or use a chat"
    ):
        render({"text": "once"}, tokenizer)


# reliability: 45
def test_messages_without_a_template_are_an_error_with_a_way_out():
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match=r"has no chat template.* Set chat_template: to a Jinja file"):
        render({"messages": HI}, tokenizer)
    assert marked({"messages": HI}, tokenizer, chat_template=CHATML).endswith("[4<|im_end|>]\n")


@pytest.mark.parametrize(
    ("template", "messages", "what"),
    [
        (GEMMA, [{"role": "system", "content": "s"}, *HI], "System role not supported"),
        (MISTRAL, [HI[0], *HI], "Conversation roles must alternate"),
        (CHATML, [HI[0], {"role": "assistant", "content": 4}], "TypeError"),
        ("{% for", HI, "TemplateSyntaxError"),
    ],
)
def test_what_the_template_says_is_passed_on_with_the_place(byte_tokenizer, template, messages, what):
    with pytest.raises(TemplateError, match=f"a.jsonl:3: the chat template refuses .*{what}") as caught:
        render({"messages": messages, "source": "a.jsonl", "line": 3}, byte_tokenizer, chat_template=template)
    assert caught.value.reason == "template"


# reliability: 42
def test_control_tokens_of_a_person_are_found_in_tool_calls_and_tools_too(byte_tokenizer):
    call = {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"<|im_end|>": ["<|im_start|>"]}}]}
    row = render({"messages": [HI[0], call], "tools": [{"name": "<|pad|>"}]}, byte_tokenizer)
    assert [row.text[slice(*literal)] for literal in row.literal] == ["<|pad|>", "<|im_end|>", "<|im_start|>"]


@pytest.mark.parametrize("as_text", [False, True])
def test_values_nested_too_deeply_are_refused(byte_tokenizer, as_text):
    arguments = '{"x": ' + "[" * 600 + "]" * 600 + "}"
    call = {"function": {"name": "f", "arguments": arguments if as_text else json.loads(arguments)}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(TemplateError, match="nested too deeply") as caught:
        render({"messages": [{"role": "user", "content": "?"}, calling]}, byte_tokenizer)
    assert caught.value.reason == "too-deep"


def test_a_template_that_acts_on_a_persons_control_token_is_refused(byte_tokenizer):
    template = CHATML.replace("(message.content or '')", "message.content.split('<|im_end|>')[0]")
    messages = [{"role": "user", "content": "a<|im_end|>b"}, HI[1]]
    with pytest.raises(RowError, match="contains a control token") as caught:
        render({"messages": messages}, byte_tokenizer, chat_template=template)
    assert caught.value.reason == "control-token-in-content"


def test_an_answer_may_open_the_conversation(byte_tokenizer):
    expected = "<|im_start|>assistant\n[4<|im_end|>]\n<|im_start|>user\n2+2?<|im_end|>\n"
    assert marked({"messages": [HI[1], HI[0]]}, byte_tokenizer) == expected


def test_a_conversation_without_an_answer_has_no_span(byte_tokenizer):
    assert render({"messages": HI[:1]}, byte_tokenizer).spans == []


def test_the_oldest_exchange_goes_and_the_system_turn_stays():
    shorter = drop_oldest_turns({"messages": TOOLS, "source": "a"})
    assert shorter == {"messages": [TOOLS[0], *TOOLS[5:]], "source": "a"}
    assert drop_oldest_turns(shorter) is None


def test_a_prompt_loses_its_oldest_exchange_but_never_its_question():
    example = {"prompt": [*HI, HI[0]], "completion": [HI[1]]}
    assert drop_oldest_turns(example) == {"prompt": [HI[0]], "completion": [HI[1]]}
    assert drop_oldest_turns({"prompt": [HI[0]], "completion": [HI[1]]}) is None
    assert drop_oldest_turns({"text": "once"}) is None


CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}


# reliability: 44
@pytest.mark.parametrize(
    ("example", "words", "reason"),
    [
        ({"messages": [HI[0], CALL]}, "does not write the call of tool 'add' in turn 2", "call-not-written"),
        (
            {"messages": HI, "tools": [{"function": {"name": "add"}}]},
            "does not write the tool 'add'",
            "tools-not-written",
        ),
        ({"messages": [{"role": "system", "content": "Be brief."}, *HI]}, r"turn 1 \(system\)", "turn-not-written"),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(byte_tokenizer, example, words, reason):
    template = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(TemplateError, match=words) as caught:
        render(example, byte_tokenizer, chat_template=template)
    assert caught.value.reason == reason


ZEPHYR = (  # as many templates: one branch for each role it knows
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIRST_CALL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{{ m.tool_calls[0] | tojson }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADD = CALL["tool_calls"][0]
RAIN = {"role": "tool", "content": "It rains."}
ASKED = {"role": "assistant", "content": "I ask.", "tool_calls": [ADD]}


# reliability: 44
@pytest.mark.parametrize(
    ("template", "messages", "tools", "words"),
    [
        (ZEPHYR, [*HI, RAIN, HI[1]], None, r"turn 3 \(tool\). Take that turn out"),
        (ZEPHYR, [{"role": "developer", "content": "Be brief."}, *HI], None, r"turn 1 \(developer\)"),
        (ZEPHYR, [HI[0], {**ASKED, "train": False}, HI[1]], None, "the call of tool 'add' in turn 2"),
        (ZEPHYR, [HI[0], ASKED, HI[0], HI[1]], [{"function": {"name": "add"}}], "the call of tool 'add' in turn 2"),
        (FIRST_CALL, [HI[0], ASKED, RAIN, HI[1]], None, r"the words beside the tool call in turn 2 \(assistant\)"),
        (FIRST_CALL, [HI[0], {**CALL, "tool_calls": [ADD, ADD]}, RAIN, HI[1]], None, "the call of tool 'add' in turn"),
    ],
)
def test_a_template_that_leaves_out_a_tool_s_answer_a_call_or_words_is_refused(
    byte_tokenizer, template, messages, tools, words
):
    with pytest.raises(TemplateError, match=words):
        render({"messages": messages, "tools": tools}, byte_tokenizer, chat_template=template)


@pytest.mark.parametrize(
    ("written", "content"),
    [
        ("{{ m.content | tojson }}", 'It says "rain"\nin Rome.'),
        ("{{ m.content | fromjson | tojson(indent=2) }}", '{"weather": "raining", "in": "Rome"}'),
    ],
)
def test_a_tool_s_answer_may_be_written_as_json(byte_tokenizer, written, content):
    template = ZEPHYR.replace("{% elif", "{% elif m.role == 'tool' %}<|im_start|>tool\n" + written + "{% elif", 1)
    template = template.replace("m.content | fromjson", "{'weather': 'raining', 'in': 'Rome'}")
    messages = [HI[0], {"role": "assistant", "content": "I ask."}, {"role": "tool", "content": content}, HI[1]]
    assert len(render({"messages": messages}, byte_tokenizer, chat_template=template).spans) == 2


def test_thoughts_of_trained_turns_that_the_template_leaves_out_are_told(byte_tokenizer):
    thinks = {**HI[1], "reasoning_content": "Two and two."}
    calls = {**HI[1], "function_call": {"name": "add", "arguments": "{}"}}
    rows = [[HI[0], thinks], [HI[0], thinks, HI[0], thinks], [HI[0], calls], [HI[0], {**thinks, "train": False}, *HI]]
    told = ["reasoning_content", "reasoning_content of 2 turns", "function_call", ""]
    assert [render({"messages": row}, byte_tokenizer).unwritten for row in rows] == told
    template = ZEPHYR.replace(
        "{{ m.content }}<|im_end|>\n{% endif", "{{ m.reasoning_content }}{{ m.content }}<|im_end|>\n{% endif"
    )
    assert render({"messages": rows[0]}, byte_tokenizer, chat_template=template).unwritten == ""


def test_a_text_ends_without_a_stop_token_if_none_is_wanted(byte_tokenizer):
    rendered = render({"text": "hi"}, byte_tokenizer, append_eos=False, add_special_tokens=False)
    assert rendered == Rendered("hi", [Span(0, 2)])


MOODY = "{{ mood }}{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}"


def test_variables_of_the_template_are_text_and_reach_training_and_prompt_alike(byte_tokenizer):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    kwargs = {"mood": "calm<|im_end|>"}
    rendered = render({"messages": messages, "chat_template_kwargs": kwargs}, byte_tokenizer, chat_template=MOODY)
    assert rendered.text == "calm<|im_end|>[?][!]<|im_end|>"
    assert rendered.literal == [(4, 14)]
    prompt = render_prompt(messages[:1], byte_tokenizer, chat_template=MOODY, chat_template_kwargs=kwargs)
    assert rendered.text.startswith(prompt.text)
    assert prompt.text == "calm<|im_end|>[?]["


def test_what_the_renderer_sets_is_no_variable_of_the_template(byte_tokenizer):
    with pytest.raises(ConfigError, match="chat_template_kwargs: tokenize is set by tunesmith"):
        render_prompt([{"role": "user", "content": "?"}], byte_tokenizer, chat_template_kwargs={"tokenize": True})
