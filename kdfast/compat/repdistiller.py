"""RepDistiller's losses (HobbitLong/RepDistiller): CRDLoss(opt), DistillKL(T), RKDLoss(w_d, w_a)."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from .._core import checks
from ..bank import AliasSampler
from ..distill import CRD, KD


class DistillKL(nn.Module):
    """`loss(y_s, y_t)`: T^2 KL(softmax(y_t / T) || softmax(y_s / T)), the mean over samples; kdfast.distill.KD. No gradient to y_t."""

    def __init__(self, T: float):
        super().__init__()
        self.T = T
        self.kd = KD(T)

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        checks.rows("y_s", y_s)
        checks.rows("y_t", y_t)
        return self.kd(y_s, y_t)


class RKDLoss(nn.Module):
    """`loss(f_s, f_t)`: w_d times the distance term + w_a times the angle term of relational distillation; kdfast.losses.RKDLoss.

    Features are flattened to [N, -1]; f_t gets no gradient. The N^3 angles are never stored.
    """

    def __init__(self, w_d: float = 25, w_a: float = 50):
        super().__init__()
        checks.weights(w_d=w_d, w_a=w_a)
        self.w_d, self.w_a = w_d, w_a

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        _check_features(f_s, f_t)
        return losses.RKDLoss(self.w_d, self.w_a)(f_s.flatten(1), f_t.flatten(1))


class CRDLoss(nn.Module):
    """Contrastive representation distillation (Tian et al. 2020): `loss(f_s, f_t, idx, contrast_idx=None)` -> 0-d; kdfast.distill.CRD.

    Args:
        opt: any object with the fields s_dim, t_dim, feat_dim, n_data, nce_k, nce_t, nce_m.

    idx [N]: the samples' rows in [0, n_data); contrast_idx [N, 1 + nce_k]: idx, then the negatives; None draws nce_k other rows
    uniformly. Features [N, ...] are flattened, embedded by `embed_s` and `embed_t` and normalised. state_dict has the original's
    names and shapes, so that its checkpoints load: embed_s.linear.*, embed_t.linear.*, contrast.params, contrast.memory_v1, _v2.

    Differs: the sampled rows are never copied to [N, 1 + nce_k, D]; the normalisers Z are estimated over all ranks, and nothing is
    read on the host (in the original five numbers each step); negatives are drawn without a Python loop over the data set, and are
    never the sample itself; of an index that occurs twice in a batch the last embedding counts; every rank writes all ranks'
    embeddings; in eval mode or without gradients neither Z nor the banks change.

    Raises: ValueError, TypeError, IndexError naming the argument.
    """

    def __init__(self, opt):
        super().__init__()
        crd = CRD(
            opt.n_data,
            dim=opt.feat_dim,
            num_negatives=opt.nce_k,
            sampler=_Drawn(opt.n_data, opt.nce_k),
            temperature=opt.nce_t,
            momentum=opt.nce_m,
            student_dim=opt.s_dim,
            teacher_dim=opt.t_dim,
        )
        self.embed_s, self.embed_t = Embed(crd.student_embedding), Embed(crd.teacher_embedding)
        self.crd = crd
        self._constants = opt.nce_k, opt.nce_t, opt.nce_m
        self.register_state_dict_post_hook(_to_original)
        self.register_load_state_dict_pre_hook(_from_original)

    @property
    def contrast(self) -> SimpleNamespace:
        """memory_v1 (student) and memory_v2 (teacher) [n_data, feat_dim], as they are now, and params."""
        names = "params", "memory_v1", "memory_v2"
        state = self.state_dict()
        return SimpleNamespace(**{name: state[f"contrast.{name}"] for name in names})

    def forward(self, f_s: Tensor, f_t: Tensor, idx: Tensor, contrast_idx: Tensor | None = None) -> Tensor:
        _check_features(f_s, f_t)
        checks.integral("idx", idx)
        if contrast_idx is not None:
            checks.exact_shape("contrast_idx", checks.integral("contrast_idx", contrast_idx), (len(idx), 1 + self._constants[0]))
        self.crd.sampler.given = contrast_idx
        return self.crd(f_s.flatten(1), f_t.flatten(1), index=idx)


def _check_features(f_s, f_t) -> None:
    checks.floating("f_s", f_s, min_ndim=2)
    checks.floating("f_t", f_t, min_ndim=2)
    if len(f_s) != len(f_t):
        raise ValueError(f"f_t must have the rows of f_s ({len(f_s)}), got {len(f_t)}")


class Embed(nn.Module):
    """A linear map of the flattened features, then unit length."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.linear(x.flatten(1)), dim=1)


class _Drawn(nn.Module):
    """The rows given for this step, else uniform ones."""

    def __init__(self, size: int, k: int):
        super().__init__()
        self.uniform, self.given = AliasSampler(torch.ones(size), k), None

    def draw(self, rows: Tensor, *, positive: bool) -> Tensor:
        return self.uniform.draw(rows, positive=positive) if self.given is None else self.given


#: kdfast.distill.CRD's names -> the original's
_NAMES = {
    "crd.student_embedding.weight": "embed_s.linear.weight",
    "crd.student_embedding.bias": "embed_s.linear.bias",
    "crd.teacher_embedding.weight": "embed_t.linear.weight",
    "crd.teacher_embedding.bias": "embed_t.linear.bias",
    "crd.student_bank.storage": "contrast.memory_v1",
    "crd.teacher_bank.storage": "contrast.memory_v2",
}
#: the normalisers, which the original keeps in contrast.params = [nce_k, nce_t, Z of the student, Z of the teacher, nce_m], -1: unknown
_NORMALIZERS = "crd.student_contrast.normalizer", "crd.teacher_contrast.normalizer"
_STATELESS = "crd.sampler.uniform._extra_state"


def _to_original(module, state_dict, prefix, local_metadata) -> None:
    for own, original in _NAMES.items():
        state_dict[prefix + original] = state_dict.pop(prefix + own)
    z = torch.stack([state_dict.pop(prefix + name) for name in _NORMALIZERS])
    k, temperature, momentum = (torch.full_like(z[:1], value) for value in module._constants)
    state_dict[prefix + "contrast.params"] = torch.cat([k, temperature, torch.where(z > 0, z, -1.0), momentum])
    state_dict.pop(prefix + _STATELESS)


def _from_original(module, state_dict, prefix, *rest) -> None:
    for own, original in _NAMES.items():
        if prefix + original in state_dict:
            state_dict[prefix + own] = state_dict[prefix + original]  # of `embed_s` and `embed_t` both names exist
            if original.startswith("contrast"):
                del state_dict[prefix + original]
    if prefix + "contrast.params" in state_dict:
        z = state_dict.pop(prefix + "contrast.params")[2:4].clamp(min=0)
        state_dict.update(zip((prefix + name for name in _NORMALIZERS), z, strict=True))
    state_dict[prefix + _STATELESS] = None
