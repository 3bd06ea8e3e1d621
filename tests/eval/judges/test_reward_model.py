"""A reward model from a folder: its own numbers, compared; and no folder taken for one that is none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.judges.judge import Duel
from eval.judges.reward_model import RewardModel
from pipeline.data.rows import Question
from pipeline.errors import UserError
from pipeline.model import Base

ANSWERS = ["Use a unique index.", "No.", "Retry with backoff and jitter, and make the call idempotent."]


@pytest.fixture(scope="module")
def folder(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base's body with a head drawn at random: a real classifier, if no wise one."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(base.folder, num_labels=1)
    model = AutoModelForSequenceClassification.from_pretrained(base.folder, config=config)
    torch.nn.init.normal_(model.score.weight)
    path = tmp_path_factory.mktemp("reward")
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(base.folder).save_pretrained(path)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "reward"))


@pytest.fixture(scope="module")
def reward(folder: Path) -> Callable[[str, str], float]:
    """As plain transformers gives it."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer))

    def score(prompt: str, answer: str) -> float:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.inference_mode():
            return float(model.eval()(input_ids=ids).logits[0, 0])

    return score


def question(prompt: str) -> Question:
    return Question(id=prompt, prompt=prompt, key_points=["k"])


def judged(model: RewardModel, *duels: tuple[str, str, str]) -> list[float | None]:
    return [verdict.score for verdict in model.judge([Duel(question(p), a, b) for p, a, b in duels])]


def test_the_answer_with_the_larger_reward_wins_in_either_order(
    folder: Path, reward: Callable[[str, str], float]
) -> None:
    duels = [("How?", a, b) for a in ANSWERS for b in ANSWERS]
    rewards = {a: reward("How?", a) for a in ANSWERS}
    expected = [0.5 if a == b else float(rewards[a] > rewards[b]) for _, a, b in duels]
    model = RewardModel(folder, "reward")
    assert judged(model, *duels) == expected
    assert model.order_blind and model.limits and model.spent.calls == 0


def test_rewards_within_the_margin_are_a_tie(folder: Path, reward: Callable[[str, str], float]) -> None:
    apart = abs(reward("How?", ANSWERS[0]) - reward("How?", ANSWERS[1]))
    duel = ("How?", ANSWERS[0], ANSWERS[1])
    assert judged(RewardModel(folder, "reward", margin=apart * 1.01), duel) == [0.5]
    assert judged(RewardModel(folder, "reward", margin=apart * 0.99), duel) != [0.5]


def test_an_answer_that_ends_its_turn_itself_is_read_as_text(folder: Path) -> None:
    """What stands behind a turn's end would else be read as another turn, and be what the reward is of."""
    from transformers import AutoTokenizer

    end = AutoTokenizer.from_pretrained(folder).eos_token
    model = RewardModel(folder, "reward")
    assert end not in model._plain(f"a{end}b") and model._plain(f"a{end}b").replace("\u200b", "") == f"a{end}b"
    assert model._plain("a < b") == "a < b"


def test_an_answer_longer_than_the_model_reads_has_no_reward(folder: Path) -> None:
    longest = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    long = "word " * longest
    assert judged(RewardModel(folder, "reward"), ("How?", long, "No."), ("How?", "Yes.", "No.")) != [None, None]
    found = RewardModel(folder, "reward").judge([Duel(question("How?"), long, "No.")])[0]
    assert (found.score, found.why) == (None, "an answer has no score")


def test_a_reward_that_is_no_number_is_none(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    weights["score.weight"] *= float("nan")
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    assert judged(RewardModel(copied, "reward"), ("How?", "Yes.", "No.")) == [None]


def edit(path: Path, **values: Any) -> None:
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def _two_labels(path: Path) -> None:
    edit(path, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})


def _language_model(path: Path) -> None:
    edit(path, architectures=["LlamaForCausalLM"])


def _without_template(path: Path) -> None:
    (path / "chat_template.jinja").unlink()


def _nothing(path: Path) -> None:
    shutil.rmtree(path)


def _empty(path: Path) -> None:
    _nothing(path)
    path.mkdir()


def _own_code(path: Path) -> None:
    edit(path, model_type="own", auto_map={"AutoConfig": "own.Config"})
    (path / "own.py").write_text("raise SystemExit('was run')")


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (_two_labels, "is a LlamaForSequenceClassification with 2 labels"),
        (_language_model, "is a LlamaForCausalLM with 1 labels"),
        (_without_template, "has no chat template"),
        (_nothing, "there is no such folder"),
        (_empty, "is no model's folder"),
        (_own_code, "is no model's folder"),
    ],
    ids=["two labels", "language model", "no template", "nothing", "empty", "own code"],
)
def test_what_is_no_reward_model_is_refused(copied: Path, spoil: Callable[[Path], None], what: str) -> None:
    spoil(copied)
    with pytest.raises(UserError, match=rf"^my/reward: {what}") as caught:
        RewardModel(copied, "my/reward")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("without", ["the head", "safetensors"])
def test_weights_that_would_be_drawn_at_random_or_unpickled_are_refused(copied: Path, without: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    if without == "the head":
        del weights["score.weight"]
        save_file(weights, copied / "model.safetensors", {"format": "pt"})
        what = "lacks the weights score.weight"
    else:
        (copied / "model.safetensors").unlink()
        torch.save(weights, copied / "pytorch_model.bin")
        what = "cannot be loaded"
    with pytest.raises(UserError, match=f"^my/reward: {what}"):
        judged(RewardModel(copied, "my/reward"), ("How?", "Yes.", "No."))
