"""A small GPT of ours in float64 whose every parameter, biases too, is somewhere at random, and tokens for it."""

import torch

from erlangen.lm import GPT, GPTConfig

TOKENS = torch.randint(32, (3, 16), generator=torch.Generator().manual_seed(0))


def make(**fields):
    config = GPTConfig(vocab_size=32, context_length=16, num_layers=2, num_heads=4, dim=32, **fields)
    model = GPT(config, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def at_random(model, which=("query", "value")):
    """A broken model, its unlearned means (of queries, values, or both) somewhere at random."""
    unlearned = model.symmetry_breaking
    generator = torch.Generator().manual_seed(2)
    for layer in range(2):
        for name in which:
            mean = unlearned.bias(name, layer, mean=True)
            unlearned.set_mean(name, layer, torch.randn(mean.shape, generator=generator, dtype=torch.float64))
    return model
