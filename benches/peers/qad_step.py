"""Seconds of one QAD step in PyTorch on the CPU, to be run beside `recoup recover` on the same machine.

The same step: NVFP4 W4A4 on every linear of the blocks under the student checkpoint's own frozen scales, straight-through
gradients, the BF16 teacher run on the same batch, KL over the whole vocabulary, clipping, AdamW on f32 masters. Products
are BF16; the rounding is compiled by TorchInductor unless --eager is given.

    python benches/peers/qad_step.py STUDENT UNROUNDED TEACHER [--sequences 4] [--length 256] [--steps 6] [--eager]

STUDENT is a ModelOpt NVFP4 checkpoint, UNROUNDED the model it was rounded from (`recoup quantize --keep-unrounded`).
"""

import argparse
import json
import time

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

BLOCK = 16


def round_e2m1(q):
    """The nearest of 0 .5 1 1.5 2 3 4 6, ties to the even code."""
    a = q.abs().clamp(max=6.0)
    fine = torch.round(a * 2) * 0.5
    middle = torch.round(a)
    coarse = torch.round(a * 0.5) * 2
    return torch.where(a < 2, fine, torch.where(a < 4, middle, coarse)) * torch.sign(q)


def quantize_weight(master, scale):
    blocks = master.reshape(master.shape[0], -1, BLOCK)
    return (round_e2m1(blocks / scale) * scale).reshape(master.shape).to(torch.bfloat16)


def quantize_input(x, global_scale):
    blocks = x.float().reshape(-1, x.shape[-1] // BLOCK, BLOCK)
    amax = blocks.abs().amax(-1, keepdim=True)
    scale = (amax / (6 * global_scale)).clamp(max=448.0).to(torch.float8_e4m3fn).float() * global_scale
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (round_e2m1(blocks / safe) * scale).reshape(x.shape).to(torch.bfloat16)


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, function, scale, reach):
        ctx.reach = reach
        if reach is not None:
            ctx.save_for_backward(x)
        return function(x, scale)

    @staticmethod
    def backward(ctx, grad):
        if ctx.reach is not None:
            (x,) = ctx.saved_tensors
            grad = grad * (x.abs() <= ctx.reach)
        return grad, None, None, None


class Linear(torch.nn.Module):
    def __init__(self, master, block_scale, global_scale):
        super().__init__()
        self.weight = torch.nn.Parameter(master)
        self.register_buffer("block_scale", block_scale)
        self.global_scale = global_scale

    def forward(self, x):
        w = Through.apply(self.weight, quantize_weight, self.block_scale, None)
        x = Through.apply(x, quantize_input, self.global_scale, 6 * 448 * self.global_scale)
        return torch.nn.functional.linear(x, w)


def tensors(folder):
    with safe_open(f"{folder}/model.safetensors", "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}


def main():
    global quantize_weight, quantize_input
    parser = argparse.ArgumentParser()
    parser.add_argument("student")
    parser.add_argument("unrounded")
    parser.add_argument("teacher")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    if not args.eager:
        quantize_weight = torch.compile(quantize_weight, dynamic=False)
        quantize_input = torch.compile(quantize_input, dynamic=True)

    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16)
    student = AutoModelForCausalLM.from_pretrained(args.unrounded, dtype=torch.bfloat16)
    stored, plain = tensors(args.student), tensors(args.unrounded)
    for name in [n for n, m in student.named_modules() if isinstance(m, torch.nn.Linear)]:
        if f"{name}.weight_scale" not in stored:
            continue
        scale = stored[f"{name}.weight_scale"].float() * stored[f"{name}.weight_scale_2"].float()
        linear = Linear(plain[f"{name}.weight"].float(), scale.unsqueeze(-1), stored[f"{name}.input_scale"].item())
        parent, leaf = name.rsplit(".", 1)
        setattr(student.get_submodule(parent), leaf, linear)
    for p in student.parameters():
        p.requires_grad_(False)
    masters = [m.weight.requires_grad_(True) for m in student.modules() if isinstance(m, Linear)]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    vocabulary = student.config.vocab_size
    random = torch.Generator().manual_seed(0)
    times = []
    for _ in range(args.steps):
        ids = torch.randint(vocabulary, (args.sequences, args.length), generator=random)
        start = time.perf_counter()
        with torch.no_grad():
            target = teacher(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        logits = student(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        loss = torch.nn.functional.kl_div(logits, target, log_target=True, reduction="sum") / logits.shape[:2].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        times.append(time.perf_counter() - start)
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "tokens": ids.numel(), "seconds": [round(t, 3) for t in times], "loss": loss.item()}))


main()
