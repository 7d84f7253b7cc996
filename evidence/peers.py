"""The tokenizers that ours is measured against, all fitted to the same training episodes.

ResidualFSQ and ResidualVQ of vector-quantize-pytorch stand in the place of our autoencoder's quantiser. Encoder,
decoder, data, split and the choice of the epoch are those of `rfsq_ref.train`; the quantiser is the library's.
"""

import copy
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pad

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.fast import fit_fast
from rfsq.evidence.schemes import BinRange, Codec, fit_bins
from rfsq.rfsq_ref.autoencoder import ModelConfig, StepAutoencoder
from rfsq.rfsq_ref.data import ActionDataset, FloatArray, split_episodes
from rfsq.rfsq_ref.normaliser import Normaliser, fit_normaliser, suggested_normaliser
from rfsq.rfsq_ref.settings import NormaliserKind, TrainConfig, check_positive
from rfsq.rfsq_ref.tensor_files import hash_tensors, load_safetensors
from rfsq.rfsq_ref.training import train_epochs
from rfsq.runtime.bundle.paths import replacing
from rfsq.runtime.bundle.reading import parse_json

# Importing it takes longer than torch and all of this project together, so that only a model that is made imports it.
# Where it is missing, that is said here already.
if find_spec("vector_quantize_pytorch") is None:
    raise ModuleNotFoundError("No module named 'vector_quantize_pytorch'", name="vector_quantize_pytorch")

#: RT-2 and OpenVLA have 8 bits, 256 bins.
BIN_BITS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
#: The paper's default is 10.
FAST_SCALES = (2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
#: The scale that is also decoded in part, and after how many tokens per value of a chunk (T * A).
PARTIAL_SCALE = 50.0
PARTIAL_SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8)
# More chunks change nothing measurable, and byte-pair coding takes longer.
_MOST_CHUNKS = 20_000
FORMAT = "rfsq-evidence-peer"
#: Of the learning rate, once k-means has fitted the codebooks to a trained encoder.
_FINE_TUNING_SHARE = 1 / 3
#: Of the moving averages that are ResidualVQ's codebooks, the library's default.
_DECAY = 0.8
_LATENT_DIM, _HIDDEN_WIDTH = ModelConfig.latent_dim, ModelConfig.hidden_width


class ResidualFamily(StrEnum):
    """The library's class."""

    FSQ = "ResidualFSQ"
    VQ = "ResidualVQ"


#: To be raised when a change here changes what comes out of a family's training.
RECIPES = {ResidualFamily.FSQ: 1, ResidualFamily.VQ: 2}


@dataclass(frozen=True)
class ResidualConfig:
    """Sizes and recipe; what is not named here follows `rfsq_ref.train`. num_quantizers: residual layers.

    levels: of each of the D latents, one ResidualFSQ per `len(levels)` latents (ResidualFSQ only); codebook_size:
    entries of each codebook over all D latents (ResidualVQ only). epochs: end to end; unquantised_epochs: before them
    without the quantiser, whose codebooks k-means then fits.
    """

    family: ResidualFamily
    num_quantizers: int
    seed: int = 0
    levels: tuple[int, ...] = (7, 7, 7, 7)
    codebook_size: int = 512
    epochs: int = 100
    unquantised_epochs: int = 0
    batch_size: int = 64
    learning_rate: float = 1e-3
    quantize_dropout: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "num_quantizers", "codebook_size", "epochs", "batch_size", error=EvidenceError)
        if self.family is ResidualFamily.FSQ and (not self.levels or _LATENT_DIM % len(self.levels)):
            raise EvidenceError(f"{_LATENT_DIM} latents do not divide into groups of {len(self.levels)} levels")

    @property
    def bits_per_quantizer(self) -> float:
        """Of one step."""
        if self.family is ResidualFamily.VQ:
            return math.log2(self.codebook_size)
        return _LATENT_DIM / len(self.levels) * sum(map(math.log2, self.levels))


