"""Results of an evaluation written by hand, for the page: one figure of each kind, all intervals as a stage records them."""

from pathlib import Path
from typing import Any

from pipeline import yamlio
from pipeline.records.file import RecordFile
from pipeline.records.schema import Facts

EVAL, MERGE, SFT = "EXP-2026-01-01-003", "EXP-2026-01-01-002", "EXP-2026-01-01-001"


def figure(value: float, half: float | None = None, n: int = 50) -> dict[str, Any]:
    ends = {} if half is None else {"ci_low": round(value - half, 6), "ci_high": round(value + half, 6)}
    return {"value": value, **ends, "n": n}


def change(before: float, after: float, half: float | None = 0.02, n: int = 50, **more: Any) -> dict[str, Any]:
    """`half`: of the change's interval."""
    delta = figure(round(after - before, 6), half, n)
    return {"before": figure(before, 0.06, n), "after": figure(after, 0.06, n), "delta": delta, **more}


def win_rate(value: float = 0.62, half: float = 0.08, n: int = 120, **more: Any) -> dict[str, Any]:
    beside = {
        "wins": 70, "ties": 10, "losses": 40, "sign_test_p": 0.004, "judge": "key-point words", "weakness": "reads words",
        "students_t": figure(value, half, n), "base_against_itself": figure(0.5, None, n),
        "longest_wins": figure(0.52, 0.09, n),
    }  # fmt: skip
    return figure(value, half, n) | beside | more


def results() -> dict[str, Any]:
    """Better: loss, win-rate, one benchmark. Worse: answers that end by themselves. Not known: the rest."""
    return {
        "model": "small-merged",
        "against": "tiny",
        "parity": {"prompts": 12, "in_process": {"backend": "transformers, plain", "verdict": "equal where compared"}},
        "eval_loss": change(2.0, 1.8, unit="nats a token"),
        "perplexity": {"before": figure(7.39, 0.3), "after": figure(6.05, 0.3), "ratio": figure(0.819, 0.016)},
        "eval_loss_by_token": change(1.95, 1.77, 0.03, unit="nats a token"),
        "by_domain": {
            "eval_loss": {
                "databases": change(2.1, 1.8, 0.1, 20, holm_p=0.001),
                "devops": change(1.9, 1.8, 0.09, 25, holm_p=0.07),
                "performance": change(2.0, 1.9, None, 1),
            },
            "preference_accuracy": {"databases": figure(0.8, 0.2, 9), "devops": figure(0.5, 0.3, 8)},
        },
        "by_fault": {"inaccurate": figure(0.9, 0.09, 12) | {"holm_p": 0.01}, "generic": figure(0.6, 0.2, 14)},
        "preference_accuracy": figure(0.6, 0.18, 30) | {"chance": 0.5},
        "margin": change(-0.5, 1.5, 0.9, 30),
        "end_of_turn": {
            "surprise": change(3.0, 2.9, 0.3),
            "at_end": change(0.31, 0.36, 0.07),
            "median": {"before": figure(0.3, 0.05), "after": figure(0.36, 0.05)},
            "likely_at_end": change(0.2, 0.3, 0.12),
            "inside": change(0.4, 0.41, 0.05),
            "expected": {"before": figure(0.71, 0.1), "after": figure(0.77, 0.1), "actual": 1.0},
        },
        "benchmarks": {
            "aletheia_choices": change(0.4, 0.55, 0.08, 155, metric="acc", version="2.0", mcnemar_p=0.001, holm_p=0.002),
            "hellaswag": change(0.5, 0.52, 0.04, 200, metric="acc_norm", version="1.0", mcnemar_p=0.3, holm_p=0.3),
            "odd_metric": change(10.0, 12.0, 1.0, 200, metric="cleverness", version="1", mcnemar_p=0.01, holm_p=0.02),
        },
        "guards": {
            "regressed": {"value": 0, "ci_low": 0, "ci_high": 1},
            "margin": 0.03,
            "tasks": {"hellaswag": {"finding": "not known", "why": "+0.02, and a loss of 0.06 is not excluded", "n_needed": 480}},
        },
        "win_rate": win_rate(),
        "stops_by_itself": change(0.9, 0.7, 0.1, 120),
        "answer_tokens": change(126.0, 408.0, 40.0, 120),
        "answer_length": {
            "p10": {"before": figure(40, 10.0, 120), "after": figure(90, 25.0, 120)},
            "p50": {"before": figure(120, 15.0, 120), "after": figure(380, 60.0, 120)},
            "p90": {"before": figure(250, 30.0, 120), "after": figure(800, None, 120)},
            "median_change": figure(240.0, 45.0, 120),
            "unit": "tokens",
        },
        "structure": {
            "with_code": change(0.3, 0.45, 0.1, 120, holm_p=0.02),
            "repeated": change(0.05, 0.06, 0.02, 120, holm_p=0.9),
            "loops": change(0.0, 0.01, 0.02, 120, holm_p=1.0),
        },
        "technical": {
            "model": {"answers": 120, "without_code": 60, "unscored": 3, "parses": {"code": figure(0.8, 0.1, 57)}, "passes": {}},
            "base": {"answers": 120, "without_code": 80, "unscored": 1, "parses": {"code": figure(0.7, 0.15, 39)}, "passes": {}},
            "change": {"parses": change(0.72, 0.8, 0.15, 30)},
        },
    }  # fmt: skip


def resources(amount: float, kwh: float, seconds: float = 60.0) -> dict[str, Any]:
    energy = {"kwh": kwh, "co2_kg": 0.0, "how": "estimated: 10 W a busy core"}
    return {"wall_seconds": seconds, "energy": energy, "cost": {"amount": amount, "currency": "USD"}}


def write(experiments: Path, name: str, facts: dict[str, Any]) -> RecordFile:
    """A complete record of `stage` eval, else as `facts` say."""
    experiments.mkdir(parents=True, exist_ok=True)
    file = RecordFile(experiments / f"{name}.yaml")
    file.path.write_text(yamlio.dump({"experiment_id": name}), "utf-8")
    file.write(Facts(**{"status": "complete", "stage": "eval", "profile_used": "small"} | facts))
    return file


def lineage(root: Path, found: dict[str, Any] | None = None, **more: Any) -> RecordFile:
    """An evaluation of a merge of an SFT, below `root`; returns the evaluation's file."""
    experiments = root / "experiments"

    def taken(name: str, stage: str) -> dict[str, Any]:
        return {"inputs": [{"id": name, "stage": stage, "path": f"checkpoints/{name}", "sha256": "0" * 64}]}

    write(experiments, SFT, {"stage": "sft", "resources": resources(2.0, 0.5, 3600.0)})
    write(experiments, MERGE, {"stage": "merge", "resources": resources(0.5, 0.1), "lineage": taken(SFT, "sft")})
    facts = {"results": results() if found is None else found, "lineage": taken(MERGE, "merge")}
    return write(experiments, EVAL, facts | {"resources": resources(0.5, 0.2)} | more)
