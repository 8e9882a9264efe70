"""The divergence and its gradient against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradmap_hub.healing import objective
from gradmap_hub.healing.objective import TopK, divergence, top_k

POSITIONS, WIDTH, VOCABULARY = 21, 8, 50


@pytest.fixture
def parts() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head, and the teacher's logits."""
    draw = torch.Generator().manual_seed(3)
    return (
        torch.randn(POSITIONS, WIDTH, generator=draw),
        torch.randn(VOCABULARY, WIDTH, generator=draw),
        2 * torch.randn(POSITIONS, VOCABULARY, generator=draw),
    )


def binned(hidden: Tensor, head: Tensor, teacher: TopK) -> Tensor:
    """The objective in plain autograd: KL over the K tokens and one bin for all others."""
    student = (hidden @ head.T).log_softmax(dim=-1).gather(-1, teacher.indices)
    others = 1 - student.exp().sum(dim=-1)
    known = (teacher.logprobs.exp() * (teacher.logprobs - student)).sum(dim=-1)
    return known + teacher.rest * (teacher.rest.log() - others.log())


@pytest.mark.parametrize("chunk", [4, 256])
def test_value_and_gradient_equal_autograd(
    chunk: int, parts: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "CHUNK", chunk)
    hidden, head, logits = parts
    teacher = top_k(logits, 6)
    weights = torch.linspace(0.5, 2, POSITIONS)
    ours, plain = hidden.clone().requires_grad_(True), hidden.clone().requires_grad_(True)
    found, _ = divergence(ours, lambda states: states @ head.T, teacher)
    (found * weights).sum().backward()
    wanted = binned(plain, head, teacher)
    (wanted * weights).sum().backward()
    assert ours.grad is not None and plain.grad is not None
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(ours.grad, plain.grad, atol=1e-5)


def test_all_tokens_give_the_whole_divergence(parts: tuple[Tensor, Tensor, Tensor]) -> None:
    """With K = the vocabulary it is KL itself, with fewer less, and of a model from itself 0."""
    hidden, head, logits = parts
    student = (hidden @ head.T).log_softmax(dim=-1)
    whole = torch.nn.functional.kl_div(student, logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    values = {k: divergence(hidden, lambda h: h @ head.T, top_k(logits, k))[0] for k in (2, 10, VOCABULARY)}
    assert torch.allclose(values[VOCABULARY], whole, atol=1e-4)
    assert (values[2] <= values[10] + 1e-6).all() and (values[10] <= whole + 1e-6).all()
    own, _ = divergence(hidden, lambda h: h @ head.T, top_k(hidden @ head.T, 10))
    assert own.abs().max() < 1e-5


def test_labels_give_the_loss(parts: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, head, logits = parts
    labels = torch.arange(POSITIONS)
    _, losses = divergence(hidden, lambda h: h @ head.T, top_k(logits, 5), labels)
    assert losses is not None
    assert torch.allclose(losses, torch.nn.functional.cross_entropy(hidden @ head.T, labels, reduction="none"))


def test_a_certain_teacher_gives_finite_gradients(parts: tuple[Tensor, Tensor, Tensor]) -> None:
    """All mass within K tokens, for the teacher and almost so for the student."""
    hidden, head, _ = parts
    teacher = top_k(100 * (hidden @ head.T), 4)
    ours = (50 * hidden).requires_grad_(True)
    found, _ = divergence(ours, lambda h: h @ head.T, teacher)
    found.sum().backward()
    assert ours.grad is not None and found.isfinite().all() and ours.grad.isfinite().all()
