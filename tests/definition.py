"""The definition of the operation, written down densely for one sequence: no state, no streaming, no shortcuts.

Follows docs/architecture.md line by line; everything else is compared with it.
"""

from __future__ import annotations

import itertools
import math

import torch


def attend(q, k, v, kernel):
    """q [H, T, D], k and v [Hk, T, D] float64 -> y [H, T, D]."""
    spec, (H, T, _), Hk = kernel.spec, q.shape, k.shape[0]
    y = torch.zeros(H, T, v.shape[-1], dtype=q.dtype)
    pos = torch.arange(T)[None, None]
    root = kernel.scaling**0.5
    phi_q = kernel.map_q(q[None] * root, pos)[0] if spec.has_memory else [None] * H
    phi_k = kernel.map_k(k[None] * root, pos)[0] if spec.has_memory else [None] * Hk
    for h in range(Hk):
        heads = range(h * H // Hk, (h + 1) * H // Hk)
        rates = token_rates(k[h], v[h], kernel, h)
        scores = token_scores(q[heads.start : heads.stop], k[h], v[h], phi_k[h], rates, kernel, h)
        held = [exact_sets(b * spec.block, T, scores, spec, h) for b in range(block(T - 1, spec) + 1)]
        for t in range(T):
            history = held[: block(t, spec) + 1]
            for head in heads:
                y[head, t] = mix(
                    q[head, t], k[h], v[h], history, t, head, h, phi_q[head], phi_k[h], rates, scores, kernel
                )
    return y


def score(a, b, kernel):
    s = float(a @ b) * kernel.scaling
    return s if kernel.softcap is None else kernel.softcap * math.tanh(s / kernel.softcap)


def pair_score(q, k, t, j, kernel):
    """The score of query q_t on key k_j; beyond reach, as if the key stood there: both turned to where they would."""
    spec, rotation = kernel.spec, kernel.rotation
    if spec.reach and rotation is not None and t - j > spec.reach:
        k = turn(k, t - spec.reach - j, rotation, t, j)
    return score(q, k, kernel)


def turn(k, by, rotation, t, j):
    """k turned on by so many positions; the angle of each position is a float32, as in models."""
    out = k.clone()
    R = len(rotation.frequencies)
    for i in range(R):
        f = rotation.frequencies[i].float()
        angle = sum(sign * float(torch.tensor(float(p)) * f) for sign, p in ((1, t), (-1, j), (-1, t - j - by)))
        a, b = (2 * i, 2 * i + 1) if rotation.interleaved else (i, R + i)
        out[a] = k[a] * math.cos(angle) - k[b] * math.sin(angle)
        out[b] = k[a] * math.sin(angle) + k[b] * math.cos(angle)
    return out


def mix(q, k, v, history, t, head, h, phi_q, phi_k, rates, scores, kernel):
    """The quotient of the architecture; history: for each block up to t's, what holds a slot, a share."""
    spec, slots = kernel.spec, history[-1]
    gone = [j for j in range(t + 1) if left(j, t, spec)]
    window = [j for j in range(t + 1) if j not in gone]
    weights = {j: math.exp(pair_score(q, k[j], t, j, kernel)) for j in [*window, *itertools.chain(*slots)]}
    for s, (name, _) in enumerate(spec.shares):
        for j in slots[s] if name == "learned" else ():
            weights[j] /= 1 + math.exp(-scores[s][j])  # sigmoid(score)
    memory = {}
    for j in gone if spec.has_memory else ():
        if j not in weights:
            decay = math.exp(sum(rates[i] for i in gone if i > j))  # the memory's clock: tokens that left after j
            memory[j] = math.exp(float(kernel.log_gate[head])) * decay * float(phi_q[t] @ phi_k[j])
    total = sum(w * v[j] for j, w in weights.items())
    if spec.is_delta and memory:
        total = total + sum(memory.values()) * delta_answer(phi_q[t], k, v, history, phi_k, rates, h, kernel)
    else:
        total = total + sum(w * v[j] for j, w in memory.items())
    norm = sum(weights.values()) + sum(memory.values())
    if kernel.sink_logits is not None:
        norm += math.exp(float(kernel.sink_logits[head]))
    return total / norm


def delta_answer(phi, k, v, history, phi_k, rates, h, kernel):
    """What the corrected memory answers: S <- d S, S <- S + k beta (v - S'k)', the dying in order of position.

    A token that dies long after it left the window has faded meanwhile as the memory has.
    """
    spec, memory, alive = kernel.spec, torch.zeros(phi.shape[-1], v.shape[-1], dtype=v.dtype), set()
    fade = {}
    for b, slots in enumerate(history):
        comes = [j for j in range(v.shape[0]) if left(j, b * spec.block, spec) and block(j, spec) == b - spec.back - 1]
        now = set(itertools.chain(*slots))
        for j in sorted(alive | set(comes)):
            if j in comes:
                memory = memory * math.exp(rates[j])
                fade = {i: f * math.exp(rates[j]) for i, f in fade.items()} | {j: 1.0}
            if j not in now:
                unit = phi_k[j] / phi_k[j].norm()
                beta = 1 / (1 + math.exp(-float(kernel.beta_weight[h] @ k[j] + kernel.beta_bias[h])))
                memory = memory + torch.outer(unit, beta * (fade[j] * v[j] - unit @ memory))
        alive = now
    return (phi / phi.norm()) @ memory


def block(t, spec):
    return t // spec.block


def left(j, t, spec):
    """Token j has left the window by the time of query t."""
    return j >= spec.sinks and block(j, spec) < block(t, spec) - spec.back


def exact_sets(t, T, scores, spec, h):
    """What holds a slot during the block that begins with t: a list a share."""
    pool = [j for j in range(min(t + 1, T)) if left(j, t, spec)]
    found = []
    for s, (_, capacity) in enumerate(spec.shares_of(h)):
        best = sorted(pool, key=lambda j: (-scores[s][j], j))[:capacity] if spec.slots else []
        found.append(best)
        pool = [j for j in pool if j not in best]
    return found


def token_rates(k, v, kernel, h):
    """The log decay that each token puts on those before it, when it leaves the window."""
    if kernel.log_decay is None:
        return [0.0] * len(k)
    rate = float(kernel.log_decay[h])
    if kernel.decay_weight is None:
        return [rate] * len(k)
    x = torch.cat([k, v], -1) @ kernel.decay_weight[h] + math.log(math.e - 1)
    return (rate * torch.log1p(x.exp())).tolist()


# --- scores -------------------------------------------------------------------------------------------------


def token_scores(q, k, v, phi_k, rates, kernel, h):
    """One list a share: the score of every token, as if it left the window."""
    spec = kernel.spec
    if not spec.slots:
        return []
    table = {
        "attention": lambda: faded(mass(q, k, kernel), spec),
        "recall": lambda: recall(k, v, phi_k, rates, spec),
        "value": lambda: v.norm(dim=-1).tolist(),
        "keydiff": lambda: keydiff(k, spec),
    }
    measured = {**table, "attention": lambda: mass(q, k, kernel)}
    for name, trained in (("learned", learned), ("forecast", forecast)):
        found = {s: measured[s] for s in spec.statistics(name)}
        table[name] = lambda trained=trained, found=found: trained({s: x() for s, x in found.items()}, k, v, kernel, h)
    return [table[name]() for name, _ in spec.shares]


def faded(masses, spec):
    """A mass fades as exp(−age/aging); the order at every later time is that of mass · exp(position/aging)."""
    if not spec.aging:
        return masses
    return [math.log(m + 1e-6) + j / spec.aging for j, m in enumerate(masses)]


def mass(q, k, kernel):
    spec, T = kernel.spec, k.shape[0]
    total = [0.0] * T
    for g in range(q.shape[0]):
        for t in range(T):
            local = [j for j in range(t + 1) if not left(j, t, spec)]
            weights = {j: math.exp(pair_score(q[g, t], k[j], t, j, kernel)) for j in local}
            norm = sum(weights.values())
            for j in local:
                if block(j, spec) < block(t, spec):
                    total[j] += weights[j] / norm
    return total


def recall(k, v, phi_k, rates, spec):
    errors = []
    for j in range(k.shape[0]):
        before = [i for i in range(spec.sinks, k.shape[0]) if block(i, spec) < block(j, spec)]
        weights = [math.exp(sum(rates[m] for m in before if m > i)) * float(phi_k[j] @ phi_k[i]) for i in before]
        answer = sum(w * v[i] for w, i in zip(weights, before, strict=True)) / sum(weights) if before else 0.0
        errors.append(float((v[j] - answer).norm()))
    return errors


def keydiff(k, spec):
    """−cos of a key and the mean key of all blocks before the one that lets it leave, sinks left out."""
    found = []
    for j in range(k.shape[0]):
        mean = k[spec.sinks : (block(j, spec) + spec.back + 1) * spec.block].sum(0)
        found.append(-float(torch.nn.functional.cosine_similarity(k[j], mean, dim=0)))
    return found


def learned(statistics, k, v, kernel, h):
    columns = [
        torch.tensor(x) if name == "keydiff" else (torch.tensor(x, dtype=k.dtype) + 1e-6).log()
        for name, x in statistics.items()
    ]
    x = torch.cat([torch.stack(columns, -1).to(k.dtype), k, v], -1)
    return (x @ kernel.score_weight[h] + kernel.score_bias[h]).tolist()


def forecast(statistics, k, v, kernel, h):
    if kernel.key_rotation is not None:  # keys as they were before their positions
        k = torch.stack([turn(x, -j, kernel.key_rotation, 0, j) for j, x in enumerate(k)])
    known = [torch.tensor(x, dtype=k.dtype).add(1e-6).log() for x in statistics.values()]
    of_key, of_value = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (k, v))
    x = torch.cat([torch.stack([*known, torch.ones_like(known[0])], -1), of_key, of_value], -1)
    hidden = x @ kernel.forecast_in[h]
    return (x @ kernel.forecast_skip[h] + hidden * torch.sigmoid(hidden) @ kernel.forecast_out[h]).tolist()
