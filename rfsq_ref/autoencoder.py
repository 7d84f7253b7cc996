"""The Robust RFSQ autoencoder: actions to tokens and back, one step of a chunk at a time."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rfsq.rfsq_ref.errors import NotDecodableError, SettingsError
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.quantizer import Conditioning, ConditioningConstants, ResidualQuantizer, dynamic_needs_stats
from rfsq.runtime.bundle.advice import quoted
from rfsq.runtime.bundle.models import SIZE_LIMITS
from rfsq.runtime.bundle.paths import shown


@dataclass(frozen=True)
class ModelConfig:
    """Sizes: action_dim A, latent_dim D, hidden_width of both networks, num_layers L, num_levels K."""

    action_dim: int = 7
    latent_dim: int = 16
    hidden_width: int = 64
    num_layers: int = 8
    num_levels: int = 7

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            least, most = SIZE_LIMITS[name]
            # bool is an int to isinstance.
            if type(size) is not int or not least <= size <= most:
                raise SettingsError(f"{name} is {shown(size)}; expected an integer from {least} to {most}")


@dataclass(frozen=True)
class RecoveredDecoder:
    """Latents from the tokens of a prefix of l layers: z = matrix @ tokens.flatten() + offset (docs/architecture.md).

    matrix: float64 [D, D * l], the last axis ordered as tokens [D, l]; offset: float64 [D].
    """

    matrix: Tensor
    offset: Tensor

    def latents(self, tokens: Tensor) -> Tensor:
        """tokens [..., D, l] to latents [..., D]."""
        flat = tokens.flatten(-2).to(self.matrix.dtype)
        return flat @ self.matrix.T + self.offset

    def __add__(self, other: "RecoveredDecoder") -> "RecoveredDecoder":
        """The map that gives the sum of what both give."""
        return RecoveredDecoder(self.matrix + other.matrix, self.offset + other.offset)


@dataclass(frozen=True)
class Readout:
    """The decoder's last layer, refitted to latents of the `calibrated` conditioning (rfsq.calibration.readout).

    weight: float32 [A, hidden_width]; bias: float32 [A].
    """

    weight: Tensor
    bias: Tensor


class InRobotUnits(nn.Module):
    """Takes and gives physical units: the normaliser is part of it, as `offset` and `units`, float32 [A] each."""

    offset: Tensor
    units: Tensor

    def __init__(self, action_dim: int, normaliser: Normaliser | None) -> None:
        super().__init__()
        offset = normaliser.offset if normaliser else (0.0,) * action_dim
        units = normaliser.scale if normaliser else (1.0,) * action_dim
        self.register_buffer("offset", torch.tensor(offset), persistent=False)
        self.register_buffer("units", torch.tensor(units), persistent=False)


class StepAutoencoder(InRobotUnits):
    """Encoder and decoder of single steps, with room between them for a quantiser of the latents."""

    def __init__(
        self, action_dim: int, latent_dim: int, hidden_width: int, normaliser: Normaliser | None = None
    ) -> None:
        super().__init__(action_dim, normaliser)
        self.encoder = nn.Sequential(
            nn.Linear(action_dim, hidden_width),
            nn.Mish(),
            nn.Linear(hidden_width, latent_dim),
            nn.Tanh(),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden_width),
            nn.Mish(),
            nn.Linear(hidden_width, action_dim),
        )

    def encode_latents(self, actions: Tensor) -> Tensor:
        """actions [..., A] to latents [..., D], not quantised."""
        latents: Tensor = self.encoder((actions - self.offset) / self.units)
        return latents

    def decode_latents(self, latents: Tensor) -> Tensor:
        """latents [..., D] to actions [..., A]."""
        actions: Tensor = self.decoder(latents) * self.units + self.offset
        return actions


def linear_layers(network: nn.Sequential) -> tuple[nn.Linear, nn.Linear]:
    """Those of an encoder or a decoder."""
    first, second = network[0], network[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    return first, second


class ActionAutoencoder(StepAutoencoder):
    """Encoder, residual quantiser, decoder: actions to tokens and back.

    >>> model = ActionAutoencoder(ModelConfig(), Conditioning.NONE)
    >>> tokens, _ = model.encode(torch.zeros(2, 8, 7))
    >>> tokens.shape, model.decode(tokens[..., :3]).shape
    (torch.Size([2, 8, 16, 8]), torch.Size([2, 8, 7]))
    """

    def __init__(
        self,
        config: ModelConfig,
        conditioning: Conditioning,
        *,
        constants: ConditioningConstants | None = None,
        recovered: Mapping[int, RecoveredDecoder] | None = None,
        normaliser: Normaliser | None = None,
    ) -> None:
        super().__init__(config.action_dim, config.latent_dim, config.hidden_width, normaliser)
        if conditioning is Conditioning.DYNAMIC and config.latent_dim < 2:
            raise SettingsError("conditioning 'dynamic' needs latent_dim >= 2: one latent has no standard deviation")
        if normaliser is not None and len(normaliser.scale) != config.action_dim:
            raise SettingsError(f"normaliser for {len(normaliser.scale)} dimensions, model for {config.action_dim}")
        self.config = config
        self.quantizer = ResidualQuantizer(
            config.num_layers, config.num_levels, config.latent_dim, conditioning, constants
        )
        self.recovered = dict(recovered or {})
        self.normaliser = normaliser

    @property
    def conditioning(self) -> Conditioning:
        return self.quantizer.conditioning

    def forward(self, actions: Tensor) -> Tensor:
        """actions [..., A] through the quantiser and back, with the straight-through gradient."""
        return self.decode_latents(self.quantizer(self.encode_latents(actions)))

    def encode(self, actions: Tensor) -> tuple[Tensor, Tensor | None]:
        """actions [..., A] to tokens int64 [..., D, L] and, for `dynamic`, stats [..., L, 2]."""
        quantized = self.quantizer.quantize(self.encode_latents(actions))
        return quantized.tokens, quantized.stats

    def dequantize(self, tokens: Tensor, stats: Tensor | None = None) -> Tensor:
        """tokens [..., D, l] to latents [..., D].

        A `dynamic` model uses stats where given, else its recovered decoder for that prefix; raises
        NotDecodableError where it has neither.
        """
        prefix = tokens.shape[-1]
        if self.conditioning is not Conditioning.DYNAMIC or stats is not None:
            return self.quantizer.dequantize(tokens, stats)
        if prefix in self.recovered:
            return self.recovered[prefix].latents(tokens).to(self.offset.dtype)
        if self.recovered:
            raise NotDecodableError(
                f"no recovered decoder for a prefix of {prefix} layers; fitted prefixes: {sorted(self.recovered)}. "
                f"Fit it with {quoted('calibrate', f'--method recovered --prefixes {prefix}')}"
            )
        raise NotDecodableError(dynamic_needs_stats())

    def decode(self, tokens: Tensor, stats: Tensor | None = None) -> Tensor:
        """tokens [..., D, l] to actions [..., A]; see `dequantize` for what a `dynamic` model needs."""
        return self.decode_latents(self.dequantize(tokens, stats))

    def token_map(self, prefix: int) -> tuple[Tensor, Tensor]:
        """matrix [D, D * prefix] and offset [D] with latents = matrix @ tokens.flatten() + offset.

        Read off `dequantize`, column by column: decoding is affine in the tokens. Raises as that does.
        """
        inputs = self.config.latent_dim * prefix
        probes = torch.cat((torch.zeros(1, inputs), torch.eye(inputs))).long()
        latents = self.dequantize(probes.reshape(-1, self.config.latent_dim, prefix))
        return (latents[1:] - latents[0]).T, latents[0]
