"""Rationales as a page of HTML, each token on a ground as dark as its weight."""

import html
from collections.abc import Iterable, Sequence

__all__ = ["heatmap"]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Weights of rationales</title><style>
body {{ font: 16px/1.9 sans-serif; max-width: 60em; margin: 2em auto; }}
p {{ white-space: pre-wrap; }} small {{ color: #666; }} span {{ padding: 0.15em 0; border-radius: 0.2em; }}
</style></head><body><h1>Weights of rationales</h1>
{body}
</body></html>
"""


def heatmap(rows: Iterable[tuple[str, Sequence[str], Sequence[float]]]) -> str:
    """A page without scripts; a token's weight is shown where the pointer rests on it.

    Args:
        rows: Name, texts of the tokens, and weights in [0, 1] of each rationale.
    """
    paragraphs = []
    for name, tokens, weights in rows:
        spans = (
            f'<span style="background: rgba(255, 140, 0, {weight:.2f})" title="{weight:.3f}">{html.escape(token)}</span>'
            for token, weight in zip(tokens, weights, strict=True)
        )
        paragraphs.append(f"<p><small>{html.escape(name)}</small>\n{''.join(spans)}</p>")
    return _PAGE.format(body="\n".join(paragraphs))
