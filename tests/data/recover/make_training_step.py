"""One training step by PyTorch in f64: losses and gradients that `tests/library/recover.rs` compares with.

Run at the top of the repository, with torch, transformers and safetensors installed:
    python tests/data/recover/make_training_step.py
"""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

FIXTURES = "tests/fixtures/modelopt/llama"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
BLOCK = 16


def tensors(name):
    with safe_open(f"{FIXTURES}/{name}/model.safetensors", "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}


def e2m1(x):
    """The nearest code's value, ties to the even code."""
    a = x.abs()
    steps = [(0.25, 0.5, False), (0.75, 0.5, True), (1.25, 0.5, False), (1.75, 0.5, True), (2.5, 1, False), (3.5, 1, True), (5, 2, False)]
    value = sum(step * ((a >= at) if up else (a > at)).double() for at, step, up in steps)
    return torch.where(x < 0, -value, value)


class FakeQuantize(torch.autograd.Function):
    """NVFP4 of activations; gradients pass where |x| is within the calibrated range (ModelOpt's rule)."""

    @staticmethod
    def forward(ctx, x, global_scale):
        ctx.save_for_backward(x.abs() <= 6 * 448 * global_scale)
        blocks = x.reshape(-1, BLOCK)
        scale = (blocks.abs().amax(1, keepdim=True) / (6 * global_scale)).float().clamp(max=448).to(torch.float8_e4m3fn).double() * global_scale
        quotient = torch.where(scale > 0, blocks / scale.clamp(min=1e-300), torch.zeros_like(blocks))
        return (e2m1(quotient) * scale).reshape(x.shape)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


class Linear(torch.nn.Module):
    def __init__(self, weight, global_scale):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.global_scale = global_scale

    def forward(self, x):
        if self.global_scale is not None:
            x = FakeQuantize.apply(x, self.global_scale)
        return x @ self.weight.T


def load(name):
    config = LlamaConfig(**{k: v for k, v in json.load(open(f"{FIXTURES}/{name}/config.json")).items() if k != "quantization_config"})
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).double()
    stored = tensors(name)
    plain = {k: v.double() for k, v in stored.items() if v.dtype == torch.bfloat16}
    model.load_state_dict(plain, strict=False)
    trained = {}
    for module in [m for m, _ in model.named_modules()]:
        if f"{module}.weight_scale" not in stored:
            continue
        packed = stored[f"{module}.weight"]
        codes = torch.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1).long()
        scales = stored[f"{module}.weight_scale"].double() * stored[f"{module}.weight_scale_2"].double()
        weight = E2M1[codes] * scales.repeat_interleave(BLOCK, 1)
        scale = stored.get(f"{module}.input_scale")
        linear = Linear(weight, scale.double() if scale is not None else None)
        parent, leaf = module.rsplit(".", 1)
        setattr(model.get_submodule(parent), leaf, linear)
        trained[module] = linear
    return model, trained


def main():
    ids = (torch.arange(2 * 24).reshape(2, 24) * 37 + 11) % 256
    with torch.no_grad():
        teacher = load("bf16")[0](ids).logits[:, :-1].log_softmax(-1)
    out = {"input_ids": ids.to(torch.int64)}
    for name in ["nvfp4_w4a16", "nvfp4_four_over_six"]:
        for kl, ce in [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)]:
            model, trained = load(name)
            logits = model(ids).logits[:, :-1].log_softmax(-1)
            divergence = (teacher.exp() * (teacher - logits)).sum(-1).mean()
            entropy = -logits.gather(-1, ids[:, 1:, None]).mean()
            (kl * divergence + ce * entropy).backward()
            case = f"{name}/{kl}/{ce}"
            out[f"{case}/losses"] = torch.stack([divergence, entropy]).detach().float()
            for module, linear in trained.items():
                out[f"{case}/{module}.norm"] = linear.weight.grad.norm().float().reshape(1)
                out[f"{case}/{module}.first_row"] = linear.weight.grad[0].float()
    save_file(out, "tests/data/recover/training_step.safetensors")


main()
