"""Training of a backbone: what is compiled, what decays, the types of the weights and the tokenizer of the data."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from typing_extensions import override

from zoo.lm.backbone import Backbone
from zoo.lm.trained_types import settle_types

if TYPE_CHECKING:
    from zoo.module import ZooModule as Base
else:
    Base = object

__all__ = ["TunedBackbone"]


class TunedBackbone(Base):
    """A part of a module that trains one ``backbone``."""

    backbone: Backbone

    @override
    def networks(self) -> list[nn.Module]:
        """The blocks, which are alike, so that one compilation serves all."""
        return self.backbone.blocks

    @override
    def parameter_groups(self) -> Iterable[Any]:
        """Matrices, which decay; gains and biases, which do not."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
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
            ValueError: If the tokenizer has ids beyond the model's.
        """
        super().setup(stage)
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            self.backbone.check_tokenizer(tokenizer)
