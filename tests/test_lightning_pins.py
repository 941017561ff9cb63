"""Names that are private to Lightning and jsonargparse and that the zoo leans on: a release that changes them fails here."""

import inspect

import jsonargparse
import lightning
from jsonargparse import _parameter_resolvers, _typehints
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.loops.fit_loop import _FitLoop
from packaging.version import Version


def test_the_pinned_release():
    assert Version("2.6.6") <= Version(lightning.__version__) < Version("2.7")


def test_names_of_lightning():
    for cls, names in {
        LightningCLI: ["_parse_ckpt_path", "_instantiate_trainer", "parse_arguments", "before_instantiate_classes"],
        HyperparametersMixin: ["_set_hparams", "_to_hparams_dict"],
        _FitLoop: ["_should_accumulate"],
        RichProgressBar: ["_get_train_description"],
    }.items():
        for name in names:
            assert callable(getattr(cls, name)), name
    assert {"_command", "trainer"} - set(inspect.signature(LightningCLI).parameters)  # our attributes shadow none of its own


def test_names_of_jsonargparse():
    assert Version("4.40") <= Version(jsonargparse.__version__) < Version("4.54")
    assert callable(_parameter_resolvers.get_signature_parameters)
    for name in ("import_object", "resolve_class_path_by_name"):
        assert callable(getattr(_typehints, name))
    source = inspect.getsource(_parameter_resolvers.ParametersVisitor.replace_param_default_subclass_specs)
    assert "ast_is_constant" in source and "ast_get_constant_value" in source


def test_state_of_the_loops_has_the_keys_that_a_checkpoint_edits(tmp_path):
    from tiny import MLP, Tiny, TinyData

    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(Tiny(MLP()), TinyData())
    assert trainer._signal_connector.received_sigterm is False and trainer._signal_connector._original_handlers == {}
    state = trainer.fit_loop.state_dict()
    for key in ("epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
        assert {"total", "current", "is_last_batch"} <= state[key].keys()
        assert state[key]["current"].keys() == {"ready", "started", "processed", "completed"}
