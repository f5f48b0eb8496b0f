"""What a user says of a guard."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

import mergekit_align
from mergekit_align.fingerprint import commit, digest, model_fingerprint


class GuardSettings(BaseModel):
    """Which guard judges, where it lives, and how it decides."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str
    """Directory or hub name of the guard; for a backend, where its tokenizer and config are."""
    profile: str | None = None
    """Name or YAML file of its profile; by default told from the checkpoint."""
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """P(unsafe) from which on a response is unsafe."""
    controversial: Literal["safe", "unsafe"] = "unsafe"
    """How a guard's third verdict counts."""
    policy: dict[str, str] | None = None
    """Policies by code, in place of the guard's own, where it takes any."""
    mode: Literal["probability", "generate"] = "probability"
    """`generate` reads the verdict from text that the guard writes: slow, to compare with."""
    categories: bool = True
    """Whether to have the categories named of what is unsafe."""
    device: str | None = None
    """`cpu`, `cuda` or `cuda:1`; by default a GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Floating type; by default bfloat16, or float32 on a CPU without it."""
    batch_size: int | None = Field(default=None, ge=1)
    """Prompts in a batch at most; by default memory alone bounds it."""
    backend: str | None = None
    """Name of an lm-eval model that answers in place of one in this process: `vllm`, ..."""
    backend_args: dict[str, Any] = {}
    """Its arguments, as for `lm_eval --model_args`."""

    def fingerprint(self) -> str:
        """What verdicts depend on: the guard, its profile's text, how it decides; not where it runs."""
        profile = Path(self.profile) if self.profile else None
        where = {"device", "batch_size", "backend_args"}
        arguments = {k: v for k, v in self.backend_args.items() if k != "base_url"}
        parts = [
            model_fingerprint(self.model),
            commit(self.model) if self.backend is None else None,
            self.model_dump(mode="json", exclude=where),
            {key: str(value) for key, value in arguments.items()},
            profile.read_text(encoding="utf-8") if profile and profile.is_file() else None,
            mergekit_align.__version__,
        ]
        return digest(parts)[:16]
