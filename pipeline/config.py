"""What a profile may say: every key, its type, its default and its meaning.

The YAML files in `configs/` are read against these classes by `pipeline.profile`; below that door the code sees plain
typed values. `aletheia config explain` prints each one's effective value and where it came from.
"""

import re
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

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
    adapter: Literal["lora", "rslora", "dora"] = Field(
        "lora",
        description="rslora scales by alpha / sqrt(rank), for high ranks; dora learns each row's length apart, slower",
    )
    lora_rank: Positive = Field(16, description="rank of the adapter's matrices; more learns more and costs memory")
    lora_alpha: Positive = Field(32, description="the adapter's update is scaled by alpha / rank")
    lora_dropout: Share = Field(0.0, description="share of the adapter's inputs dropped in training")
    target_modules: Literal["all-linear"] | list[str] = Field("all-linear", description="modules that get an adapter")


class Guards(Section):
    policy: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="on a trip: stop the run, skip the step, or rollback to the last checkpoint and go on after these rows",
    )
    most_trips: Positive = Field(5, description="skip and rollback: one more trip than this stops the run all the same")
    spike: Annotated[float, Field(gt=1)] = Field(
        100.0, description="a gradient norm this many times the largest before it is a spike"
    )
    explosion: Annotated[float, Field(gt=1)] = Field(
        3.0, description="a loss this many times the usual, five steps in a row, is an explosion"
    )


class TrainingConfig(Section):
    batch_size: Positive = Field(
        2, description="rows in one forward pass at full length; batch_size × max_length = its tokens"
    )
    gradient_accumulation: Positive = Field(
        16, description="batch_size × this = rows an optimiser step learns from, however they are executed"
    )
    packing: bool = Field(
        True,
        description="rows end to end, each attending to itself alone, no padding; false: padded, for a model that cannot",
    )
    pass_tokens: Positive | None = Field(
        None, description="tokens in one forward pass: memory and speed, never what is learnt; null: what fits"
    )
    max_length: Positive = Field(2048, description="tokens; a longer row is rejected, never cut")
    warmup_ratio: Share = Field(0.05, description="share of the steps over which the rate rises from 0")
    schedule: Literal["cosine", "linear", "constant_with_warmup", "reduce_on_plateau"] = Field(
        "cosine",
        description="how the rate goes after warm-up; reduce_on_plateau: a tenth when the held-out loss stops falling",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's pull of the adapter towards 0")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="gradients are clipped to this norm")
    save_steps: Positive = Field(50, description="steps between checkpoints one can resume from")
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="recompute activations: less memory, about 0.7 × the speed; auto: only when memory asks for it",
    )
    evaluate_each_epoch: bool = Field(
        True,
        description="measure the held-out rows after every epoch, not only after the last: a forward pass over each",
    )
    evaluate_steps: Positive | None = Field(None, description="measure the held-out rows every so many steps too")
    early_stopping: Positive | None = Field(
        None, description="stop after so many measurements without a lower held-out loss; null: never"
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="the adapter that later stages take; the best by held-out loss is kept beside the last as adapter-best",
    )
    domain_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="weight of a domain's rows in the loss; 1 where none is named"
    )
    domain_sampling: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="times that an epoch meets a domain's rows: 2 twice, 0.5 half of them, the next epoch the others; "
        "1 where none is named",
    )
    guards: Guards = Field(Guards(), description="what stops a training that went wrong")


class SftConfig(LoraConfig, TrainingConfig):
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-4, description="peak rate of AdamW")
    epochs: Annotated[float, Field(gt=0)] = Field(
        2.0, description="passes over the training rows; a part of one is rounded up to whole steps"
    )
    neftune_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="noise on the embeddings in training (NEFTune); 5 is usual, null: none"
    )
    curriculum: bool = Field(
        False, description="each epoch from beginner over intermediate to expert rows, in place of all mixed"
    )
    shuffle_answers: bool = Field(
        False, description="control: train on answers shuffled between questions; never used as a stage's input"
    )


class DpoConfig(TrainingConfig):
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-5, description="peak rate of AdamW")
    epochs: Annotated[float, Field(gt=0)] = Field(
        1.0, description="passes over the training pairs; a part of one is rounded up to whole steps"
    )
    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="how strongly the policy is held to the reference")
    loss_type: Literal["sigmoid", "ipo", "robust", "hinge", "apo_zero", "kto", "sppo_hard", "orpo"] = Field(
        "sigmoid",
        description="sigmoid is DPO; kto judges each answer by itself, for one more forward pass a step; "
        "orpo needs no reference, and as published an sft_weight of 1",
    )
    sft_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="adds this × the loss of the chosen answers (RPO), which keeps their log-probs from collapsing"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="robust: the share of pairs thought to be labelled the wrong way round"
    )

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> Self:
        if self.label_smoothing and self.loss_type != "robust":
            raise ValueError("label_smoothing is used by loss_type robust alone")
        return self


