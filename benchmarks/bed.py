"""What the training benchmark trains: a 34M-parameter Llama with random weights, its tokenizer, and rows of known length.

    bed = make_bed()              # once, some 20 seconds; kept under the system's temporary folder

400 conversations in five parts and 200 preference pairs in two, of at most 512 tokens: a round of the benchmark is one epoch
over one part. Rows longer than that are not in the bed, so nobody can cut them. Lengths are spread log-uniformly from 60 to 512
tokens: batches of two drawn at random and padded are then 75 % useful. The text is `pipeline/tiny/corpus.jsonl`, so
the bed is the same on every machine; `facts.json` holds a hash of its rows.

`model` is what is timed. `narrow` has the same tokenizer and one layer of 64: an epoch of it takes a second, which is how
`same_work.py` sees what a command really trains.
"""

import hashlib
import json
import random
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

CHECKOUT = Path(__file__).resolve().parents[1]
CORPUS = CHECKOUT / "pipeline" / "tiny" / "corpus.jsonl"
SFT_ROWS, PAIRS, QUICK = 400, 200, 12
PARTS = {"sft": 5, "dpo": 2}  # of so many each: a round of the benchmark trains one of them
SHORTEST, LONGEST, VOCABULARY = 60, 512, 8192
MODEL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
NARROW = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
SPECIAL = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad|>"}
HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
TEMPLATE = (  # Llama-3's: nothing follows <|eot_id|>, so there is nothing after it that one could train and another not
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
WORDS = (  # Llama-3's too: line ends stand apart, so that a prompt's tokens begin the whole conversation's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Row = dict[str, Any]
Sequence_ = tuple[tuple[int, ...], tuple[bool, ...]]  # token ids, and which of them are supervised


@dataclass(frozen=True)
class Bed:
    """The folder and what lies where in it. A part is `0`, `1` …, or `quick`: a few rows of the first."""

    folder: Path

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.folder / "facts.json").read_text("utf-8"))
        return facts

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def narrow(self) -> Path:
        return self.folder / "narrow"

    def rows(self, task: str, part: str) -> Path:
        """A folder with one JSONL file: conversations (`sft`), these as prompt and completion (`sft-trl`), or pairs (`dpo`)."""
        return self.folder / task / part

    def read(self, task: str, part: str) -> list[Row]:
        lines = (self.rows(task, part) / "train.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def sequences(self, task: str, part: str) -> list[Sequence_]:
        """What an epoch must train: each conversation, or each pair's two sides; an answer and its end-of-turn supervised."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model)
        if task == "sft":
            return [encode(tokenizer, row["messages"][:-1], row["messages"][-1:]) for row in self.read(task, part)]
        return [
            encode(tokenizer, row["prompt"], row[side])
            for row in self.read(task, part)
            for side in ("chosen", "rejected")
        ]


def encode(tokenizer: Any, prompt: list[Row], answer: list[Row]) -> Sequence_:
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*prompt, *answer], return_dict=False)
    if whole[: len(before)] != before or whole[-1] != tokenizer.eos_token_id or len(whole) > LONGEST:
        raise AssertionError(f"not a row of the bed: {prompt[0]['content'][:60]!r}")
    return tuple(whole), tuple(i >= len(before) for i in range(len(whole)))


def make_bed(folder: Path | None = None) -> Bed:
    """Takes the one that is there; else makes it aside and renames it, so that one that is there is whole."""
    recipe = hashlib.sha256(Path(__file__).read_bytes() + CORPUS.read_bytes()).hexdigest()[:12]
    bed = Bed(folder or Path(tempfile.gettempdir()) / f"aletheia-bed-{recipe}")
    if not bed.folder.exists():
        with FileLock(f"{bed.folder}.lock"):
            if not bed.folder.exists():
                _make(bed.folder)
    return bed


def _make(folder: Path) -> None:
    unfinished = Bed(Path(tempfile.mkdtemp(dir=folder.parent, prefix="aletheia-bed-making-")))
    try:
        texts = [json.loads(line) for line in CORPUS.read_text("utf-8").splitlines()]
        tokenizer = _tokenizer(text["response"] for text in texts)
        facts = _write_rows(unfinished, tokenizer, texts)
        for shape, target in ((MODEL, unfinished.model), (NARROW, unfinished.narrow)):
            facts[f"{target.name}_parameters"] = _write_model(target, tokenizer, shape)
        (unfinished.folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
        unfinished.folder.rename(folder)
    finally:
        shutil.rmtree(unfinished.folder, ignore_errors=True)


def _tokenizer(texts: Iterable[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL.values(), *HEADERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, padding_side="right", **SPECIAL)
    fast.chat_template = TEMPLATE
    return fast


def _write_model(folder: Path, tokenizer: Any, shape: dict[str, int]) -> int:
    """Parameters of the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokens = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in SPECIAL}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, dtype="bfloat16", **shape, **tokens)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _write_rows(bed: Bed, tokenizer: Any, texts: Sequence[Row]) -> dict[str, Any]:
    """Writes all parts. Returns what is worth knowing of them."""
    draw = random.Random(0)
    conversations = _conversations(tokenizer, texts, SFT_ROWS + PAIRS, draw)
    draw.shuffle(conversations)
    sft = _by_length(tokenizer, conversations[:SFT_ROWS])
    whole = _by_length(tokenizer, conversations[SFT_ROWS:])
    pairs = [_pair(row, number % 3 == 0, draw) for number, row in enumerate(whole)]
    parts = {"sft": _parts(sft, PARTS["sft"], draw), "dpo": _parts(pairs, PARTS["dpo"], draw)}
    parts["sft-trl"] = [
        [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in p] for p in parts["sft"]
    ]
    digest = hashlib.sha256()
    for task, found in parts.items():
        for name, rows in [*((str(i), rows) for i, rows in enumerate(found)), ("quick", found[0][:QUICK])]:
            folder = bed.rows(task, name)
            folder.mkdir(parents=True)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "train.jsonl").write_text(lines, "utf-8")
            digest.update(lines.encode())
    lengths = [len(encode(tokenizer, row["messages"][:1], row["messages"][1:])[0]) for row in sft]
    encoded = [encode(tokenizer, pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    prompts = sum(mask.count(False) for _, mask in encoded) // 2
    return {
        "rows_sha256": digest.hexdigest(),
        "sft_rows": len(lengths),
        "sft_tokens": sum(lengths),
        "longest": max(lengths),
        "useful_when_padded_in_twos": round(_useful_in_twos(lengths), 3),
        "pairs": len(pairs),
        "pair_tokens": sum(len(ids) for ids, _ in encoded),
        "pair_tokens_with_the_prompt_once": sum(len(ids) for ids, _ in encoded) - prompts,
    }


def _conversations(tokenizer: Any, texts: Sequence[Row], number: int, draw: random.Random) -> list[Row]:
    """Of texts put together until a length is reached, the lengths spread log-uniformly; each text stands in one row."""
    sized = sorted(
        (len(tokenizer(f"{text['instruction']}\n{text['response']}\n\n")["input_ids"]), index)
        for index, text in enumerate(texts)
    )
    around = len(tokenizer.apply_chat_template(_conversation([])["messages"], return_dict=False))
    rows, used = [], set[str]()
    for rank in reversed(range(number)):  # the longest first, while there is a choice
        room = round(SHORTEST * (LONGEST / SHORTEST) ** ((rank + 0.5) / number)) - around
        taken: list[Row] = []
        while fitting := bisect_right(sized, (room, len(texts))):
            place = draw.randrange(fitting) if room > 2 * SHORTEST else fitting - 1
            size, index = sized.pop(place)
            if texts[index]["response"] not in used:
                used.add(texts[index]["response"])
                taken.append(texts[index])
                room -= size
        rows.append(_conversation(taken))
    return rows


def _conversation(texts: Sequence[Row]) -> Row:
    asked = "\n".join(text["instruction"].strip() for text in texts)
    answer = "\n\n".join(text["response"].strip() for text in texts)
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def _by_length(tokenizer: Any, rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: len(encode(tokenizer, row["messages"][:1], row["messages"][1:])[0]))


def _pair(row: Row, long_prompt: bool, draw: random.Random) -> Row:
    """The answer against most of its words in disorder; every third prompt holds the answer's first half."""
    asked, answer = (message["content"] for message in row["messages"])
    if long_prompt:
        half = answer.rindex("\n", 0, max(answer.index("\n") + 1, len(answer) // 2)) if "\n" in answer else 0
        asked, answer = f"{asked}\n{answer[:half]}".strip(), answer[half:].strip()
    words = answer.split()
    draw.shuffle(words)
    rejected = " ".join(words[: max(1, round(len(words) * draw.uniform(0.6, 1)))]).strip()
    return {
        "prompt": [{"role": "user", "content": asked}],
        "chosen": [{"role": "assistant", "content": answer}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def _parts(rows: Sequence[Row], number: int, draw: random.Random) -> list[list[Row]]:
    """Each of the same lengths, mixed. `rows` stand in the order of their lengths."""
    found = [list(rows[part::number]) for part in range(number)]
    for rows_of_part in found:
        draw.shuffle(rows_of_part)
    return found


def _useful_in_twos(lengths: Sequence[int]) -> float:
    """Share of tokens that are no padding, on the average over all batches of two."""
    ordered = sorted(lengths)
    n = len(ordered)
    longer = sum(length * rank for rank, length in enumerate(ordered)) / (n * (n - 1) / 2)  # mean of the longer of two
    return sum(ordered) / n / longer


if __name__ == "__main__":
    made = make_bed()
    print(made.folder)
    print(json.dumps(made.facts, indent=1))
