"""The terminal chat: commands, streaming, an answer that is stopped, and a pipe."""

import io
import threading

import pytest
import torch
from rich.console import Console

from tests.tiny import make_tiny_model
from tunesmith.deliver import chat as chatting
from tunesmith.deliver.chat import chat
from tunesmith.errors import DataError, TemplateError
from tunesmith.evaluate.generate import encode_prompt, generate_texts

SHORT = {"max_new_tokens": 6}


def typed(*lines):
    """A reader that gives these lines and then the end; a BaseException is raised in its place."""
    left = list(lines)

    def read_line():
        if not left:
            raise EOFError
        line = left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    return read_line


@pytest.fixture
def pipe():
    return Console(file=io.StringIO(), width=20)


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)


def test_in_a_pipe_answers_are_all_that_is_written(tiny_model, byte_tokenizer, pipe):
    messages = chat(tiny_model, byte_tokenizer, decoding=SHORT, console=pipe, read_line=typed("hello\n", "\n"))
    prompt = encode_prompt(byte_tokenizer, [{"role": "user", "content": "hello"}])
    answer = dict(generate_texts(tiny_model, byte_tokenizer, [prompt.input_ids], decoding=SHORT))[0]
    assert messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer.strip()}]
    assert pipe.file.getvalue() == chatting.printable(answer) + "\n"


def test_control_tokens_that_a_person_types_are_text(tiny_model, byte_tokenizer, pipe, monkeypatch):
    seen, generate = [], tiny_model.generate
    monkeypatch.setattr(tiny_model, "generate", lambda **given: seen.append(given["input_ids"]) or generate(**given))
    chat(tiny_model, byte_tokenizer, decoding=SHORT, console=pipe, read_line=typed("a<|im_end|>"))
    stop = byte_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (seen[0] == stop).sum() == 1


def test_the_conversation_goes_on_and_begins_with_the_system_message(tiny_model, byte_tokenizer, pipe):
    messages = chat(
        tiny_model, byte_tokenizer, system="Be kind.", decoding=SHORT, console=pipe, read_line=typed("a", "b")
    )
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("lines", "roles"),
    [
        (["a", "/reset"], ["system"]),
        (["a", "/system Be brief.", "b"], ["system", "user", "assistant"]),
        (["a", "/system"], []),
        (["/exit", "a"], ["system"]),
        (["/help", "  "], ["system"]),
        ([KeyboardInterrupt(), "a"], ["system"]),
    ],
)
def test_commands(tiny_model, byte_tokenizer, pipe, lines, roles):
    messages = chat(tiny_model, byte_tokenizer, system="Hi", decoding=SHORT, console=pipe, read_line=typed(*lines))
    assert [message["role"] for message in messages] == roles
    assert "/system Be brief." not in lines or messages[0]["content"] == "Be brief."


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(tiny_model, byte_tokenizer, pipe, monkeypatch):
    shown, threads = [], threading.active_count()

    def interrupt_at_the_first_piece(text):
        shown.append(text)
        if len(shown) == 1:
            raise KeyboardInterrupt
        return text

    monkeypatch.setattr(chatting, "printable", interrupt_at_the_first_piece)
    tiny_model.generation_config.eos_token_id = None
    messages = chat(
        tiny_model, byte_tokenizer, decoding={"max_new_tokens": 400}, console=pipe, read_line=typed("a", "/reset", "b")
    )
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert pipe.file.getvalue().startswith(" …\n")
    assert threading.active_count() == threads


def test_an_error_in_the_model_is_raised_and_not_waited_for(tiny_model, byte_tokenizer, pipe, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(tiny_model, "generate", fail)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        chat(tiny_model, byte_tokenizer, decoding=SHORT, console=pipe, read_line=typed("a"))


PICKY = "{% if messages[0].content == 'bad' %}{{ raise_exception('not this') }}{% endif %}{{ messages[0].content }}"


def test_a_turn_that_the_template_refuses_is_told_and_forgotten(tiny_model, byte_tokenizer, terminal):
    how = {"decoding": SHORT, "chat_template": PICKY, "console": terminal}
    messages = chat(tiny_model, byte_tokenizer, **how, read_line=typed("bad", "good"))
    assert [message["content"] for message in messages][:1] == ["good"]
    assert "not this" in terminal.file.getvalue()


def test_in_a_pipe_it_ends_there_with_the_error(tiny_model, byte_tokenizer, pipe):
    how = {"decoding": SHORT, "chat_template": PICKY, "console": pipe}
    with pytest.raises(TemplateError, match="not this"):
        chat(tiny_model, byte_tokenizer, **how, read_line=typed("bad", "good"))
    assert pipe.file.getvalue() == ""


def test_a_conversation_longer_than_the_model_reads_is_told(byte_tokenizer, terminal, monkeypatch):
    model, rooms = make_tiny_model(max_position_embeddings=64), []
    generate = model.generate
    keep = lambda **given: rooms.append(given["generation_config"].max_new_tokens) or generate(**given)  # noqa: E731
    monkeypatch.setattr(model, "generate", keep)
    how = {"decoding": {"max_new_tokens": 100}, "console": terminal}
    messages = chat(model, byte_tokenizer, **how, read_line=typed("a" * 99, "b"))
    assert "with its answer the model reads 64 at most. /reset begins anew." in terminal.file.getvalue()
    assert messages[0]["content"] == "b"
    assert rooms == [64 - len(encode_prompt(byte_tokenizer, messages[:1]).input_ids)]


def test_bytes_that_are_no_text_are_said(tiny_model, byte_tokenizer, pipe):
    line = b"caf\xe9".decode("utf-8", "surrogateescape")
    with pytest.raises(DataError, match="the line holds bytes that are no UTF-8 text"):
        chat(tiny_model, byte_tokenizer, decoding=SHORT, console=pipe, read_line=typed(line))


def test_training_mode_comes_back(tiny_model, byte_tokenizer, pipe):
    tiny_model.train()
    chat(tiny_model, byte_tokenizer, decoding=SHORT, console=pipe, read_line=typed("a"))
    assert tiny_model.training


def test_standard_input_is_read_line_by_line(tiny_model, byte_tokenizer, pipe, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo"))
    messages = chat(tiny_model, byte_tokenizer, decoding=SHORT, console=pipe)
    assert [message["content"] for message in messages if message["role"] == "user"] == ["one", "two"]
