"""Projector: shapes, lazy widths, constraints, norms, state."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parameter import is_lazy

from kdfast import Projector
from kdfast.projectors import Affine


def test_linear_is_the_plain_product_and_gradient():
    projector = Projector(5, 3).double()
    s = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    t = torch.randn(7, 3, dtype=torch.float64)
    out, same = projector(s, t)
    weight, bias = projector.maps[0].weight, projector.maps[0].bias
    torch.testing.assert_close(out, s @ weight.t() + bias)
    assert same is t
    torch.autograd.gradcheck(lambda x: projector(x, t)[0], s)


def test_mlp_has_a_relu_between_two_maps():
    projector = Projector(5, 3, "mlp", hidden=11)
    s, t = torch.randn(7, 5), torch.randn(7, 3)
    first, _, second = projector.maps
    torch.testing.assert_close(projector(s, t)[0], F.linear(F.linear(s, first.weight, first.bias).relu(), second.weight, second.bias))


def test_invert_maps_the_teacher():
    projector = Projector(invert=True)
    s, t = torch.randn(7, 5), torch.randn(7, 3)
    student, teacher = projector(s, t)
    assert student is s and teacher.shape == (7, 5)
    assert (projector.source_dim, projector.target_dim) == (3, 5)


@pytest.mark.parametrize("invert", [False, True])
def test_maps_are_projected_per_position_and_pooled_to_the_smaller(invert):
    projector = Projector(invert=invert)
    s, t = torch.randn(2, 5, 8, 8), torch.randn(2, 3, 4, 4)
    student, teacher = projector(s, t)
    small = F.adaptive_avg_pool2d(s, 4)
    affine = projector.maps[0]
    mapped = F.conv2d(t if invert else small, affine.weight[:, :, None, None], affine.bias)
    torch.testing.assert_close(teacher if invert else student, mapped)
    torch.testing.assert_close(student if invert else teacher, small if invert else t)


def test_tokens_act_on_the_last_dimension_and_a_map_meets_a_vector_as_its_mean():
    assert Projector()(torch.randn(2, 6, 5), torch.randn(2, 6, 3))[0].shape == (2, 6, 3)
    s, t = torch.randn(2, 5, 4, 4), torch.randn(2, 3)
    projector = Projector()
    torch.testing.assert_close(projector(s, t)[0], projector.map(s.mean((2, 3))))


@pytest.mark.parametrize("widths", [(5, 3), (3, 5), (4, 4)], ids=str)
def test_orthogonal_stays_orthonormal_while_trained(widths):
    projector = Projector(*widths, "orthogonal")
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.1)
    s, t = torch.randn(16, widths[0]), torch.randn(16, widths[1])
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(*projector(s, t)).backward()
        optimizer.step()
    with torch.autocast("cpu", torch.bfloat16):
        weight = projector.maps[0].effective_weight()
    gram = weight @ weight.t() if weight.shape[0] <= weight.shape[1] else weight.t() @ weight
    torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)


def test_spectral_has_unit_norm_and_the_gradient_of_w_over_sigma():
    affine = Affine(6, 4, constraint="spectral").double()
    affine.weight.data *= 3
    x = torch.randn(5, 6, dtype=torch.float64)
    for _ in range(200):
        affine(x)  # the power method converges
    singular = torch.linalg.svdvals(affine.effective_weight().detach())
    torch.testing.assert_close(singular[0].item(), 1.0, atol=1e-6, rtol=0)
    grad = torch.autograd.grad(affine(x).square().sum(), affine.weight)[0]
    weight = affine.weight.detach().requires_grad_()
    plain = F.linear(x, weight / torch.linalg.matrix_norm(weight, 2), affine.bias).square().sum()
    torch.testing.assert_close(grad, torch.autograd.grad(plain, weight)[0], atol=1e-6, rtol=1e-5)


def test_spectral_backward_survives_a_later_forward():
    affine = Affine(6, 4, constraint="spectral")
    in_eval = affine.eval()(torch.randn(2, 6))
    first, second = affine.train()(torch.randn(2, 6)), affine(torch.randn(2, 6))
    (in_eval.sum() + first.sum() + second.sum()).backward()


def test_spectral_direction_is_kept_in_eval_and_without_gradient():
    affine = Affine(6, 4, constraint="spectral")
    affine.weight.data += torch.randn_like(affine.weight)
    before = affine.direction.clone()
    with torch.no_grad():
        affine(torch.randn(2, 6))
    affine.eval()(torch.randn(2, 6))
    assert torch.equal(before, affine.direction)


def test_norms_act_on_both_sides():
    s, t = torch.randn(9, 5, 2, 2), torch.randn(9, 3, 2, 2)
    for x in Projector(norm="l2")(s, t):
        torch.testing.assert_close(x.norm(dim=1), torch.ones(9, 2, 2))
    for x in Projector(norm="batch")(s, t):
        torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(x.var((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-3, rtol=0)
    for x in Projector(norm="batch")(torch.randn(9, 4, 5), torch.randn(9, 4, 3)):
        torch.testing.assert_close(x.mean((0, 1)), torch.zeros(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_an_early_optimiser_holds_the_parameters_that_come(kind):
    projector = Projector(kind=kind, hidden=8)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=0.1)
    held = optimizer.param_groups[0]["params"]
    assert any(is_lazy(p) for p in held)
    s, t = torch.randn(16, 5), torch.randn(16, 3)
    before = F.mse_loss(*projector(s, t))
    assert {id(p) for p in held} == {id(p) for p in projector.parameters()}
    for _ in range(20):
        optimizer.zero_grad()
        F.mse_loss(*projector(s, t)).backward()
        optimizer.step()
    assert F.mse_loss(*projector(s, t)) < before


def test_initial_parameters_are_those_of_a_linear_layer():
    projector = Projector()
    projector(torch.randn(2, 400), torch.randn(2, 300))
    for p in projector.parameters():
        assert p.abs().max() <= 0.05 and abs(p.std().item() - 0.05 / 3**0.5) < 0.005


@pytest.mark.parametrize("kind", ["linear", "mlp", "orthogonal", "spectral"])
def test_state_goes_into_a_projector_that_knows_no_width(kind):
    projector = Projector(5, 3, kind, hidden=8)
    s, t = torch.randn(4, 5), torch.randn(4, 3)
    fresh = Projector(hidden=8, kind=kind) if kind in ("linear", "mlp") else Projector(5, 3, kind)
    fresh.load_state_dict(projector.state_dict())
    assert torch.equal(fresh.eval()(s, t)[0], projector.eval()(s, t)[0])
    assert torch.equal(copy.deepcopy(fresh)(s, t)[0], fresh(s, t)[0])


def test_state_before_widths_says_so():
    with pytest.raises(RuntimeError, match="call build"):
        Projector().state_dict()


def test_half_precision_features_and_autocast():
    projector = Projector()
    s, t = torch.randn(4, 5).bfloat16(), torch.randn(4, 3).half()
    assert projector(s, t)[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert projector(s.float(), t)[0].dtype == torch.bfloat16


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="kind must be one of"):
        Projector(5, 3, "conv")
    with pytest.raises(ValueError, match="norm must be one of"):
        Projector(norm="layer")
    with pytest.raises(ValueError, match="teacher_dim must be given for kind='orthogonal'"):
        Projector(5, kind="orthogonal")
    with pytest.raises(ValueError, match="student_dim must be >= 1"):
        Projector(0, 3)
    projector = Projector(5, 3)
    with pytest.raises(ValueError, match=r"student must have width 5 \(student_dim\), got shape \(2, 4\)"):
        projector(torch.randn(2, 4), torch.randn(2, 3))
    with pytest.raises(ValueError, match="teacher must have width 3"):
        projector(torch.randn(2, 5), torch.randn(2, 4))
    with pytest.raises(ValueError, match="student must have width 5"):
        Projector(5, 3, invert=True)(torch.randn(2, 4), torch.randn(2, 3))
