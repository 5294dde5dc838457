"""The question key's directions are those in which what is asked differs most."""

import torch
from torch.nn import functional

from sparsemem.background.question_key import MOST, discriminant, least_cosine


def test_discriminant_finds_what_differs_between_classes():
    chance = torch.Generator().manual_seed(0)
    centres = torch.zeros(6, 20)
    centres[:, :3] = torch.randn(6, 3, generator=chance)
    labels = [str(i % 6) for i in range(600)]
    noise = torch.randn(600, 20, generator=chance)
    # the classes differ in three dimensions that scatter little; the others scatter a lot
    states = centres[torch.arange(600) % 6] + noise * torch.tensor([0.1] * 3 + [10.0] * 17) + 5

    mean, projection = discriminant(states, labels)

    keys = functional.normalize((states - mean) @ projection, dim=-1)
    nearest = (keys @ keys.T).fill_diagonal_(-1).argmax(1)
    assert mean.dtype == projection.dtype == torch.float32
    assert projection.shape == (20, 5)
    assert ((nearest % 6) == (torch.arange(600) % 6)).float().mean() > 0.95


def test_least_cosine_is_lower_where_other_questions_are_far_apart():
    chance = torch.Generator().manual_seed(0)
    relation = torch.arange(800) % 40
    labels, names = [f"{i:02}" for i in relation.tolist()], ["one"] * 800
    noise = torch.randn(800, 20, generator=chance)
    apart = 30 * torch.randn(40, 20, generator=chance)[relation] + noise
    # three groups of relations, with nothing to tell those of a group apart
    alike = 30 * torch.eye(20)[relation // 2 % 3] + noise

    assert least_cosine(apart, labels, names, [True] * 800) < MOST
    assert least_cosine(alike, labels, names, [True] * 800) == MOST
