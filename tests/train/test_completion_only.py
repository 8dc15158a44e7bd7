"""What is trained is read as text: `trained` decodes the tokens whose labels are not ignored."""

import pickle
import warnings
from bisect import bisect_left

import pytest
import torch
from datasets import Dataset
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from tests import tiny
from tunesmith.data.render import Rendered
from tunesmith.data.tokenize import encoder_of
from tunesmith.errors import ConfigError, DataError
from tunesmith.train import token_text
from tunesmith.train.completion_only import CompletionLabels, TemplateNotFound
from tunesmith.train.completion_only import DataCollatorForCompletionOnlyLM as Collator

HUMAN, ASSISTANT = "### Human:", "### Assistant:"
TALK = (
    f"{HUMAN} Hello, mask all of this.{ASSISTANT} I should not be masked."
    f"{HUMAN} Mask this as well.{ASSISTANT} I should not be masked too."
)
BYTE = tiny.make_byte_tokenizer()
TOKENIZERS = {
    "byte": BYTE,
    "bpe": tiny.make_bpe_tokenizer(),
    "llama2": tiny.make_sentencepiece_like_tokenizer(),
    "metaspace": tiny.make_sentencepiece_like_tokenizer(prefix="first"),
}


@pytest.fixture(params=TOKENIZERS, ids=str)
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.fixture(params=["by bytes", "by beginnings"])
def way(request, monkeypatch):
    """Both ways to find a text among tokens."""
    if request.param == "by beginnings":
        monkeypatch.setattr(token_text, "WAYS", ())


def trained(tokenizer, labels) -> str:
    return token_text.TokenText(tokenizer).decode(
        [label for label in torch.as_tensor(labels).flatten().tolist() if label >= 0]
    )


def in_context(tokenizer, text: str) -> str:
    """The text as the tokenizer writes it when it does not begin a row."""
    return text[1:] if tokenizer in (TOKENIZERS["llama2"], TOKENIZERS["metaspace"]) and text[:1] == " " else text


def byte_row(text: str, **columns) -> dict:
    return {"input_ids": BYTE(text)["input_ids"], **columns}


# trainer: D1
def test_the_collator_takes_the_arguments_of_trl():
    collator = Collator(ASSISTANT, HUMAN, tokenizer=BYTE, mlm=False, pad_to_multiple_of=64, return_tensors="pt")
    assert isinstance(collator, DataCollatorForLanguageModeling)
    assert (collator.ignore_index, collator.padding_free, collator.mlm) == (-100, False, False)
    batch = collator([BYTE(TALK)])
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].shape == (1, 192)
    assert Collator(ASSISTANT, None, BYTE).tokenizer is BYTE


# trainer: D1
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlm": True}, "mlm: .* Leave it out"),
        ({"mlm_probability": 0.3}, "mlm_probability: no option"),
        ({"padding_fre": True}, "Did you mean 'padding_free'"),
        ({"return_tensors": "np"}, "return_tensors: .* torch tensors only"),
        ({"padding_free": True, "pad_to_multiple_of": 8}, "pad_to_multiple_of: padding_free=True pads nothing"),
        ({"on_missing_template": "drop"}, "one of error, warn, skip; got 'drop'"),
        ({"instruction_template": []}, "instruction_template: expected a text or a list"),
    ],
)
def test_an_option_without_effect_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Collator(ASSISTANT, tokenizer=BYTE, **options)


# trainer: D1
def test_another_kind_of_tensors_is_refused_in_the_call():
    with pytest.raises(ConfigError, match="torch tensors only"):
        Collator(ASSISTANT, tokenizer=BYTE)([BYTE(TALK)], return_tensors="np")


# trainer: D1
def test_a_subclass_may_change_the_batch_in_torch_call():
    class Doubled(Collator):
        def torch_call(self, examples):
            return super().torch_call([*examples, *examples])

    assert Doubled(ASSISTANT, tokenizer=BYTE)([BYTE(TALK)])["labels"].shape[0] == 2


