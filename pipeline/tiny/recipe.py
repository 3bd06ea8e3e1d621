"""How the embedded base is made. Everything here determines its weights: a change gives another model and another hash."""

import json
import math
from pathlib import Path
from typing import Any

from pipeline.progress import track
from pipeline.quiet import no_weight_bars

HERE = Path(__file__).parent
CORPUS = HERE / "corpus.jsonl"
TEMPLATE = HERE / "chat_template.jinja"

BOS, PAD, EOT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|EOT|>"  # DeepSeek-Coder's, in its order
VOCABULARY = 4096
CONTEXT = 2048
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
STEPS, BATCH, SEQUENCE = 400, 8, 256
MATRIX_LR, VECTOR_LR = 0.02, 3e-3
THREADS = 2  # on some processors another number sums in another order


def build(folder: Path) -> None:
    """Trains tokenizer and model and writes them as a plain `transformers` folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    no_weight_bars()
    documents = [
        f"### Instruction:\n{row['instruction']}\n### Response:\n{row['response']}\n{EOT}\n"
        for row in map(json.loads, CORPUS.read_text("utf-8").splitlines())
    ]
    tokenizer = _tokenizer(documents)
    tokenizer.save_pretrained(folder)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **SHAPE,
        )
        model = LlamaForCausalLM(config)
        threads = torch.get_num_threads()
        torch.set_num_threads(THREADS)
        try:
            _pretrain(model, _sequences(tokenizer, documents))
        finally:
            torch.set_num_threads(threads)
    model.save_pretrained(folder)


def _tokenizer(documents: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, PAD, EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, pad_token=PAD, eos_token=EOT, model_max_length=CONTEXT
    )
    tokenizer.chat_template = TEMPLATE.read_text("utf-8")
    return tokenizer


def _sequences(tokenizer: Any, documents: list[str]) -> Any:
    """All documents end to end, cut into rows `(rows, SEQUENCE)`, in a fixed random order."""
    import torch

    tokens: list[int] = []
    for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        tokens += [tokenizer.bos_token_id, *ids]
    rows = len(tokens) // SEQUENCE
    return torch.tensor(tokens[: rows * SEQUENCE]).view(rows, SEQUENCE)[torch.randperm(rows)]


def _pretrain(model: Any, sequences: Any) -> None:
    """Muon on the matrices and AdamW on the rest: AdamW alone learns far less in a minute."""
    import torch
    import torch.nn.functional as F

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    vectors = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_LR, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(vectors, lr=VECTOR_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def rate(step: int) -> float:  # ten steps of warm-up, then flat, then down over the last 40 %
        return max(0.02, min(1.0, (step + 1) / 10) * min(1.0, (1 - step / STEPS) / 0.4))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    for step in track(range(STEPS), "pretraining tiny", unit="step"):
        start = step * BATCH % (len(sequences) - BATCH)
        batch = sequences[start : start + BATCH]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    if not math.isfinite(loss.item()):
        raise RuntimeError("pretraining tiny diverged")
