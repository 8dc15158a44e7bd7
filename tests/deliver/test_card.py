"""The model card says what was trained, on what, and how; and never replaces what a person wrote."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from tests import tiny, unsloth_shape
from tunesmith import SFTConfig
from tunesmith.data.report import Report
from tunesmith.deliver.card import BESIDE, MARK, TAGS, is_generated, tag_model, write_card


def lora(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM"))


@pytest.fixture
def write(tmp_path):
    """`write(model, ...)` gives the card's front matter as a dict and its text."""

    def write(model=None, **facts):
        path = write_card(tmp_path / "run", model=model or tiny.make_tiny_model(), **facts)
        card = ModelCard.load(path)
        return card.data.to_dict(), card.text

    return write


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    return SFTConfig(output_dir=str(tmp_path_factory.mktemp("args")), use_cpu=True, hub_token="hf_secret12345")


def report() -> Report:
    found = Report()
    found.read, found.kept, found.num_tokens, found.num_trained = 12, 11, 4321, 1234
    return found


# trainer: A13
def test_the_front_matter_is_what_the_hub_reads(write):
    data, text = write(model_name="poet", dataset_name="owner/poems", tags=["verse"])
    assert data == {
        "datasets": ["owner/poems"],
        "library_name": "transformers",
        "model_name": "poet",
        "pipeline_tag": "text-generation",
        "tags": ["generated_from_trainer", *TAGS, "verse"],
    }
    assert "\n# poet\n" in text
    assert "SFT" in text
    assert "license" not in data


# trainer: A13
def test_a_tag_may_be_a_text(write):
    assert write(tags="verse")[0]["tags"][-1] == "verse"


# trainer: A13
@pytest.mark.parametrize(
    ("name", "shown"), [("facebook/opt-350m", "facebook/opt-350m"), ("/data/base", None), ("gpt2", "gpt2"), ("", None)]
)
def test_a_base_model_is_named_by_its_hub_id(write, name, shown):
    model = tiny.make_tiny_model()
    model.config._name_or_path = name
    data, text = write(model)
    assert data.get("base_model") == shown
    assert ("huggingface.co/" + (shown or "?")) in text or shown is None


# trainer: A13
# reliability: 64
def test_a_base_model_in_a_folder_is_not_named(write, tmp_path):
    (tmp_path / "base").mkdir()
    model = tiny.make_tiny_model()
    model.config._name_or_path = str(tmp_path / "base")
    data, text = write(model)
    assert "base_model" not in data
    assert str(tmp_path) not in text


# trainer: A13 A14
def test_unsloth_models_are_tagged(write):
    assert "unsloth" in write(unsloth_shape.PlainModule(tiny.make_tiny_model()))[0]["tags"]
    assert "unsloth" not in write(tiny.make_tiny_model())[0]["tags"]


def test_an_adapter_is_peft_s_and_loads_with_it(write):
    data, text = write(lora(tiny.make_tiny_model()))
    assert data["library_name"] == "peft"
    assert "AutoPeftModelForCausalLM.from_pretrained" in text
    assert "| target_modules | q_proj, v_proj |" in text
    assert "- PEFT " in text


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", [None, "chatml"])
def test_the_quick_start_is_python_and_names_the_model(write, adapted, family):
    model, tokenizer = tiny.make_tiny_model(), tiny.make_byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template if family else None
    _, text = write(lora(model) if adapted else model, tokenizer=tokenizer, args=SimpleNamespace(hub_model_id="me/it"))
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert '"me/it"' in code
    assert ('"role": "user"' in code) == bool(family)


# reliability: 64
def test_rows_tokens_options_and_figures_are_shown(write, args):
    history = [
        {"loss": 3.0, "step": 1},
        {"eval_loss": 2.5, "eval_runtime": 1.0, "step": 1},
        {"eval_loss": 2.0, "eval_samples_per_second": 3.0, "step": 2},
        {"train_loss": 2.75, "train_runtime": 9.0, "total_flos": 0.0},
    ]
    _, text = write(args=args, reports={"train_dataset": report()}, log_history=history)
    assert "| train | 12 | 11 | 4,321 | 1,234 |" in text
    assert "| learning_rate | 2e-05 |" in text
    assert "| lr_scheduler_type | linear |" in text
    assert "| eval_loss | 2 |" in text
    assert "| train_loss | 2.75 |" in text
    assert "runtime" not in text
    assert "hf_secret" not in text


