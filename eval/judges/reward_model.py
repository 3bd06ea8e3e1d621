"""A judge that is a reward model of one's own: a sequence classifier with one label, from a folder (TRL's `RewardTrainer`).

It reads the question and one answer in its own chat template and gives a number; the larger one wins, and rewards within
`tie_margin` are a tie. Each answer is read alone and once, without padding, in the precision it is stored in. An answer that
is longer than the model can read has no reward. Only safetensors are read, and no code that comes with them is run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.judges.judge import ByScore, Duel, Spent, Verdict
from pipeline.data.rows import Question
from pipeline.errors import UserError
from pipeline.progress import track

LIMITS = "likes what it was trained to like, each answer by itself; how far people agree with it is not known"


@dataclass
class RewardModel:
    """Raises `UserError` where the folder holds no such model, with what is missing. Loaded to judge, then let go."""

    folder: Path
    name: str
    device: str = "auto"  # a GPU where there is one
    margin: float = 0.0
    limits: str = LIMITS
    order_blind: bool = True
    spent: Spent = field(default_factory=Spent)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise UserError("there is no such folder", where=self.name, remedy="eval_config.judges")
        from transformers import AutoConfig, AutoTokenizer

        try:
            self._config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)
            self._tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"is no model's folder: {str(error).splitlines()[0]}", where=self.name) from None
        kind = (getattr(self._config, "architectures", None) or ["nothing"])[0]
        if not kind.endswith("ForSequenceClassification") or self._config.num_labels != 1:
            what = f"is a {kind} with {self._config.num_labels} labels, no sequence classifier with one"
            raise UserError(what, where=self.name, remedy="the folder that TRL's RewardTrainer saved")
        if not self._tokenizer.chat_template:
            raise UserError("has no chat template", where=self.name, remedy="chat_template.jinja beside the model")

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        texts = dict.fromkeys((d.question.id, d.question.prompt, text) for d in duels for text in (d.first, d.second))
        model = self._load()
        rewards = {
            known: self._reward(model, known[1], known[2])
            for known in track([*texts], f"{self.name}: rewards", "answer")
        }

        def score(question: Question, answer: str) -> float | None:
            return rewards[question.id, question.prompt, answer]

        return ByScore(self.name, self.limits, score, self.margin).judge(duels)

    def forecast(self, duels: Sequence[Duel]) -> str:
        return ""

    def _load(self) -> Any:
        """Raises `UserError` where weights are missing: they would be drawn at random."""
        import torch
        from transformers import AutoModelForSequenceClassification

        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                self.folder, trust_remote_code=False, local_files_only=True, use_safetensors=True, dtype="auto",
                output_loading_info=True,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise UserError(f"cannot be loaded: {str(error).splitlines()[0]}", where=self.name) from None
        if missing := sorted(found["missing_keys"]):
            raise UserError(f"lacks the weights {', '.join(missing[:3])}", where=self.name)
        return model.to("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu").eval()

    def _reward(self, model: Any, asked: str, answer: str) -> float | None:
        import torch

        turns = [{"role": "user", "content": self._plain(asked)}, {"role": "assistant", "content": self._plain(answer)}]
        text = self._tokenizer.apply_chat_template(turns, tokenize=False)
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > (getattr(self._config, "max_position_embeddings", None) or len(ids)):
            return None
        with torch.inference_mode():
            reward = float(model(input_ids=torch.tensor([ids], device=model.device)).logits[0, 0])
        return reward if reward == reward else None  # NaN is no reward

    def _plain(self, text: str) -> str:
        """With no token of the template's own in it: what is judged ends no turn."""
        for token in self._tokenizer.added_tokens_decoder.values():
            if token.special and token.content:
                text = text.replace(token.content, f"{token.content[0]}\u200b{token.content[1:]}")
        return text
