"""A chat template is a program that comes with a model: it is tried in a process of its own before it may run here.

Jinja's sandbox keeps it from reading or running anything, but not from filling the memory (`'a' * 10**10`).
"""

import json
import re
import subprocess
import sys
from functools import cache

SECONDS = 10
BYTES = 1 << 30
TURNS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ],
]
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own tag
PROGRAM = """
import json, resource, sys
template, conversations, limit = json.load(sys.stdin)
from jinja2 import ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols])
world.filters["tojson"] = lambda value, **options: json.dumps(value)
def refuse(message):
    raise ValueError(message)
world.globals.update(raise_exception=refuse, strftime_now=lambda form: "")
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = world.from_string(template)
for messages in conversations:
    for prompt in (False, True):
        try:
            found.render(messages=messages, add_generation_prompt=prompt, bos_token="", eos_token="", tools=None)
        except MemoryError:
            raise
        except Exception:
            pass  # it may refuse a conversation; so it will say when a row is refused
"""


@cache
def too_much(template: str) -> str | None:
    """Why a template may not be rendered here, `None` if two short turns take it little time and memory.

    Templates that are wrong in other ways pass: the first conversation that they refuse tells.
    """
    if sys.platform == "win32":  # which knows no limits of this kind
        return None
    words = [sys.executable, "-I", "-c", PROGRAM]
    given = json.dumps([GENERATION.sub("", template), TURNS, BYTES])
    try:
        done = subprocess.run(words, input=given, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"it takes longer than {SECONDS} s for a conversation of two words"
    if done.returncode < 0 or "MemoryError" in done.stderr:
        return f"it takes more than {BYTES >> 30} GiB for a conversation of two words"
    return None
