"""Typical loops around a sampler, as the example has them: each short, and right."""

from __future__ import annotations

import inspect
import runpy
from pathlib import Path

import pytest
import torch

import sdesolve as sds

LOOPS = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "loops.py"))
DATA = LOOPS["DATA"]
SCORE = DATA.score(sds.VP())


@pytest.mark.parametrize("name", ["inpainting", "image_to_image", "inversion", "settled", "fine_tune", "text_to_image"])
def test_a_loop_is_at_most_thirty_lines(name):
    assert len(inspect.getsource(LOOPS[name]).splitlines()) <= 30


def test_inpainting_by_a_mask_of_each_image():
    images = DATA.sample(64, seed=1)
    seen = torch.stack([torch.arange(64) % 2 == 0, torch.arange(64) % 2 == 1], 1)
    drawn = LOOPS["inpainting"](images, seen, SCORE, steps=60)
    assert torch.equal(drawn[seen], images[seen])
    assert (drawn.sign() == images.sign()).all()  # a mode is 13 standard deviations from the other


def test_images_go_to_images_of_the_law():
    images = torch.tensor([[1.0, 1.5]]).repeat(500, 1)
    near, far = (LOOPS["image_to_image"](images, SCORE, strength=s, steps=20) for s in (0.1, 0.95))
    assert (near > 0).all()  # little noise leaves them at their mode
    assert abs(float((far > 0).all(1).float().mean()) - 0.5) < 0.15
    assert (near.mean(0) - 2.0).abs().max() < 0.2  # drawn from 1 and 1.5 to the mode


def test_inversion_comes_back():
    images = DATA.sample(16, seed=1)
    latent, again = LOOPS["inversion"](images, SCORE)
    assert (again - images).abs().max() < 1e-3
    assert 0.3 < float(latent.std()) < 2.0


def test_a_run_stops_when_its_estimate_has_settled():
    x, steps = LOOPS["settled"](SCORE, (64, 2))
    assert 20 < steps < 60
    assert (x.abs() - 2.0).abs().mean() < 0.4


@pytest.mark.uncompiled
def test_policy_gradients_raise_the_reward():
    score = LOOPS["learned"](steps=80)
    rewards = LOOPS["fine_tune"](score, lambda x: -(x - 2.0).square().sum(1), rounds=3)
    assert rewards[-1] > rewards[0] + 0.5


def test_sentences_of_any_length_say_where_to():
    """A point for each prompt, within the reach of its law; the score is told by its words, however they are padded."""
    prompts = ["up left", "right", "down"] * 8
    score, drawn = LOOPS["text_to_image"](prompts, [1.0] * 24, steps=100)
    centres = torch.tensor([[-1.5, 1.5], [1.5, 0.0], [0.0, -1.5]])
    assert float((drawn.reshape(8, 3, 2).mean(0) - centres).abs().max()) < 0.6
    t, x = torch.tensor(0.5), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    told = [score.given(context=c, context_mask=m)(x, t) for c, m in (LOOPS["texts"](prompts[:3], n) for n in (2, 6))]
    torch.testing.assert_close(*told, rtol=1e-4, atol=1e-5)
