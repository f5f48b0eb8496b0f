"""Evaluations and searches as a page that a person can decide by, and in a merged model's card.

from mergekit_align.report import add_safety_section, write_report

write_report(["evaluation.json", "evolved/study.journal"], output="report.html", chosen="merged")
add_safety_section("evolved/final_model", "evaluation.json")
"""

from mergekit_align.report.card import add_safety_section
from mergekit_align.report.write import watch, write_report

__all__ = ["add_safety_section", "watch", "write_report"]