# trainer: D2
def test_only_the_text_behind_the_response_template_is_trained(tokenizer, way):
    row = tokenizer("### Instructions:\nMask this.\n\n### Response:\nI am trained.")
    labels = Collator("### Response:\n", tokenizer=tokenizer)([row])["labels"]
    assert trained(tokenizer, labels) == "I am trained."


# trainer: D2
def test_the_last_of_several_response_templates_counts(tokenizer, way):
    labels = Collator(ASSISTANT, tokenizer=tokenizer).labels_for(tokenizer(TALK)["input_ids"])
    assert trained(tokenizer, labels) == in_context(tokenizer, " I should not be masked too.")


# trainer: D2
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_ignored_on_either_side(side):
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.padding_side = side
    batch = Collator("A:", tokenizer=tokenizer)([{"input_ids": [*b"Q?A:ab"]}, {"input_ids": [*b"A:c"]}])
    pad, no = [258] * 3, [-100] * 3
    left = side == "left"
    assert batch["input_ids"].tolist() == [[*b"Q?A:ab"], [*pad, *b"A:c"] if left else [*b"A:c", *pad]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [0, 0, 0, 1, 1, 1] if left else [1, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [-100] * 4 + [*b"ab"],
        [*no, -100, -100, 99] if left else [-100, -100, 99, *no],
    ]


# trainer: D2 D8
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_end_of_sequence_token_that_also_pads_is_trained(side):
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, side
    rows = [{"input_ids": [*b"A:yes", 257]}, {"input_ids": [*b"A:n", 257]}]
    labels = Collator("A:", tokenizer=tokenizer)(rows)["labels"]
    assert [[one for one in line if one >= 0] for line in labels.tolist()] == [[*b"yes", 257], [*b"n", 257]]


# trainer: D2
def test_padding_that_rows_bring_is_told_by_their_attention_mask():
    rows = [{"input_ids": [257, 257, *b"A:n", 257], "attention_mask": [0, 0, 1, 1, 1, 1], "labels": [7] * 6}]
    batch = Collator("A:", tokenizer=BYTE)(rows)
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100] * 4 + [110, 257]]


# trainer: D3
def test_only_the_answers_of_a_conversation_are_trained(tokenizer, way):
    collator = Collator(instruction_template=HUMAN, response_template=ASSISTANT, tokenizer=tokenizer, mlm=False)
    labels = collator([tokenizer(TALK)])["labels"]
    assert trained(tokenizer, labels) == in_context(tokenizer, " I should not be masked. I should not be masked too.")


# trainer: D3
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("H:q A:one H:q A:two", "one two"),
        ("A:one H:q A:two", "one two"),  # the first response comes first
        ("H:q A:one H:unanswered", "one "),  # more instructions than responses
        ("H:q H:q A:one", "one"),
        ("H:q A:one A:two H:q", "one two "),  # the second header is not trained
        ("S: H:q A:", ""),
    ],
)
def test_each_answer_ends_where_the_next_template_begins(text, expected):
    assert trained(BYTE, CompletionLabels(BYTE, "A:", "H:")([*text.encode()])) == expected


# trainer: D3
def test_a_template_inside_the_other_is_no_template_of_its_own():
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    labels = CompletionLabels(BYTE, "<|im_start|>assistant\n", "<|im_start|>")(BYTE(text)["input_ids"])
    assert trained(BYTE, labels) == "Yo<|im_end|>\n"


# trainer: D3
def test_a_token_that_holds_a_part_of_a_template_is_not_trained(way):
    tokenizer = TOKENIZERS["bpe"]
    row = tokenizer("assistant\n  Yo\n\nuser\nBye")["input_ids"]
    assert "\n\n" in [tokenizer.decode([one]) for one in row]  # ends the answer and begins the template
    assert trained(tokenizer, CompletionLabels(tokenizer, "assistant\n", "\nuser")(row)) == "  Yo"


