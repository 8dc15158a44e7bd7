"""What Unsloth hands to a trainer, without Unsloth: patched forwards, and a config that names it."""

import types
from types import ModuleType
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

VERSION = "2026.11.1"


class PlainModule(nn.Module):
    """A language model that is no `PreTrainedModel`: what the trainer needs of one, and nothing more.

    As Unsloth's forward, it takes any keyword, ignores those it does not know, and attends causally over the whole
    row, so that documents laid end to end would see each other.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.body, self.lm_head, self.config = model.model, model.lm_head, model.config
        self.config.unsloth_version = VERSION

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **_ignored: Any
    ) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.lm_head(causal_hidden(self.body, input_ids, attention_mask)))

    def get_input_embeddings(self) -> nn.Module:
        return self.body.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def causal_hidden(body: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Hidden states with positions 0, 1, 2, ... over the whole row, whatever documents are in it."""
    return body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def fast_forward(
    self: nn.Module, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **_ignored: Any
) -> CausalLMOutputWithPast:
    """Stands for Unsloth's `CausalLM_fast_forward`."""
    return CausalLMOutputWithPast(logits=self.lm_head(causal_hidden(self.model, input_ids, attention_mask)))


class FastLanguageModel:
    """The two functions of Unsloth's class, on transformers and peft."""

    @staticmethod
    def from_pretrained(
        model_name: str, max_seq_length: int, dtype: Any = None, load_in_4bit: bool = False
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model = AutoModelForCausalLM.from_pretrained(model_name)  # in 4 bits only where there is a GPU
        model.config.unsloth_version = VERSION
        model.max_seq_length = max_seq_length
        model.forward = types.MethodType(fast_forward, model)
        return model, AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel, *, random_state: int, use_gradient_checkpointing: bool, **lora: Any
    ) -> nn.Module:
        if use_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))


def fake_unsloth() -> ModuleType:
    """A module to put under `sys.modules["unsloth"]`."""
    module = ModuleType("unsloth")
    module.FastLanguageModel = FastLanguageModel
    return module
