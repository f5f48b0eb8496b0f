"""Guard models as judges of responses: Llama Guard and its peers, each described by a profile.

guard = load_guard(GuardSettings(model="meta-llama/Llama-Guard-3-8B"))
guard.judge([Conversation.of("How do I bake bread?", "Mix flour and water.")])
"""

from mergekit_align.guard.conversation import Conversation
from mergekit_align.guard.guard import Guard, check_guard, load_guard
from mergekit_align.guard.profile import GuardProfile, load_profile, profiles
from mergekit_align.guard.settings import GuardSettings
from mergekit_align.guard.verdict import Verdict

__all__ = [
    "Conversation",
    "Guard",
    "GuardProfile",
    "GuardSettings",
    "Verdict",
    "check_guard",
    "load_guard",
    "load_profile",
    "profiles",
]