# trainer: D4
def test_templates_may_be_token_ids():
    text = [*TALK.encode()]
    by_text = CompletionLabels(BYTE, ASSISTANT, HUMAN)(text)
    human, assistant = [*HUMAN.encode()], [*ASSISTANT.encode()]
    assert CompletionLabels(BYTE, assistant, human)(text) == by_text
    assert CompletionLabels(BYTE, assistant, HUMAN)(text) == by_text
    assert CompletionLabels(BYTE, torch.tensor(assistant), tuple(human))(text) == by_text


# trainer: D4
def test_token_ids_are_looked_for_as_they_are():
    tokenizer = TOKENIZERS["llama2"]
    alone = tokenizer.encode(ASSISTANT, add_special_tokens=False)
    with pytest.raises(TemplateNotFound, match="response"):
        CompletionLabels(tokenizer, alone)(tokenizer("### User: Hello\n\n### Assistant: Hi")["input_ids"])


# trainer: D5
def test_a_text_is_found_where_its_context_gives_it_other_ids():
    tokenizer = TOKENIZERS["llama2"]
    row = tokenizer("### User: Hello\n\n### Assistant: Hi, how can I help you?")["input_ids"]
    alone = tokenizer.encode(ASSISTANT, add_special_tokens=False)
    trick = tokenizer.encode(f"\n{ASSISTANT}", add_special_tokens=False)[2:]
    assert alone != trick  # what the documentation of TRL works around
    labels = Collator(ASSISTANT, tokenizer=tokenizer).labels_for(row)
    assert labels == Collator(trick, tokenizer=tokenizer).labels_for(row)
    assert trained(tokenizer, labels) == "Hi, how can I help you?"


# trainer: D5
@pytest.mark.parametrize(
    ("name", "template", "text"),
    [
        ("llama2", " ### Answer:", " ### Answer: yes"),  # begins the row with two spaces, and text with one
        ("llama2", "<s>### Answer:", "<s>### Answer: yes"),  # has a space behind <s>
        ("metaspace", "### Answer:", "### Answer: yes"),
        ("words", "### Answer:\n", "### Question: the ### Answer:\nyes"),  # has no line breaks, and spaces everywhere
    ],
)
def test_a_template_is_found_as_the_tokenizer_writes_it(name, template, text):
    tokenizer = make_word_tokenizer() if name == "words" else TOKENIZERS[name]
    row = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert trained(tokenizer, CompletionLabels(tokenizer, template)(row)) == "yes"


def make_word_tokenizer() -> PreTrainedTokenizerFast:
    """In the manner of BERT: what it decodes is neither the text nor the sum of its tokens."""
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "#": 1, "answer": 2, ":": 3, "y": 4, "##es": 5, "the": 6}))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


# trainer: D6
def test_a_missing_template_is_an_error_on_request():
    collator = Collator("A:", tokenizer=BYTE, on_missing_template="error")
    words = r"Could not find response key \[65, 58\] in token IDs tensor\(\[78, 111, 116, 104, 105, 110, 103\]\)"
    with pytest.raises(RuntimeError, match=rf"{words}.*does not occur in a row of 7 tokens: 'Nothing'.*max_length"):
        collator([byte_row("Nothing")])
    with pytest.raises(DataError):
        collator.labels_for(byte_row("Nothing")["input_ids"])


# trainer: D6
def test_a_missing_template_warns_and_masks_the_row():
    words = (
        "Could not find response key `A:` in the following instance: Nothing This instance will be ignored in loss "
        "calculation. Note, if this happens often, consider increasing the `max_seq_length`"
    )
    with pytest.warns(UserWarning, match=words):
        labels = Collator("A:", tokenizer=BYTE)([byte_row("Nothing"), byte_row("A:yes")])["labels"]
    assert labels.tolist() == [[-100] * 7, [-100, -100, *b"yes", -100, -100]]


