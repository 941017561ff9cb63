"""eMIGM: masked image generation in few steps."""

from zoo.emigm.codecs import DCAE, KLVAE, LatentCodec, PixelCodec
from zoo.emigm.dpm_solver import DPMSolver
from zoo.emigm.guidance import Guidance, nfe_of, num_iter_of
from zoo.emigm.head import DiffLossHead
from zoo.emigm.latent_cache_writer import LatentCacheWriter
from zoo.emigm.latent_encoder import LatentEncoder
from zoo.emigm.lr_schedule import WarmUp
from zoo.emigm.mask_schedule import elbo_weight, expected_reveals, gamma, reveal_probability, step_times
from zoo.emigm.masking import MaskDraw, Masking
from zoo.emigm.module import EMIGM
from zoo.emigm.network import MaskedTransformer
from zoo.emigm.sampler import Drawn, MaskSampler, reveal_counts, sample_tokens
from zoo.emigm.sizes import Architecture
from zoo.emigm.state_dict_adapter import OfficialConfig, infer_config, load_official, read_official_weights, to_official

__all__ = [
    "DCAE",
    "EMIGM",
    "KLVAE",
    "Architecture",
    "DPMSolver",
    "DiffLossHead",
    "Drawn",
    "Guidance",
    "LatentCacheWriter",
    "LatentCodec",
    "LatentEncoder",
    "MaskDraw",
    "MaskSampler",
    "MaskedTransformer",
    "Masking",
    "OfficialConfig",
    "PixelCodec",
    "WarmUp",
    "elbo_weight",
    "expected_reveals",
    "gamma",
    "infer_config",
    "load_official",
    "nfe_of",
    "num_iter_of",
    "read_official_weights",
    "reveal_counts",
    "reveal_probability",
    "sample_tokens",
    "step_times",
    "to_official",
]
