"""The diffusion head: a small network that draws a token given what the transformer says of its position.

Source: DiffLoss of MAR, as You et al., arXiv 2503.07197, section 5 and appendix D use it. The names of the weights are the
published ones. Shape suffixes: R rows (tokens), C channels of a token, W width, Z channels of the condition, T time features.
"""

import math
from collections.abc import Callable
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from zoo.emigm.diffusion import Diffusion
from zoo.emigm.dpm_solver import DPMSolver, solver_orders

__all__ = ["DiffLossHead", "HeadSampler", "RowNoise", "check_head_steps"]

HeadSampler = Literal["dpm-solver", "ddpm"]

#: Standard normal noise (R, C) by the name of the draw.
RowNoise = Callable[[str], Tensor]

_TIME_FEATURES = 256


def check_head_steps(algorithm: str, steps: int) -> None:
    """Refuse a sampler that the head does not have, or a number of steps that it cannot take.

    Raises:
        ValueError: unknown algorithm, or too few or too many steps.
    """
    if algorithm == "dpm-solver":
        solver_orders(steps)
    elif algorithm == "ddpm":
        Diffusion.cosine().respaced(steps)
    else:
        raise ValueError(f"The head has no sampler {algorithm!r}; it has {', '.join(get_args(HeadSampler))}.")


class _TimeEmbedding(nn.Module):
    """256 sinusoids of the time and two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        for layer in self.layers():
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def layers(self) -> list[nn.Linear]:
        """Both."""
        return [layer for layer in self.mlp if isinstance(layer, nn.Linear)]

    def forward(self, time_R: Tensor) -> Tensor:
        """Embedding (R, W)."""
        half = _TIME_FEATURES // 2
        rate = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=time_R.device) / half)
        angle_RT = time_R.float()[:, None] * rate
        features_RT = torch.cat([angle_RT.cos(), angle_RT.sin()], dim=1)
        return self.mlp(features_RT.to(self.layers()[0].weight.dtype))


class _ResBlock(nn.Module):
    """x + gate MLP(norm(x) (1 + scale) + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x_RW: Tensor, modulation_RW: Tensor) -> Tensor:
        """``modulation_RW``: SiLU of time and condition, the same for all blocks."""
        shift_RW, scale_RW, gate_RW = self.adaLN_modulation[1](modulation_RW).chunk(3, dim=1)
        h_RW = torch.addcmul(shift_RW, self.in_ln(x_RW), 1 + scale_RW)
        return torch.addcmul(x_RW, gate_RW, self.mlp(h_RW))


