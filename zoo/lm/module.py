"""Fine-tuning and continued training of any language model.

Shape suffixes: B sequences, T tokens of a sequence, D width, V vocabulary, N labels that count.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from typing_extensions import override

from zoo.lm.backbone import Backbone
from zoo.lm.batches import Batch, counted_labels
from zoo.lm.cross_entropy import IGNORED, cross_entropy
from zoo.lm.decoder import Decodes
from zoo.lm.encoded_pair import Ids
from zoo.lm.evaluation import TokenLosses
from zoo.lm.language_module import LanguageModule
from zoo.lm.trained_types import settle_types

__all__ = ["CausalLM"]


class CausalLM(LanguageModule):
    """A causal language model that is tuned on texts or conversations, as the DataModules Text, SFT and ToolDialogues give them.

    Loss: mean cross-entropy of the labels, in nats. Only the positions before a label pass the output head.

    Args:
        backbone: The model; what of it is trained is its ``tuning``.
        loss_chunk: Labels whose logits are in memory at a time; 0: all. Without effect where the head is more than a product.
        optimizer: Makes the optimizer; matrices decay, gains and biases do not.
        kwargs: Arguments of `LanguageModule` and `ZooModule`; ``compile`` compiles each block in place.

    Raises:
        ValueError: If the backbone is no causal model, or arguments do not fit one another.
    """

    #: Losses of the last training step, without gradient: ``ce`` (nats), ``ce_per_sample`` (B,), and ``weight`` of ``ce`` among
    #: the micro-batches and processes of the optimizer step.
    last_losses: dict[str, Tensor]

    def __init__(
        self,
        backbone: Backbone,
        loss_chunk: int = 0,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-5, weight_decay=0.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if backbone.kind != "causal":
            raise ValueError(
                f"{type(self).__name__}: the backbone is an {backbone.kind}, which predicts no next token: take a causal model."
            )
        if loss_chunk < 0:
            raise ValueError(f"{type(self).__name__}: loss_chunk={loss_chunk} must not be negative.")
        self.backbone = backbone
        self.loss_chunk = loss_chunk
        self.last_losses = {}

    @property
    @override
    def vocab_size(self) -> int:
        return self.backbone.vocab_size

    @override
    def networks(self) -> list[nn.Module]:
        """The blocks, which are alike, so that one compilation serves all."""
        return self.backbone.blocks

    @override
    def parameter_groups(self) -> Iterable[Any]:
        """Matrices, which decay; gains and biases, which do not."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [parameter for parameter in trained if parameter.dim() >= 2]},
            {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Settle the type of trained weights before callbacks and strategies copy or divide them."""
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            settle_types(self.backbone, self.trainer)
        return super().configure_callbacks()

    @override
    def setup(self, stage: str) -> None:
        """Compare the vocabularies of model and data before anything runs.

        Raises:
            ValueError: If the tokenizer has ids beyond the model's; and as of `LanguageModule`.
        """
        super().setup(stage)
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            self.backbone.check_tokenizer(tokenizer)

    @override
    def token_losses(self, batch: Batch) -> TokenLosses:
        """Cross-entropies of a batch; its labels are those of the tokens that follow."""
        hidden_BTD = self.backbone(batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids"))
        label_BT = counted_labels(batch)[:, 1:]
        counted_BT = label_BT != IGNORED
        x_ND, label_N = hidden_BTD[:, :-1][counted_BT], label_BT[counted_BT]
        weight_VD = self.backbone.head_weight()
        if weight_VD is not None:
            loss, each_N = cross_entropy(x_ND, weight_VD, label_N, self.loss_chunk)
        else:
            logits_NV = self.backbone.logits(x_ND)
            logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
            loss_N = nn.functional.cross_entropy(logits_NV, label_N, reduction="none")
            loss, each_N = loss_N.sum() / max(1, len(loss_N)), loss_N.detach()
        return TokenLosses(loss, each_N.new_zeros(label_BT.shape).masked_scatter(counted_BT, each_N))

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Weighted loss of a batch."""
        count_B = (counted_labels(batch)[:, 1:] != IGNORED).sum(1)
        self._begin_mean(count_B.sum(), batch_idx)
        loss, loss_BT = self.token_losses(batch)
        weight = self._weight(loss)
        self.last_losses = {
            "ce": loss.detach(),
            "ce_per_sample": loss_BT.sum(1) / count_B.clamp(min=1),
            "weight": weight,
        }
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss * weight

    @override
    def decodes(self) -> Decodes:
        return self.backbone.decodes()

    @override
    def scores(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[float]:
        device = next(self.backbone.parameters()).device

        def logits(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.backbone.logits(self.backbone(input_ids.to(device), attention_mask.to(device)))

        return _scores(logits, pairs, self._largest(len(pairs)))


@torch.no_grad()
def _scores(logits: Callable[[Tensor, Tensor], Tensor], pairs: Sequence[tuple[Ids, Ids]], passes: int) -> list[float]:
    """Log-likelihoods of continuations, one pass each, and passes without a result up to a number."""
    found = []
    for context, continuation in pairs:
        ids_1T = torch.tensor([[*context, *continuation[:-1]]])
        logp_TV = logits(ids_1T, torch.ones_like(ids_1T))[0, len(context) - 1 :].double().log_softmax(-1)
        found.append(float(logp_TV.gather(1, torch.tensor(continuation, device=logp_TV.device)[:, None]).sum()))
    for _ in range(passes - len(pairs)):
        logits(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64))
    return found
