"""Models -> one table: alignment, over-refusal and tasks, with 95% intervals.

    from mergekit_align.evaluate import evaluate

    evaluation = evaluate(["aligned", "merged"], data=["test.jsonl"], guard="guard", output="table")
    evaluation.columns["alignment"].scores["merged"].value

Every model answers the prompts greedily and runs the lm-eval tasks; then the guard judges what was
answered. One model is in memory at a time. What a model generated, what it told lm-eval of
likelihoods, and what a guard judged is kept on disk, so that a killed run goes on where it stopped and
a task or a guard that is added costs only itself.
"""

from mergekit_align.evaluate.report import Evaluation, print_table, save
from mergekit_align.evaluate.run import evaluate
from mergekit_align.evaluate.scores import Column, Difference, Score

__all__ = ["Column", "Difference", "Evaluation", "Score", "evaluate", "print_table", "save"]