class _FinalLayer(nn.Module):
    """Linear of norm(x) (1 + scale) + shift."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_RW: Tensor, modulation_RW: Tensor) -> Tensor:
        """See `_ResBlock`."""
        shift_RW, scale_RW = self.adaLN_modulation[1](modulation_RW).chunk(2, dim=1)
        return self.linear(torch.addcmul(shift_RW, self.norm_final(x_RW), 1 + scale_RW))


class _HeadNetwork(nn.Module):
    """Residual MLP with adaptive layer norm (SimpleMLPAdaLN)."""

    def __init__(self, token_channels: int, condition_channels: int, depth: int, width: int) -> None:
        super().__init__()
        self.time_embed = _TimeEmbedding(width)
        self.cond_embed = nn.Linear(condition_channels, width)
        self.input_proj = nn.Linear(token_channels, width)
        self.res_blocks = nn.ModuleList(_ResBlock(width) for _ in range(depth))
        self.final_layer = _FinalLayer(width, 2 * token_channels)
        zero = [layer for name, layer in self.named_modules() if "adaLN_modulation" in name or name == "final_layer.linear"]
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and layer not in self.time_embed.layers():
                (nn.init.zeros_ if layer in zero else nn.init.xavier_uniform_)(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x_RC: Tensor, time_R: Tensor, condition_RW: Tensor) -> Tensor:
        """Noise estimate and variance (R, 2C).

        Args:
            x_RC: noisy tokens.
            time_R: (R,), or (1,) where all rows share one.
            condition_RW: ``cond_embed`` of the transformer's output, the same at each time.
        """
        modulation_RW = nn.functional.silu(self.time_embed(time_R) + condition_RW)
        h_RW = self.input_proj(x_RC)
        for block in self.res_blocks:
            h_RW = block(h_RW, modulation_RW)
        return self.final_layer(h_RW, modulation_RW)


class DiffLossHead(nn.Module):
    """Models p(token | z) by a diffusion process over the token.

    Everything is computed in single precision or better, without autocast: half precision overflows here. So ``half()``,
    ``bfloat16()`` and true half precision of a Trainer leave the head in float32.

    Args:
        token_channels: channels C of a token.
        condition_channels: channels Z of the transformer's output.
        depth: number of residual blocks.
        width: width W.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, token_channels: int, condition_channels: int, depth: int = 3, width: int = 1024) -> None:
        super().__init__()
        sizes = {"token_channels": token_channels, "condition_channels": condition_channels, "depth": depth, "width": width}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"DiffLossHead: {name}={size} must be at least 1.")
        self.token_channels = token_channels
        self.net = _HeadNetwork(token_channels, condition_channels, depth, width)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the module to devices and float types, but never to half precision: the weights stay as they are."""
        before = {name: parameter.detach() for name, parameter in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = before[name].to(parameter.device, torch.float32)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Float type of weights and computation."""
        return self.net.input_proj.weight.dtype

    def loss(self, target: Tensor, z: Tensor, step: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Loss of each row and draw, (R, D) each: ``loss`` = ``mse`` + ``vb``.

        Args:
            target: tokens (R, C).
            z: output of the transformer (R, Z).
            step: diffusion steps, int64 (R, D) with D draws for each row.
            noise: standard normal (R, D, C).
        """
        with torch.autocast(target.device.type, enabled=False):
            draws = step.shape[1]
            condition_RW = self.net.cond_embed(z.to(self.dtype)).repeat_interleave(draws, 0)
            target = target.to(self.dtype).repeat_interleave(draws, 0)
            noise, flat = noise.to(self.dtype).flatten(0, 1), step.flatten()
            diffusion = Diffusion.cosine()
            output = self.net(diffusion.noised(target, flat, noise), flat, condition_RW)
            mse, vb = diffusion.losses(output, target, flat, noise)
        mse, vb = mse.view(step.shape), vb.view(step.shape)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        noise: RowNoise,
        *,
        z_uncond: Tensor | None = None,
        scale: float = 1.0,
        algorithm: HeadSampler = "dpm-solver",
        steps: int = 8,
        temperature: float = 1.0,
        clip: float | None = None,
    ) -> Tensor:
        """Draw a token for each row, (R, C).

        Args:
            z: output of the transformer under the class (R, Z).
            noise: standard normal draws (R, C) by name: ``"start"``, and ``"step <i>"`` for DDPM.
            z_uncond: output without a class (R, Z), for guidance; needs not be given where ``scale`` is 1.
            scale: guided noise estimate = without class + scale (with class - without class).
            algorithm: ``dpm-solver`` (`DPMSolver`; ignores ``temperature``) or ``ddpm``.
            steps: number of network calls.
            temperature: scales the noise that DDPM adds.
            clip: DDPM only: confine data estimates to [-clip, clip]; published: None.
        """
        with torch.autocast(z.device.type, enabled=False):
            guided = scale != 1 and z_uncond is not None
            condition_RW = self.net.cond_embed((torch.cat([z_uncond, z]) if guided else z).to(self.dtype))  # type: ignore[list-item]
            x = noise("start").to(self.dtype)

            def network(x: Tensor, time: float) -> tuple[Tensor, Tensor]:
                time_1 = torch.full((1,), time, dtype=torch.float32, device=x.device)
                if not guided:
                    estimate, variance = self.net(x, time_1, condition_RW).chunk(2, dim=1)
                    return estimate, variance
                output = self.net(x.repeat(2, 1), time_1, condition_RW)
                (without, estimate), variance = output[:, : self.token_channels].chunk(2), output[len(x) :, self.token_channels :]
                return torch.lerp(without, estimate, scale), variance

            if algorithm == "dpm-solver":
                return DPMSolver.with_steps(steps).sample(lambda x, time: network(x, time)[0], x)
            process = Diffusion.cosine().respaced(steps)
            return process.sample(network, x, lambda i: noise(f"step {i}").to(self.dtype), temperature, clip)
