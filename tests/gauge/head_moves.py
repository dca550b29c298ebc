"""Tiny models, their heads in other numbers, optimisers of all kinds, and short training runs."""

import torch

from erlangen import optim
from erlangen.gauge import _pairs, forms
from erlangen.lm import GPT, GPTConfig

VARIANTS = {
    "plain": {},
    "unbiased": {"attention_bias": False},
    "grouped": {"num_kv_heads": 2},
    "rotary": {"positions": "rotary", "attention_bias": False},
    "partly rotary": {"positions": "rotary", "rotary_fraction": 0.5, "num_kv_heads": 2},
}


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "amsgrad": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3, amsgrad=True),
    "nadam": lambda model: torch.optim.NAdam(model.parameters(), lr=1e-3),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-4, momentum=0.9, centered=True),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=1e-3),
    "muon": lambda model: optim.create("muon", model.named_parameters()),
    "ecd": lambda model: optim.create("ecd", model.parameters(), lr=0.1),
    "ecd euler": lambda model: optim.create("ecd", model.parameters(), lr=0.1, kick="euler", weight_decay=1e-3),
}


def soap(model, eps=1e-8):
    return optim.create("soap", model.parameters(), precondition_frequency=4, eps=eps)


def same(found, expected, tolerance):
    """Whether two runs, or two models' numbers, are one to a relative tolerance."""
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def make_gpt(seed=0, dtype=torch.float64, **fields):
    config = GPTConfig(vocab_size=32, context_length=16, num_layers=2, num_heads=4, dim=32, **fields)
    model = GPT(config, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.no_grad():  # the weights of a model that has been trained a little
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(5.0)
            elif "attention" in name and name.endswith("bias"):
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def some_tokens(model, seed=0, number=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(32, (number, 17), generator=generator)


def loss_of(model, tokens):
    return model(tokens[:, :-1], tokens[:, 1:])[1]


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens[:, :-1])[0]


def factors_of(model, pair, tensors=None):
    parameters = _pairs.parameters_by_name(model) if tensors is None else tensors
    return tuple(factor.double().clone() for factor in pair.factors(lambda name: parameters[name].detach()))


def matrices(pair, heads, generator):
    """A matrix of the group of a pair for each head, of a condition of about ten."""
    turned, width = 0 if pair.rotary is None else pair.rotary.dim, pair.width
    matrix = torch.zeros(heads, width, width, dtype=torch.float64)
    if pair.rotary is not None:
        numbers = torch.randn(heads, turned // 2, generator=generator, dtype=torch.complex128)
        matrix[:, :turned, :turned] = forms.plane_matrices(numbers + 0.3, pair.rotary.planes())
    rest = width - turned
    q, _ = torch.linalg.qr(torch.randn(heads, rest, rest, generator=generator, dtype=torch.float64))
    p, _ = torch.linalg.qr(torch.randn(heads, rest, rest, generator=generator, dtype=torch.float64))
    matrix[:, turned:, turned:] = (q * torch.logspace(-0.5, 0.5, rest, dtype=torch.float64)) @ p
    return matrix


def move_heads(model, seed=1):
    """Bring a model's heads into other numbers, in place: GL where positions leave it."""
    generator, parameters = torch.Generator().manual_seed(seed), _pairs.parameters_by_name(model)
    for pair in _pairs.head_pairs(model):
        first, second = factors_of(model, pair)
        matrix = matrices(pair, len(first), generator)
        pair.put(lambda name: parameters[name], matrix @ first, torch.linalg.inv(matrix).mT @ second)
    return model


def train(model, optimizer, steps, *, first=0):
    """The losses of some steps, float64 [steps]."""
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(model, some_tokens(model, seed=step))
        loss.backward()
        optimizer.step(loss.item)
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def loaded(model, prepare, weights, state, order):
    """The optimiser that ``prepare`` makes for a model, after weights and state were loaded.

    Args:
        order: "weights first", "state first", or "weights before all", before the optimiser is made.
    """
    if order == "weights before all":
        model.load_state_dict(weights)
    optimizer = prepare(model)
    if order == "weights first":
        model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    if order == "state first":
        model.load_state_dict(weights)
    return optimizer