class ResidualAutoencoder(StepAutoencoder):
    """Our encoder and decoder with the library's quantiser between them.

    ResidualFSQ bounds its input itself and ResidualVQ needs no bound, so the encoder ends without Tanh.
    """

    def __init__(self, config: ResidualConfig, action_dim: int, normaliser: Normaliser | None = None) -> None:
        from vector_quantize_pytorch import ResidualFSQ, ResidualVQ

        super().__init__(action_dim, _LATENT_DIM, _HIDDEN_WIDTH, normaliser)
        self.config = config
        del self.encoder[-1]
        # Kept in the file, so that it is read without its data.
        for name in ("offset", "units"):
            self.register_buffer(name, getattr(self, name))
        self.quantizer: nn.Module
        common = {"num_quantizers": config.num_quantizers, "quantize_dropout": config.quantize_dropout}
        if config.family is ResidualFamily.FSQ:
            # GroupedResidualFSQ has nothing to learn and treats its groups alike: one ResidualFSQ with the groups as
            # its sequence axis is the same, and faster.
            self.quantizer = ResidualFSQ(levels=list(config.levels), **common)
            self._group = len(config.levels)
        else:
            codebooks = {"codebook_size": config.codebook_size, "decay": _DECAY, "kmeans_init": True}
            self.quantizer = ResidualVQ(dim=_LATENT_DIM, **codebooks, **common)
            self._group = _LATENT_DIM

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """latents [N, D] to quantised latents [N, D], indices [N, D / group, quantisers] and commitment loss []."""
        quantized, indices, *losses = self.quantizer(latents.reshape(len(latents), -1, self._group))
        return quantized.reshape(latents.shape), indices, losses[0].sum() if losses else latents.new_zeros(())

    def dequantize(self, indices: Tensor) -> Tensor:
        """indices [N, D / group, l] of the first l quantisers to latents [N, D]."""
        # -1 is the library's mark for a quantiser that is left out.
        filled = pad(indices, (0, self.config.num_quantizers - indices.shape[-1]), value=-1)
        latents: Tensor = self.quantizer.get_codes_from_indices(filled).sum(dim=0)  # type: ignore[operator]
        return latents.flatten(1)

    def forward(self, actions: Tensor, *, quantised: bool = True) -> tuple[Tensor, Tensor]:
        """actions [N, A] through the quantiser, or past it, and back; and the commitment loss []."""
        latents = self.encode_latents(actions)
        if not quantised:
            return self.decode_latents(latents), actions.new_zeros(())
        quantized, _, loss = self.quantize(latents)
        return self.decode_latents(quantized), loss


@dataclass(frozen=True, eq=False)
class ResidualCodec(Codec):
    """The first `prefix` quantisers of a trained ResidualAutoencoder; each step is coded on its own.

    series: what one curve is drawn through; partial: whether quantisers are left out.
    """

    name: str
    family: str
    series: str
    partial: bool
    model: ResidualAutoencoder
    prefix: int

    def tokens(self, chunks: FloatArray) -> Tensor:
        """float32 [B, T, A] to indices int64 [B * T, groups, prefix]."""
        with torch.no_grad():
            # A copy: datasets are read-only, and torch has no tensors that are.
            steps = torch.from_numpy(chunks.reshape(-1, chunks.shape[-1]).copy())
            return self.model.quantize(self.model.encode_latents(steps))[1][..., : self.prefix]

    def reconstruct(self, chunks: FloatArray) -> FloatArray:
        """See Codec; chunks of any length."""
        tokens = self.tokens(chunks)
        with torch.no_grad():
            decoded: FloatArray = self.model.decode_latents(self.model.dequantize(tokens)).numpy()
        return decoded.reshape(chunks.shape)

    def bits_per_step(self, chunks: FloatArray) -> float:
        """log2 of the codebook for each token."""
        del chunks
        return self.prefix * self.model.config.bits_per_quantizer


