"""A guard's chat template: conversations and policies in, the prompt's text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from mergekit_align.errors import InputError
from mergekit_align.guard.conversation import Conversation
from mergekit_align.guard.profile import GuardProfile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_JINJA = ImmutableSandboxedEnvironment()


class GuardTemplate:
    """The template of one guard's tokenizer, or of its profile.

    Args:
        tokenizer: the guard's.
        profile: how the guard is asked.
        policy: policies by code, in place of the guard's own.

    Raises:
        InputError: there is no chat template, or the guard takes no policy.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        profile: GuardProfile,
        policy: Mapping[str, str] | None,
    ) -> None:
        if not profile.template and not tokenizer.chat_template:
            raise InputError(
                f"{tokenizer.name_or_path}: chat template: found none; expected one, as "
                f"{profile.name} guards have"
            )
        if policy and profile.policy is None:
            raise InputError(f"policy: found one, but {profile.name} guards take none")
        self.tokenizer = tokenizer
        self.profile = profile
        self._policy = policy

    def policies(self, conversation: Conversation) -> tuple[str | None, ...]:
        """Codes of the policies that are judged one by one; `(None,)` for all at once."""
        form = self.profile.policy
        if form is None or form.form == "all":
            return (None,)
        return tuple(self._policy_texts(conversation)) or (None,)

    def _policy_texts(self, conversation: Conversation) -> Mapping[str, str]:
        form = self.profile.policy
        if form is None:
            return {}
        return self._policy or (form.prompt if conversation.ends_with_prompt else form.response)

    def render(
        self, contents: Sequence[str], policy: str | None, conversation: Conversation
    ) -> str:
        """The prompt's text around `contents`, which stand for the turns of `conversation`.

        Raises:
            InputError: the template cannot be rendered, or leaves a content out.
        """
        roles = [("user", "assistant")[index % 2] for index in range(len(contents))]
        arguments = {
            **self.profile.template_arguments,
            **self._policy_argument(policy, conversation),
        }

        def render(wrapped: Sequence[Any]) -> str:
            messages = [{"role": r, "content": c} for r, c in zip(roles, wrapped, strict=True)]
            if self.profile.question is not None:
                asked = _JINJA.from_string(self.profile.question).render(messages=messages)
                messages = [{"role": "user", "content": asked}]
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=self.profile.add_generation_prompt,
                    chat_template=self.profile.template,
                    **arguments,
                )
            )

        # Templates of multimodal guards take contents in parts.
        parts = [[{"type": "text", "text": content}] for content in contents]
        problem = None
        for wrapped in (contents, parts):
            try:
                text = render(wrapped)
            except Exception as error:  # a template raises what it likes
                problem = problem or error
                continue
            # Not what a list looks like when it is printed.
            if (
                all(content.strip() in text for content in contents)
                and "'type': 'text'" not in text
            ):
                return text
        reason = f" ({problem})" if problem else ""
        raise InputError(
            f"{self.tokenizer.name_or_path}: chat template: found that it does not render a "
            f"conversation of {len(contents)} turns{reason}"
        )

    def _policy_argument(self, policy: str | None, conversation: Conversation) -> dict[str, Any]:
        form, texts = self.profile.policy, self._policy_texts(conversation)
        if form is None or not texts:
            return {}
        if policy is None:
            return {form.argument: dict(texts)}
        text = texts[policy]
        if isinstance(form.value, str):
            return {form.argument: form.value.format(code=policy, text=text)}
        needed = {key: value for key, value in form.value.items() if text or "{text}" not in value}
        return {form.argument: {k: v.format(code=policy, text=text) for k, v in needed.items()}}

    def check_policy(self, text: str, policy: str | None) -> None:
        """See that the user's policy is in a prompt's text: a template may ignore the argument.

        Raises:
            InputError: it is not.
        """
        given = self._policy or {}
        for code, wanted in given.items() if policy is None else [(policy, given.get(policy, ""))]:
            if wanted not in text:
                raise InputError(
                    f"policy: {code}: found that the chat template of "
                    f"{self.tokenizer.name_or_path} leaves it out; expected one that takes policies"
                )
