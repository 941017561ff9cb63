"""Ling as a backbone of other systems."""

import dataclasses
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from zoo.ling.causal_lm import LingForCausalLM
from zoo.ling.config import LingConfig, Preset, preset
from zoo.ling.network import positions_and_mask
from zoo.ling.state_dict_adapter import load_hf
from zoo.lm.backbone import Backbone
from zoo.lm.pooling import PoolingKind
from zoo.lm.trained_backbone import trained_backbone

__all__ = ["LingBackbone"]


class LingBackbone(Backbone):
    """Ling-Lite, Ling-Plus and relatives, without the routers' losses.

    Args:
        config: Architecture, or the name of a preset, for random weights.
        checkpoint: Weights to start from, whose architecture is used instead: a folder of released weights or the name of a
            repository of the hub; or a module of the zoo whose ``backbone`` is a LingBackbone, as a ``.ckpt`` file, a folder of
            ``save_pretrained`` or a name that ``zoo list`` shows. The scalar head is taken over too if both have one.
        pooling: How the vectors of a text's tokens become one.
        scalar_head: Whether vectors are mapped to a number, without bias.
        activation_checkpointing: Compute the blocks' activations again in the backward pass instead of keeping them.
    """

    network: LingForCausalLM

    def __init__(
        self,
        config: LingConfig | Preset = "ling_tiny",
        checkpoint: str | None = None,
        pooling: PoolingKind = "last",
        scalar_head: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        config = preset(config) if isinstance(config, str) else config
        found = None if checkpoint is None else trained_backbone(checkpoint, LingBackbone)
        trained = None if found is None else found[0]
        if trained is not None:
            self.network = trained.network
        else:
            self.network = LingForCausalLM(config) if checkpoint is None else load_hf(checkpoint).train()
        self.network.model.activation_checkpointing = activation_checkpointing
        self.kind = "causal"
        self.is_pretrained = checkpoint is not None
        self.hidden_size, self.vocab_size = self.network.config.hidden_size, self.network.config.vocab_size
        self.add_heads(pooling, scalar_head)
        if self.scalar is not None and trained is not None and trained.scalar is not None:
            self.scalar = trained.scalar

    @override
    def forward(
        self,
        ids_BT: Tensor | None,
        mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        decoder_ids_BT: Tensor | None = None,
        decoder_mask_BT: Tensor | None = None,
        embeddings_BTE: Tensor | None = None,
    ) -> Tensor:
        given = ids_BT if embeddings_BTE is None else embeddings_BTE
        assert given is not None
        if position_ids_BT is not None and mask_BT is not None and mask_BT.dim() == 4:
            return self.network.model(ids_BT, position_ids_BT, mask_BT, inputs_embeds=embeddings_BTE)[0]
        documents_BT = None if position_ids_BT is None else (position_ids_BT == 0).cumsum(1)
        positions, mask = positions_and_mask(given, 0, mask_BT, position_ids_BT, documents_BT)
        return self.network.model(ids_BT, positions, mask, inputs_embeds=embeddings_BTE)[0]

    @override
    def logits(self, hidden: Tensor) -> Tensor:
        return self.network.lm_head(hidden)

    @property
    @override
    def input_embedding(self) -> nn.Embedding:
        return self.network.model.word_embeddings

    @property
    @override
    def output_head(self) -> nn.Module:
        return self.network.lm_head

    @override
    def head_weight(self) -> Tensor:
        return self.network.lm_head.effective_weight()

    @override
    def decodes(self) -> LingForCausalLM:
        return self.network

    @property
    @override
    def blocks(self) -> list[nn.Module]:
        return list(self.network.model.layers)

    @property
    @override
    def init_config(self) -> dict[str, Any]:
        """Arguments as plain data; checkpoints hold all weights and do not need the folder."""
        config = super().init_config
        if config["init_args"]["checkpoint"] is not None:
            config["init_args"].update(config=dataclasses.asdict(self.network.config), checkpoint=None)
        return config
