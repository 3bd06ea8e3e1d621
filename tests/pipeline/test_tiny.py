"""The embedded base: DeepSeek-Coder's template and token roles, made deterministically, cached whole or not at all."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline import tiny
from pipeline.model import Base
from pipeline.tiny import recipe

CONVERSATION = [
    {"role": "user", "content": "Write f."},
    {"role": "assistant", "content": "```python\ndef f():\n    return 1\n```"},
    {"role": "user", "content": "Why?"},
]
RENDERED = """\
<｜begin▁of▁sentence｜>You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek \
Company, and you only answer questions related to computer science. For politically sensitive questions, security and \
privacy issues, and other non-computer science questions, you will refuse to answer
### Instruction:
Write f.
### Response:
```python
def f():
    return 1
```
<|EOT|>
### Instruction:
Why?
### Response:
"""
# fmt: off
BRIEFED_IDS = [
    0, 36, 71, 292, 598, 347, 16, 201,                                           # BOS, "Be brief."
    286, 325, 28, 201, 2870, 280, 16, 201,                                       # "### Instruction:", "Write f."
    286, 327, 28, 201, 357, 429, 201, 396, 280, 1256, 285, 371, 618, 201, 357,   # "### Response:", the code
    201, 2, 201,                                                                 # end of turn, between line ends
    286, 325, 28, 201, 57, 74, 91, 33, 201, 286, 327, 28, 201,
]
# fmt: on


def test_template_renders_deepseek_coders_text(base: Base) -> None:
    assert base.tokenizer().apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True) == RENDERED


def test_template_puts_a_system_message_in_the_place_of_the_default_one(base: Base) -> None:
    turns = [{"role": "system", "content": "Be brief.\n"}, CONVERSATION[0]]
    rendered = base.tokenizer().apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == "<｜begin▁of▁sentence｜>Be brief.\n### Instruction:\nWrite f.\n### Response:\n"


def test_template_gives_the_golden_token_ids(base: Base) -> None:
    turns = [{"role": "system", "content": "Be brief.\n"}, *CONVERSATION]
    assert base.tokenizer().apply_chat_template(turns, add_generation_prompt=True)["input_ids"] == BRIEFED_IDS


def test_token_roles_are_deepseek_coders(base: Base) -> None:
    tokenizer = base.tokenizer()
    roles = [
        (t, tokenizer.convert_tokens_to_ids(t)) for t in (tokenizer.bos_token, tokenizer.pad_token, tokenizer.eos_token)
    ]
    assert roles == [("<｜begin▁of▁sentence｜>", 0), ("<｜end▁of▁sentence｜>", 1), ("<|EOT|>", 2)]
    config = json.loads((base.folder / "config.json").read_text())
    assert [config[f"{role}_token_id"] for role in ("bos", "pad", "eos")] == [0, 1, 2]


@pytest.mark.parametrize("text", ["def f(x):\n\treturn x  # é 你好 🙂\r\n", "  two  spaces  ", "\x00\x7f", " ,. n't"])
def test_tokens_give_back_any_text(base: Base, text: str) -> None:
    tokenizer = base.tokenizer()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_model_has_the_size_it_claims(base: Base) -> None:
    model = base.load()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert round(model.num_parameters() / 1e6, 1) == 1.3
    assert model.config.vocab_size == len(base.tokenizer()) == recipe.VOCABULARY
    assert base.context == recipe.CONTEXT == 2048


def test_same_recipe_gives_the_same_bytes_whatever_the_caller_did_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "corpus.jsonl"
    short.write_text("\n".join((tiny.HERE / "corpus.jsonl").read_text("utf-8").splitlines()[:60]))
    monkeypatch.setattr(recipe, "CORPUS", short)
    monkeypatch.setattr(recipe, "STEPS", 2)
    hashes, threads = [], torch.get_num_threads()
    for seed in (1, 2):
        torch.set_num_threads(seed)
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        recipe.build(tmp_path / str(seed))
        assert torch.equal(torch.random.get_rng_state(), state), "and the caller's own draws stay as they were"
        assert torch.get_num_threads() == seed
        files = sorted((tmp_path / str(seed)).iterdir())
        hashes.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    torch.set_num_threads(threads)
    assert hashes[0] == hashes[1]
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= set(hashes[0])


# ── The cache ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and in the place of the pretraining a recipe that takes no time."""
    monkeypatch.setenv("ALETHEIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(recipe, "build", lambda folder: (folder / "config.json").write_text("{}"))
    return tmp_path / "cache"


def test_base_is_built_once_and_then_found(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny.tiny_base()
    monkeypatch.setattr(recipe, "build", lambda folder: pytest.fail("built again"))
    assert tiny.tiny_base() == first and first.parent == cache
    assert [p.name for p in first.iterdir()] == ["config.json"]


def test_build_that_fails_leaves_nothing_that_could_be_taken_for_a_base(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("No space left on device")

    good = recipe.build
    monkeypatch.setattr(recipe, "build", half)
    with pytest.raises(OSError):
        tiny.tiny_base()
    assert not [p for p in cache.iterdir() if p.is_dir()]
    monkeypatch.setattr(recipe, "build", good)
    assert (tiny.tiny_base() / "config.json").exists()


@pytest.mark.parametrize("name", ["corpus.jsonl", "chat_template.jinja", "recipe.py"])
def test_change_of_what_determines_the_base_gives_another_base(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = tiny.tiny_base()
    copy = tmp_path / "copy"
    shutil.copytree(tiny.HERE, copy)
    monkeypatch.setattr(tiny, "HERE", copy)
    assert tiny.tiny_base() == before
    with (copy / name).open("a") as out:
        out.write("\n")
    assert tiny.tiny_base() != before
