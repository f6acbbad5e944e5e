"""What the tests of attraction share: problems of every form, the formula over all scores, values and gradients of either."""

import torch

from kdfast.functional import info_nce

FORMS = ("bank", "positive", "two positives", "in batch", "two in batch")
CLASSES = torch.tensor([-(2**63), -1, 0, 7, 2**63 - 1])


def formula(inputs, options, include):
    """Row losses [*B, N] and which of them count; `inputs` have the names of the arguments."""
    query, tau = inputs["query"], inputs["temperature"]
    given = inputs.get("positive")
    given = None if given is None else given.view(*query.shape[:-1], -1, query.shape[-1])  # [*B, N, J, D]
    n, lead = query.shape[-2], query.shape[:-2]
    labels, own = options["query_labels"], options.get("own_index")
    if "bank" in inputs:
        keys, classes = inputs["bank"], options["bank_labels"]
    else:
        copies, keys = given.shape[-2], given.flatten(-3, -2)
        classes, given = labels.repeat_interleave(copies, -1), None
    z = query @ keys.mT / tau[..., None] + inputs.get("bank_bias", torch.zeros(1, dtype=query.dtype))[..., None, :]
    column = torch.arange(keys.shape[-2])
    admitted = (z > -torch.inf) & (column < options.get("bank_valid", len(column)))
    if own is not None:
        mine = column == own[..., None] if "bank" in inputs else (column // copies == own[..., None]) & (own != torch.arange(n))[..., None]
        admitted = admitted & ~mine
    positive = admitted & (labels[..., None] == classes[..., None, :])
    if given is not None:
        z = torch.cat([z, (query[..., None, :] * given).sum(-1) / tau[..., None]], -1)
        more = torch.ones(*lead, *z.shape[-2:], dtype=torch.bool)[..., len(column) :]
        admitted, positive = torch.cat([admitted, more], -1), torch.cat([positive, more], -1)
    below = admitted if include else admitted & ~positive
    counted = positive.any(-1) & below.any(-1)
    safe = torch.where(counted[..., None], below, True)
    lse = torch.where(safe, torch.where(admitted, z, 0.0), -torch.inf).logsumexp(-1)
    mean = torch.where(positive, z, 0.0).sum(-1) / positive.sum(-1).clamp(min=1)
    return torch.where(counted, lse - mean, 0.0), counted


def problem(form, n, m, d, *, lead=(), own_banks=False, excluded=False, dtype=torch.float32):
    """The tensors that have gradients, by name, and the other arguments."""
    banks = lead if own_banks else ()
    copies = (2,) if "two" in form else ()
    inputs = {"query": torch.randn(*lead, n, d).to(dtype), "temperature": torch.rand(*lead, n) + 0.5}
    options = {"query_labels": CLASSES[torch.randint(5, (*lead, n))]}
    if form != "bank":
        inputs["positive"] = torch.randn(*lead, n, *copies, d).to(dtype)
    if "batch" in form:
        if excluded:  # some rows name themselves, and keep their own positive
            options["own_index"] = torch.where(torch.arange(n) % 4 == 0, -1, torch.randint(0, n, (*lead, n)))
            options["own_index"][..., n // 2] = n // 2
        return inputs, options
    inputs["bank"] = torch.randn(*banks, m, d).to(dtype)
    options["bank_labels"] = CLASSES[torch.randint(4, (*banks, m))]  # the last class has no key
    if excluded:
        inputs["bank_bias"] = torch.randn(*banks, m)
        inputs["bank_bias"][..., m // 2] = -torch.inf
        options["own_index"] = torch.where(torch.arange(n) % 4 == 0, -1, torch.randint(0, m, (*lead, n)))
        options["bank_valid"] = m - m // 5
    return inputs, options


def found(inputs, options, include, reduction, dtype=None, impl="cpu", device="cpu", **further):
    """(value, gradients) of ours or, with a dtype, of the formula in it."""
    leaves = {name: x.detach().to(device, dtype or x.dtype).requires_grad_() for name, x in inputs.items()}
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    if dtype is None:
        value = info_nce(**leaves, **options, same_class="positive", include_positive=include, reduction=reduction, impl=impl, **further)
    else:
        losses, counted = formula(leaves, options, include)
        value = losses if reduction == "none" else losses.sum() / counted.sum().clamp(min=1)
    return value.detach().double().cpu(), [g.double().cpu() for g in torch.autograd.grad(value.sum(), list(leaves.values()))]


def close(ours, expected, eps):
    torch.testing.assert_close(ours[0], expected[0], rtol=eps, atol=eps)
    for x, y in zip(ours[1], expected[1], strict=True):
        torch.testing.assert_close(x, y, rtol=4 * eps, atol=4 * eps * float(1 + y.abs().max()))
