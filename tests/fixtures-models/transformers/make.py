"""Writes qwen3_5_moe/bf16: a mixture of random weights, its experts in the layout that transformers 5 has in memory and that
released Qwen3.5 checkpoints have, and the logits that it gives. Needs transformers 5.24, torch and safetensors:

    python make.py CONFIG OUT       (CONFIG: the config.json beside what it wrote)
"""
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, Qwen3_5MoeForConditionalGeneration

config, out = sys.argv[1:]
torch.manual_seed(0)
model = Qwen3_5MoeForConditionalGeneration(AutoConfig.from_pretrained(config)).to(torch.float32).eval()
with torch.no_grad():
    for name, p in model.named_parameters():
        if "norm" in name:
            p.normal_(0, 0.1)
        elif "A_log" not in name and "dt_bias" not in name:
            p.normal_(0, 0.08)
        p.copy_(p.to(torch.bfloat16).float())
    ids = torch.randint(0, 120, (2, 24))
    logits = model(input_ids=ids).logits
model.to(torch.bfloat16).save_pretrained(out, save_original_format=False)
save_file({"logits": logits.float().contiguous(), "input_ids": ids.contiguous()}, out + "/reference.safetensors")
