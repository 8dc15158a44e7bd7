"""Fixtures that all tests share; `tests/tiny.py` builds variants."""

import os
import signal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TUNESMITH_CACHE", "off")  # nothing of a test stays in the user's cache folder
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: torch's threads would stand in their way
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # under `nohup`, and what is started from here would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import settings

from tests import tiny
from tests.workplace import PAIRS, write_recipe, write_rows

settings.register_profile("tunesmith", max_examples=100, derandomize=True, deadline=None)
settings.load_profile("tunesmith")


@pytest.fixture(scope="session")
def byte_tokenizer():
    """One byte is one id, so expected ids can be read; ChatML. Session-wide: do not change it, build your own."""
    return tiny.make_byte_tokenizer()


@pytest.fixture(scope="session")
def bpe_tokenizer():
    """Byte-level BPE with merges across newlines and spaces; ChatML."""
    return tiny.make_bpe_tokenizer()


@pytest.fixture(scope="session")
def sentencepiece_like_tokenizer():
    """BPE with `▁` and byte fallback in the manner of Llama 2; Mistral-like template."""
    return tiny.make_sentencepiece_like_tokenizer()


@pytest.fixture
def tiny_model():
    """A fresh seeded float32 Llama for the byte tokenizer; `make_tiny_model(**config)` builds others."""
    return tiny.make_tiny_model()


@pytest.fixture(scope="session")
def make_tiny_model():
    return tiny.make_tiny_model


@pytest.fixture
def workplace(tiny_model, byte_tokenizer, tmp_path, monkeypatch):
    """A folder with a model, training rows, held-out rows and a recipe; it is the current directory."""
    tiny_model.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", PAIRS * 4)
    write_rows(tmp_path / "heldout.jsonl", PAIRS[:3])
    write_recipe(tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pytest_addoption(parser):
    """How much of `tests/faults` is run: a part, or with `make faults` all of it."""
    parser.addoption("--all-faults", action="store_true", help="kill at every write of a save, not at each seventh")
    parser.addoption("--kills", type=int, default=0, help="kills at random moments")
