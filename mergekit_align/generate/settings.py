"""What a user says of the data to be generated: the config's schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from mergekit_align.guard import GuardSettings

SAMPLES, TRIAL_SAMPLES = 1000, 10
"""Questions of a type: the paper's K (arXiv 2406.14563), and for a trial."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Strict):
    """A model and how lm-eval runs it; what is not said is as for all models."""

    model: str
    """Directory, hub name, or what its server calls it."""
    name: str | None = None
    """What it is called in files and tables; by default the end of its path."""
    licence: str | None = None
    """For the data card."""
    backend: str | None = None
    """lm-eval model that runs it: `hf`, `vllm`, `local-completions`, `local-chat-completions`, ..."""
    backend_args: dict[str, Any] | None = None
    """Its arguments, as for `lm_eval --model_args`."""


class Origin(Strict):
    """Where prompts come from that exist already: a file, a dataset, or an lm-eval task."""

    path: str | None = None
    """JSONL, JSON, CSV, or a directory that `datasets` saved."""
    dataset: str | None = None
    """A dataset's hub name or directory, as `datasets.load_dataset` takes it."""
    name: str | None = None
    """The dataset's configuration."""
    split: str | None = None
    """The dataset's split."""
    task: str | None = None
    """lm-eval task, group or tag, of which every prompt counts (in `decontaminate` alone)."""
    prompt: str | None = None
    """Column of the prompts; by default `prompt`, `question` or `text`."""
    category: str | None = None
    """Column of what a prompt is about; by default `category`."""
    where: dict[str, Any] = {}
    """Only rows whose columns have these values: `{label: unsafe}`."""


class AskedSettings(Strict):
    """Questions of one type, or of one domain, and where they come from."""

    samples: int | None = Field(default=None, ge=1)
    """How many; by default the config's `samples`, which domains share."""
    topics: str | list[str | dict[str, Any]] | None = None
    """Topics: a list, a YAML file, or the name of ours; questions are spread over them alike, or by
    their `share`."""
    template: str | None = None
    """How the writer is asked and read: a YAML file, or the name of ours."""
    model: str | ModelSettings | None = None
    """Who writes the questions; by default `questions.model`."""
    prompts: str | Origin | None = None
    """Existing prompts, in place of generated ones."""


class DomainSettings(AskedSettings):
    """Task questions of one domain."""

    expert: str | None = None
    """The pool's model, by name or path, whose answers are kept."""
    examples: str | list[str | dict[str, Any]] = []
    """A few questions of the domain, for the writer: a list, or a JSONL, JSON or YAML file."""


class Sampling(Strict):
    """How a stage's models generate."""

    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer."""
    batch_size: int | None = Field(default=None, ge=1)
    """Prompts answered at once; by default 64, halved where memory is short."""
    seed: int | None = None
    """By default the config's."""


class QuestionStage(Sampling):
    """How questions are written."""

    model: str | ModelSettings | None = None
    """Who writes them: often a model that refuses nothing."""
    temperature: float = Field(default=1.0, ge=0)
    attempts: int = Field(default=8, ge=1)
    """Rounds of asking, of which each asks for what is missing still."""


class SelectStage(Strict):
    """Which answers are kept."""

    seed: int | None = None
    """Draws among a question's answers; by default the config's."""
    min_characters: int = Field(default=1, ge=0)
    max_characters: int = Field(default=4000, ge=1)
    """Lengths of a kept answer."""


class Quality(Strict):
    """What a question must be like."""

    min_characters: int = Field(default=8, ge=1)
    max_characters: int = Field(default=2000, ge=1)
    near_duplicates: float = Field(default=0.7, ge=0.5, le=1)
    """Jaccard similarity (of runs of five characters) from which on two questions are one."""


Share = Annotated[float, Field(gt=0, le=1)]


class Settings(Strict):
    """A config of `mergekit-align-generate`. Paths are relative to the working directory."""

    models: list[str | ModelSettings] = Field(min_length=1)
    """The pool: every model answers the unsafe and the harmless questions."""
    output: str
    """Directory of every stage's file, of the samples, and of their card."""
    guard: GuardSettings | None = None
    """Judges the answers to unsafe and harmless questions."""
    samples: int = Field(default=SAMPLES, ge=1)
    """Questions of each type."""
    seed: int = 0
    """Of all that is drawn."""
    alignment: AskedSettings | None = None
    """Unsafe questions; of their answers a refusal is kept. `{}` is every default."""
    benign: AskedSettings | None = None
    """Harmless questions that look unsafe; of their answers a helpful one is kept."""
    task: dict[str, DomainSettings] = {}
    """Questions of domains, by name; the expert's answer is kept."""
    questions: QuestionStage = QuestionStage()
    answers: Sampling = Sampling()
    select: SelectStage = SelectStage()
    split: dict[str, Share] = {"train": 0.8, "validation": 0.1, "test": 0.1}
    """Shares of the samples, by the name of the file that they go to."""
    quality: Quality = Quality()
    decontaminate: list[str | Origin] = []
    """Evaluation sets: a question that is nearly one of their prompts is dropped."""
    task_search_path: list[str] = []
    """Directories of lm-eval tasks, for those in `decontaminate` that are the user's own."""
    language: str | None = None
    """Of the questions, two letters (`en`); without it none is asked for and none is checked."""
    licence: str | None = None
    """Of the data, for its card."""
    backend: str = "hf"
    """lm-eval model that runs the models."""
    backend_args: dict[str, Any] = {}
    device: str | None = None
    """`cpu`, `cuda` or `cuda:1`; by default a GPU where there is one."""


Stage = Literal["questions", "answers", "judge", "select", "split", "save"]
STAGES: tuple[Stage, ...] = get_args(Stage)
