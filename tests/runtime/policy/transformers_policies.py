"""Policies of transformers with the adapter inside. In a file of their own, for transformers takes long to import."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rfsq.runtime.policy.adapter import ActionRFSQAE


class VlaConfig(PretrainedConfig):
    model_type = "vla"

    def __init__(self, bundle: str = "", **settings: Any) -> None:
        super().__init__(**settings)
        self.bundle = bundle


class Vla(PreTrainedModel):
    config_class = VlaConfig

    def __init__(self, config: VlaConfig) -> None:
        super().__init__(config)
        self.tokenizer = ActionRFSQAE.from_bundle(config.bundle)
        self.head = nn.Linear(3, 3)
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokenizer(x)[0])


class FineTuned(Vla):
    """Begins from a base model without a tokenizer."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ActionRFSQAE):
            module.reset_parameters()
