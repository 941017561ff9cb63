"""Arguments of the model that were left out and that the data know."""

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule

from zoo.base.hyperparameters import build, find_class, plain

__all__ = ["fill_model_arguments"]


def fill_model_arguments(config: Namespace) -> None:
    """Give the model the arguments that are None and that the DataModule lists in ``model_arguments``.

    Typed values and those of configurations and checkpoints stay. The model stores the filled values as hyperparameters, so that
    it is rebuilt without the data.

    Args:
        config: Options of a subcommand, with ``model`` and ``data``; changed in place.
    """
    model, data = config.get("model"), config.get("data")
    if not model or not data or "init_args" not in model:
        return
    known = getattr(find_class(data.class_path, LightningDataModule), "model_arguments", ())
    missing = [name for name in known if name in model.init_args and model.init_args[name] is None]
    if missing:
        options = {"class_path": data.class_path, "init_args": data.get("init_args", Namespace()).as_dict()}
        datamodule = build(LightningDataModule, options, trusted=True)
        for name in missing:
            model.init_args[name] = plain(getattr(datamodule, name), name)
