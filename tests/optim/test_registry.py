import copy
import inspect
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from erlangen.optim import ECD, OPTIMIZERS, SOAP, MuonAdamW, create

NAMED_SHAPES = {
    "token_embedding.weight": (11, 4),
    "blocks.0.multihead_attn.weight": (6, 4),
    "blocks.0.mlp.weight": (4, 6),
    "blocks.0.mlp.bias": (4,),
    "lm_head.weight": (11, 4),
}


def named(dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (name, torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)))
        for name, shape in NAMED_SHAPES.items()
    ]


def make_closure(params: list[Tensor], step: int):
    generator = torch.Generator().manual_seed(50 + step)
    targets = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]

    def closure() -> Tensor:
        for p in params:
            p.grad = None
        loss = sum((p - t).square().mean() for p, t in zip(params, targets)) + 0.1
        loss.backward()
        return loss

    return closure


def run(name: str, steps: int, save_at: int | None = None, dtype=torch.float32, **settings) -> list[Tensor]:
    pairs = named(dtype)
    optimizer = create(name, pairs, **settings)
    for step in range(steps):
        if step == save_at:
            saved = copy.deepcopy(optimizer.state_dict())
            pairs = [(n, torch.nn.Parameter(p.detach().clone())) for n, p in pairs]
            optimizer = create(name, pairs, **settings)
            optimizer.load_state_dict(saved)
        optimizer.step(make_closure([p for _, p in pairs], step))
    return [p.detach() for _, p in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_repeats_bit_for_bit(name, dtype):
    settings = {"soap": {"precondition_frequency": 3}, "sgdm": {"initial_velocity_std": 0.1}}.get(name, {})
    straight = run(name, 10, dtype=dtype, **settings)
    for save_at in (1, 5):
        assert all(torch.equal(a, b) for a, b in zip(straight, run(name, 10, save_at, dtype, **settings)))
    assert any(not torch.equal(p, q) for p, (_, q) in zip(straight, named(dtype)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_schedulers_and_closures_are_honoured(name):
    pairs = named()
    params = [p for _, p in pairs]
    optimizer = create(name, pairs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 3))
    calls = []
    for step in range(5):
        before = [p.detach().clone() for p in params]
        closure = make_closure(params, step)
        loss = optimizer.step(lambda closure=closure: calls.append(1) or closure())
        assert loss.item() > 0
        moved = any(not torch.equal(p, q) for p, q in zip(params, before))
        assert moved == (step < 3 and not (name == "soap" and step == 0))
        schedule.step()
    assert len(calls) == 5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_halving_lr_halves_a_step(name):
    moves = []
    for scale in (1.0, 0.5):
        pairs = named(torch.float64)
        params = [p for _, p in pairs]
        optimizer = create(name, pairs, weight_decay=0.0)
        optimizer.step(make_closure(params, 0))
        for group in optimizer.param_groups:
            group["lr"] *= scale
        before = [p.detach().clone() for p in params]
        if name == "ecd":  # its kick depends on lr as well; along the gradient there is none
            optimizer.state.clear()
        optimizer.step(make_closure(params, 1))
        moves.append([p.detach() - q for p, q in zip(params, before)])
    for whole, half in zip(*moves):
        torch.testing.assert_close(half, whole / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_takes_tensors_groups_and_names(name):
    params = [p for _, p in named()]
    assert isinstance(create(name, params), torch.optim.Optimizer)
    groups = create(name, [{"params": params[:2], "lr": 0.5}, {"params": params[2:]}], lr=0.25).param_groups
    assert {id(p): group["lr"] for group in groups for p in group["params"]} == {
        id(p): 0.5 if i < 2 else 0.25 for i, p in enumerate(params)
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_made_of_plain_things(name, tmp_path):
    pairs = named()
    optimizer = create(name, pairs)
    for step in range(3):
        optimizer.step(make_closure([p for _, p in pairs], step))
    state = optimizer.state_dict()

    def check(value):
        if isinstance(value, dict):
            for item in value.values():
                check(item)
        elif isinstance(value, list | tuple):
            for item in value:
                check(item)
        else:
            assert value is None or isinstance(value, Tensor | int | float | bool | str), type(value)

    check(state)
    torch.save(state, tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)
    check({"a": [1, None]})
    with pytest.raises(AssertionError):
        check({"a": [b"pickled"]})


@pytest.mark.parametrize("name", ["ecd", "soap"])
def test_table_has_the_defaults_of_the_classes(name):
    cls = {"ecd": ECD, "soap": SOAP}[name]
    signature = inspect.signature(cls.__init__).parameters
    defaults = {key: p.default for key, p in signature.items() if key not in ("self", "params")}
    assert dict(OPTIMIZERS[name].settings) == defaults


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"no optimiser 'adam', did you mean 'adamw'\?; there are adamw, sgdm"):
        create("adam", [])
    with pytest.raises(ValueError, match=r"sgdm has no setting 'momentun', did you mean 'momentum'\?; it takes lr"):
        create("sgdm", [], momentun=0.9)
    with pytest.raises(ValueError, match="initial_velocity_std"):
        create("sgdm", [p for _, p in named()], initial_velocity_std=-1.0)


def test_initial_velocity():
    def buffers(**settings):
        optimizer = create("sgdm", [torch.nn.Parameter(torch.zeros(200, 100)) for _ in range(2)], **settings)
        return [optimizer.state[p]["momentum_buffer"] for p in optimizer.param_groups[0]["params"]]

    first, second = buffers(initial_velocity_std=0.1)
    assert abs(first.std() / 0.1 - 1) < 0.02
    assert not torch.equal(first, second)
    assert torch.equal(first, buffers(initial_velocity_std=0.1)[0])
    assert not torch.equal(first, buffers(initial_velocity_std=0.1, seed=1)[0])


def test_muon_divides_the_parameters():
    pairs = named()
    optimizer = create("muon", pairs)
    assert isinstance(optimizer, MuonAdamW)
    where = {id(p): group["algorithm"] for group in optimizer.param_groups for p in group["params"]}
    assert [where[id(p)] for _, p in pairs] == ["adamw", "muon", "muon", "adamw", "adamw"]
    without_names = create("muon", [p for _, p in pairs])
    where = {id(p): group["algorithm"] for group in without_names.param_groups for p in group["params"]}
    assert [where[id(p)] for _, p in pairs] == ["muon", "muon", "muon", "adamw", "muon"]


def test_muon_is_the_two_optimisers():
    pairs, others = named(), named()
    both = create("muon", pairs)
    matrices = [p for name, p in others if "blocks" in name and p.dim() == 2]
    rest = [p for name, p in others if "blocks" not in name or p.dim() != 2]
    muon = torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(4):
        both.step(make_closure([p for _, p in pairs], step))
        make_closure([p for _, p in others], step)()
        muon.step()
        adamw.step()
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(pairs, others))


def soap_reference(weight: Tensor, grads: list[Tensor], lr: float, beta: float, wd: float, frequency: int) -> Tensor:
    """SOAP for one matrix, from algorithm 3 of arXiv 2409.11321, with the authors' skipped first step."""
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    L = (1 - beta) * grads[0] @ grads[0].T
    R = (1 - beta) * grads[0].T @ grads[0]
    QL, QR = torch.linalg.eigh(L)[1].flip(1), torch.linalg.eigh(R)[1].flip(1)
    for t, G in enumerate(grads[1:], start=1):
        m = beta * m + (1 - beta) * G
        v = beta * v + (1 - beta) * (QL.T @ G @ QR) ** 2
        m_hat, v_hat = m / (1 - beta**t), v / (1 - beta**t)
        N = (QL.T @ m_hat @ QR) / (v_hat.sqrt() + 1e-8 / (1 - beta**t) ** 0.5)
        weight = (1 - lr * wd) * (weight - lr * QL @ N @ QR.T)
        L = beta * L + (1 - beta) * G @ G.T
        R = beta * R + (1 - beta) * G.T @ G
        if t % frequency == 0:
            for side, (gram, Q) in enumerate(((L, QL), (R, QR))):
                order = torch.diag(Q.T @ gram @ Q).argsort(descending=True)
                v = v[order] if side == 0 else v[:, order]
                new = torch.linalg.qr(gram @ Q[:, order])[0]
                QL, QR = (new, QR) if side == 0 else (QL, new)
    return weight


@pytest.mark.parametrize("frequency", [1, 3])
def test_soap_agrees_with_the_paper(frequency):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 6, generator=generator, dtype=torch.float64)  # square: the first basis is unique
    scale = torch.logspace(-1, 1, 6, dtype=torch.float64)
    grads = [torch.randn(6, 6, generator=generator, dtype=torch.float64) * scale for _ in range(12)]
    p = torch.nn.Parameter(start.clone())
    optimizer = create("soap", [p], lr=0.1, weight_decay=0.1, precondition_frequency=frequency)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        assert torch.equal(p.grad, grad)
    torch.testing.assert_close(p.detach(), soap_reference(start, grads, 0.1, 0.95, 0.1, frequency), rtol=0, atol=1e-10)


def test_soap_without_preconditioner_is_adam_a_step_later():
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (3, 4, 2), (6,)]
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    ours = [torch.nn.Parameter(x.clone()) for x in start]
    theirs = [torch.nn.Parameter(x.clone()) for x in start]
    soap = create("soap", ours, lr=0.1, weight_decay=0.0, max_precond_dim=0)
    adam = torch.optim.Adam(theirs, lr=0.1, betas=(0.95, 0.95), eps=0.0)
    for group in soap.param_groups:
        group["eps"] = 0.0
    for step in range(6):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            q.grad = p.grad.clone()
        soap.step()
        if step:
            adam.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_soap_rejects_bad_settings():
    p = torch.nn.Parameter(torch.ones(2, 2))
    for settings in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"shampoo_beta": 1.0}, {"precondition_frequency": 0}):
        with pytest.raises(ValueError):
            SOAP([p], **settings)


def test_import_is_light():
    code = (
        "import sys, erlangen.optim; "
        "sys.exit(bool({'torch._dynamo', 'heavyball', 'torch.distributed.tensor'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
