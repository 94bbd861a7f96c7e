"""What is trained, how, and how it is measured: model, data, train, checkpoint, eval."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.job.sections.section import MOST, Auto, Metric, OwnMetric, Section, Tokenizer, key
from strategies import optimizers, schedules

Format = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "classification", "text"]
Scheduler = Literal[  # those of strategies/schedules.py
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
Optimizer = Literal[  # those of strategies/optimizers.py
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "adagrad",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_32bit",
    "rmsprop_bnb_8bit",
    "sgd",
    "adafactor",
    "schedule_free_adamw",
    "schedule_free_radam",
    "schedule_free_sgd",
    "muon",
]
REFUSED_VALUES = {"train.lr_scheduler_type": schedules.REFUSED, "train.optim": optimizers.REFUSED}  # with the reason


class ModelSection(Section):
    """Which model is tuned."""

    model_name_or_path: str = Field(
        description="a local folder, a Hugging Face name, or smollm2-135m-instruct (comes as a package, needs no hub)"
    )
    model_revision: str | None = key(None, "revision on the hub")
    dtype: Auto | Literal["float32", "bfloat16", "float16"] = key("auto", "precision of forward and backward")
    attn_implementation: Auto | Literal["document", "sdpa", "eager", "flash_attention_2", "flex_attention"] = key(
        "auto", "attention kernel; document = one causal kernel a document, for rows without padding"
    )
    trust_remote_code: bool = key(False, "run Python code that the model's repository ships")


class ColumnNames(Section):
    """Which column of a file is what: {prompt: question, completion: answer}."""

    prompt: str | None = key(None, "column of the question; with braces a text of columns: '{context} Q: {question}'")
    input: str | None = key(None, "column of what is put behind the prompt (Alpaca's input)")
    completion: str | None = key(None, "column of the answer; with braces a text of columns")
    messages: str | None = key(None, "column of the turns of a conversation")
    system: str | None = key(None, "column of the system prompt")
    tools: str | None = key(None, "column of the functions that the model may call")
    history: str | None = key(None, "column of the earlier turns, pairs of question and answer")
    text: str | None = key(None, "column of plain text")
    label: str | None = key(
        None, "column of the label: with text a classification; with an answer, whether it is good (objective: kto)"
    )
    chosen: str | None = key(None, "column of the better answer, under an objective of pairs")
    rejected: str | None = key(None, "column of the other answer")
    role: str | None = key(None, "key of a turn: who speaks")
    content: str | None = key(None, "key of a turn: its text")
    train: str | None = key(None, "key of a turn: whether it is trained (1 or true) or only read (0 or false)")
    tool_calls: str | None = key(None, "key of a turn: the calls of functions")
    reasoning_content: str | None = key(None, "key of a turn: the reasoning before the answer")

    def stated(self) -> dict[str, str]:
        """Our name -> the file's, of those that are stated."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class Source(Section):
    """One data source: a file, a folder, an address or a hub dataset."""

    path: str = Field(
        description="jsonl, json, csv, tsv, txt, parquet or arrow (a text also as gz, bz2, xz, zst), a folder of them,"
        " a pattern (data/*.jsonl), an address (s3://, gs://, https://), or a Hugging Face dataset"
    )
    format: Format = key("auto", "how a row is read; auto looks at the first row of each file")
    split: str = key("train", "which split: of a hub dataset, or of a folder by the names of its files")
    config: str | None = key(None, "configuration (subset) of a hub dataset")
    revision: str | None = key(None, "revision of a hub dataset: a branch, tag or commit")
    data_files: str | list[str] | None = key(None, "files of a hub dataset to read instead of its own choice")
    columns: ColumnNames | None = key(None, "which column is what in this source; replaces data.columns")
    encoding: str = key("auto", "encoding of text files; auto = UTF-8, or detected and named")
    delimiter: str = key("auto", "what separates the cells of csv files; auto = detected and named", max_length=4)
    sample_by: Literal["auto", "line", "paragraph", "document"] = key(
        "auto", "what is a row of a txt file; auto = paragraphs where it has blank lines, else lines"
    )
    weight: float = key(
        1.0, "how often each sample counts: 0.5 = half of them, drawn by train.seed; 2 = each twice", gt=0, le=1000
    )
    max_samples: int | None = key(None, "most rows of this source, drawn by train.seed", ge=1, le=MOST)


