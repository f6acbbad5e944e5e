"""Every method in a Distiller: it lowers its own loss without hurting the student, resumes bit for bit, obeys the common rules."""

import copy
import math

import pytest
import torch
from distill_cases import STEPS, trainer

from kdfast import distill
from kdfast.study.recipes import RECIPES
from kdfast.study.training import ALONE, accuracy

every_method = pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))


@pytest.fixture(scope="module")
def alone() -> float:
    """Test accuracy of a student that learns its task alone."""
    run = trainer(ALONE)
    for _ in range(STEPS):
        run.step()
    return accuracy(run.student, run.data.test)


@every_method
def test_it_lowers_its_loss(recipe):
    run = trainer(recipe._replace(weight=1.0, task_weight=0.0))
    values = [run.step() for _ in range(STEPS)]
    assert all(math.isfinite(value) for value in values)
    filled = 16  # steps after which banks hold two epochs of samples
    assert sum(values[-10:]) < sum(values[filled : filled + 10])


@every_method
def test_it_does_not_hurt(recipe, alone):
    """Beside the task, at a tenth of its weight: a run of 60 steps is short."""
    run = trainer(recipe._replace(weight=recipe.weight / 10, task_weight=1.0))
    for _ in range(STEPS):
        run.step()
    assert accuracy(run.student, run.data.test) >= alone - 0.03, alone


@every_method
def test_a_resumed_run_goes_on_bit_for_bit(recipe):
    run = trainer(recipe)
    for _ in range(3):
        run.step()
    twin = trainer(recipe, seed=1)
    twin.distiller.load_state_dict(copy.deepcopy(run.distiller.state_dict()))
    twin.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    twin.generator.set_state(run.generator.get_state())
    twin.schedule.load_state_dict(run.schedule.state_dict())
    for model, other in zip(twin.averages, run.averages, strict=True):
        model.load_state_dict(copy.deepcopy(other.state_dict()))
    state = torch.get_rng_state()
    want = [run.step() for _ in range(2)]
    torch.set_rng_state(state)
    assert [twin.step() for _ in range(2)] == want
    for name, value in run.distiller.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, twin.distiller.state_dict()[name]), name


@every_method
def test_terms_sum_to_the_loss_and_state_moves_in_training_alone(recipe):
    run = trainer(recipe)
    run.step()
    loss = run.distiller.losses["method"]
    _, parts = run.forward()
    total = recipe.weight * sum(loss.last.values())
    torch.testing.assert_close(total, parts["method"])
    assert loss.last and all(value.dim() == 0 and not value.requires_grad for value in loss.last.values())
    before = copy.deepcopy(loss.state_dict())
    loss.eval()
    run.forward()
    with torch.no_grad():
        loss.train()
        run.forward()
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, loss.state_dict()[name]), name


@every_method
def test_autocast_keeps_the_loss_in_float32_and_near(recipe):
    run = trainer(recipe)
    run.step()
    run.distiller.eval()
    twin = copy.deepcopy(run.generator)
    state = torch.get_rng_state()
    _, plain = run.forward()
    run.generator = twin
    torch.set_rng_state(state)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = run.forward()
    loss.backward()
    assert parts["method"].dtype == torch.float32
    torch.testing.assert_close(parts["method"], plain["method"], rtol=0.05, atol=0.05 * recipe.weight)
    assert all(p.grad is None or p.grad.isfinite().all() for p in run.distiller.parameters())


def test_every_method_is_here():
    helpers = {"BagDataset", "DistillLoss", "Distiller", "ImageGenerator", "ImagePool", "RGALSynthesizer", "Term", "cutmix", "make_bags"}
    assert set(distill.__all__) - helpers == {name.replace(",", "").split()[0] for name in RECIPES}
