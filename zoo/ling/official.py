"""Released weights of a Ling module: read, written, and kept with what was said of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor
from typing_extensions import override

from zoo.base.hyperparameters import build
from zoo.ling.causal_lm import LingForCausalLM
from zoo.ling.state_dict_adapter import infer_hf, load_official, save_hf, to_hf_state_dict

if TYPE_CHECKING:
    from zoo.module import ZooModule as Base
else:
    Base = object

__all__ = ["LingOfficialWeights"]


class LingOfficialWeights(Base):
    """A part of `zoo.ling.Ling`: folders of the Hugging Face layout to and from its ``network``."""

    network: LingForCausalLM

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the entries of the released ``config.json``, and its folder."""
        super().on_save_checkpoint(checkpoint)
        folder = self.network.hf_folder
        checkpoint["ling_released"] = {"config": self.network.hf_config, "folder": None if folder is None else str(folder)}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` stored."""
        super().on_load_checkpoint(checkpoint)
        if (released := checkpoint.get("ling_released")) is not None:
            self.network.hf_config = released["config"]
            self.network.hf_folder = None if released["folder"] is None else Path(released["folder"])

    @override
    def shared_entries(self) -> dict[str, Any]:
        """Steps of the router's warm-up so far, and the entries of the released ``config.json``."""
        entries = {**super().shared_entries(), "_applied_steps": self.applied_steps}
        return {**entries, "_released": self.network.hf_config} if self.network.hf_config else entries

    @override
    def take_shared_entries(self, config: Mapping[str, Any]) -> None:
        """Restore what `shared_entries` stored.

        Args:
            config: All entries of ``config.json``.
        """
        super().take_shared_entries(config)
        self.network.hf_config = config.get("_released", {})
        # Weights without that entry have passed the warm-up.
        self.applied_steps = config.get("_applied_steps", config.get("router_warmup_steps") or 0)

    @override
    def load_official(self, path: str | Path) -> None:
        """Fill the network from a released folder (Hugging Face layout, whole or in shards) or one file of weights.

        Raises:
            ValueError: If files are unsafe, damaged, or do not fit; all names and shapes that differ are listed.
        """
        load_official(self.network, path)

    @override
    def to_official(self) -> dict[str, Tensor]:
        """The weights by their released names; `save_hf` writes a whole folder."""
        return {name: tensor.cpu().clone() for name, tensor in to_hf_state_dict(self.network).items()}

    @override
    def write_official(self, path: Path) -> int:
        """Write a released folder, in shards; or one file of weights where ``path`` ends like one."""
        if path.suffix in (".safetensors", ".pt", ".pth", ".bin") and not path.is_dir():
            return super().write_official(path)
        save_hf(self.network, path)
        return len(to_hf_state_dict(self.network))

    @classmethod
    @override
    def build_official(cls, model: Mapping[str, Any], path: str | Path) -> Self:
        """Build the module with weights in the type they are stored in; memory holds them once.

        Args:
            model: ``{"class_path", "init_args"}``.
            path: A released folder, or one file of weights.
        """
        arguments = dict(model.get("init_args", {}))
        found = infer_hf(cls, path)
        if found is None or found["init_args"]["config"] != arguments.get("config"):  # another architecture on purpose
            return super().build_official(model, path)
        return build(cls, {**model, "init_args": {**arguments, "checkpoint": str(path)}})

    @classmethod
    def from_hf(cls, path: str | Path, **arguments: Any) -> Self:
        """The module of a released folder, see `load_hf`.

        Args:
            path: The folder, or a repository of the hub.
            arguments: Arguments of the constructor.
        """
        return cls(**{**arguments, "checkpoint": str(path)})

    def to_hf(self, folder: str | Path, **options: Any) -> Path:
        """Write a released folder, see `save_hf`.

        Args:
            folder: Where to write.
            options: Options of `save_hf`: ``max_shard_size``, ``normalized_head``, ``dtype``.
        """
        return save_hf(self.network, folder, **options)

    @classmethod
    @override
    def from_official_config(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Our hyperparameters from the entries of a released ``config.json``."""
        return infer_hf(cls, config)

    @classmethod
    @override
    def infer_official_config(cls, path: str | Path) -> dict[str, Any] | None:
        """Our hyperparameters from a released folder, or a file of weights beside its ``config.json``."""
        return infer_hf(cls, path)
