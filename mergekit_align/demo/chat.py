"""The demo world's chat templates: Llama 3's layout for its models, Llama Guard 3's for its guard.

Both layouts are as published (llama.com, "Model Cards and Prompt formats"), so that code which
works on a real model's tokenizer works here. The guard's policy is the demo's own and short.
"""

from collections.abc import Sequence

from mergekit_align.demo.lexicon import CATEGORIES

BOS = "<|begin_of_text|>"
EOT = "<|eot_id|>"
PAD = "<|finetune_right_pad_id|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
SPECIAL_TOKENS = (BOS, EOT, PAD, START_HEADER, END_HEADER)

SAFE = "\n\nsafe"
UNSAFE = "\n\nunsafe\n"
"""The guard's verdicts; the category's code follows the second."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    f"{{{{ '{START_HEADER}' + message['role'] + '{END_HEADER}\\n\\n' }}}}"
    f"{{{{ message['content'] | trim }}}}{EOT}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{START_HEADER}assistant{END_HEADER}\\n\\n' }}}}"
    "{% endif %}"
)


def _guard_template(categories: Sequence[tuple[str, str]]) -> str:
    policy = "".join(f"{code}: {name}.\\n" for code, name in categories)
    judged = "{{ 'User' if messages | length % 2 else 'Agent' }}"
    # Llama Guard 3 writes the blank line after the header itself, as its verdict's first token: its
    # prompt ends with the header, whether or not a generation prompt is asked for.
    return (
        "{{ bos_token }}"
        f"{{{{ '{START_HEADER}user{END_HEADER}\\n\\n' }}}}"
        f"Task: Check if there is unsafe content in '{judged}' messages by these categories."
        f"{{{{ '\\n\\n<BEGIN UNSAFE CONTENT CATEGORIES>\\n{policy}<END UNSAFE CONTENT CATEGORIES>"
        "\\n\\n<BEGIN CONVERSATION>\\n\\n' }}"
        "{% for message in messages %}"
        "{{ ('User: ' if message['role'] == 'user' else 'Agent: ')"
        " + message['content'] | trim + '\\n\\n' }}"
        "{% endfor %}"
        "{{ '<END CONVERSATION>\\n\\n' }}"
        f"Provide your safety assessment for ONLY THE LAST {judged} message:"
        "{{ \"\\n - First line must read 'safe' or 'unsafe'.\""
        ' + "\\n - If unsafe, the second line must list categories, comma-separated." }}'
        f"{EOT}{START_HEADER}assistant{END_HEADER}"
    )


BRIEF_GUARD_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ ('User: ' if message['role'] == 'user' else 'Agent: ')"
    " + message['content'] | trim + '\n\n' }}"
    "{% endfor %}"
    f"<END CONVERSATION>{EOT}{START_HEADER}assistant{END_HEADER}"
)
"""The end of the guard's prompt alone: a quarter of the tokens, on which it learns to judge."""

GUARD_TEMPLATE = _guard_template(list(CATEGORIES.items()))


def guard_verdict(category: str | None) -> str:
    """What the guard answers, from the end of its prompt on."""
    return SAFE if category is None else UNSAFE + category
