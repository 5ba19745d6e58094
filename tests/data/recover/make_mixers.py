"""Outputs and gradients by PyTorch in f64 of what hybrids and mixtures are made of, with which
`tests/library/hybrids.rs` compares. Written token by token from the formulas of transformers' nemotron_h, gpt_oss and
qwen3_5.

Run at the top of the repository, with torch and safetensors installed:
    python tests/data/recover/make_mixers.py
"""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

torch.manual_seed(20)
OUT = {}


def leaf(*shape, scale=1.0, shift=0.0):
    """Random numbers that f32 holds exactly."""
    return (torch.randn(*shape) * scale + shift).float().double().requires_grad_()


def record(name, inputs, out):
    weights = torch.randn(*out.shape).float().double()
    (out * weights).sum().backward()
    OUT[f"{name}/output"] = out.detach().float().contiguous()
    OUT[f"{name}/weights"] = weights.float()
    for key, value in inputs.items():
        OUT[f"{name}/{key}"] = value.detach().float().contiguous()
        OUT[f"{name}/{key}.grad"] = value.grad.float().contiguous()


def convolution(u, weight, bias):
    kernel = weight.shape[1]
    padded = torch.cat([torch.zeros(kernel - 1, u.shape[1], dtype=u.dtype), u])
    out = sum(padded[j : j + len(u)] * weight[:, j] for j in range(kernel))
    return F.silu(out if bias is None else out + bias)


