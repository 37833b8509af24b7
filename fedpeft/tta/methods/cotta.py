"""CoTTA: a student follows an augmentation-averaged mean teacher; a random share of its weights goes back each step.

1. z = f_theta(x);  c = batch mean of the source model's largest probability
2. t = mean over `views` of f_theta'(view(x)) if c < threshold, else f_theta'(x)      (logits; the answer)
3. theta <- step of mean_i CE(softmax t_i, z_i)          (both directions with `symmetric`)
4. theta' <- alpha theta' + (1 - alpha) theta            (parameters; batch norms use the batch)
5. each entry of theta <- theta_0 with probability p

Wang et al., arXiv 2203.13591. The released code is followed where it differs from the paper (c is a batch mean). Ours:
`restore_order` before swaps 4 and 5, without which restored weights never reach the teacher that answers; LoRA pairs
are restored by rank-one component; views are computed only when they are used; only adaptable tensors are copied, and
the anchor is the backbone itself. `adapt: all` is every tensor; the authors take those named weight or bias, so that a
transformer's class token and positions stay (1,152 of the tiny ViT's 136,138 values).

    >>> import torch
    >>> from fedpeft.tta.method import make
    >>> net = torch.nn.Linear(2, 2)
    >>> method = make("cotta", net, {"threshold": 0.0, "restore": 1.0, "ema": 0.5, "lr": 0.1})
    >>> _ = method.step(torch.tensor([[1.0, 0.0], [2.0, 2.0]]))
    >>> bool(torch.equal(method.memory["student"]["weight"], net.weight))      # p = 1: the student is the source
    True
"""

from __future__ import annotations

from fedpeft.tta.parts.teacher import MeanTeacher


class CoTTA(MeanTeacher):
    """Continual mean teacher with stochastic restore."""

    paper = "Wang et al. 2022, arXiv 2203.13591"
