"""A language model on texts of your own, with a loss term of your own, and what it then writes.

``python examples/my_language_model.py`` (half a minute) trains on the text files of a folder, here this repository's own
documents. The same from the command line: ``zoo fit --model my_language_model.PolarLing --data Text --data.sources.docs 1``.
"""

import functools
import sys
from pathlib import Path

import torch
from lightning import Trainer
from torch import Tensor

from datamodules import ByteTokenizer, Text
from zoo.ling import Ling, preset


class PolarLing(Ling):
    """Ling that is also rewarded for being sure where to send a token.

    Args:
        sharpness: weight of the router's entropy in the loss.
        kwargs: as for Ling.
    """

    def __init__(self, sharpness: float = 0.01, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.sharpness = sharpness

    def router_losses(self, output, valid_N) -> tuple[Tensor, Tensor]:
        """Add the entropy to the balance loss."""
        aux, z = super().router_losses(output, valid_N)
        entropy = sum((-r.probs_NE * r.probs_NE.clamp(min=1e-9).log()).sum(-1).mean() for r in output.routings)
        return aux + self.sharpness * entropy, z


def main(folder: str, max_steps: int = 100) -> str:
    """Train on all Markdown files of a folder, and continue a sentence."""
    config = preset("ling_tiny").replace(num_hidden_layers=2, num_experts=8)
    model = PolarLing(config=config, router_warmup_steps=20, optimizer=functools.partial(torch.optim.AdamW, lr=5e-3))
    data = Text(sources={f"{folder}/**/*.md": 1.0}, seq_len=129, batch_size=8)
    Trainer(max_steps=max_steps, accelerator="cpu", logger=False, enable_checkpointing=False).fit(model, data)
    model.save_pretrained("my-ling")

    tokenizer = ByteTokenizer()
    prompt = torch.tensor([tokenizer.encode("The model is ")])
    ids = PolarLing.from_pretrained("my-ling").network.generate(prompt, max_new_tokens=60, temperature=0.8, top_p=0.9)
    return tokenizer.decode(ids[0].tolist())


if __name__ == "__main__":
    print(main(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent.parent)))