# trainer: D6
def test_a_missing_template_may_be_skipped_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = Collator("A:", tokenizer=BYTE, on_missing_template="skip")([byte_row("Nothing")])["labels"]
    assert labels.eq(-100).all()


# trainer: D6
def test_a_conversation_without_an_instruction_is_missing_a_template():
    with pytest.warns(UserWarning, match="Could not find instruction key `H:`"):
        assert Collator("A:", "H:", tokenizer=BYTE)([byte_row("A:yes")])["labels"].eq(-100).all()
    with pytest.raises(TemplateNotFound, match="instruction key") as caught:
        CompletionLabels(BYTE, "A:", "H:")([*b"A:yes"])
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


# trainer: D8
def test_conversations_warn_where_the_padding_token_ends_sequences():
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.warns(UserWarning, match="pad_token_id and eos_token_id are both 257.* stays trained"):
        Collator(ASSISTANT, HUMAN, tokenizer=tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Collator(ASSISTANT, tokenizer=tokenizer)
        Collator(ASSISTANT, HUMAN, tokenizer=BYTE)


# trainer: D9
def test_without_padding_rows_lie_end_to_end():
    rows = [byte_row("A:yes", attention_mask=[1] * 5), {"input_ids": [258, *b"A:n"], "attention_mask": [0, 1, 1, 1]}]
    batch = Collator("A:", tokenizer=BYTE, padding_free=True)(rows)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[*b"A:yes", *b"A:n"]],
        "labels": [[-100, -100, *b"yes", -100, -100, 110]],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1, 2]],
    }


# trainer: D9
def test_the_first_token_of_a_row_is_never_trained_without_padding():
    class All(Collator):
        def labels_for(self, input_ids):
            return list(input_ids)

    batch = All("A:", tokenizer=BYTE, padding_free=True, ignore_index=-1)(
        [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}]
    )
    assert batch["labels"].tolist() == [[-1, 2, -1, 4]]


# trainer: D7 D9
def test_each_document_of_a_packed_row_is_labelled_by_itself():
    row = {"input_ids": [*b"A:yesNoA:n"], "seq_lengths": [5, 2, 3]}
    batch = Collator("A:", tokenizer=BYTE, on_missing_template="skip")([row])
    assert batch["labels"].tolist() == [[-100, -100, *b"yes", -100, -100, -100, -100, 110]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2]]
    assert batch["document_lengths"] == (5, 2, 3)
    assert batch["loss_targets"].tolist() == [*b"yes", 110]


# trainer: D10
def test_the_snippet_with_a_batched_formatting_function():
    def formatting_prompts_func(example):
        return [
            f"### Question: {example['instruction'][i]}\n ### Answer: {example['output'][i]}"
            for i in range(len(example["instruction"]))
        ]

    texts = formatting_prompts_func({"instruction": ["2+2?", "Sky?"], "output": ["4", "It is blue."]})
    for tokenizer in TOKENIZERS.values():
        collator = Collator(" ### Answer:", tokenizer=tokenizer)
        rows = Dataset.from_dict(dict(tokenizer(texts))).with_format("torch")
        labels = collator([rows[0], rows[1]])["labels"]
        assert [trained(tokenizer, line).strip() for line in labels] == ["4", "It is blue."]


# trainer: D10
def test_the_snippet_with_instruction_and_response_templates(tokenizer):
    instruction_template, response_template = "### Human:", "### Assistant:"
    collator = Collator(
        instruction_template=instruction_template, response_template=response_template, tokenizer=tokenizer, mlm=False
    )
    texts = [
        "### Human: Hi### Assistant: Yo",
        "### Human: And?### Assistant: Well.### Human: Bye### Assistant: So long",
    ]
    labels = collator([tokenizer(text, return_tensors="pt") for text in texts])["labels"]
    assert [trained(tokenizer, line).strip() for line in labels] == ["Yo", "Well. So long"]


