"""A causal language model with a value head: one number for each token, how good the text up to there is."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.base import MERGED
from tunesmith.model.load import first_line, load_any

HEAD_FILE = "value_head.safetensors"
OLD_HEAD_FILE = "value_head.bin"
HEAD_PREFIX = "v_head."  # the names that TRL and LLaMA-Factory give the tensors of the file
# What a trainer asks a model for, answered by the language model.
PASSED_ON = {
    *("config", "generation_config", "device", "dtype", "quantization_method", "hf_device_map", "_no_split_modules"),
    *("get_input_embeddings", "get_output_embeddings", "enable_input_require_grads"),
    *("gradient_checkpointing_enable", "gradient_checkpointing_disable"),
    *("peft_config", "active_peft_config", "_hf_peft_config_loaded", MERGED),
}


class ValueHead(nn.Module):
    """Hidden state → reward, in float32 whatever the model's type.

    The weights begin as N(0, 1 / (H + 1)²): two texts hardly ever tie, and a pair's first loss is close to ln 2. The
    bias is there for files of other programs; a difference of two rewards does not see it, so it does not train.
    """

    def __init__(self, hidden_size: int, seed: int = 0):
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1, dtype=torch.float32)
        first = torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(seed)) / (hidden_size + 1)
        self.summary.weight.data.copy_(first)
        self.summary.bias.data.zero_()
        self.summary.bias.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, H) → (B, S) float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.summary.weight.float(), self.summary.bias.float()).squeeze(-1)


class RewardModel(nn.Module):
    """A language model, plain, quantized or wrapped by peft, and its value head; the language model's own head rests.

    Args:
        base: the causal language model. Its output head is frozen, for no reward depends on it.
        head: `None` makes a new one, drawn from `seed` alone.
    """

    def __init__(self, base: nn.Module, head: ValueHead | None = None, seed: int = 0):
        super().__init__()
        if getattr(base, "get_output_embeddings", lambda: None)() is None:
            raise ConfigError(
                f"a reward model is a causal language model with a value head of its own, got {type(base).__name__}. "
                "Load it with AutoModelForCausalLM."
            )
        self.base = base
        embeddings = base.get_input_embeddings()
        self.v_head = ValueHead(base.config.get_text_config().hidden_size, seed) if head is None else head
        self.v_head.to(embeddings.weight.device)
        shared = {id(parameter) for parameter in embeddings.parameters()}
        for parameter in base.get_output_embeddings().parameters():
            if id(parameter) not in shared:
                parameter.requires_grad_(False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in PASSED_ON:
                raise
            return getattr(self.base, name)

    def forward(self, **inputs: Any) -> Tensor:
        """Rewards of all tokens, (B, S) float32; inputs as the language model takes them. No logits are formed."""
        return self.v_head(decoder(self.base)(**inputs).last_hidden_state)

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None, **options: Any) -> None:
        """The language model (only the adapter, if it has one) and the value head beside it.

        Args:
            state_dict: gathered weights of this module, where they are spread over several processes.
            options: of the language model's `save_pretrained`.
        """
        head = self.v_head.state_dict()
        if state_dict is not None:
            head = {
                name.removeprefix("v_head."): state_dict[name] for name in state_dict if name.startswith("v_head.")
            }
            parts = (name for name in state_dict if name.startswith("base."))
            options["state_dict"] = {name.removeprefix("base."): state_dict[name] for name in parts}
        self.base.save_pretrained(folder, **options)
        save_head(head, folder)

    def merge_and_unload(self) -> "RewardModel":
        """The adapter's weights put into the base; the same value head."""
        return RewardModel(self.base.merge_and_unload(), self.v_head)


def decoder(model: nn.Module) -> nn.Module:
    """The part of a causal language model that makes hidden states, adapters inside."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.base_model


def save_head(tensors: dict[str, Tensor], folder: str | Path) -> None:
    """Write a head's state as `value_head.safetensors`."""
    from safetensors.torch import save_file

    plain = {HEAD_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, Path(folder) / HEAD_FILE, metadata={"format": "pt"})


def has_head(folder: str | Path) -> bool:
    """Whether a value head lies in a model, adapter or checkpoint folder."""
    return any((Path(folder) / name).is_file() for name in (HEAD_FILE, OLD_HEAD_FILE))


def read_head(folder: str | Path) -> ValueHead:
    """The value head in a folder: ours, or one that LLaMA-Factory or TRL wrote (`.bin` too; no code in it runs).

    Raises: ModelError where there is none, or it is no value head.
    """
    safe, old = (Path(folder) / name for name in (HEAD_FILE, OLD_HEAD_FILE))
    if not has_head(folder):
        raise ModelError(
            f"{folder}: holds no {HEAD_FILE}, so it is no reward model. Name a folder that stage rm wrote."
        )
    path = safe if safe.is_file() else old
    tensors = read_tensors(path)
    tensors = {name.removeprefix(HEAD_PREFIX): value for name, value in tensors.items()}
    weight, bias = tensors.get("summary.weight"), tensors.get("summary.bias")
    if weight is None or weight.dim() != 2 or weight.shape[0] != 1:
        raise ModelError(
            f"{path}: has no tensor v_head.summary.weight of shape (1, hidden), only {', '.join(tensors)}."
        )
    head = ValueHead(weight.shape[1])
    head.summary.weight.data.copy_(weight)
    if bias is not None:
        head.summary.bias.data.copy_(bias)
    return head


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; raises ModelError for one that is damaged."""
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything
        raise ModelError(
            f"{path}: cannot be read ({first_line(error)}). Copy it again from where it was trained."
        ) from error


def load_reward_model(name: str, *, trainable: bool = False, **options: Any) -> RewardModel:
    """The reward model in a folder, its adapter on its base; `options` as for `load_model`.

    Raises: ModelError where the folder holds no model, or no value head.
    """
    head = read_head(name)
    return RewardModel(load_any(name, trainable_adapter=trainable, **options), head).train(trainable)