def mamba2(name, lengths, heads, p, groups, s, kernel, limit, eps=1e-5):
    inner, channels = heads * p, heads * p + 2 * groups * s
    i = {
        "x": leaf(sum(lengths), inner + channels + heads),
        "conv1d": leaf(channels, kernel, scale=0.5),
        "conv1d_bias": leaf(channels, scale=0.2),
        "a_log": leaf(heads, scale=0.5),
        "d": leaf(heads),
        "dt_bias": leaf(heads),
        "norm": leaf(inner, scale=0.3, shift=1.0),
    }
    outs = []
    for x in i["x"].split(lengths):
        z, u, dt = x.split([inner, channels, heads], dim=1)
        v = convolution(u, i["conv1d"], i["conv1d_bias"])
        xs, b, c = v.split([inner, groups * s, groups * s], dim=1)
        d = F.softplus(dt + i["dt_bias"]).clamp(*limit)
        state = torch.zeros(heads, p, s, dtype=x.dtype)
        for t in range(len(x)):
            xt = xs[t].view(heads, p)
            bt, ct = (m[t].view(groups, s).repeat_interleave(heads // groups, 0) for m in (b, c))
            state = torch.exp(-torch.exp(i["a_log"]) * d[t])[:, None, None] * state
            state = state + d[t][:, None, None] * xt[:, :, None] * bt[:, None, :]
            y = (state * ct[:, None, :]).sum(-1) + i["d"][:, None] * xt
            r = (y.reshape(inner) * F.silu(z[t])).view(groups, -1)
            r = r * torch.rsqrt((r * r).mean(-1, keepdim=True) + eps)
            outs.append(r.reshape(inner) * i["norm"])
    record(name, i, torch.stack(outs))


def delta_net(name, lengths, kh, vh, dk, dv, kernel, eps=1e-6):
    channels = 2 * kh * dk + vh * dv
    i = {
        "qkv": leaf(sum(lengths), channels),
        "z": leaf(sum(lengths), vh * dv),
        "a": leaf(sum(lengths), vh),
        "b": leaf(sum(lengths), vh),
        "conv1d": leaf(channels, kernel, scale=0.5),
        "a_log": leaf(vh, scale=0.5),
        "dt_bias": leaf(vh),
        "norm": leaf(dv, scale=0.3, shift=1.0),
    }
    outs = []
    for qkv, z, a, b in zip(*(i[k].split(lengths) for k in ("qkv", "z", "a", "b"))):
        q, k, v = convolution(qkv, i["conv1d"], None).split([kh * dk, kh * dk, vh * dv], dim=1)
        state = torch.zeros(vh, dk, dv, dtype=q.dtype)
        beta = torch.sigmoid(b)
        g = -torch.exp(i["a_log"]) * F.softplus(a + i["dt_bias"])
        for t in range(len(q)):
            unit = lambda m: m * torch.rsqrt((m * m).sum(-1, keepdim=True) + 1e-6)
            qt = (unit(q[t].view(kh, dk)) / dk**0.5).repeat_interleave(vh // kh, 0)
            kt = unit(k[t].view(kh, dk)).repeat_interleave(vh // kh, 0)
            state = torch.exp(g[t])[:, None, None] * state
            delta = beta[t][:, None] * (v[t].view(vh, dv) - (state * kt[:, :, None]).sum(1))
            state = state + kt[:, :, None] * delta[:, None, :]
            o = (state * qt[:, :, None]).sum(1)
            o = o * torch.rsqrt((o * o).mean(-1, keepdim=True) + eps) * i["norm"]
            outs.append((o * F.silu(z[t].view(vh, dv))).reshape(-1))
    record(name, i, torch.stack(outs))


def sinks(name, tokens, heads, kv_heads, d, window, scale):
    i = {"q": leaf(tokens, heads * d), "k": leaf(tokens, kv_heads * d), "v": leaf(tokens, kv_heads * d), "sinks": leaf(heads)}
    q = i["q"].view(tokens, heads, d)
    k, v = (i[n].view(tokens, kv_heads, d).repeat_interleave(heads // kv_heads, 1) for n in ("k", "v"))
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    t, s = torch.meshgrid(torch.arange(tokens), torch.arange(tokens), indexing="ij")
    scores = scores.masked_fill((s > t) | (s <= t - window), -torch.inf)
    joined = torch.cat([scores, i["sinks"][:, None, None].expand(heads, tokens, 1)], -1)
    p = joined.softmax(-1)[..., :-1]
    record(name, i, torch.einsum("hts,shd->thd", p, v).reshape(tokens, heads * d))


def mixture(name, rule, tokens, hidden, width, experts, top_k):
    i = {
        "x": leaf(tokens, hidden),
        "router": leaf(experts, hidden, scale=0.4),
        "up": leaf(experts, width, hidden, scale=0.4),
        "down": leaf(experts, hidden, width, scale=0.4),
    }
    x = i["x"]
    logits = x @ i["router"].T
    if rule == "softmax":
        scores = logits.softmax(-1)
        weights, chosen = scores.topk(top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
    elif rule == "softmax_of_chosen":
        best, chosen = logits.topk(top_k, -1)
        weights = best.softmax(-1)
    else:
        scores = logits.sigmoid()
        bias = (torch.randn(experts) * 0.1).float()
        OUT[f"{name}/bias"] = bias
        chosen = (scores + bias.double()).topk(top_k, -1).indices
        weights = scores.gather(-1, chosen)
        weights = 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20)
    outs = []
    for t in range(tokens):
        one = lambda e: i["down"][e] @ (i["up"][e] @ x[t]).clamp(min=0) ** 2
        outs.append(sum(w * one(e) for e, w in zip(chosen[t], weights[t])))
    record(name, i, torch.stack(outs))


def swiglu(name, limit):
    i = {"gate": leaf(8, 12, scale=4.0), "up": leaf(8, 12, scale=4.0)}
    gate, up = i["gate"].clamp(max=limit), i["up"].clamp(-limit, limit)
    record(name, i, (up + 1) * gate * torch.sigmoid(1.702 * gate))


# The first sequence is longer than the pieces in which states are made again.
mamba2("mamba2", [67, 1, 5], heads=4, p=3, groups=2, s=5, kernel=4, limit=(0.0, float("inf")))
mamba2("mamba2_clamped", [9], heads=2, p=4, groups=1, s=18, kernel=2, limit=(0.3, 1.2))
delta_net("delta_net", [66, 1, 4], kh=2, vh=4, dk=5, dv=3, kernel=4)
sinks("sinks", tokens=13, heads=4, kv_heads=2, d=6, window=5, scale=0.4)
for rule in ("softmax", "softmax_of_chosen", "sigmoid"):
    mixture(f"mixture_{rule}", rule, tokens=7, hidden=6, width=5, experts=5, top_k=3)
swiglu("clamped_swiglu", 7.0)
save_file(OUT, "tests/data/recover/mixers.safetensors")
