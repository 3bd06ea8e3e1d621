"""What `benchmarks/gpu.py` compares: a training step of ours and of its peers, over one base and the same rows.

Depends on torch, transformers and peft, on our passes, and where they are called on trl, datasets and bitsandbytes.
"""

import gc
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, helpers
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.gpu_rows import Shape, columns, padded
from pipeline.train import attention
from pipeline.train.head import sequence_sums, token_log_probs
from pipeline.train.passes import Pass, Row, lay, supervised

BETA, RATE, WARM_UP = 0.1, 2e-4, 1  # WARM_UP: steps that are not counted
PEER_ROWS = 2  # a forward pass of a peer's
Steps = Sequence[Sequence[Row]]


@dataclass
class Run:
    """One contestant's steps. Memory is in bytes; None on a CPU."""

    seconds: list[float]  # of each counted step
    first_loss: float  # of the first step, warm-up or not
    adapter: str  # dtype
    reserved: int | None  # most that was taken from the device
    allocated: int | None  # most of it that was in use


class Training:
    """One shape on one device."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device, self.cuda = shape, device, device.type == "cuda"

    def base(self, quantised: bool) -> Any:
        """A Llama of random weights, bf16 or NF4."""
        shape = self.shape
        config = LlamaConfig(
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.ffn,
            vocab_size=shape.vocabulary,
            max_position_embeddings=2 * shape.length,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
            use_cache=False,
        )
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with self.device:
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        if quantised:
            quantise(model, self.device)
        model.requires_grad_(False)
        self.clean()
        return model

    def restore(self, base: Any) -> None:
        """Takes adapters, hooks and checkpointing off: the next contestant finds the base as it was built."""
        for name, module in list(base.named_modules()):
            if isinstance(module, LoraLayer):
                base.set_submodule(name, module.get_base_layer())
        vars(base).pop("peft_config", None)
        base.gradient_checkpointing_disable()
        base.get_input_embeddings()._forward_hooks.clear()  # `disable_input_require_grads` leaves one where there are two
        base.set_attn_implementation("sdpa")
        base.requires_grad_(False)
        self.clean()

    def clean(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def ours(self, base: Any, steps: Steps, pass_tokens: int, checkpointing: bool) -> Run:
        """The passes of `pipeline.train.trainer`, without the trainer. DPO's reference is the policy before its first step."""
        attention.install(base)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model = self._adapted(base)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=self.cuda)
        batches = [lay(rows, pass_tokens, packed=True) for rows in steps]
        references, seconds, losses = [], [], []
        with no_casting(model):
            for rows, passes in zip(steps, batches, strict=True):
                start = self.now()
                with torch.no_grad():
                    references.append([self._sums(model, p) if isinstance(rows[0], tuple) else None for p in passes])
                seconds.append(self.now() - start)
            for step, (rows, passes) in enumerate(zip(steps, batches, strict=True)):
                start = self.now()
                total = torch.zeros((), device=self.device)
                for batch, reference in zip(passes, references[step], strict=True):
                    loss = self._loss(model, batch, rows, reference)
                    loss.backward()
                    total += loss.detach()
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(total.item())
                seconds[step] += self.now() - start
        return self._run(seconds, losses[0], model)

    def trl(self, base: Any, steps: Steps) -> Run:
        """Its defaults: padded, bf16, activations recomputed, full logits; DPO's reference by a second forward pass."""
        import trl
        from datasets import Dataset

        rows = [row for step in steps for row in step]
        pairs = isinstance(rows[0], tuple)
        stock: Any = trl.DPOTrainer if pairs else trl.SFTTrainer
        config: Any = trl.DPOConfig if pairs else trl.SFTConfig
        options = {"beta": BETA} if pairs else {"dataset_kwargs": {"skip_prepare_dataset": True}}

        class InOrder(stock):
            def _get_train_sampler(self, *given: Any) -> Any:
                return SequentialSampler(self.train_dataset)

            def _prepare_dataset(self, dataset: Any, *given: Any, **named: Any) -> Any:
                return dataset  # token ids already

        with tempfile.TemporaryDirectory() as folder:
            trainer = InOrder(
                model=base,
                args=config(max_length=None, **options, **self._arguments(folder, len(steps))),
                train_dataset=Dataset.from_list([columns(row) for row in rows]),
                processing_class=tokenizer(),
                peft_config=lora(),
            )
            return self._timed(trainer)

    def plain_trainer(self, base: Any, steps: Steps) -> Run:
        """`transformers.Trainer` with TRL's settings, for SFT where there is no trl."""

        class InOrder(Trainer):
            def _get_train_sampler(self, *given: Any) -> Any:
                return SequentialSampler(self.train_dataset)

        model = self._adapted(base)
        model.enable_input_require_grads()
        rows = [columns(row) for step in steps for row in step]
        with tempfile.TemporaryDirectory() as folder:
            arguments = self._arguments(folder, len(steps)) | {"bf16": True, "gradient_checkpointing": True}
            return self._timed(InOrder(model, TrainingArguments(**arguments), padded, rows))

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _adapted(self, base: Any) -> Any:
        torch.manual_seed(1)
        model = get_peft_model(base, lora())
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return model.train()

    def _loss(self, model: Any, batch: Pass, rows: Sequence[Row], reference: torch.Tensor | None) -> torch.Tensor:
        """A pass's share of the step's mean over supervised tokens, or over pairs."""
        if reference is None:
            return -self._log_probs(model, batch).sum() / sum(map(supervised, rows))
        ratios = self._sums(model, batch) - reference
        return -F.logsigmoid(BETA * (ratios[0::2] - ratios[1::2])).sum() / len(rows)

    def _sums(self, model: Any, batch: Pass) -> torch.Tensor:
        return sequence_sums(self._log_probs(model, batch), batch.to(self.device))

    def _log_probs(self, model: Any, batch: Pass) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            return token_log_probs(model, batch.to(self.device))

    def _arguments(self, folder: str, steps: int) -> dict[str, Any]:
        return {
            "output_dir": folder,
            "per_device_train_batch_size": PEER_ROWS,
            "gradient_accumulation_steps": self.shape.rows // PEER_ROWS,
            "max_steps": steps,
            "learning_rate": RATE,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not self.cuda,
        }

    def _timed(self, trainer: Any) -> Run:
        now, ends, losses = self.now, [], []

        class Clock(TrainerCallback):
            def on_train_begin(self, *given: Any, **named: Any) -> None:
                ends.append(now())

            on_step_end = on_train_begin

            def on_log(self, *given: Any, logs: dict[str, float], **named: Any) -> None:
                losses.append(logs.get("loss", float("nan")))

        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Clock())
        trainer.train()
        return self._run([b - a for a, b in pairwise(ends)], losses[0], trainer.model)

    def _run(self, seconds: list[float], first_loss: float, model: Any) -> Run:
        dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
        memory = (torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()) if self.cuda else (None, None)
        return Run(seconds[WARM_UP:], first_loss, str(dtype).removeprefix("torch."), *memory)


def lora() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def no_casting(model: Any) -> AbstractContextManager[Any]:
    """Autocast does what peft would do again for each layer; older ones of peft have no switch for it."""
    switch = getattr(helpers, "disable_input_dtype_casting", None)
    return switch(model) if switch else nullcontext()


def quantise(model: Any, device: torch.device) -> None:
    """The layers' weights as transformers quantises them: NF4 with double quantisation."""
    import bitsandbytes as bnb

    for name, linear in list(model.model.named_modules()):
        if type(linear) is not nn.Linear:
            continue
        made = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        weight = linear.weight.data
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made).to(device)
        made.support_avx512bf16_for_cpu = False  # it would repack for inference, and no gradient would flow
        model.model.set_submodule(name, made)
    model.is_loaded_in_4bit = True


def tokenizer() -> Any:
    """trl wants one; with token ids given, it is asked for the padding alone."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