class MergeConfig(Section):
    check_logits: bool = Field(
        True, description="compare logits with base + adapter, where the model fits in memory twice"
    )
    arithmetic: Literal["float32", "peft"] = Field(
        "float32", description="float32: summed in float32, rounded once; peft: bit for bit what merge_and_unload gives"
    )
    adapters: list[str] = Field(
        [],
        description="further adapters added in the same pass, each at its own scale: EXP-… of a training, or folders; "
        "a DPO holds its SFT already",
    )


def _each_once(formats: list[str]) -> list[str]:
    if not formats or len(set(formats)) < len(formats):
        raise ValueError("names at least one format, and each once")
    return formats


class ExportConfig(Section):
    formats: Annotated[list[Literal["f16", "q8_0", "q4_k_m"]], AfterValidator(_each_once)] = Field(
        ["f16", "q8_0", "q4_k_m"], description="GGUF files written; each with its size and loss of quality"
    )
    rows: Positive = Field(64, description="held-out rows on which the loss of quality is measured")


class ServeConfig(Section):
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 opens it to the network")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="port; 0 takes a free one")
    backend: Literal["auto", "vllm", "transformers", "llamacpp"] = Field(
        "auto",
        description="auto: vllm where its environment and a GPU are, else transformers; the server says which, why",
    )
    max_concurrent: Positive = Field(16, description="requests generated at once; more wait their turn")
    max_waiting: Annotated[int, Field(ge=0)] = Field(
        64, description="requests that may wait; more get 429, Retry-After"
    )
    max_tokens: Positive = Field(512, description="tokens generated for a request that does not say")
    max_body_mb: Annotated[float, Field(gt=0)] = Field(4.0, description="MB of a request's body; more is refused, 413")
    request_timeout: Annotated[float, Field(gt=0)] = Field(
        600.0, description="seconds a request may take, waiting included; more ends it, 504"
    )
    drain_timeout: Annotated[float, Field(ge=0)] = Field(
        30.0, description="seconds that running requests have to end after SIGTERM"
    )
    kv_cache_gb: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="memory of the KV cache; null: what max_concurrent needs, a quarter of the free memory at most",
    )
    threads: Positive | None = Field(None, description="compute threads on a CPU; null: one a physical core")
    context: Positive | None = Field(None, description="tokens, prompt and answer together; null: the model's own")
    adapters: list[str] = Field([], description="vllm: adapters (EXP-…) served unmerged beside the model, by their ids")
    tensor_parallel: Positive = Field(1, description="vllm: GPUs that share each layer")
    pipeline_parallel: Positive = Field(1, description="vllm: groups of GPUs or nodes that take the layers in turn")
    vllm_args: list[str] = Field([], description="vllm: further words of its command, such as --max-num-seqs=64")


def _without_password(uri: str) -> str:
    """The configuration stands in the record, and that is committed."""
    if re.search(r"://[^/@]*:[^/@]*@", uri):
        raise ValueError("holds a password; try the shell: MLFLOW_TRACKING_USERNAME and …_PASSWORD, ALETHEIA_API_KEY")
    return uri


class EndpointJudge(Section):
    endpoint: Annotated[str, AfterValidator(_without_password)] = Field(
        description="URL of an OpenAI-compatible server whose model judges; its key: ALETHEIA_JUDGE_API_KEY"
    )
    model: str | None = Field(None, description="the model's name there; null: the only one it has")
    price_in: Annotated[float, Field(ge=0)] | None = Field(
        None, description="of a million tokens read, in cost.currency"
    )
    price_out: Annotated[float, Field(ge=0)] | None = Field(None, description="of a million tokens written")
    max_tokens: Positive = Field(1024, description="of a verdict with its reason; a model that thinks needs more")
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(0.0, description="of the verdicts")
    concurrency: Positive = Field(8, description="requests at once")
    timeout: Annotated[float, Field(gt=0)] = Field(120.0, description="seconds for a verdict")
    retries: Annotated[int, Field(ge=0)] = Field(4, description="of a request that failed, waiting longer each time")


class RewardModelJudge(Section):
    reward_model: str = Field(description="folder of a sequence classifier with one label and a chat template")
    tie_margin: Annotated[float, Field(ge=0)] = Field(0.0, description="rewards no further apart than this are a tie")


def _judges(given: Any) -> Any:
    """Each as what its keys say that it is. Raises ValueError with the first mistake as one sentence."""
    if not isinstance(given, list) or not given:
        raise ValueError("is a list of one judge or more: key_points, {endpoint: URL}, {reward_model: FOLDER}")
    return [_judge(each, number) for number, each in enumerate(given, 1)]


