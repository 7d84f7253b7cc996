"""Policy code as it is written around the published model: training, a draft on coarse tokens, acting.

Nothing here knows of the adapter. `model` is the tokenizer, as its users call it.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F  # noqa: N812  the name everybody uses


class Policy(nn.Module):
    """Observation to logits of every token of a chunk; the main model predicts all layers, a draft the first three."""

    def __init__(self, observation_dim, chunk_length, latent_dim, num_layers, num_levels):
        super().__init__()
        self.shape = (chunk_length, latent_dim, num_layers, num_levels)
        self.head = nn.Sequential(nn.Linear(observation_dim, 32), nn.ReLU(), nn.Linear(32, math.prod(self.shape)))

    def forward(self, observation):
        return self.head(observation).view(-1, *self.shape)


def cross_entropy(logits, codes):
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), codes.reshape(-1))


def train_policy(model, observations, chunks, device="cpu", steps=30):
    model.eval()
    model.to(device)
    for p in model.parameters():
        p.requires_grad = False
    chunk_length = chunks.shape[1]
    sizes = (model.hidden_dim, model.num_layers, model.num_levels)
    torch.manual_seed(0)
    main = Policy(observations.shape[1], chunk_length, *sizes).to(device)
    draft = Policy(observations.shape[1], chunk_length, sizes[0], 3, sizes[2]).to(device)
    optimizer = torch.optim.AdamW([*main.parameters(), *draft.parameters()], lr=1e-2)
    losses = []
    for _ in range(steps):
        observation, chunk = observations.to(device), chunks.to(device)
        with torch.no_grad():
            _, codes = model(chunk)
        codes_coarse = codes[:, :, :, :3]
        loss = cross_entropy(main(observation), codes) + cross_entropy(draft(observation), codes_coarse)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return main, draft, losses


@torch.no_grad()
def act(model, main, observation):
    """One observation -> one chunk of actions [1, T, A]."""
    indices = main(observation).argmax(dim=-1)  # [1, T, D, L]
    return model.decode_from_indices(indices)


@torch.no_grad()
def act_through_rfsq(model, main, observation):
    """The same, as code does that does not know of `decode_from_indices`."""
    indices = main(observation).argmax(dim=-1)
    latents = model.rfsq.decode_from_indices(indices)
    return model.decoder(latents)