def residual_codecs(model: ResidualAutoencoder) -> list[ResidualCodec]:
    """One codec for every prefix of the quantisers."""
    count, family = model.config.num_quantizers, model.config.family.value
    title = family + (" with dropout" if model.config.quantize_dropout else "")
    return [
        ResidualCodec(f"{title}, {prefix} of {count}", family, title, prefix < count, model, prefix)
        for prefix in range(1, count + 1)
    ]


# Training ------------------------------------------------------------------------------------------------------------


def train_residual(dataset: ActionDataset, config: ResidualConfig) -> ResidualAutoencoder:
    """Train on the training episodes of `split_episodes(dataset)`, keep the epoch with the lowest validation error.

    Where all epochs of a phase are worse than what it starts from, that stays: k-means' codebooks before fine-tuning.
    Actions that are not of about unit size are normalised by their minimum and maximum. Deterministic for a given
    seed. Raises DataError for too few episodes, EvidenceError when it diverges.
    """
    split = split_episodes(dataset)
    actions, validation = (torch.from_numpy(part.steps()) for part in (split.train, split.validation))
    normaliser = None
    if suggested_normaliser(dataset):
        normaliser = fit_normaliser(split.train.steps(), NormaliserKind.MIN_MAX, untouched=())
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    model = ResidualAutoencoder(config, dataset.action_dim, normaliser)
    if config.unquantised_epochs:
        _fit(model, actions, validation, generator, quantised=False)
    if config.family is ResidualFamily.VQ:
        # The library's k-means on all training steps: a first batch of 64 would give 64 different entries.
        model.train()
        with torch.no_grad():
            model(actions)
    _fit(model, actions, validation, generator, quantised=True)
    return model.eval()


