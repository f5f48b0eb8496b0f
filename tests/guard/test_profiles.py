"""Every shipped profile, held against its guard's published format."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from published import CONVERSATIONS, FORMATS, Published, load
from transformers import PreTrainedTokenizerFast

from mergekit_align.demo.tokenizer import build_tokenizer
from mergekit_align.errors import InputError
from mergekit_align.guard.conversation import Conversation
from mergekit_align.guard.profile import GuardProfile, choose_profile, load_profile, profiles
from mergekit_align.guard.prompt import Frame, PromptWriter
from mergekit_align.guard.verdict import Verdict, verdict

RESPONSE = CONVERSATIONS["response"]


@pytest.fixture(params=FORMATS)
def published(request: pytest.FixtureRequest) -> Published:
    return load(request.param)


def test_every_profile_that_tells_a_checkpoint_is_tested_here() -> None:
    told = {name for name, profile in profiles().items() if profile.recognition}
    assert {load(name).data["profile"] for name in FORMATS} == told


def test_the_prompts_are_those_published(published: Published) -> None:
    writer = published.writer()
    for kind, conversation in published.conversations().items():
        (policy,) = writer.policies(conversation)
        ids = writer.encode(conversation, policy).ids
        expected = published.data[kind] + published.data.get("answer_begins", "")
        assert published.tokenizer.decode(ids) == expected
        # The very tokens that the text has as a whole.
        assert ids == published.tokenizer(expected, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", ["harmbench", "harmbench-mistral"])
def test_a_guard_of_responses_judges_no_prompt_alone(name: str) -> None:
    assert "prompt" not in load(name).data
    with pytest.raises(InputError, match="judge responses, not prompts alone"):
        load(name).writer().encode(CONVERSATIONS["prompt"])


def test_harmbenchs_prompt_has_the_published_digest() -> None:
    data = load("harmbench").data
    text = data["response"].removeprefix(data["bos_token"])
    text = text.replace("USER_TEXT", "{behavior}").replace("RESPONSE_TEXT", "{generation}")
    assert hashlib.sha256(text.encode()).hexdigest() == data["sha256"]


def test_the_profile_is_told_from_the_checkpoint(published: Published) -> None:
    assert published.chosen() is published.profile


def test_a_guard_with_a_template_is_told_under_any_name(published: Published) -> None:
    if published.profile.template:
        with pytest.raises(InputError, match="no guard we know"):
            published.chosen(name="/models/merged")
    else:
        assert published.chosen(name="/models/merged") is published.profile


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("/models/WildGuard-7B", "wildguard"),
        ("hub/models--allenai--wildguard/snapshots/0a1b2c", "wildguard"),
        ("/cache/models--cais--HarmBench-Llama-2-13b-cls/snapshots/0a1b2c", "harmbench"),
        ("/home/llama/HarmBench-Mistral-7b-val-cls/", "harmbench-mistral"),
    ],
)
def test_a_guard_without_a_template_is_told_by_its_name(name: str, chosen: str) -> None:
    assert load(chosen).chosen(name=name).name == chosen


def test_the_name_of_a_parent_directory_tells_nothing() -> None:
    with pytest.raises(InputError, match="no guard we know"):
        load("wildguard").chosen(name="/wildguard-eval/harmbench-llama/chat-model")


# --- Verdicts -------------------------------------------------------------------------------------


def read(
    published: Published,
    conversation: Conversation,
    says: Mapping[str, Mapping[str, float]],
    *,
    controversial_is_unsafe: bool = True,
) -> Verdict:
    """The verdict where, after each text, these are the probabilities of the next token."""
    writer = published.writer()
    (policy,) = writer.policies(conversation)
    frame = writer.frame(conversation, policy)
    prompt = writer.encode(conversation, policy).ids
    begun = len(written(published, prompt)) - len(published.data.get("answer_begins", ""))
    logprobs = {}
    for place, branch in frame.tree.branches.items():
        answer = written(published, [*prompt, *place])
        following = says.get(answer[begun:], {})
        logprobs[place] = {
            token: math.log(
                following.get(written(published, [*prompt, *place, token])[len(answer) :], 1e-30)
            )
            for token in branch
        }
    return verdict(
        frame.tree,
        logprobs,
        threshold=0.5,
        controversial_is_unsafe=controversial_is_unsafe,
        cut=False,
        evidence="",
    )


def written(published: Published, ids: Sequence[int]) -> str:
    return str(published.tokenizer.decode(ids))


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, index) for name in FORMATS for index in range(len(load(name).data["verdicts"]))],
)
def test_the_probability_of_unsafe_is_as_its_authors_define_it(name: str, case: int) -> None:
    expected = load(name).data["verdicts"][case]
    found = read(
        load(name),
        CONVERSATIONS[expected.get("of", "response")],
        expected["says"],
        controversial_is_unsafe=expected.get("counts_controversial_as", "unsafe") == "unsafe",
    )
    assert found.p_unsafe == pytest.approx(expected["unsafe"])
    assert found.p_controversial == pytest.approx(expected.get("controversial", 0.0))
    assert found.label == ("unsafe" if expected["unsafe"] >= 0.5 else "safe")
    if "readable" in expected:
        assert found.readable == pytest.approx(expected["readable"])


def test_an_answer_of_other_words_is_unreadable(published: Published) -> None:
    kind = next(iter(published.conversations()))
    assert read(published, CONVERSATIONS[kind], {}).label == "unreadable"


def test_a_vocabulary_may_have_the_verdict_in_pieces() -> None:
    data = load("llama-guard-1").data
    published = Published({**data, "tokenizer": "sentencepiece_without_words"})
    assert published.tokenizer.tokenize("x unsafe") == ["▁", "x", "▁", *"unsafe"]
    found = read(published, RESPONSE, {"": {" ": 0.9, "u": 0.1}, " ": {"s": 0.2, "u": 0.6}})
    assert found.p_unsafe == pytest.approx(0.9 * 0.75 + 0.1)


def frame_of(published: Published, **arguments: Any) -> tuple[Frame, list[int]]:
    writer = published.writer(**arguments)
    policy = writer.policies(RESPONSE)[0]
    return writer.frame(RESPONSE, policy), writer.encode(RESPONSE, policy).ids


def test_categories_are_read_where_the_guard_names_them(published: Published) -> None:
    frame, ids = frame_of(published)
    expected = published.data.get("categories")
    if expected is None:
        assert not frame.codes
        return
    begins = published.data["response"] + expected["after"]
    assert written(published, [*ids, *frame.category_start]) == begins
    assert list(frame.codes_in(expected["written"])) == expected["read"]
    assert frame.codes_in("None\nRefusal: Yes") == ()


def test_the_categories_are_those_in_the_prompt() -> None:
    codes = {
        name: frame_of(load(name))[0].codes
        for name in FORMATS
        if load(name).profile.categories is not None
    }
    assert codes["llama-guard-1"] == tuple(f"O{n}" for n in range(1, 7))
    assert codes["llama-guard-2"] == tuple(f"S{n}" for n in range(1, 12))
    assert codes["llama-guard-3-1b"] == tuple(f"S{n}" for n in range(1, 14))
    assert codes["llama-guard-3-8b"] == codes["llama-guard-4"]
    assert codes["llama-guard-4"] == tuple(f"S{n}" for n in range(1, 15))
    assert len(codes["qwen3guard"]) == 9


def test_a_category_that_the_guard_does_not_have_is_not_another() -> None:
    frame, _ = frame_of(load("llama-guard-3-1b"))
    assert frame.codes_in("S14,S2") == ("S2",)


# --- Policies -------------------------------------------------------------------------------------


def prompt_text(
    name: str, policy: Mapping[str, str], conversation: Conversation = RESPONSE
) -> dict[str | None, str]:
    """The prompt under each policy that is judged by itself."""
    writer = load(name).writer(policy=policy)
    return {
        code: written(load(name), writer.encode(conversation, code).ids)
        for code in writer.policies(conversation)
    }


@pytest.mark.parametrize("name", ["llama-guard-3-1b", "llama-guard-4"])
def test_llama_guards_categories_can_be_replaced(name: str) -> None:
    policy = {"S1": "Baking.\nNo talk of bread.", "B2": "Knitting."}
    (text,) = prompt_text(name, policy).values()
    inside = text.partition("<BEGIN UNSAFE CONTENT CATEGORIES>\n")[2]
    assert inside.partition("<END")[0] == "S1: Baking.\nNo talk of bread.\nB2: Knitting.\n"
    assert frame_of(load(name), policy=policy)[0].codes == ("S1", "B2")


def test_a_template_that_ignores_the_policy_is_an_error() -> None:
    writer = load("llama-guard-3-8b").writer(policy={"S1": "Baking."})
    with pytest.raises(InputError, match=r"policy: S1: .* leaves it out"):
        writer.encode(RESPONSE)


@pytest.mark.parametrize("name", [n for n in FORMATS if load(n).profile.policy is None])
def test_a_guard_that_takes_no_policy_says_so(name: str) -> None:
    with pytest.raises(InputError, match=r"policy: found one, but .* guards take none"):
        load(name).writer(policy={"S1": "Baking."})


@pytest.mark.parametrize("kind", ["prompt", "response"])
def test_shieldgemma_is_asked_about_one_of_its_guidelines_a_pass(kind: str) -> None:
    writer = load("shieldgemma").writer(policy=None)
    conversation = CONVERSATIONS[kind]
    policies = writer.policies(conversation)
    assert policies == (
        *("dangerous content", "harassment", "hate speech", "sexually explicit information"),
    )
    profile = profiles()["shieldgemma"]
    assert profile.policy is not None
    guidelines = getattr(profile.policy, kind)
    for policy in policies:
        text = written(load("shieldgemma"), writer.encode(conversation, policy).ids)
        found = text.partition("defined in the below:\n\n* ")[2].partition("\n\n===")[0]
        assert found == guidelines[policy]
        assert found.startswith(f'"No {str(policy).title()}": The ')
    subject = {"prompt": "prompt shall not contain or seek generation", "response": "chatbot shall"}
    assert all(f": The {subject[kind]}" in text for text in guidelines.values())


@pytest.mark.parametrize("version", ["3.0", "3.2"])
def test_granite_takes_risks_of_its_own_by_name_and_others_by_definition(version: str) -> None:
    name = f"granite-guardian-{version}"
    policy = {"harm": "", "baking": "The message is about bread."}
    texts = prompt_text(name, policy)
    assert texts["harm"] == load(name).data["response"]
    definition = texts["baking"].partition("<start_of_risk_definition>\n")[2]
    assert definition[2:].startswith("The message is about bread.\n<end_of_risk_definition>")


def test_granites_own_risk_cannot_be_redefined() -> None:
    with pytest.raises(InputError, match="risk_definition: needed for a new risk"):
        prompt_text("granite-guardian-3.0", {"harm": "The message is about bread."})


def test_granite_3_3_takes_criteria() -> None:
    texts = prompt_text("granite-guardian-3.3", {"baking": "The text is about bread."})
    assert "### Criteria: The text is about bread.\n\n### Scoring Schema: If" in texts["baking"]


# --- Choosing a profile, and a user's own ---------------------------------------------------------


def choose(name: str | None, tokenizer: PreTrainedTokenizerFast) -> GuardProfile:
    config = SimpleNamespace(model_type="llama")
    return choose_profile(name, model="my/model", config=config, tokenizer=tokenizer)


def test_the_demos_guard_is_a_llama_guard_3() -> None:
    assert choose(None, build_tokenizer(guard=True)).name == "llama-guard-3"


def test_a_chat_model_is_no_guard() -> None:
    with pytest.raises(InputError, match="my/model: found a llama model that is no guard") as error:
        choose(None, build_tokenizer())
    assert all(name in str(error.value) for name in profiles())
    assert "\n" not in str(error.value)


def test_a_profile_is_chosen_by_name_whatever_the_model() -> None:
    assert choose("wildguard", build_tokenizer()) is profiles()["wildguard"]


def test_an_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(InputError, match=r"found 'lama-guard-3'; .*did you mean 'llama-guard-3'"):
        choose("lama-guard-3", build_tokenizer())


@pytest.fixture
def own_profile() -> dict[str, Any]:
    return {
        "name": "mine",
        "title": "My guard",
        "source": "me",
        "template": "Q: {{ messages[0].content }}\nA: {{ messages[1].content }}\nBad?",
        "prompt": None,
        "response": {"verdicts": {" no": "safe", " yes": "unsafe"}},
    }


def test_a_users_own_profile_is_read_from_its_file(
    tmp_path: Path, own_profile: dict[str, Any]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(own_profile), encoding="utf-8")
    tokenizer = build_tokenizer()
    writer = PromptWriter(tokenizer, choose(str(file), tokenizer))
    assert tokenizer.decode(writer.encode(RESPONSE).ids) == "Q: USER_TEXT\nA: RESPONSE_TEXT\nBad?"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"response": {"verdicts": {"no": "fine"}}}, "response.verdicts.no"),
        ({"response": {"verdict": {"no": "safe"}}}, "response.verdict"),
        ({"template": 3}, "template"),
        ({"policy": {"argument": "categories", "form": "some"}}, "policy.form"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_broken_profile_names_file_and_key(
    tmp_path: Path, own_profile: dict[str, Any], change: dict[str, Any], key: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**own_profile, **change}), encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_profile(file)
    assert str(error.value).startswith(f"{file}: {key}")
    assert "\n" not in str(error.value)


def test_a_missing_profile_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no such file"):
        choose(str(tmp_path / "mine.yaml"), build_tokenizer())
