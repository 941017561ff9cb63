"""EMIGM: the LightningModule of masked image generation."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from zoo.base.random import SampleRandom
from zoo.base.samples import Samples
from zoo.emigm.codecs import LatentCodec
from zoo.emigm.guidance import Guidance, nfe_of, num_iter_of
from zoo.emigm.head import HeadSampler
from zoo.emigm.mask_schedule import elbo_weight
from zoo.emigm.masking import MaskDraw, Masking
from zoo.emigm.network import MaskedTransformer
from zoo.emigm.patches import known_positions, patchify, token_mask, unpatchify
from zoo.emigm.sampler import Drawn, MaskSampler, equal_groups, sample_tokens
from zoo.emigm.sizes import Architecture, SizeName, architecture
from zoo.emigm.state_dict_adapter import TiedTokenSource, Which, infer_official_config, load_official, to_official
from zoo.metrics.mean_and_error import Mean, MeanAndError
from zoo.module import ZooModule
from zoo.nn import evaluation_mode

__all__ = ["EMIGM"]

Weighting = Literal["one", "elbo"]
Reduction = Literal["masked_mean", "sum_over_N"]

_LEAST_STD, _LARGEST_STD = 0.4, 2.5  # of latents: the head assumes 1


class EMIGM(ZooModule):
    """Masked image generation (eMIGM), with the switches that make it MaskGIT-, MAR- or MDM-like.

    A transformer sees an image of which some tokens are masked; a small diffusion head draws the masked ones. Images take a few
    mask-prediction steps. Source: You et al., ICML 2025, arXiv 2503.07197.

    Rows of the paper's table 1, all with the diffusion head: MaskGIT: ``masking.law: fixed_count``, ``masking.schedule:
    cosine``; MAR: ``masking.law: mar_truncnorm``, ``cfg_with_mask: false``; MDM: ``weighting: elbo``, ``reduction: sum_over_N``,
    ``masking.time: sample``, ``use_mae: false``; eMIGM: the defaults.

    Args:
        codec: makes latents of images and images of latents; its weights are not part of the model's.
        size: a published size; None with ``architecture``.
        architecture: sizes of one's own; None with ``size``.
        num_classes: number of classes.
        patch_size: latent positions of a token along each axis.
        buffer_size: slots that carry the class; 64 for 256 tokens, 4 to 8 for few.
        masking: which tokens are hidden in training.
        weighting: ``one``, or ``elbo`` for gamma'/gamma, which makes the loss a bound of the likelihood.
        reduction: ``masked_mean``, as published, divides by the number of masked tokens; ``sum_over_N`` by that of all tokens,
            which is equation 7 up to the constant 1/N.
        use_mae: the encoder sees visible tokens only; otherwise a single encoder sees all.
        cfg_with_mask: "no class" is expressed by the mask token.
        label_drop_prob: how often a sample is trained without its class.
        attn_dropout: dropout of attention weights.
        proj_dropout: dropout of the outputs of attention and MLP.
        diffusion_batch_mul: diffusion times for each token and training step.
        grad_checkpointing: recompute the blocks in the backward pass.
        sampler: how images are drawn.
        samples_per_class: sample i shows class ``i // samples_per_class % num_classes`` unless labels are given; 50 with 50,000
            samples is the published protocol on ImageNet, 10 gives rows of ten.
        conditional: whether samples have a class at all; false draws without one.
        val_times: mask times at which validation and test measure the loss.
        record_trajectory: let `predict` return the image after each step too.
        pretrained: a released checkpoint (``.pth``, ``.safetensors``) whose weights are read when the module is built; it is not
            among the hyperparameters that are stored, so that the module can be built again without it.
        tied_token_source: which of the two names is believed in ``pretrained``; see `read_official_weights`.
        optimizer: makes the optimizer. Published rates: 4e-4 (xsmall, small), 8e-4 (others) at batches of 1024 and 2048.
        lr_scheduler: makes the learning-rate schedule; see `WarmUp`.
        lr_scheduler_interval: whether it advances per step or epoch.
        compile: compile the network.

    Raises:
        ValueError: arguments that are out of range or do not fit each other.
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
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["step", "epoch"] = "step",
        compile: bool = False,
    ) -> None:
        super().__init__(
            optimizer=optimizer, lr_scheduler=lr_scheduler, lr_scheduler_interval=lr_scheduler_interval, compile=compile
        )
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
        sizes = _sizes(size, architecture, max(codec.image_shape[1:]))
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
            width=sizes.width,
            encoder_depth=sizes.encoder_depth,
            decoder_depth=sizes.decoder_depth,
            num_heads=sizes.num_heads,
            head_depth=sizes.head_depth,
            head_width=sizes.head_width,
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
            ValueError: the data have another shape than the codec's.
        """
        shape = self.codec.latent_shape
        if isinstance(batch, dict):
            x_BCHW, label_B = batch["latents"], batch["labels"]
        else:
            image_BCHW, label_B = batch
            noise = random.normal("posterior", shape, torch.float32)
            with torch.no_grad():
                x_BCHW = self.codec.encode(image_BCHW.to(self.device, self._float), noise.to(self._float))
        if tuple(x_BCHW.shape[1:]) != tuple(shape):
            raise ValueError(
                f"EMIGM: latents have shape {tuple(x_BCHW.shape[1:])}, but {type(self.codec).__name__} is set up for"
                f" {tuple(shape)}: the cache was made by another codec, or for another resolution."
            )
        return x_BCHW.to(self._float), label_B

    @property
    def _float(self) -> torch.dtype:
        """Float type of data, noise and losses."""
        return torch.float64 if self.network.diffloss.dtype == torch.float64 else torch.float32

    @override
    def setup(self, stage: str) -> None:
        """Refuse data that do not fit the model, before the first step.

        Raises:
            ValueError: the data have another number of classes, shape or scale than the model.
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
        """Share of each sample in the losses ``loss``, ``mse`` and ``vb``, (B,) each; their mean is the batch's.

        Only masked tokens go through the head, which changes nothing but the time it takes.

        Args:
            x_BCHW: latents.
            label_B: classes; None: trained or measured without.
            draw: which tokens are masked.
            random: the batch's random numbers: dropped labels, diffusion times, noise.
            weighted: whether the weight over mask times applies.
        """
        x_BNC = patchify(x_BCHW, self.patch_size)
        batch, num_tokens, channels = x_BNC.shape
        drop_B = random.uniform("label drop") < self.label_drop_prob if self.training else None
        class_BD = self.network.class_embedding(label_B, batch, drop_B)
        draws = self.diffusion_batch_mul
        if draw.order is not None:
            masked_BM, visible_BV = draw.order[:, : draw.num_masked], draw.order[:, draw.num_masked :]
            z_BND = self.network(x_BNC, class_BD, visible_BV, draw.mask)
            place_BMD = masked_BM[..., None].expand(-1, -1, z_BND.shape[-1])
            z, target = z_BND.gather(1, place_BMD).flatten(0, 1), x_BNC.gather(1, masked_BM[..., None].expand(-1, -1, channels))
            target, shape = target.flatten(0, 1), (masked_BM.shape[1], draws)
            step = random.integers("diffusion step", 1000, shape).flatten(0, 1)
            noise = random.normal("diffusion noise", (*shape, channels), self._float).flatten(0, 1)
            weight_R = self._weight(draw, weighted).expand(batch)[:, None].expand(-1, masked_BM.shape[1]).flatten()
        else:
            z_BND = self.network(x_BNC, class_BD, mask_BN=draw.mask)
            z, target = z_BND[draw.mask], x_BNC[draw.mask]
            shape = (num_tokens, draws)
            step = random.integers("diffusion step", 1000, shape)[draw.mask]
            noise = random.normal("diffusion noise", (*shape, channels), self._float)[draw.mask]
            weight_R = self._weight(draw, weighted)[:, None].expand(-1, num_tokens)[draw.mask]
        losses = self.network.diffloss.loss(target, z, step, noise)
        sample_R = draw.mask.nonzero()[:, 0] if draw.order is None else None
        count_B = torch.full((batch,), float(num_tokens), device=z.device)
        if self.reduction == "masked_mean":  # of the batch in training; an evaluation must not depend on batches
            count_B = draw.mask.sum(1) if not self.training else torch.full_like(count_B, len(target) / batch)
        reduced = {}
        for name, rows_RD in losses.items():
            row_R = rows_RD.mean(1) * weight_R
            if sample_R is None:
                sum_B = row_R.view(batch, -1).sum(1)
            else:
                sum_B = torch.zeros(batch, dtype=row_R.dtype, device=row_R.device).index_add(0, sample_R, row_R)
            reduced[name] = sum_B / count_B.to(sum_B).clamp(min=1 / batch)
        return reduced

    def _weight(self, draw: MaskDraw, weighted: bool) -> Tensor:
        """w(t) of each sample (B,), or of all (1,)."""
        if self.weighting == "one" or not weighted:
            return torch.ones_like(draw.time, dtype=self._float)
        return elbo_weight(self.masking.schedule, draw.time).to(self._float)

    # Lightning

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
        """Log the test's means."""
        for name, metric in self.test_losses.items():
            mean, error = cast(MeanAndError, metric).compute()
            self.log(f"test/{name}", mean)
            self.log(f"test/{name}/standard_error", error)
            cast(MeanAndError, metric).reset()

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Draw samples, or fill in what is unknown of the user's images.

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
        drawn, nfe_B = self._sample(
            batch["index"],
            self.sampler,
            self.random_seed,
            label_B,
            image_BCHW=batch.get("image"),
            mask_B1HW=batch.get("mask"),
            record=self.record_trajectory,
        )
        result = {"index": batch["index"], "images": drawn.images, "nfe": nfe_B}
        if label_B is not None:
            result["label"] = label_B
        if drawn.trajectory is not None:
            result["trajectory"] = drawn.trajectory
        return result | ({"path": batch["path"]} if "path" in batch else {})

    # Sampling

    @property
    def sampler_names(self) -> tuple[str, ...]:
        """Samplers of the head."""
        return get_args(HeadSampler)

    def sample_labels(self, index_B: Tensor) -> Tensor | None:
        """Class (B,) that each sample shows unless another is asked for; None if the model draws without."""
        return index_B // self.samples_per_class % self.num_classes if self.conditional else None

    def check_sampler(self, sampler: str | None = None, nfe: int | None = None) -> None:
        """Make sure that `sample` can draw so.

        Raises:
            ValueError: unknown sampler, or too few network calls.
        """
        self._sampler(sampler, nfe)

    @property
    def sample_type(self) -> type[Samples]:
        """Images."""
        return Samples

    def _sampler(self, head: str | None, nfe: int | None, guided: bool | None = None) -> MaskSampler:
        """The module's sampler with another head or number of transformer evaluations.

        Args:
            head: sampler of the head; None for the module's own.
            nfe: evaluations that each image may cost; None for the module's own number of steps.
            guided: whether samples have a class to be guided to; None: as the module draws by itself.
        """
        options: dict[str, Any] = dict(vars(self.sampler))
        if nfe is not None:
            guidance = self._guidance(self.conditional if guided is None else guided)
            options["num_iter"] = num_iter_of(nfe, guidance, self.sampler.eps)
        if head is not None and head != self.sampler.head:
            options |= {"head": head, "head_steps": {"dpm-solver": 8, "ddpm": 100}.get(head, 1)}
        return MaskSampler(**options)

    def _guidance(self, guided: bool) -> Guidance:
        """The sampler's guidance, or none where there is no class to guide to."""
        return self.sampler.guidance if guided else Guidance(scale=1.0)

    def sample(
        self,
        index_B: Tensor,
        *,
        seed: int = 0,
        sampler: str | MaskSampler | None = None,
        nfe: int | None = None,
        labels: Tensor | Literal["default"] | None = "default",
        image: Tensor | None = None,
        mask: Tensor | None = None,
        record: bool = False,
    ) -> Samples:
        """Draw one image per number; equal numbers and seeds give equal ones in any batch.

        Args:
            index_B: (B,) int64, the samples' numbers.
            seed: seed of all samples.
            sampler: ``dpm-solver`` or ``ddpm`` for the head, or a whole `MaskSampler`; None for the module's own.
            nfe: transformer evaluations for each image, guided steps counting twice; the most steps that spend no more are
                taken. None for the sampler's own.
            labels: classes (B,); None: without class; by default those of `sample_labels`.
            image: for in-painting and editing, images (B, C, H, W) in [0, 1].
            mask: true where ``image`` is known (B, 1, H, W); a token counts as known where all its pixels are, and known pixels
                are kept as they are.
            record: return the image after each step too, as ``trajectory``.

        Raises:
            ValueError: unknown sampler, too few network calls, or classes out of range.
        """
        if isinstance(sampler, MaskSampler) and nfe is not None:
            raise ValueError("EMIGM.sample: give a whole MaskSampler or nfe, not both; num_iter says how many steps it takes.")
        label_B = self.sample_labels(index_B) if isinstance(labels, str) else labels
        chosen = sampler if isinstance(sampler, MaskSampler) else self._sampler(sampler, nfe, guided=label_B is not None)
        return self._sample(index_B, chosen, seed, label_B, image_BCHW=image, mask_B1HW=mask, record=record)[0]

    def _sample(
        self,
        index_B: Tensor,
        sampler: MaskSampler,
        seed: int,
        label_B: Tensor | None,
        *,
        image_BCHW: Tensor | None,
        mask_B1HW: Tensor | None,
        record: bool,
    ) -> tuple[Samples, Tensor]:
        """Samples, and the transformer evaluations of each (B,)."""
        self.codec.require_weights()
        index_B = index_B.to(self.device)
        label_B = None if label_B is None else label_B.to(self.device)
        known_BNC, known_BN = self._known(image_BCHW, mask_B1HW, SampleRandom(seed, index_B))
        parts: list[tuple[Tensor, Drawn]] = []
        with evaluation_mode(self.network):
            for row, block in equal_groups(known_BN, index_B // sampler.count_block):
                drawn = sample_tokens(
                    self.network,
                    sampler,
                    SampleRandom(seed, index_B[row]),
                    SampleRandom(seed, torch.tensor([block])),
                    None if label_B is None else label_B[row],
                    known_BNC=None if known_BNC is None else known_BNC[row],
                    known_BN=None if known_BN is None else known_BN[row],
                    record=record,
                )
                parts.append((row, drawn))
        order = torch.cat([row for row, _ in parts]).argsort()
        images = self._decode(torch.cat([drawn.tokens for _, drawn in parts])[order], image_BCHW, mask_B1HW)
        trajectory = None
        if record:
            length = max(1, *(0 if d.trajectory is None else d.trajectory.shape[1] for _, d in parts))
            frames = torch.cat([_lengthened(drawn, length) for _, drawn in parts])[order]
            trajectory = torch.stack([self._decode(frame, image_BCHW, mask_B1HW) for frame in frames.unbind(1)], dim=1)
        nfe_B = torch.cat([torch.full_like(row, drawn.nfe) for row, drawn in parts])[order]
        return Samples(images, int(nfe_B.max()), trajectory), nfe_B

    def _known(
        self, image_BCHW: Tensor | None, mask_B1HW: Tensor | None, random: SampleRandom
    ) -> tuple[Tensor | None, Tensor | None]:
        """Tokens of the user's images, and which of them are known."""
        if image_BCHW is None:
            return None, None
        if mask_B1HW is None:
            raise ValueError("EMIGM: an image needs a mask that says which of its pixels are known (predict_masks).")
        noise = random.normal("posterior", self.codec.latent_shape, torch.float32).to(self._float)
        latents = self.codec.encode(image_BCHW.to(self.device, self._float), noise)
        known = known_positions(mask_B1HW[:, 0].to(self.device), *self.codec.latent_shape[1:])
        return patchify(latents, self.patch_size), token_mask(known, self.patch_size)

    def _decode(self, x_BNC: Tensor, image_BCHW: Tensor | None, mask_B1HW: Tensor | None) -> Tensor:
        """Images of tokens; known pixels are kept."""
        images = self.codec.decode(unpatchify(x_BNC, self.codec.latent_shape, self.patch_size)).float()
        if image_BCHW is None or mask_B1HW is None:
            return images
        return torch.where(mask_B1HW.to(images.device), image_BCHW.to(images), images)

    # Official weights

    official_entries = ("model", "model_ema")

    def load_official(self, path: str | Path, which: Which = "ema", tied_token_source: TiedTokenSource = "mask_token") -> None:
        """Read a released checkpoint of eMIGM or MAR into the network; see `read_official_weights` for the arguments."""
        load_official(self.network, path, which, tied_token_source)

    def to_official(self) -> dict[str, Tensor]:
        """The network's weights under the released files' names."""
        return to_official(self.network)

    @classmethod
    def infer_official_config(cls, path: str | Path) -> dict[str, Any] | None:
        """Our hyperparameters from a released checkpoint alone: ``EMIGM.from_official(path)`` needs no configuration."""
        return infer_official_config(cls, path)

    @property
    def nfe(self) -> int:
        """Transformer evaluations of a sample under the module's sampler."""
        return nfe_of(self.sampler.num_iter, self._guidance(self.conditional), self.sampler.eps)


def _sizes(size: SizeName | None, own: Architecture | None, image_size: int) -> Architecture:
    if (size is None) == (own is None):
        raise ValueError(f"EMIGM: give size ({', '.join(get_args(SizeName))}) or an architecture of your own, one of the two.")
    return architecture(size, image_size) if own is None else own  # type: ignore[arg-type]


def _time_name(time: float) -> str:
    return f"loss_t{time:g}".replace(".", "_")


def _batch_size(batch: Any) -> int:
    return len(batch["labels"] if isinstance(batch, dict) else batch[1])


def _lengthened(drawn: Drawn, length: int) -> Tensor:
    """The trajectory (B, T, N, C), its last state repeated."""
    frames = drawn.tokens[:, None] if drawn.trajectory is None else drawn.trajectory
    return torch.cat([frames, frames[:, -1:].expand(-1, length - frames.shape[1], -1, -1)], dim=1)