def _fit(
    model: ResidualAutoencoder, actions: Tensor, validation: Tensor, generator: torch.Generator, *, quantised: bool
) -> None:
    """One phase of the training, without or with the quantiser; the best weights stay."""
    config = model.config
    recipe = TrainConfig(
        epochs=config.epochs if quantised else config.unquantised_epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate * (_FINE_TUNING_SHARE if quantised and config.unquantised_epochs else 1.0),
    )

    def losses(batch: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error in normalised units, and commitment loss."""
        decoded, commitment = model(batch, quantised=quantised)
        return mse_loss(decoded / model.units, batch / model.units), commitment

    epochs = train_epochs(model, lambda batch: torch.add(*losses(batch)), actions, recipe, generator)
    lowest, best = math.inf, copy.deepcopy(model.state_dict())
    errors = []
    model.eval()
    # What training starts from is a candidate too: right after k-means it may be the best there is.
    for _ in chain([None], epochs):
        with torch.no_grad():
            found = float(losses(validation)[0])
        errors.append(found)
        if found < lowest:
            lowest, best = found, copy.deepcopy(model.state_dict())
    if not any(map(math.isfinite, errors[1:])):
        raise EvidenceError(
            f"{config.family.value} diverged in training: no finite validation error in {recipe.epochs} epochs; "
            f"lower the learning rate (now {recipe.learning_rate}) or normalise the data"
        )
    model.load_state_dict(best)


# Cache ---------------------------------------------------------------------------------------------------------------


def trained_residual(dataset: ActionDataset, config: ResidualConfig, cache: Path) -> ResidualAutoencoder:
    """As train_residual, or from an earlier run's file. Raises EvidenceError for a file that is not that run's."""
    path = cached_residual_path(dataset, config, cache)
    if not path.is_file():
        _save(train_residual(dataset, config), _identity(dataset, config), path)
    return _load(path, dataset, config)


def cached_residual_path(dataset: ActionDataset, config: ResidualConfig, cache: Path) -> Path:
    """Where a trained peer is kept; the name carries a hash of all that decides its weights."""
    digest = hashlib.sha256(_identity(dataset, config).encode()).hexdigest()[:12]
    return cache / f"{config.family.value}-seed{config.seed}-{digest}.safetensors"


def _identity(dataset: ActionDataset, config: ResidualConfig) -> str:
    return json.dumps([RECIPES[config.family], dataset.sha256, asdict(config)], sort_keys=True)


def _save(model: ResidualAutoencoder, identity: str, path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    made_with = {name: version(name) for name in ("torch", "vector-quantize-pytorch")}
    header = json.dumps({"identity": identity, "sha256": hash_tensors(tensors), "made_with": made_with})
    with replacing(path, error=EvidenceError) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, metadata={FORMAT: header}))


def _load(path: Path, dataset: ActionDataset, config: ResidualConfig) -> ResidualAutoencoder:
    expected, model = _identity(dataset, config), ResidualAutoencoder(config, dataset.action_dim)
    try:
        tensors, metadata = load_safetensors(path.read_bytes())
        header = parse_json(metadata[FORMAT])
        if header["identity"] != expected:
            raise ValueError(f"it holds another peer, {header['identity']}, and not {expected}")
        if header["sha256"] != hash_tensors(tensors):
            raise ValueError("its weights have another hash than when it was written")
        model.load_state_dict(tensors)
    except OSError as error:
        raise EvidenceError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise EvidenceError(
            f"{path} is no whole file of this peer ({reason}): delete it, and it is trained again"
        ) from error
    return model.eval()


# All of them ----------------------------------------------------------------------------------------------------------


def residual_configs(seed: int) -> tuple[ResidualConfig, ...]:
    """At our bits per layer: 44.9 for a layer of ResidualFSQ, 45 for five codebooks of 512 entries (ResidualVQ).

    ResidualFSQ is trained by our recipe, without and with quantiser dropout: with it the first two layers are better,
    without it all layers together. One limit is for the sake of time, and to the peer's disadvantage: ResidualVQ gets
    100 epochs without the quantiser, k-means, then 20 end to end, in batches of 256 instead of 64.
    """
    return (
        ResidualConfig(ResidualFamily.FSQ, num_quantizers=8, seed=seed),
        ResidualConfig(ResidualFamily.FSQ, num_quantizers=3, seed=seed, quantize_dropout=True),
        ResidualConfig(
            ResidualFamily.VQ, num_quantizers=15, seed=seed, unquantised_epochs=100, epochs=20, batch_size=256,
            learning_rate=3e-3,
        ),
    )  # fmt: skip


def peer_codecs(dataset: ActionDataset, chunk_length: int, *, seed: int, cache: Path) -> list[Codec]:
    """All peers, fitted to the training episodes of `split_episodes(dataset)` and not to its test episodes.

    seed: of what is trained (ResidualFSQ, ResidualVQ); bins and FAST have nothing random. cache: folder where trained
    models are kept. Raises DataError for too few episodes, EvidenceError
    for a damaged file in the cache.
    """
    train = split_episodes(dataset).train
    steps, chunks = train.steps(), training_chunks(train, chunk_length)
    codecs: list[Codec] = [fit_bins(steps, kind, bits) for kind in BinRange for bits in BIN_BITS]
    for scale in FAST_SCALES:
        whole = fit_fast(chunks, scale)
        codecs.append(whole)
        if scale == PARTIAL_SCALE:
            counts = sorted({max(1, round(share * chunks[0].size)) for share in PARTIAL_SHARES})
            codecs += [whole.first_tokens(count) for count in counts]
    for config in residual_configs(seed):
        codecs += residual_codecs(trained_residual(dataset, config, cache))
    return codecs


def training_chunks(episodes: ActionDataset, length: int) -> FloatArray:
    """Every window of `length` steps, as a policy is trained on them: float32 [B, length, A].

    A shorter episode gives one window, its last action repeated. At most 20,000 windows, evenly spaced.
    """
    if length < 1:
        raise EvidenceError(f"chunk length is {length}; expected at least 1")
    windows = []
    for episode in episodes.episodes:
        filled = np.pad(episode, ((0, max(0, length - len(episode))), (0, 0)), "edge")
        windows.append(np.lib.stride_tricks.sliding_window_view(filled, length, axis=0).transpose(0, 2, 1))
    found = np.concatenate(windows)
    return found[:: -(-len(found) // _MOST_CHUNKS)]
