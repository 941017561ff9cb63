"""Several scored answers to a prompt as a pair: the best against the worst, where the prompt is neither too easy nor too hard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from datamodules.base.json_lines import MalformedRow, is_finite

__all__ = ["BestOfN"]


class BestOfN:
    """Makes one row with ``chosen`` and ``rejected`` of each row with ``answers`` and ``scores``, and counts what is left out.

    Args:
        solve_rates: Least and greatest share of a prompt's answers that solve it, both included; ``None``: any.
        solved_score: Score from which on an answer counts as solving its prompt.

    Raises:
        ValueError: ``solve_rates`` are not two numbers in [0, 1], the lower one first.

    Example:
        >>> BestOfN((0.2, 0.6)).pair({"prompt": "2+2=", "answers": ["5", "4", "22"], "scores": [0, 1, 0]})
        {'prompt': '2+2=', 'chosen': '4', 'rejected': '5'}
    """

    def __init__(self, solve_rates: tuple[float, float] | None = None, solved_score: float = 1.0) -> None:
        if solve_rates is not None and not 0 <= solve_rates[0] <= solve_rates[1] <= 1:
            raise ValueError(f"solve_rates={solve_rates} should be two shares between 0 and 1, the lower one first.")
        self.solve_rates, self.solved_score = solve_rates, solved_score
        self.total = self.equal = self.easy_or_hard = 0

    def pair(self, row: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The row with a pair; ``None`` if there is none to be made of it. Of equal scores, the first answer counts.

        Raises:
            MalformedRow: Answers and scores that do not belong together, both kinds of rows in one, or, with ``solve_rates``, a
                row without scores.
        """
        if "answers" not in row and "scores" not in row:
            if self.solve_rates is not None:
                raise MalformedRow("it has no answers and scores, of which solve_rates asks how many solve the prompt")
            return row
        if twice := sorted({"chosen", "rejected"} & row.keys()):
            raise MalformedRow(f"it has answers with scores, and {' and '.join(twice)} as well")
        answers, scores = row.get("answers"), row.get("scores")
        if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores) or len(answers) < 2:
            raise MalformedRow("answers and scores are not two lists of the same length, of 2 or more")
        if not all(map(is_finite, scores)):
            raise MalformedRow("its scores are not all numbers")
        logps = row.get("reference_logps")
        if logps is not None and (not isinstance(logps, list) or len(logps) != len(answers)):
            raise MalformedRow("its reference_logps are no list with one number for each answer")
        self.total += 1
        rate = sum(score >= self.solved_score for score in scores) / len(scores)
        if self.solve_rates is not None and not self.solve_rates[0] <= rate <= self.solve_rates[1]:
            self.easy_or_hard += 1
            return None
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        if best == worst:
            self.equal += 1
            return None
        rest = {name: value for name, value in row.items() if name not in ("answers", "scores", "reference_logps")}
        paired = {**rest, "chosen": answers[best], "rejected": answers[worst]}
        if logps is not None:
            paired |= {"reference_chosen_logps": logps[best], "reference_rejected_logps": logps[worst]}
        return paired

    def report(self, source: object) -> None:
        """Say how many prompts were left out, if any."""
        if not self.equal + self.easy_or_hard:
            return
        reasons = [f"{self.equal} whose answers all have one score"] if self.equal else []
        if self.easy_or_hard and self.solve_rates is not None:
            least, most = self.solve_rates
            reasons.append(f"{self.easy_or_hard} that less than {least:.0%} or more than {most:.0%} of the answers solve")
        rank_zero_warn(
            f"{self.equal + self.easy_or_hard} of {self.total} prompts of {source} are left out: {', '.join(reasons)}."
        )
