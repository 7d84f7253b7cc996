"""The Robust RFSQ action autoencoder as research code publishes it, written down without looking at `rfsq_ref`.

Only torch is used, and every formula stands where it is needed: this is the second opinion that the reference is
compared with. What is odd here is odd on purpose: the layer norm that is created and never called, and
`decode_from_indices`, which forgets the means and deviations.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F  # noqa: N812  the name everybody uses


class FSQLayer(nn.Module):
    def __init__(self, num_levels=7, use_layernorm=False, layernorm_parameters=False):
        super().__init__()
        self.use_layernorm = use_layernorm
        self.register_buffer("boundaries", torch.linspace(-1, 1, num_levels))
        if layernorm_parameters:
            self.layernorm = nn.LayerNorm(1)

    def forward(self, x):
        if self.use_layernorm:
            mean = x.mean(dim=-1, keepdim=True)
            std = x.std(dim=-1, keepdim=True) + 1e-5
            normed = (x - mean) / std
        else:
            normed = x
        distances = torch.abs(normed.unsqueeze(-1) - self.boundaries)
        idx = torch.argmin(distances, dim=-1)
        quantized = self.boundaries[idx]
        if self.use_layernorm:
            quantized = quantized * std + mean
        return quantized, idx


class RFSQ(nn.Module):
    def __init__(self, num_layers=8, num_levels=7, use_layernorm=False, layernorm_parameters=False):
        super().__init__()
        self.layers = nn.ModuleList(
            [FSQLayer(num_levels, use_layernorm, layernorm_parameters) for _ in range(num_layers)]
        )

    def forward(self, z):
        residual = z
        out = torch.zeros_like(z)
        codes = []
        for layer in self.layers:
            q, idx = layer(residual)
            out = out + q
            residual = residual - q
            codes.append(idx)
        return z + (out - z).detach(), torch.stack(codes, dim=-1)

    def decode_from_indices(self, indices):
        out = 0
        for i, layer in enumerate(self.layers):
            out = out + layer.boundaries[indices[..., i]]
        return out


class ActionRFSQAE(nn.Module):
    def __init__(
        self,
        action_dim=7,
        hidden_dim=16,
        num_layers=8,
        num_levels=7,
        use_layernorm=False,
        width=64,
        layernorm_parameters=False,
    ):
        super().__init__()
        self.config = {
            "action_dim": action_dim,
            "hidden_dim": hidden_dim,
            "num_layers": num_layers,
            "num_levels": num_levels,
            "use_layernorm": use_layernorm,
        }
        self.encoder = nn.Sequential(nn.Linear(action_dim, width), nn.Mish(), nn.Linear(width, hidden_dim), nn.Tanh())
        self.rfsq = RFSQ(num_layers, num_levels, use_layernorm, layernorm_parameters)
        self.decoder = nn.Sequential(nn.Linear(hidden_dim, width), nn.Mish(), nn.Linear(width, action_dim))

    def forward(self, x):
        z_q, codes = self.rfsq(self.encoder(x))
        return self.decoder(z_q), codes

    @torch.no_grad()
    def encode(self, x):
        return self.rfsq(self.encoder(x))[1]

    @torch.no_grad()
    def decode_from_indices(self, indices):
        return self.decoder(self.rfsq.decode_from_indices(indices))


def train_a_little(model, actions, steps=40, batch_size=64):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        batch = actions[step * batch_size % (len(actions) - batch_size) :][:batch_size]
        loss = F.mse_loss(model(batch)[0], batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def layouts(model):
    """What training scripts hand to torch.save, by name."""
    state = model.state_dict()
    return {
        "trained": {"model_state_dict": state, "epoch": 12, "train_mse": 0.25, "config": model.config},
        "model key": {"model": state, "config": model.config},
        "both keys": {"model_state_dict": state, "model": dict(state), "config": model.config},
        "state dict": state,
    }
