"""What a profile may say: every key, its type, its default and its meaning.

The YAML files in `configs/` are read against these classes by `pipeline.profile`; below that door the code sees plain
typed values. `aletheia config explain` prints each one's effective value and where it came from.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Validation(Section):
    fraction: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="share of the rows held out of training")
    path: str | None = Field(None, description="rows held out instead of a fraction: a folder with sft/, dpo/ or both")
    strategy: Literal["stratified", "random", "group", "temporal"] = Field(
        "stratified",
        description="stratified: the share of each domain; group: rows alike in group_by stay together; temporal: the latest",
    )
    group_by: str = Field(
        "group", description="group: the field that rows of one family share; without it, a like prompt"
    )
    time_by: str = Field("date", description="temporal: the field with an ISO 8601 date or time, or a number")
    seed: int = Field(42, description="which rows: the same seed and rows always give the same split")


class Check(Section):
    ignore: list[str] = Field(
        [], description="rules that are not run: codes, starts of codes, names; data check --rules"
    )
    errors: list[str] = Field([], description="rules whose rows are rejected, whatever their own severity")
    warnings: list[str] = Field([], description="rules that only warn, whatever their own severity")
    shortest_answer: Positive = Field(2, description="characters; a shorter one is said (D203)")
    longest_answer: Positive = Field(40_000, description="characters; a longer one is said (D203)")
    near_duplicate: Annotated[float, Field(gt=0.5, le=1)] = Field(
        0.8, description="rows whose words overlap this much (Jaccard, word triples) are near-duplicates"
    )
    leak_words: Annotated[int, Field(ge=5, le=50)] = Field(
        13, description="words in a row shared with an evaluation: a leak"
    )
    length_auc: Annotated[float, Field(ge=0.5, le=1)] = Field(
        0.6, description="length may tell chosen from rejected no better than this, over at least 20 pairs"
    )
    domain_share: Share = Field(0.25, description="of an even share: a domain with fewer rows is unbalanced")


class TrainingData(Section):
    sft: str = Field("data/sft", description="conversations: a file, a folder of them, or hub:OWNER/NAME")
    dpo: str = Field("data/dpo", description="preference pairs: a file, a folder of them, or hub:OWNER/NAME")
    eval: str = Field("data/eval", description="a folder with questions/ and choices/")
    validation: Validation = Field(Validation(), description="rows held out of training to measure it")
    check: Check = Field(Check(), description="the gate that every row goes through")
    max_reject_share: Share = Field(0.05, description="stop when more than this share of the rows cannot be used")


class LoraConfig(Section):
    lora_rank: Positive = Field(16, description="rank of the adapter's matrices; more learns more and costs memory")
    lora_alpha: Positive = Field(32, description="the adapter's update is scaled by alpha / rank")
    lora_dropout: Share = Field(0.0, description="share of the adapter's inputs dropped in training")
    target_modules: Literal["all-linear"] | list[str] = Field("all-linear", description="modules that get an adapter")


class TrainingConfig(Section):
    batch_size: Positive = Field(2, description="rows in one forward pass; memory")
    gradient_accumulation: Positive = Field(
        16, description="passes before an optimiser step; batch_size × this = rows a step learns from"
    )
    max_length: Positive = Field(2048, description="tokens; a longer row is rejected, never cut")
    warmup_ratio: Share = Field(0.05, description="share of the steps over which the rate rises from 0")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="how the rate goes after warm-up"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's pull of the adapter towards 0")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="gradients are clipped to this norm")
    save_steps: Positive = Field(50, description="steps between checkpoints one can resume from")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about 0.7 × the speed")
    evaluate_each_epoch: bool = Field(
        True,
        description="measure the held-out rows after every epoch, not only after the last: a forward pass over each",
    )


class SftConfig(LoraConfig, TrainingConfig):
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-4, description="peak rate of AdamW")
    epochs: Annotated[float, Field(gt=0)] = Field(2.0, description="passes over the training rows")
    shuffle_answers: bool = Field(
        False, description="control: train on answers shuffled between questions; never used as a stage's input"
    )


class DpoConfig(TrainingConfig):
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-5, description="peak rate of AdamW")
    epochs: Annotated[float, Field(gt=0)] = Field(1.0, description="passes over the training pairs")
    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="how strongly the policy is held to the reference")


class MergeConfig(Section):
    check_logits: bool = Field(
        True, description="compare logits with base + adapter, where the model fits in memory twice"
    )


class ServeConfig(Section):
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 opens it to the network")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="port; 0 takes a free one")
    max_concurrent: Positive = Field(16, description="requests generated at once; more wait their turn")
    max_tokens: Positive = Field(512, description="tokens generated for a request that does not say")


class EvalConfig(Section):
    tasks: list[str] = Field(["aletheia_choices"], description="lm-eval-harness tasks; own ones in <eval>/tasks")
    limit: Positive | None = Field(None, description="items of each task; null: all")
    questions: Positive | None = Field(None, description="open questions answered for the win-rate; null: all")
    max_tokens: Positive = Field(512, description="tokens generated for a win-rate answer")
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(0.0, description="of the win-rate answers; 0 is greedy")
    seed: int = Field(42, description="of the win-rate answers, where they are drawn")
    batch_size: Positive = Field(8, description="rows in one forward pass")


class Cost(Section):
    gpu_hour: Annotated[float, Field(ge=0)] = Field(0.0, description="price of an hour of the GPU")
    kwh: Annotated[float, Field(ge=0)] = Field(0.0, description="price of a kWh")
    co2_per_kwh: Annotated[float, Field(ge=0)] = Field(0.4, description="kg of CO2 a kWh, of the grid used")
    currency: str = Field("USD", description="currency of the prices")


class Profile(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="names the links in checkpoints/: <name>-sft, <name>-dpo, <name>-merged"
    )
    base_model: str = Field(description="`tiny` (embedded), a local folder, or a model on the hub")
    revision: str = Field("main", description="of a hub model; pin a commit for a result that can be reproduced")
    trust_remote_code: bool = Field(False, description="run code that comes with the model: only if you have read it")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: a CUDA GPU when there is one")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="of the base's weights; auto: bf16 on a GPU, else as stored. The adapter trains in float32"
    )
    quantization: Literal["none", "nf4", "int8", "auto"] = Field(
        "none", description="of the base in training; auto: nf4 when the precision does not fit in memory"
    )
    seed: int = Field(42, description="of adapter initialisation, data order and sampling")
    training_data: TrainingData = Field(TrainingData(), description="where the rows are")
    sft_config: SftConfig = Field(SftConfig(), description="supervised fine-tuning")
    dpo_config: DpoConfig = Field(DpoConfig(), description="direct preference optimisation")

    merge_config: MergeConfig = Field(MergeConfig(), description="adapter into base")
    serve_config: ServeConfig = Field(ServeConfig(), description="the endpoint")
    eval_config: EvalConfig = Field(EvalConfig(), description="evaluation")
    cost: Cost = Field(Cost(), description="prices, for the record")