class HeldOutFraction(Section):
    """Hold out a part of the training rows."""

    split: float = Field(description="fraction of the training rows to hold out", gt=0, lt=1)


class DataSection(Section):
    """The training rows, and how they become tokens."""

    train: str | Source | list[str | Source] = Field(description="training rows: a path, or a list of paths")
    eval: str | Source | list[str | Source] | HeldOutFraction | None = key(
        None, "held-out rows: paths, or {split: 0.05}"
    )
    format: Format = key("auto", "format of every source that does not state its own")
    columns: ColumnNames | None = key(
        None, "which column of the files is what: {prompt: question, completion: answer}; null = by their names"
    )
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = key(
        {}, "who a role of the rows is: {customer: user, agent: assistant}"
    )
    ignore_columns: list[str] = key([], "columns that are not read, whatever their names mean")
    max_samples: int | None = key(
        None, "most rows of each source that states no other, drawn by train.seed", ge=1, le=MOST
    )
    chat_template: str = key("tokenizer", "tokenizer, or the path of a .jinja file")
    system_prompt: str | None = key(None, "put before conversations that have no system message")
    instruction: str = key("", "classification: text put before each row's text")
    assistant_only_loss: bool = key(True, "conversations: train on the assistant's turns only")
    completion_only_loss: bool = key(True, "prompt/completion rows: train on the completion only")
    train_on_eos: Literal["turn", "last", "all", "none"] = key(
        "turn", "which ends of turns are learnt: of each trained answer, of the last one, of all turns, of none"
    )
    max_length: Auto | Annotated[int, Field(ge=8, le=MOST)] = key("auto", "longest sample in tokens")
    overlong: Literal["auto", "truncate", "drop", "split"] = key(
        "auto", "what happens to longer samples; auto = conversations are cut, plain text is split"
    )
    truncate: bool = key(False, "continue where more than 20 % of the tokens or rows are cut or dropped")
    packing: Auto | bool = key("auto", "lay documents end to end instead of padding; never lets one see another")
    share_prefixes: Auto | bool = key(
        "auto", "compute what rows of a micro-batch begin with alike once; the same result. For packed rows on CPUs"
    )
    packing_strategy: Literal["bfd"] = key("bfd", "best-fit decreasing")
    strict: bool = key(True, "a broken row is an error; false counts it and writes it to rejected.jsonl")


