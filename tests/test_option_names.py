"""Options of the command line: their names are those of earlier versions, however constructors share them."""

import jsonargparse._parameter_resolvers as _resolvers
import pytest

from zoo import ZooModule
from zoo.bfn import BFN
from zoo.callbacks import SampleQuality, TextQuality
from zoo.ctr import XDeepFM
from zoo.emigm import EMIGM
from zoo.ling import Ling, LingDPO

_LING = """config checkpoint config_changes experts aux_coef z_coef aux_reduction aux_scope loss_over router_warmup_steps
    router_momentum router_dtype loss_chunk activation_checkpointing freeze generation optimizer lr_scheduler
    lr_scheduler_interval compile"""
_COMPARISON = "samplers nfes num_samples batch_size every_n_epochs seed"
NAMES: dict[type, str] = {
    ZooModule: "optimizer lr_scheduler lr_scheduler_interval compile",
    BFN: """network flow head solver codec stratified_time loss_steps clip_in_loss min_loss_variance likelihood_steps
        likelihood_repeats record_trajectory optimizer lr_scheduler lr_scheduler_interval compile""",
    EMIGM: """codec size architecture num_classes patch_size buffer_size masking weighting reduction use_mae cfg_with_mask
        label_drop_prob attn_dropout proj_dropout diffusion_batch_mul grad_checkpointing sampler samples_per_class conditional
        val_times record_trajectory pretrained tied_token_source optimizer lr_scheduler lr_scheduler_interval compile""",
    Ling: _LING,
    LingDPO: f"beta nll_weight reference {_LING}",
    XDeepFM: "field_dims num_dense embed_dim cin dnn dropout optimizer row_optimizer lr_scheduler compile",
    SampleQuality: f"{_COMPARISON} extractor weights_path kid_subset_size statistics",
    TextQuality: f"{_COMPARISON} min_count",
}


@pytest.mark.parametrize("cls", NAMES, ids=lambda cls: cls.__name__)
def test_every_option_has_its_name_and_a_description(cls: type) -> None:
    options = _resolvers.get_signature_parameters(cls)
    assert sorted(option.name for option in options) == sorted(NAMES[cls].split())
    assert all(option.doc for option in options)
