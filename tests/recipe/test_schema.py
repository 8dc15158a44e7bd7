"""Options as help shows them."""

from tunesmith.config import CONFIGS
from tunesmith.recipe.schema import options_help


def test_help_tells_name_type_default_and_text_of_every_option():
    rows = {name: (kind, default, text) for name, kind, default, text in options_help(CONFIGS)}
    assert rows["lora_r"][:2] == ("int ≥ 1", "16")
    assert rows["packing"][:2] == ("bool", "false")
    assert rows["too_long"][0] == "error|drop|truncate|truncate_left|keep_last_turns"
    assert all(text for _, _, text in rows.values())