class TrainSection(Section):
    """How the model is optimised."""

    global_batch_size: Auto | Annotated[int, Field(ge=1, le=MOST)] = key("auto", "samples a step, over all workers")
    per_device_train_batch_size: Auto | Annotated[int, Field(ge=1, le=MOST)] = key("auto", "rows of a micro-batch")
    gradient_accumulation_steps: Auto | Annotated[int, Field(ge=1, le=MOST)] = key("auto", "micro-batches a step")
    num_train_epochs: float = key(3.0, "passes over the data", gt=0, le=100_000)
    max_steps: int = key(-1, "stop after so many steps; -1 = by epochs", ge=-1, le=MOST)
    learning_rate: Annotated[float, Field(gt=0, le=1e30)] = key(2e-4, "peak learning rate")
    lr_scheduler_type: Scheduler = key("cosine", "shape of the learning rate over time")
    lr_scheduler_kwargs: dict[str, int | float | str] = key(
        {},
        "options of the schedule by transformers' names: num_cycles, lr_end, power, timescale, min_lr, min_lr_rate,"
        " warmup_lr_rate, num_decay_steps, num_stable_steps, warmup_type, decay_type, min_lr_ratio",
    )
    warmup_ratio: float = key(0.03, "fraction of the steps with rising learning rate", ge=0, le=1)
    warmup_steps: int = key(0, "steps with rising learning rate; overrides warmup_ratio when above 0", ge=0, le=MOST)
    optim: Auto | Optimizer = key(
        "auto",
        "optimizer, by transformers' names; muon = torch's for matrices of layers, AdamW for the rest;"
        " schedule_free_...: the rate stays constant after the warm-up, an average of the weights is evaluated and"
        " handed back",
    )
    neftune_noise_alpha: float | None = key(
        None, "NEFTune: noise on the embeddings of training rows, 5 say (arXiv 2310.05914); null = none", gt=0, le=1e6
    )
    label_smoothing_factor: float = key(
        0.0,
        "this part of each trained token's label is spread over the vocabulary; held-out losses are without",
        ge=0,
        lt=1,
    )
    loss_type: Auto | Literal["nll", "chunked_nll"] = key(
        "auto", "chunked_nll never holds all logits at once: less memory, the output matrix applied twice"
    )
    torch_compile: bool = key(False, "compile the model: faster steps after a minute or more; not with packing")
    use_liger_kernel: bool = key(
        False, "Liger's kernels for norms, rotary positions and gated MLPs: NVIDIA's GPUs with liger-kernel installed"
    )
    weight_decay: float = key(
        0.0,
        "weight decay of all trained weights but norms and biases, as transformers' Trainer has it; decoupled, but of"
        " sgd, adagrad and rmsprop, which add it to the gradient",
        ge=0,
        le=1000,
    )
    adam_beta1: float = key(0.9, "Adam's first decay", ge=0, lt=1)
    adam_beta2: float = key(0.999, "Adam's second decay", ge=0, lt=1)
    adam_epsilon: float = key(1e-8, "Adam's epsilon", gt=0, le=1)
    max_grad_norm: float = key(1.0, "clip the gradient to this norm; 0 = never", ge=0, le=1e12)
    seed: int = key(42, "order of samples, adapter initialisation, dropout", ge=0, le=2**64 - 1)
    gradient_checkpointing: Auto | bool = key("auto", "recompute activations to save memory")
    threads: Auto | Annotated[int, Field(ge=1, le=MOST)] = key(
        "auto",
        "threads of a worker on a CPU; auto = all cores of its machine, divided among the workers there. Those that"
        " wait spin, and sleep at once while other programs use the cores (GOMP_SPINCOUNT, OMP_WAIT_POLICY decide"
        " where set)",
    )
    cache_frozen_activations: Auto | bool | Literal["disk"] = key(
        "auto",
        "keep what layers below the first that trains make of a sample, for later epochs: true = in the host's memory,"
        " disk = in a file of the cache folder while it trains; auto = on CPUs, where one of the two is worth it",
    )
    deterministic: bool = key(
        False,
        "the same bits in every run on one GPU, also after a resume; costs time: kernels that add in a fixed order (how"
        " much was not measured). One CPU worker repeats itself anyway",
    )

    @property
    def most_threads(self) -> int:
        """Of a worker, where its machine has as many cores for it."""
        return MOST if self.threads == "auto" else self.threads


class CheckpointSection(Section):
    """What is kept on disk."""

    output_dir: str = key("runs", "folder that holds one folder a run")
    save_steps: Auto | Annotated[int, Field(ge=1, le=MOST)] = key("auto", "steps between checkpoints")
    save_total_limit: int = key(2, "checkpoints kept, beside the best", ge=2, le=MOST)
    load_best_model_at_end: Auto | bool = key("auto", "hand back the weights with the lowest held-out loss")


class EvalSection(Section):
    """How quality is measured on the held-out rows."""

    eval_steps: Auto | Annotated[int, Field(ge=1, le=MOST)] | None = key(
        "auto", "steps between held-out losses; null = end only"
    )
    metrics: Auto | list[Metric | OwnMetric] = key(
        "auto",
        "metrics of generated answers; module:function is one of your own, in the job's folder; [] = loss only",
    )
    answer_pattern: str | None = key(
        None,
        "regular expression whose one group is the answer in a text: exact_match, accuracy and macro_f1 compare that,"
        " as a number where it is one. gsm8k and last_number are names of such",
        min_length=1,
    )
    tokenizer: Tokenizer = key(
        "auto",
        "what rouge_l and bleu count; auto = words, and characters where a text has no spaces; else a tokenizer of"
        " sacrebleu: ja-mecab needs sacrebleu[ja], flores200 fetches its SentencePiece model once",
    )
    max_new_tokens: Auto | Annotated[int, Field(ge=1, le=MOST)] = key("auto", "longest generated answer in tokens")
    temperature: float = key(0.0, "of answers drawn by train.seed; 0 = the likeliest tokens", ge=0, le=100)
    top_p: float = key(
        1.0, "draw from the likeliest tokens that have this probability together; needs temperature", gt=0, le=1
    )
    max_rows: int = key(200, "most held-out rows that answers are generated for", ge=1, le=MOST)
    before: bool = key(True, "evaluate the base model too")
    num_samples: int = key(3, "sample outputs kept", ge=0, le=MOST)
    early_stopping_patience: int | None = key(
        None, "stop after so many evaluations without a better loss", ge=1, le=MOST
    )
