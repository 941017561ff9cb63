"""Fine-tuning and continued training of any language model.

Shape suffixes: B sequences, T tokens of a sequence, S tokens that an encoder reads, D width, V vocabulary, N labels that count.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from zoo.lm.backbone import Backbone, BackboneKind
from zoo.lm.batches import Batch, check_vocabulary, counted_labels
from zoo.lm.cross_entropy import IGNORED, cross_entropy
from zoo.lm.decoder import Decodes
from zoo.lm.encoded_pair import Ids
from zoo.lm.evaluation import TokenLosses
from zoo.lm.language_module import LanguageModule
from zoo.lm.prompt_and_answer import prompt_and_answer
from zoo.lm.tuned_backbone import TunedBackbone

__all__ = ["CausalLM", "Seq2SeqLM", "TunedLM"]


class TunedLM(TunedBackbone, LanguageModule):
    """The base of `CausalLM` and `Seq2SeqLM`.

    Loss: mean cross-entropy of the labels, in nats. Only the positions before a label pass the output head.

    Args:
        backbone: The model; what of it is trained is its ``tuning``.
        loss_chunk: Labels whose logits are in memory at a time; 0: all. Without effect where the head is more than a product.
        optimizer: Makes the optimizer; matrices decay, gains and biases do not.
        kwargs: Arguments of `LanguageModule` and `ZooModule`; ``compile`` compiles each block in place.

    Raises:
        ValueError: If the backbone is of another kind, or ``loss_chunk`` negative.
    """

    kind: ClassVar[BackboneKind]
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
        if backbone.kind != self.kind:
            raise ValueError(
                f"{type(self).__name__}: the backbone is of the kind {backbone.kind}: take CausalLM for causal models, Seq2SeqLM"
                " for an encoder_decoder; an encoder alone predicts no next token."
            )
        if loss_chunk < 0:
            raise ValueError(f"{type(self).__name__}: loss_chunk={loss_chunk} must not be negative.")
        self.backbone = backbone
        self.is_pretrained = backbone.is_pretrained
        self.loss_chunk = loss_chunk
        self.last_losses = {}

    @property
    @override
    def vocab_size(self) -> int:
        return self.backbone.vocab_size

    def hidden(self, batch: Batch) -> Tensor:
        """Inputs of the output head (B, T, D), those of position t for the label of t + 1."""
        raise NotImplementedError

    @override
    def token_losses(self, batch: Batch) -> TokenLosses:
        hidden_BTD = self.hidden(batch)
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
    @torch.no_grad()
    def scores(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[float]:
        found = []
        for context, continuation in pairs:
            logp_TV = self._logits(context, continuation).double().log_softmax(-1)
            found.append(float(logp_TV.gather(1, torch.tensor(continuation, device=logp_TV.device)[:, None]).sum()))
        for _ in range(self._largest(len(pairs)) - len(pairs)):  # other processes may wait for these passes
            self._logits([0], [0])
        return found

    def _logits(self, context: Ids, continuation: Ids) -> Tensor:
        """Scores (T, V) of a continuation's tokens after a context."""
        raise NotImplementedError


class CausalLM(TunedLM):
    """A causal language model that is tuned on texts or conversations, as the DataModules Text, SFT and ToolDialogues give them.

    See `TunedLM` for the arguments and `LanguageModule` for the batches.
    """

    kind = "causal"

    @override
    def hidden(self, batch: Batch) -> Tensor:
        return self.backbone(batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids"))

    @override
    def _logits(self, context: Ids, continuation: Ids) -> Tensor:
        ids_1T = torch.tensor([[*context, *continuation[:-1]]], device=self.device)
        return self.backbone.logits(self.backbone(ids_1T)[0, len(context) - 1 :])


class Seq2SeqLM(TunedLM):
    """An encoder-decoder model that is tuned on the same data: the encoder reads what stands before a row's first label.

    Of a row without such a prompt, as the DataModule Text gives it, the encoder reads the first half. Batches may also come
    divided, with ``decoder_input_ids`` (B, T) and ``labels`` (B, T), the label of position t + 1 after the decoder's input t.
    See `TunedLM` for the arguments.
    """

    kind = "encoder_decoder"

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check ids, and divide rows into what the encoder reads and what the decoder writes.

        Raises:
            ValueError: If rows are packed, an id is outside of the vocabulary, or ``input_ids`` are missing.
        """
        if self.trainer.predicting or "calls" in batch:
            return super().on_before_batch_transfer(batch, dataloader_idx)
        mask = batch.get("attention_mask")
        checked = super().on_before_batch_transfer(batch, dataloader_idx)
        if "decoder_input_ids" in checked:
            check_vocabulary(checked["decoder_input_ids"], self.vocab_size)
            return {**checked, "attention_mask": mask}
        if "position_ids" in checked:
            raise ValueError("Seq2SeqLM: rows with several conversations cannot be divided: set data.packing to false.")
        return prompt_and_answer(checked, self.backbone.start_id, self.backbone.pad_id)

    @override
    def hidden(self, batch: Batch) -> Tensor:
        return self.backbone(batch["input_ids"], batch.get("attention_mask"), decoder_ids_BT=batch["decoder_input_ids"])

    @override
    def _logits(self, context: Ids, continuation: Ids) -> Tensor:
        ids_1T = torch.tensor([[self.backbone.start_id, *continuation[:-1]]], device=self.device)
        context_1S = torch.tensor([list(context)], device=self.device)
        return self.backbone.logits(self.backbone(context_1S, decoder_ids_BT=ids_1T)[0])