# trainer: D1
def test_rows_may_be_lists_tensors_or_encodings():
    collator = Collator("A:", tokenizer=BYTE)
    expected = collator([{"input_ids": [*b"A:yes"]}])["labels"].tolist()
    for row in ([*b"A:yes"], torch.tensor([*b"A:yes"]), BYTE("A:yes"), BYTE("A:yes", return_tensors="pt")):
        assert collator([row])["labels"].tolist() == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "A:yes"}, r"no 'input_ids', only \['text'\]"),
        ({"input_ids": [[1, 2], [3, 4]]}, "input_ids of one row holds 2 lists"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "2 input_ids, but an attention_mask of 1"),
        ({"input_ids": [1, 2], "seq_lengths": [1]}, r"seq_lengths \[1\] do not add up to its 2 tokens"),
        ({"input_ids": [1, 2], "weights": [1.0, 1.0]}, "has 'weights'"),
    ],
)
def test_a_row_of_another_shape_is_refused(row, message):
    with pytest.raises(DataError, match=message):
        Collator("A:", tokenizer=BYTE)([row])


def test_what_was_learned_from_rows_does_not_change_the_collator():
    collator = Collator("A:", tokenizer=BYTE)
    labels = collator.labels_for([*b"A:yes"])
    assert collator.completion_labels.reader.__getstate__() == {"tokenizer": BYTE}
    assert pickle.loads(pickle.dumps(collator)).labels_for([*b"A:yes"]) == labels


words = st.text(st.sampled_from("ab :.\n#Aé漢😀"), max_size=12)


# trainer: D2 D5
@pytest.mark.parametrize("is_by_bytes", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
@given(before=words, template=st.sampled_from(["#A:", "é:", "漢😀", " A: ", "assistant\n"]), after=words)
def test_training_begins_at_the_right_character(name, is_by_bytes, before, template, after):
    text = before + template + after
    find_labels = CompletionLabels(TOKENIZERS[name], template)
    if not is_by_bytes:
        find_labels.reader.ways = []
    encoded, _ = encoder_of(TOKENIZERS[name]).encode(Rendered(text, []))  # knows the offsets, from the text
    end = text.rindex(template) + len(template)
    first = bisect_left(encoded.starts, end)
    assert find_labels(encoded.ids) == [-100] * first + encoded.ids[first:]


# trainer: D3 D5
@pytest.mark.parametrize("is_by_bytes", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
@given(answer=words, question=words)
def test_training_ends_at_the_right_character(name, is_by_bytes, answer, question):
    text = f"漢#Q:#A:{answer}漢#Q:{question}"
    assume("漢#Q:" not in answer + question)
    find_labels = CompletionLabels(TOKENIZERS[name], "#A:", "漢#Q:")
    if not is_by_bytes:
        find_labels.reader.ways = []
    encoded, _ = encoder_of(TOKENIZERS[name]).encode(Rendered(text, []))
    start, end = text.rindex("#A:", 0, len(text) - len(question)) + 3, len(text) - len(question) - 4
    assume(start == 7)  # no answer inside the answer
    assume("#A:" not in question)
    trained = [
        one if start <= first and stop <= end else -100
        for one, first, stop in zip(encoded.ids, encoded.starts, encoded.ends)
    ]
    assert find_labels(encoded.ids) == trained


# trainer: D2 D6
@pytest.mark.parametrize("name", TOKENIZERS)
@given(answer=words, cut=st.integers(0, 60))
def test_cutting_a_row_cuts_its_labels(name, answer, cut):
    find_labels = CompletionLabels(TOKENIZERS[name], "#A:")
    encoded, _ = encoder_of(TOKENIZERS[name]).encode(Rendered(f"é漢😀#A:{answer}", []))
    whole = find_labels(encoded.ids)
    cut = max(cut, whole.count(-100))
    assert find_labels(encoded.ids[:cut]) == whole[:cut]
    assert find_labels.reader.read(encoded.ids[:cut]).edges  # by bytes, even if that ends in the middle of a character
