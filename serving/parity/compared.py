"""What was found of one way to run the model: what held, what did not, what could not be asked, and the verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.chat import Chat
from serving.parity.probes import Probe, Spread

REMEDIES = {
    "token ids": "the chat template that lies beside the model, as `aletheia serve` uses it",
    "BOS": "a server that adds nothing to what the chat template gives",
    "stop": "a generation_config.json beside the model whose eos_token_id is the end-of-turn",
    "log-probs": "serving this very model, its adapter applied, or --dtype where it computes in another precision",
}
WORDS = {True: "equal", False: "DIFFERS", None: "not compared"}


@dataclass
class Compared:
    """One way to run the model, by check: token ids, BOS, stop, log-probs."""

    backend: str
    bound: Spread | None = None  # of log-probs
    moved: Spread | None = None  # by training
    spread: Spread | None = None
    held: set[str] = field(default_factory=set)
    problems: dict[str, str] = field(default_factory=dict)  # the first of each check
    not_compared: dict[str, str] = field(default_factory=dict)  # why

    def saw(self, check: str, ok: bool, what: str) -> None:
        if ok:
            self.held.add(check)
        else:
            self.problems.setdefault(check, what)

    def saw_ids(self, chat: Chat, probe: Probe, served: list[int]) -> None:
        """How a chat was tokenised: the same ids, and as many BOS among them."""
        trained = probe.prompt
        same = zip(served, trained, strict=False)
        apart = next((i for i, (a, b) in enumerate(same) if a != b), min(len(served), len(trained)))
        there, here = (repr(chat.tokenizer.decode(ids[apart : apart + 1])) for ids in (served, trained))
        what = f"`{probe.name}` is {len(served)} tokens, in training it was {len(trained)}; "
        self.saw("token ids", served == trained, f"{what}token {apart} is {there}, not {here}")
        if chat.bos_id is not None:
            count, expected = served.count(chat.bos_id), trained.count(chat.bos_id)
            self.saw("BOS", count == expected, f"`{probe.name}` has {count} BOS tokens, in training it had {expected}")
        else:
            self.saw("BOS", True, "")  # there is none to lose or double

    def lacks(self, check: str, why: object) -> None:
        self.not_compared.setdefault(check, str(why))

    def judge(self, differences: Sequence[float], precision: str) -> None:
        """Of all log-probs. What is told of them may be too little to pass, and enough to fail."""
        if not differences:
            return
        spread, bound = Spread.of(differences), self.bound
        self.spread = spread
        if bound is None:
            self.lacks("log-probs", f"nothing tells here what rounding to {precision} does to this model")
            if self.moved and not spread.mean < self.moved.mean / 2:  # NaN is not
                what = (
                    f"log-probs differ by {spread.mean:.2g} nats on average; training moved them by "
                    f"{self.moved.mean:.2g}, so this may be the base"
                )
                self.saw("log-probs", False, what)
        else:
            what = (
                f"log-probs differ by {spread.worst:.2g} nats at worst, {spread.mean:.2g} on average; "
                f"rounding in {precision} allows {bound.worst:.2g} and {bound.mean:.2g}"
            )
            self.saw("log-probs", spread.within(bound), what)

    def __getitem__(self, check: str) -> bool | None:
        """Whether every observation held; None where one could not be made."""
        if check in self.problems:
            return False
        return None if check in self.not_compared or check not in self.held else True

    @property
    def verdict(self) -> str:
        found = {self[check] for check in REMEDIES}
        if False in found:
            return "DIFFERS"
        return "equal" if found == {True} else "equal where compared" if True in found else "not compared"

    @property
    def problem(self) -> tuple[str, str] | None:
        """What is wrong and what to do, of the first check that failed: the later ones follow from it."""
        return next(((self.problems[check], REMEDIES[check]) for check in REMEDIES if check in self.problems), None)

    def as_record(self) -> dict[str, Any]:
        """Its few figures; differences in nats."""
        spreads = {"log_prob_difference": self.spread, "log_prob_bound": self.bound if self.spread else None}
        return {
            "backend": self.backend,
            "verdict": self.verdict,
            **{check.lower().replace(" ", "_").replace("-", "_"): WORDS[self[check]] for check in REMEDIES},
            **{name: {k: float(f"{v:.3g}") for k, v in vars(s).items()} for name, s in spreads.items() if s},
            **({"problems": self.problems} if self.problems else {}),
            **({"not_compared": self.not_compared} if self.not_compared else {}),
        }