def test_a_zero_is_shown_and_what_was_not_counted_is_not(write, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, seed=0)
    _, text = write(args=args, reports={"train_dataset": report(), "eval_dataset": Report()})
    assert "| seed | 0 |" in text
    assert "\n| train |" in text
    assert "\n| eval |" not in text


# reliability: 64
def test_versions_are_listed(write):
    import transformers

    _, text = write()
    assert f"- Transformers {transformers.__version__}" in text
    assert "- tunesmith " in text


# trainer: A13
def test_trackers_in_use_are_linked_and_none_is_imported(write, monkeypatch):
    assert "The run at" not in write()[1]
    assert not {"wandb", "comet_ml"} & sys.modules.keys()
    wandb, comet = ModuleType("wandb"), ModuleType("comet_ml")
    wandb.run = SimpleNamespace(url="https://wandb.example/run")
    comet.get_running_experiment = lambda: SimpleNamespace(url="https://comet.example/run")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "comet_ml", comet)
    _, text = write()
    assert "<https://wandb.example/run>" in text
    assert "<https://comet.example/run>" in text


def test_the_same_facts_make_the_same_card(write, args):
    first = write(lora(tiny.make_tiny_model()), args=args)
    assert write(lora(tiny.make_tiny_model()), args=args) == first


# reliability: 65
def test_names_cannot_break_out_of_their_line(write):
    data, text = write(model_name="a\n---\n# evil: yes", tags=["x: y\n- z"])
    assert data["model_name"] == "a --- # evil: yes"
    assert data["tags"][-1] == "x: y\n- z"
    assert "\n# evil" not in text


# ------------------------------------------------------------------------------------------------ whose card


def test_a_card_of_ours_is_replaced(tmp_path):
    for name in ("first", "second"):
        path = write_card(tmp_path, model=tiny.make_tiny_model(), model_name=name)
    assert [entry.name for entry in tmp_path.iterdir()] == ["README.md"]
    assert "# second" in path.read_text()


def test_a_card_of_a_person_stays(tmp_path, caplog):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    path = write_card(tmp_path, model=tiny.make_tiny_model())
    assert (tmp_path / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine\n"
    assert path == tmp_path / BESIDE
    assert "was written by a person and stays" in caplog.text


def test_without_its_mark_our_card_is_a_persons(tmp_path):
    path = write_card(tmp_path, model=tiny.make_tiny_model())
    path.write_text(path.read_text().replace(MARK, "I trained this."))
    assert not is_generated(path.read_text())


def test_the_empty_form_that_peft_saves_is_replaced(tmp_path):
    model = lora(tiny.make_tiny_model())
    model.save_pretrained(tmp_path)
    form = (tmp_path / "README.md").read_text()
    assert is_generated(form)
    assert not is_generated(form.replace("[More Information Needed]", "Ada", 1))
    write_card(tmp_path, model=model)
    assert MARK in (tmp_path / "README.md").read_text()


def test_peft_saving_beside_our_card_keeps_it_ours(tmp_path):
    model = lora(tiny.make_tiny_model())
    tag_model(model)
    path = write_card(tmp_path, model=model, model_name="poet")
    model.save_pretrained(tmp_path)
    assert MARK in path.read_text()
    assert path.read_text().count("- PEFT ") == 1
    assert set(TAGS) <= set(ModelCard.load(path).data.tags)


# ------------------------------------------------------------------------------------------------ tags


# trainer: A14
@pytest.mark.parametrize("make", [lambda model: model, lora, unsloth_shape.PlainModule])
def test_models_carry_the_tags(make):
    model = make(tiny.make_tiny_model())
    assert tag_model(model) == model.model_tags
    assert set(TAGS) <= set(model.model_tags)
    assert ("unsloth" in model.model_tags) == (make is unsloth_shape.PlainModule)


def test_tags_that_a_model_has_are_kept_and_none_comes_twice():
    model = tiny.make_tiny_model()
    model.add_model_tags(["sft", "mine"])
    tag_model(model)
    assert tag_model(model) == ["sft", "mine", "trl", "tunesmith"]
    assert type(model).model_tags is None  # of this model, not of its class
