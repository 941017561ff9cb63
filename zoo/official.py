"""Officially released weights and a module of ours, both ways."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from zoo.base.checkpoint import as_new_files_are
from zoo.base.hyperparameters import build, class_path, read_config
from zoo.hub import import_methods

__all__ = ["OfficialWeights", "infer_official"]


class OfficialWeights:
    """Mixin of modules: reads and writes the weights of the method's published code.

    A method that has officially released weights overrides the hooks that apply; the others refuse in a sentence.
    """

    #: Entries of the dictionary in which the published code looks for the weights; none: the file is the weights themselves.
    official_entries: ClassVar[tuple[str, ...]] = ()

    def load_official(self, path: str | Path) -> None:
        """Load a file of the weights that the method's authors released.

        Raises:
            ValueError: this method has none, or the file's weights are not this module's.
        """
        raise ValueError(f"{type(self).__name__} has no officially released weights to load.")

    def to_official(self) -> dict[str, Tensor]:
        """The weights as the method's published code names and stores them.

        Raises:
            ValueError: this method has no published format.
        """
        raise ValueError(f"{type(self).__name__} has no official format of weights; leave out --official.")

    def write_official(self, path: Path) -> int:
        """Write what the published code loads; override where that is more than one file.

        Args:
            path: ``.safetensors``, or a file of ``torch.save``.

        Returns:
            How many tensors were written.

        Raises:
            ValueError: this method has no published format, or ``path`` is a folder.
        """
        weights = self.to_official()
        if path.is_dir():
            raise ValueError(f"{path} is a folder; --official writes one file, such as {path / 'weights.pt'}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(weights, path)
            as_new_files_are(path)
        else:
            entries = self.official_entries
            torch.save(dict.fromkeys(entries, weights) if entries else weights, path)
        return len(weights)

    @classmethod
    def from_official_config(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Read a configuration of the method's published code.

        Args:
            config: the file, parsed.

        Returns:
            ``{"class_path", "init_args"}`` of a module, or None if the file is no such configuration.

        Raises:
            ValueError: it is one, but says something that this module cannot do.
        """
        return None

    @classmethod
    def official_leftovers(cls, config: Mapping[str, Any]) -> list[str]:
        """Entries of a published configuration that `from_official` does not take over, a line each.

        Args:
            config: the file, parsed; any other gives nothing.
        """
        return []

    @classmethod
    def infer_official_config(cls, path: str | Path) -> dict[str, Any] | None:
        """Tell the module from a file of official weights alone.

        Args:
            path: the file.

        Returns:
            ``{"class_path", "init_args"}`` of a module, or None if these are not the method's, or do not say enough.

        Raises:
            ValueError: they are the method's, but no module can be told from them, or the file is unsafe or damaged.
        """
        return None

    @classmethod
    def from_official(cls, path: str | Path, config: str | Path | Mapping[str, Any] | None = None, **overrides: Any) -> Self:
        """Build the module that officially released weights belong to.

        Args:
            path: the file of the weights.
            config: a YAML file, or what it holds: a configuration of the zoo, or one of the method's published code. None, if
                the weights say enough by themselves.
            overrides: constructor arguments to replace.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the configuration is neither, or missing where one is needed, or the weights do not fit the module.
        """
        model = infer_official(path, cls) if config is None else cls._official_model(config)
        if model is None:
            raise ValueError(
                f"{path} holds weights from which no {cls.__name__} can be told: give config, a YAML file of the zoo or of the"
                " published code."
            )
        model = {**model, "init_args": {**model.get("init_args", {}), **overrides}}
        named = (c for c in _family(cls) if model["class_path"] in (c.__name__, class_path(c)))
        return cast(Self, next(named, cls).build_official(model, path))

    @classmethod
    def build_official(cls, model: Mapping[str, Any], path: str | Path) -> Self:
        """Build the module and fill it with official weights; override where they should not be in memory beside it.

        Args:
            model: ``{"class_path", "init_args"}`` of this class.
            path: the weights.
        """
        module = build(cls, dict(model), trusted=True)
        module.load_official(path)
        return module

    @classmethod
    def _official_model(cls, config: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
        """The module that a configuration describes, as ``{"class_path", "init_args"}``."""
        import_methods()
        parsed = config if isinstance(config, Mapping) else read_config(config)
        model = parsed.get("model")
        if not (isinstance(model, Mapping) and "class_path" in model):
            read = (found for c in _family(cls) if (found := c.from_official_config(parsed)) is not None)
            model = next(read, None)
        if model is None:
            raise ValueError(
                "This is neither a configuration of the zoo (it has no model.class_path) nor one of published code that"
                f" {cls.__name__} can read: {', '.join(map(str, parsed)) or 'it is empty'}."
            )
        return model


def infer_official(path: str | Path, base: type[OfficialWeights] = OfficialWeights) -> dict[str, Any] | None:
    """The module that a file of official weights is of, told from it alone; see `OfficialWeights.infer_official_config`.

    Args:
        path: the file.
        base: the class that the module must be of.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is unsafe or damaged, or no module can be told from its weights.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no file {path} of official weights.")
    import_methods()
    read = (found for c in _family(base) if (found := c.infer_official_config(path)) is not None)
    return next(read, None)


def _family(cls: type[OfficialWeights]) -> list[type[OfficialWeights]]:
    """A class and all that derive from it, parents first."""
    found, waiting = [], [cls]
    while waiting:
        found.append(waiting.pop(0))
        waiting += found[-1].__subclasses__()
    return found
