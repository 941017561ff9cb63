"""Callbacks are configured by class name alone, and print their options' types."""

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback

import zoo.callbacks

CONFIG = """
- class_path: SampleQuality
  init_args: {samplers: [ode1, ode2m], nfes: [5, 10], every_n_epochs: 2, extractor: fd_mnist_cnn, weights_path: null}
- class_path: SampleGridLogger
  init_args: {every_n_epochs: 5, sampler: ode2m, nfe: 20}
- class_path: ImageGridWriter
  init_args: {num_images: 64, columns: 8, single_files: true}
- class_path: TrajectoryWriter
  init_args: {num_samples: 4}
- class_path: JSONLWriter
- class_path: TextQuality
  init_args: {samplers: [ode1], nfes: [5], num_samples: 10, every_n_epochs: null}
- class_path: TextWriter
  init_args: {num_samples: null, trajectory: true}
"""


def parser() -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--callbacks", type=list[Callback])
    return made


def test_callbacks_are_built_from_a_configuration() -> None:
    made = parser()
    built = made.instantiate_classes(made.parse_object({"callbacks": yaml.safe_load(CONFIG)})).callbacks
    assert [type(callback).__name__ for callback in built] == [
        "SampleQuality",
        "SampleGridLogger",
        "ImageGridWriter",
        "TrajectoryWriter",
        "JSONLWriter",
        "TextQuality",
        "TextWriter",
    ]
    assert built[0].nfes == [5, 10] and built[0].every_n_epochs == 2
    assert built[1].nfe == 20
    assert {type(callback).__name__ for callback in built} < set(zoo.callbacks.__all__)


def test_wrong_types_are_refused_with_the_option() -> None:
    with pytest.raises(ArgumentError, match="nfes"):
        parser().parse_object(
            {"callbacks": [{"class_path": "SampleQuality", "init_args": {"samplers": ["a"], "nfes": ["many"]}}]}
        )
