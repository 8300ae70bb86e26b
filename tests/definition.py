"""The definition of the operation, written down densely for one sequence: no state, no streaming, no shortcuts.

Follows docs/architecture.md line by line; everything else is compared with it.
"""

from __future__ import annotations

import math

import torch


def attend(q, k, v, kernel):
    """q [H, T, D], k and v [Hk, T, D] float64 -> y [H, T, D]."""
    spec, (H, T, _), Hk = kernel.spec, q.shape, k.shape[0]
    y = torch.zeros(H, T, v.shape[-1], dtype=q.dtype)
    pos = torch.arange(T)[None, None]
    root = kernel.scaling**0.5
    phi_q = kernel.map_q(q[None] * root, pos)[0] if spec.has_memory else None
    phi_k = kernel.map_k(k[None] * root, pos)[0] if spec.has_memory else None
    for h in range(Hk):
        heads = range(h * H // Hk, (h + 1) * H // Hk)
        scores = token_scores(q[heads.start : heads.stop], k[h], v[h], None if phi_k is None else phi_k[h], kernel, h)
        for t in range(T):
            exact, memory = sets(t, scores, spec)
            for head in heads:
                y[head, t] = mix(q[head, t], k[h], v[h], exact, memory, t, head, h, phi_q, phi_k, kernel)
    return y


def score(a, b, kernel):
    s = float(a @ b) * kernel.scaling
    return s if kernel.softcap is None else kernel.softcap * math.tanh(s / kernel.softcap)


def mix(q, k, v, exact, memory, t, head, h, phi_q, phi_k, kernel):
    weights = {j: math.exp(score(q, k[j], kernel)) for j in exact}
    rate = 0.0 if kernel.log_decay is None else float(kernel.log_decay[h])
    folded = len([j for j in range(t + 1) if left(j, t, kernel.spec)])  # the memory's clock
    sinks = kernel.spec.sinks
    for j in memory:
        age = folded - 1 - (j - sinks)
        gate = math.exp(float(kernel.log_gate[head]) + rate * age)
        weights[j] = gate * float(phi_q[head, t] @ phi_k[h, j])
    norm = sum(weights.values())
    if kernel.sink_logits is not None:
        norm += math.exp(float(kernel.sink_logits[head]))
    return sum(w * v[j] for j, w in weights.items()) / norm


def block(t, spec):
    return t // spec.block


def left(j, t, spec):
    """Token j has left the window by the time of query t."""
    return j >= spec.sinks and block(j, spec) < block(t, spec) - spec.back


def sets(t, scores, spec):
    """(exact set, memory) of query t."""
    gone = [j for j in range(t + 1) if left(j, t, spec)]
    exact = [j for j in range(t + 1) if j not in gone]
    pool = gone
    previous = []
    for s, (_, capacity) in enumerate(spec.shares if spec.slots else ()):
        best = sorted(pool, key=lambda j: (-scores[s][j], j))[:capacity]
        previous += best
        pool = [j for j in pool if j not in best]
    return exact + previous, pool if spec.has_memory else []


def token_scores(q, k, v, phi_k, kernel, h):
    """One list a share: the score of every token, as if it left the window."""
    table = {"attention": mass, "value": lambda q, k, v, *_: v.norm(dim=-1).tolist(), "recall": recall}
    return [table[name](q, k, v, phi_k, kernel, h) for name, _ in kernel.spec.shares] if kernel.spec.slots else []


def mass(q, k, v, phi_k, kernel, h):
    spec, T = kernel.spec, k.shape[0]
    total = [0.0] * T
    for g in range(q.shape[0]):
        for t in range(T):
            local = [j for j in range(t + 1) if not left(j, t, spec)]
            weights = {j: math.exp(score(q[g, t], k[j], kernel)) for j in local}
            norm = sum(weights.values())
            for j in local:
                if block(j, spec) < block(t, spec):
                    total[j] += weights[j] / norm
    return total


def recall(q, k, v, phi_k, kernel, h):
    spec, T = kernel.spec, k.shape[0]
    rate = 0.0 if kernel.log_decay is None else float(kernel.log_decay[h])
    errors = []
    for j in range(T):
        before = [i for i in range(spec.sinks, T) if block(i, spec) < block(j, spec)]
        last = before[-1] if before else 0
        weights = torch.tensor([math.exp(rate * (last - i)) * float(phi_k[j] @ phi_k[i]) for i in before])
        answer = sum(w * v[i] for w, i in zip(weights, before, strict=True)) / weights.sum() if before else 0.0
        errors.append(float((v[j] - answer).norm()))
    return errors