def _judge(given: Any, number: int) -> Any:
    if given == "key_points" or isinstance(given, Section):
        return given
    kinds: dict[str, type[Section]] = {"endpoint": EndpointJudge, "reward_model": RewardModelJudge}
    kind = next((kinds[name] for name in kinds if isinstance(given, dict) and name in given), None)
    if kind is None:
        raise ValueError(f"judge {number} is neither key_points, {{endpoint: URL}} nor {{reward_model: FOLDER}}")
    try:
        return kind.model_validate(given)
    except ValidationError as failure:
        error = failure.errors()[0]
        key = ".".join(map(str, error["loc"]))
        if error["type"] == "extra_forbidden":
            near = get_close_matches(key, kind.model_fields, n=1) or list(kind.model_fields)
            raise ValueError(f"judge {number} has no key `{key}`; try {' or '.join(near)}") from None
        raise ValueError(f"judge {number}, {key}: {error['msg'].removeprefix('Value error, ')}") from None


class EvalConfig(Section):
    tasks: list[str] = Field(["aletheia_choices"], description="lm-eval-harness tasks; own ones in <eval>/tasks")
    limit: Positive | None = Field(None, description="items of each task, drawn with `seed`; null: all")
    max_hours: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="benchmarks foretold to take longer, all models together, are asked fewer items; null: no limit",
    )
    benchmarks_endpoint: bool = Field(
        False,
        description="ask benchmarks of the model over `endpoint`, by token ids at /v1/completions; false: in process",
    )
    guard_tasks: list[str] = Field(
        [], description="of `tasks`: those on which a regression refutes the record, whatever else it shows"
    )
    guard_margin: Annotated[float, Field(ge=0)] = Field(
        0.02,
        description="a loss on a guard that is held to be none, in the task's own unit: 0.02 is 2 points of accuracy",
    )
    also: list[
        Annotated[str, AfterValidator(_without_password), Field(pattern=r"^(sft|dpo|EXP-[\w-]+|https?://.+)$")]
    ] = Field([], description="further contestants: sft or dpo of the lineage, an EXP-…, a server's URL#model")
    questions: Positive | None = Field(None, description="open questions answered for the win-rate; null: all")
    max_tokens: Positive = Field(512, description="tokens generated for a win-rate answer")
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(0.0, description="of the win-rate answers; 0 is greedy")
    seed: int = Field(42, description="of the win-rate answers, where they are drawn")
    batch_size: Positive = Field(8, description="rows in one forward pass")
    run_code: bool = Field(
        False, description="run answers' Python against their questions' `tests`, in a sandbox (docs/sandbox.md)"
    )
    judges: Annotated[list[EndpointJudge | RewardModelJudge | Literal["key_points"]], BeforeValidator(_judges)] = Field(
        ["key_points"],
        description="of the win-rate, the first one's is win_rate: key_points (weak), {endpoint: URL, model: NAME}, "
        "{reward_model: FOLDER} (docs/judges.md)",
    )
    endpoint: Annotated[str, AfterValidator(_without_password)] | None = Field(
        None, description="URL of a running server that answers for the model: win-rate, latency; null: none is asked"
    )
    latency_requests: Positive = Field(200, description="requests of each loop: 200 for a p95, 1,000 for a p99")
    latency_tokens: Positive = Field(128, description="most tokens of an answer under load")
    latency_concurrency: Positive = Field(8, description="closed loop: requests under way at once")
    latency_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="open loop: requests a second, at random times; null: 0.7 × what the closed loop came to"
    )
    ttft_limit_ms: Annotated[float, Field(gt=0)] = Field(1000.0, description="goodput: ms to the first token, at most")
    itl_limit_ms: Annotated[float, Field(gt=0)] = Field(
        100.0, description="goodput: ms between tokens, at most, the mean of an answer"
    )


class Telemetry(Section):
    curves: bool = Field(
        True, description="pictures of the steps in experiments/EXP-…: two seconds at a training's end"
    )
    tensorboard: bool = Field(True, description="event files in experiments/EXP-…/tensorboard")
    mlflow: Annotated[str, AfterValidator(_without_password)] | None = Field(
        None, description="tracking URI, such as sqlite:///experiments/mlflow.db, from the root; null: not sent"
    )
    wandb: str | None = Field(None, description="project's name; null: not sent. WANDB_MODE=offline keeps it here")


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
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
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
    export_config: ExportConfig = Field(ExportConfig(), description="files for llama.cpp")
    serve_config: ServeConfig = Field(ServeConfig(), description="the endpoint")
    eval_config: EvalConfig = Field(EvalConfig(), description="evaluation")
    telemetry: Telemetry = Field(Telemetry(), description="where a training's steps are shown as they happen")
    cost: Cost = Field(Cost(), description="prices, for the record")
