"""A guard model as a judge of responses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergekit_align.checkpoints import read_checkpoint
from mergekit_align.devices import check_device, default_device, default_dtype
from mergekit_align.errors import InputError
from mergekit_align.guard.backend import load_backend
from mergekit_align.guard.conversation import Conversation
from mergekit_align.guard.profile import choose_profile
from mergekit_align.guard.prompt import EncodedPrompt, Frame, PromptWriter
from mergekit_align.guard.scorer import HuggingFaceScorer, Scorer
from mergekit_align.guard.settings import GuardSettings
from mergekit_align.guard.verdict import Verdict, verdict, worst
from mergekit_align.token_ids import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mergekit_align.guard.profile import GuardProfile

GENERATED_TOKENS = 100
"""Length of an answer in `generate` mode."""


class Guard:
    """A guard model, ready to judge.

    Args:
        scorer: the model.
        profile: how it is asked and read.
        settings: how it decides.

    Raises:
        InputError: the guard cannot be asked in this way.
    """

    def __init__(self, scorer: Scorer, profile: GuardProfile, settings: GuardSettings) -> None:
        self.profile = profile
        self.settings = settings
        self._scorer = scorer
        self._writer = PromptWriter(
            scorer.tokenizer, profile, max_length=scorer.max_length, policy=settings.policy
        )

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """Verdicts on the last turns of `conversations`, in their order.

        Raises:
            InputError: the guard cannot judge conversations of this kind, or its backend fails.
        """
        kept = self.profile.last_turns
        shortened = [
            conversation if kept is None else conversation.last(kept)
            for conversation in conversations
        ]
        # What is asked in the same way is read in the same batches.
        groups: dict[tuple[int, str | None], list[int]] = {}
        for index, conversation in enumerate(shortened):
            for policy in self._writer.policies(conversation):
                groups.setdefault((len(conversation.turns), policy), []).append(index)
        found: dict[int, list[tuple[str, Verdict]]] = {}
        for (_, policy), members in groups.items():
            verdicts = self._judge_alike([shortened[index] for index in members], policy)
            for index, each in zip(members, verdicts, strict=True):
                found.setdefault(index, []).append((policy or "", each))
        return [
            worst(found[index]) if found[index][0][0] else found[index][0][1]
            for index in range(len(conversations))
        ]

    def _judge_alike(
        self, conversations: Sequence[Conversation], policy: str | None
    ) -> list[Verdict]:
        frame = self._writer.frame(conversations[0], policy)
        prompts = self._writer.encode_all(conversations, policy)
        if self.settings.mode == "generate":
            return self._read_texts(frame, prompts)
        ids = [prompt.ids for prompt in prompts]
        verdicts = [
            verdict(
                frame.tree,
                score.logprobs,
                threshold=self.settings.threshold,
                controversial_is_unsafe=self.settings.controversial == "unsafe",
                cut=prompt.cut,
                evidence=score.evidence,
            )
            for prompt, score in zip(
                prompts, self._scorer.scores(ids, frame.tree, preamble=frame.preamble), strict=True
            )
        ]
        if not (frame.codes and self.settings.categories):
            return verdicts
        unsafe = [row for row, found in enumerate(verdicts) if found.label == "unsafe"]
        named = self._categories(frame, [ids[row] for row in unsafe])
        for row, codes in zip(unsafe, named, strict=True):
            verdicts[row] = verdicts[row]._replace(categories=codes)
        return verdicts

    def _categories(self, frame: Frame, prompts: Sequence[Sequence[int]]) -> list[tuple[str, ...]]:
        assert self.profile.categories is not None
        if not prompts:
            return []
        return self._scorer.categories(
            prompts, frame, max_tokens=self.profile.categories.max_tokens
        )

    def _read_texts(self, frame: Frame, prompts: Sequence[EncodedPrompt]) -> list[Verdict]:
        """Verdicts in text that the guard writes after its prompt, the forced beginning aside."""
        texts = self._scorer.texts(
            [prompt.ids for prompt in prompts],
            preamble=frame.preamble,
            max_tokens=GENERATED_TOKENS,
        )
        beginnings: list[tuple[TokenIds, Any]] = list(frame.tree.answers.items())
        readable = {self._scorer.tokenizer.decode(ids): meaning for ids, meaning in beginnings}
        verdicts = []
        for prompt, text in zip(prompts, texts, strict=True):
            fitting = [beginning for beginning in readable if text.startswith(beginning)]
            if not fitting:
                evidence = f"found {text[:80]!r} for a verdict"
                verdicts.append(
                    Verdict("unreadable", None, 0.0, 0.0, cut=prompt.cut, evidence=evidence)
                )
                continue
            meaning = readable[max(fitting, key=len)]
            unsafe = meaning == "unsafe" or (
                meaning == "controversial" and self.settings.controversial == "unsafe"
            )
            verdicts.append(
                Verdict(
                    "unsafe" if unsafe else "safe",
                    float(unsafe),
                    float(meaning == "controversial"),
                    1.0,
                    frame.codes_in(text[len(max(fitting, key=len)) :]) if unsafe else (),
                    prompt.cut,
                )
            )
        return verdicts


def check_guard(settings: GuardSettings) -> tuple[PreTrainedTokenizerBase, GuardProfile]:
    """Tokenizer and profile of the guard of these settings; its weights are not read.

    Raises:
        InputError: there is no such model or device, it is no guard that we know, or it cannot be
            asked so.
    """
    name = settings.model
    if os.path.isabs(name) and not os.path.isdir(name):
        raise InputError(f"guard: found no directory {name}; expected a model")
    if settings.device is not None and settings.backend is None:
        check_device(settings.device, "guard: device")
    config, tokenizer = read_checkpoint(name, "guard")
    profile = choose_profile(settings.profile, model=name, config=config, tokenizer=tokenizer)
    if settings.backend is None:
        PromptWriter(tokenizer, profile, policy=settings.policy).check()
    return tokenizer, profile


def load_guard(settings: GuardSettings) -> Guard:
    """The guard of these settings, loaded.

    Raises:
        InputError: there is no such model, it is no guard that we know, or it cannot be asked so.
    """
    from transformers import AutoModelForCausalLM

    tokenizer, profile = check_guard(settings)
    scorer: Scorer
    if settings.backend is not None:
        scorer = load_backend(settings)
    else:
        device = settings.device or default_device()
        dtype = settings.dtype or default_dtype(device)
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype).to(device)
        scorer = HuggingFaceScorer(model, tokenizer, batch_size=settings.batch_size)
    return Guard(scorer, profile, settings)
