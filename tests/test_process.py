"""What our commands' processes do without, until they need it."""

from __future__ import annotations

import pytest
from interpreter import python


def test_a_search_imports_no_package_that_it_does_not_use() -> None:
    printed = python(
        "from mergekit_align.process import importing",
        "with importing(): import mergekit_align.evolve",
        "print([name in sys.modules for name in ('torch', 'pandas', 'peft', 'requests')])",
    )
    assert printed == "[True, False, False, False]"


@pytest.mark.parametrize(
    "use",
    [
        "used = mergekit.common.peft.PeftModel",
        "from peft import PeftModel as used",
        "import peft.peft_model; used = peft.peft_model.PeftModel",
    ],
)
def test_a_package_is_imported_when_it_is_used(use: str) -> None:
    printed = python(
        "from mergekit_align.process import importing",
        "with importing(): import mergekit.common",
        "print('peft' in sys.modules)",
        use,
        "import peft",
        "print(used is peft.PeftModel, used is mergekit.common.peft.PeftModel)",
    )
    assert printed == "False\nTrue True"


def test_a_package_may_be_used_at_once_and_be_there_already() -> None:
    printed = python(
        "import requests",
        "from mergekit_align.process import importing",
        "with importing():",
        "    import datasets, requests as again",
        "    from datasets import Dataset",
        "print(again is requests, Dataset is datasets.Dataset is sys.modules['datasets'].Dataset)",
    )
    assert printed == "True True"
