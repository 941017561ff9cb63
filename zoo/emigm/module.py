"""EMIGM: the LightningModule of masked image generation."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from zoo.base.random import SampleRandom
from zoo.emigm.codecs import LatentCodec
from zoo.emigm.drawing import ImageRequest
from zoo.emigm.mask_schedule import elbo_weight
from zoo.emigm.masking import MaskDraw, Masking
from zoo.emigm.network import MaskedTransformer
from zoo.emigm.patches import patchify
from zoo.emigm.sampler import MaskSampler
from zoo.emigm.sampling import EMIGMSampling
from zoo.emigm.sizes import Architecture, SizeName, chosen_sizes
from zoo.emigm.state_dict_adapter import TiedTokenSource, Which, infer_official_config, load_official, to_official
from zoo.emigm.token_losses import sample_losses, token_rows
from zoo.metrics.mean_and_error import Mean, MeanAndError
from zoo.module import ZooModule

__all__ = ["EMIGM"]

Weighting = Literal["one", "elbo"]
Reduction = Literal["masked_mean", "sum_over_N"]

_LEAST_STD, _LARGEST_STD = 0.4, 2.5  # of latents: the head assumes 1


class EMIGM(EMIGMSampling, ZooModule):
    """Masked image generation (eMIGM), with the switches that make it MaskGIT-, MAR- or MDM-like.

    A transformer sees an image of which some tokens are masked; a small diffusion head draws the masked ones. Images take a few
    mask-prediction steps. Source: You et al., ICML 2025, arXiv 2503.07197.

    Rows of the paper's table 1, all with the diffusion head: MaskGIT: ``masking.law: fixed_count``, ``masking.schedule:
    cosine``; MAR: ``masking.law: mar_truncnorm``, ``cfg_with_mask: false``; MDM: ``weighting: elbo``, ``reduction: sum_over_N``,
    ``masking.time: sample``, ``use_mae: false``; eMIGM: the defaults.

    Args:
        codec: Makes latents of images and images of latents; its weights are not part of the model's.
        size: A published size; None with ``architecture``.
        architecture: Sizes of one's own; None with ``size``.
        num_classes: Number of classes.
        patch_size: Latent positions of a token along each axis.
        buffer_size: Slots that carry the class; 64 for 256 tokens, 4 to 8 for few.
        masking: Choice of the tokens that are hidden in training.
        weighting: ``one``, or ``elbo`` for gamma'/gamma, which makes the loss a bound of the likelihood.
        reduction: ``masked_mean``, as published, divides by the number of masked tokens; ``sum_over_N`` by that of all tokens,
            which is equation 7 up to the constant 1/N.
        use_mae: the encoder sees visible tokens only; otherwise a single encoder sees all.
        cfg_with_mask: "no class" is expressed by the mask token.
        label_drop_prob: Probability that a sample is trained without its class.
        attn_dropout: Dropout of attention weights.
        proj_dropout: Dropout of the outputs of attention and MLP.
        diffusion_batch_mul: Diffusion times for each token and training step.
        grad_checkpointing: Recompute the blocks in the backward pass.
        sampler: Options of the steps that draw images.
        samples_per_class: Sample i shows class ``i // samples_per_class % num_classes`` unless labels are given; 50 with 50,000
            samples is the published protocol on ImageNet, 10 gives rows of ten.
        conditional: Whether samples have a class at all; false draws without one.
        val_times: Mask times at which validation and test measure the loss.
        record_trajectory: Let `predict` return the image after each step too.
        pretrained: A released checkpoint (``.pth``, ``.safetensors``) whose weights are read when the module is built; it is not
            stored among the hyperparameters, so that the module can be built again without it.
        tied_token_source: The name that counts in ``pretrained``, of two for one tensor; see `read_official_weights`.
        optimizer: Makes the optimizer. Published rates: 4e-4 (xsmall, small), 8e-4 (others) at batches of 1024 and 2048.
        kwargs: Arguments of `ZooModule`; a published schedule is `WarmUp`.

    Raises:
        ValueError: If arguments are out of range or do not fit each other.
    """

    exact_batches = True

    def __init__(
        self,
        codec: LatentCodec,
        size: SizeName | None = None,
        architecture: Architecture | None = None,
        num_classes: int = 1000,
        patch_size: int = 1,
        buffer_size: int = 64,
        masking: Masking = Masking(),  # noqa: B008 (a default that jsonargparse shows; never changed)
        weighting: Weighting = "one",
        reduction: Reduction = "masked_mean",
        use_mae: bool = True,
        cfg_with_mask: bool = True,
        label_drop_prob: float = 0.1,
        attn_dropout: float = 0.1,
        proj_dropout: float = 0.1,
        diffusion_batch_mul: int = 4,
        grad_checkpointing: bool = False,
        sampler: MaskSampler = MaskSampler(),  # noqa: B008
        samples_per_class: int = 10,
        conditional: bool = True,
        val_times: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        record_trajectory: bool = False,
        pretrained: Path | None = None,
        tied_token_source: TiedTokenSource = "mask_token",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=4e-4, betas=(0.9, 0.95), weight_decay=0.02),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        channels, height, width = codec.latent_shape
        if patch_size < 1 or height % patch_size or width % patch_size:
            raise ValueError(f"EMIGM: patch_size={patch_size} must divide the latents' {height} x {width}.")
        if not (0 <= label_drop_prob < 1 and 0 <= attn_dropout < 1 and 0 <= proj_dropout < 1):
            raise ValueError(
                f"EMIGM: label_drop_prob={label_drop_prob}, attn_dropout={attn_dropout} and proj_dropout={proj_dropout} must"
                " lie in [0, 1)."
            )
        if diffusion_batch_mul < 1 or samples_per_class < 1:
            raise ValueError(
                f"EMIGM: diffusion_batch_mul={diffusion_batch_mul} and samples_per_class={samples_per_class} must be at least 1."
            )
        if not val_times or not all(0 < t <= 1 for t in val_times):
            raise ValueError(f"EMIGM: val_times={list(val_times)} must hold at least one time in (0, 1].")
        for name, value, kinds in (("weighting", weighting, Weighting), ("reduction", reduction, Reduction)):
            if value not in get_args(kinds):
                raise ValueError(f"EMIGM: {name}={value!r} must be one of {', '.join(get_args(kinds))}.")
        if masking.time == "sample" and use_mae:
            raise ValueError(
                "EMIGM: masking.time='sample' masks differently many tokens in each sample, so that the encoder of visible"
                " tokens cannot be used: set use_mae to false."
            )
        if weighting == "elbo" and masking.law == "mar_truncnorm":
            raise ValueError("EMIGM: weighting='elbo' needs a mask schedule, and masking.law='mar_truncnorm' follows none.")
        sizes = chosen_sizes(size, architecture, max(codec.image_shape[1:]))
        self.codec = codec
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.masking = masking
        self.weighting = weighting
        self.reduction = reduction
        self.label_drop_prob = label_drop_prob
        self.diffusion_batch_mul = diffusion_batch_mul
        self.sampler = sampler
        self.samples_per_class = samples_per_class
        self.conditional = conditional
        self.val_times = list(val_times)
        self.record_trajectory = record_trajectory
        self.network = MaskedTransformer(
            num_tokens=height * width // patch_size**2,
            token_channels=channels * patch_size**2,
            **vars(sizes),
            num_classes=num_classes,
            buffer_size=buffer_size,
            use_mae=use_mae,
            cfg_with_mask=cfg_with_mask,
            attn_dropout=attn_dropout,
            proj_dropout=proj_dropout,
            grad_checkpointing=grad_checkpointing,
        )
        self.val_losses = nn.ModuleDict({name: Mean() for name in ("loss", "mse", "vb", *map(_time_name, self.val_times))})
        self.test_losses = nn.ModuleDict({name: MeanAndError() for name in ("loss", "mse", "vb")})
        self._scale_checked = False
        if pretrained is not None:
            load_official(self.network, pretrained, tied_token_source=tied_token_source)
            for stored in (self._hparams, self._hparams_initial):
                stored["pretrained"] = None

    # Data

    def latents(self, batch: Any, random: SampleRandom) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) and labels (B,) of a batch.

        Args:
            batch: ``(image (B, C, H, W) in [0, 1], label (B,))``, or ``{"latents": (B, C, h, w), "labels": (B,)}``.
            random: the batch's random numbers, for codecs that draw.

        Raises:
            ValueError: If the data have another shape than the codec's.
        """
        shape = self.codec.latent_shape
        if isinstance(batch, dict):
            x_BCHW, label_B = batch["latents"], batch["labels"]
        else:
            image_BCHW, label_B = batch
            noise = random.normal("posterior", shape, torch.float32)
            with torch.no_grad():
                x_BCHW = self.codec.encode(image_BCHW.to(self.device, self.network.data_dtype), noise.to(self.network.data_dtype))
        if tuple(x_BCHW.shape[1:]) != tuple(shape):
            raise ValueError(
                f"EMIGM: latents have shape {tuple(x_BCHW.shape[1:])}, but {type(self.codec).__name__} is set up for"
                f" {tuple(shape)}: the cache was made by another codec, or for another resolution."
            )
        return x_BCHW.to(self.network.data_dtype), label_B

    @override
    def setup(self, stage: str) -> None:
        """Refuse data that do not fit the model, before the first step.

        Raises:
            ValueError: If the data have another number of classes, shape or scale than the model.
        """
        super().setup(stage)
        if stage == "predict":
            self.codec.require_weights()
        data = getattr(self.trainer, "datamodule", None)
        classes = getattr(data, "num_classes", None)
        if classes is not None and classes > self.num_classes:
            raise ValueError(
                f"EMIGM: the data has {classes} classes and the model num_classes={self.num_classes}: set it to {classes}."
            )
        scale, own = getattr(data, "latent_scale", None), getattr(self.codec, "scale", None)
        if scale is not None and own is not None and not math.isclose(scale, own, rel_tol=1e-4):
            raise ValueError(
                f"EMIGM: the cached latents are scaled by {scale}, but {type(self.codec).__name__} has scale={own}:"
                " use the codec that the cache was made with."
            )

    # Losses

    def token_losses(
        self, x_BCHW: Tensor, label_B: Tensor | None, draw: MaskDraw, random: SampleRandom, weighted: bool = True
    ) -> dict[str, Tensor]:
        """Contributions of each sample to the losses ``loss``, ``mse`` and ``vb``, (B,) each: their mean is the batch's.

        Args:
            x_BCHW: Latents.
            label_B: Classes; None: trained or measured without.
            draw: The masked tokens.
            random: Random numbers of the batch: dropped labels, diffusion times, noise.
            weighted: Whether the weight over mask times applies.
        """
        drop_B = random.uniform("label drop") < self.label_drop_prob if self.training else None
        class_BD = self.network.class_embedding(label_B, len(x_BCHW), drop_B)
        x_BNC, weight_B = patchify(x_BCHW, self.patch_size), self._weight(draw, weighted)
        rows = token_rows(self.network, x_BNC, class_BD, draw, random, self.diffusion_batch_mul)
        per_masked = self.reduction == "masked_mean"
        return sample_losses(self.network, rows, draw, weight_B, per_masked, of_batch=self.training)

    def _weight(self, draw: MaskDraw, weighted: bool) -> Tensor:
        """Weight w(t) of each sample (B,), or of all (1,)."""
        if self.weighting == "one" or not weighted:
            return torch.ones_like(draw.time, dtype=self.network.data_dtype)
        return elbo_weight(self.masking.schedule, draw.time).to(self.network.data_dtype)

    # Lightning

    @override
    def parameter_groups(self) -> Iterable[Any]:
        """Weight decay for all but vectors, biases and the head, as published."""
        decayed: list[nn.Parameter] = []
        free: list[nn.Parameter] = []
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                exempt = parameter.dim() == 1 or name.endswith(".bias") or "diffloss" in name
                (free if exempt else decayed).append(parameter)
        return [{"params": free, "weight_decay": 0.0}, {"params": decayed}]

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a batch; see `latents`."""
        random = self.train_random(_batch_size(batch))
        x_BCHW, label_B = self.latents(batch, random)
        self._check_scale(x_BCHW)
        draw = self.masking.draw(random, self.network.num_tokens)
        losses = {name: loss_B.mean() for name, loss_B in self.token_losses(x_BCHW, label_B, draw, random).items()}
        self.log("train_loss", losses["loss"], prog_bar=True)
        self.log_dict({"train_mse": losses["mse"], "train_vb": losses["vb"], "train_mask_ratio": draw.mask.float().mean()})
        return losses["loss"]

    def _check_scale(self, x_BCHW: Tensor) -> None:
        """Refuse, at the first batch, latents that are far from the unit variance that the head assumes."""
        if self._scale_checked:
            return
        std = float(x_BCHW.float().std())
        if not _LEAST_STD <= std <= _LARGEST_STD:
            raise ValueError(
                f"EMIGM: the first batch of latents has a standard deviation of {std:.3g}, and the head needs about 1: they are"
                " not scaled, or scaled twice (KL-16: x 0.2325, DC-AE: x 0.3189, pixels: mean and std of the data)."
            )
        self._scale_checked = True

    def _evaluate(self, batch: Any) -> dict[str, Tensor]:
        """Unweighted losses (B,) with the same draws at each evaluation, over the times of the grid and at each."""
        random = self.eval_random(_batch_size(batch))
        x_BCHW, label_B = self.latents(batch, random)
        found: dict[str, list[Tensor]] = {}
        for time in self.val_times:
            draw = self.masking.draw(random, self.network.num_tokens, time)
            losses = self.token_losses(x_BCHW, label_B, draw, random, weighted=False)
            for name in ("loss", "mse", "vb"):
                found.setdefault(name, []).append(losses[name])
            found[_time_name(time)] = [losses["loss"]]
        return {name: torch.stack(values).mean(0) for name, values in found.items()}

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss, whole and by mask time."""
        for name, value in self._evaluate(batch).items():
            mean = cast(Mean, self.val_losses[name])
            mean.update(value)
            self.log(f"val_{name}", mean, prog_bar=name == "loss")

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss with its standard error."""
        losses = self._evaluate(batch)
        for name, metric in self.test_losses.items():
            cast(MeanAndError, metric).update(losses[name])

    @override
    def on_test_epoch_end(self) -> None:
        for name, metric in self.test_losses.items():
            mean, error = cast(MeanAndError, metric).compute()
            self.log(f"test/{name}", mean)
            self.log(f"test/{name}/standard_error", error)
            cast(MeanAndError, metric).reset()

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Draw samples, or fill in the unknown parts of the user's images.

        Args:
            batch: ``index`` (B,), the samples' numbers, which are their seeds; ``label`` (B,), their classes, if chosen. For
                in-painting and editing also ``image`` (B, C, H, W) in [0, 1] and ``mask`` (B, 1, H, W), true where a pixel is
                known. ``path`` is passed on.
            batch_idx: number of the batch.

        Returns:
            ``index``; ``images`` (B, C, H, W) in [0, 1]; ``nfe`` (B,); ``label`` (B,), if there are classes; ``trajectory``
            (B, T, C, H, W), if it is recorded; ``path``.
        """
        label_B = batch.get("label")
        if label_B is None and "image" not in batch:
            label_B = self.sample_labels(batch["index"])
        known = batch.get("image"), batch.get("mask")
        request = ImageRequest(batch["index"], self.random_seed, label_B, *known, record=self.record_trajectory)
        drawn, nfe_B = self._draw(self.sampler, request)
        result = {"index": batch["index"], "images": drawn.images, "nfe": nfe_B}
        if label_B is not None:
            result["label"] = label_B
        if drawn.trajectory is not None:
            result["trajectory"] = drawn.trajectory
        return result | ({"path": batch["path"]} if "path" in batch else {})

    # Official weights

    official_entries = ("model", "model_ema")

    @override
    def load_official(self, path: str | Path, which: Which = "ema", tied_token_source: TiedTokenSource = "mask_token") -> None:
        """Read a released checkpoint of eMIGM or MAR into the network; see `read_official_weights` for the arguments."""
        load_official(self.network, path, which, tied_token_source)

    @override
    def to_official(self) -> dict[str, Tensor]:
        """The network's weights under the released files' names."""
        return to_official(self.network)

    @classmethod
    @override
    def infer_official_config(cls, path: str | Path) -> dict[str, Any] | None:
        """Our hyperparameters from a released checkpoint alone: ``EMIGM.from_official(path)`` needs no configuration."""
        return infer_official_config(cls, path)


def _time_name(time: float) -> str:
    return f"loss_t{time:g}".replace(".", "_")


def _batch_size(batch: Any) -> int:
    return len(batch["labels"] if isinstance(batch, dict) else batch[1])
