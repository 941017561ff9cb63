"""Preference training of Ling."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from zoo.ling.module import Ling
from zoo.ling.router import router_statistics
from zoo.ling.state_dict_adapter import load_hf
from zoo.lm.dpo_loss import token_losses
from zoo.lm.preference import PreferenceTraining

__all__ = ["LingDPO"]


class LingDPO(PreferenceTraining, Ling):
    """Direct preference optimisation of Ling, see `PreferenceTraining`.

    The routers' losses count as in `Ling`, over both answers.

    Args:
        reference: As of `PreferenceTraining`; a model is the folder of one in the released format, whose experts and router are
            computed as the model's.
        router_warmup_steps: 0, since the router has learned already.
        kwargs: Arguments of `PreferenceTraining` and `Ling`.

    Raises:
        ValueError: If numbers are out of range.
    """

    other_data = "the model Ling"
    reference_entry = "ling_reference"

    def __init__(
        self,
        beta: float = 0.1,
        nll_weight: float = 0.05,
        reference: str = "copy",
        router_warmup_steps: int = 0,
        **kwargs: Any,
    ) -> None:
        options: dict[str, Any] = {"beta": beta, "nll_weight": nll_weight, "reference": reference}
        super().__init__(**options, router_warmup_steps=router_warmup_steps, **kwargs)
        if router_warmup_steps:
            raise ValueError("LingDPO: router_warmup_steps must be 0: the router has learned already.")
        self._reference_options = {
            "experts": kwargs.get("experts", "auto"),
            "accurate_router": kwargs.get("router_dtype", "float32") == "float32",
        }

    @property
    @override
    def policy(self) -> nn.Module:
        return self.network

    @override
    def load_reference(self, source: str) -> tuple[nn.Module, int]:
        network = load_hf(source, **self._reference_options)
        return network, network.config.vocab_size

    @override
    def like_policy(self, reference: nn.Module) -> None:
        reference.to(self.network.lm_head.weight)

    @override
    def answer_losses(
        self, network: nn.Module, ids_BT: Tensor, labels_BT: Tensor, positions_BT: Tensor | None, answers_BT: Tensor | None
    ) -> tuple[Tensor, Any]:
        output = network(ids_BT, position_ids=positions_BT, document_ids=answers_BT)
        return token_losses(output.logits, labels_BT), output

    @override
    def other_losses(self, output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor | float, dict[str, Tensor]]:
        sides = ["packed"] if "packed_input_ids" in batch else ["chosen", "rejected"]
        masks = [batch[name] for side in sides if (name := f"{side}_attention_mask") in batch]
        valid_N = torch.cat(masks).reshape(-1).bool() if len(masks) == len(sides) else None
        self.router_stats = router_statistics(output.routings, valid_N) if output.routings else None
        aux, z = self.router_losses(output, valid_N)
        return self.aux_coef * aux + self.z_coef * z, {"aux": aux, "z": z}
