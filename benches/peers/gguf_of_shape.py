"""A GGUF of random weights with the shape of a released model, for llama.cpp's side of a comparison.

    python benches/peers/gguf_of_shape.py SHAPE OUT.gguf [--type q4_0|bf16|mxfp4]

SHAPE is a name that `recoup convert --model-shape` knows, of a Llama, Nemotron-H or gpt-oss (src/quantize/shapes.json). `q4_0`:
every matrix in Q4_0 but the head (and tied embeddings) in Q6_K, or Q8_0 where rows are no multiple of 256, as `llama-quantize` has
it. `mxfp4`: a mixture's experts in MXFP4
and all else in BF16, as gpt-oss is released. Weights are random bits under small scales, written one at a time. Needs the package
`gguf` and numpy; the tokenizer is left out, which `llama-bench` does not need.
"""

import argparse
import json
import pathlib

import gguf
import numpy as np

SHAPES = pathlib.Path(__file__).parents[2] / "src/quantize/shapes.json"
TYPES = gguf.GGMLQuantizationType
RANDOM = np.random.default_rng(0)


def matrix(kind, *shape):
    """Random weights of `shape` (rows of K last) as the bytes of `kind`."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if kind == TYPES.BF16:
        values = RANDOM.standard_normal(shape, dtype=np.float32) * 0.02
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    raw = RANDOM.integers(0, 256, size=(*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    if kind == TYPES.Q4_0:
        raw[..., :2] = np.frombuffer(np.float16(0.005).tobytes(), np.uint8)
    elif kind == TYPES.Q6_K:
        raw[..., -2:] = np.frombuffer(np.float16(0.00002).tobytes(), np.uint8)
    elif kind == TYPES.Q8_0:
        raw[..., :2] = np.frombuffer(np.float16(0.0003).tobytes(), np.uint8)
    elif kind == TYPES.MXFP4:
        raw[..., 0] = 120
    else:
        raise ValueError(f"no random weights of {kind}")
    return raw.reshape(*shape[:-1], shape[-1] // block * size)


def tensors(c, kind):
    """Name, shape and type of every tensor of the model; f32 where the type is none."""
    plain = TYPES.Q4_0 if kind == "q4_0" else TYPES.BF16
    hidden, inner, vocabulary = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    head = TYPES.BF16 if kind != "q4_0" else TYPES.Q8_0 if hidden % 256 else TYPES.Q6_K
    queries = c["num_attention_heads"] * c.get("head_dim", hidden // c["num_attention_heads"])
    keys = queries // c["num_attention_heads"] * c["num_key_value_heads"]
    yield "token_embd.weight", (vocabulary, hidden), head if c.get("tie_word_embeddings") else plain
    yield "output_norm.weight", (hidden,), None
    if not c.get("tie_word_embeddings"):
        yield "output.weight", (vocabulary, hidden), head
    for i in range(c["num_hidden_layers"]):
        at = f"blk.{i}."
        yield at + "attn_norm.weight", (hidden,), None
        kinds = c["hybrid_override_pattern"][i] if c["model_type"] == "nemotron_h" else "*-"
        if "M" in kinds:
            heads, groups, state = c["mamba_num_heads"], c["n_groups"], c["ssm_state_size"]
            width = heads * c["mamba_head_dim"]
            convolved = width + 2 * groups * state
            yield at + "ssm_in.weight", (width + convolved + heads, hidden), plain
            yield at + "ssm_conv1d.weight", (convolved, c["conv_kernel"]), None
            yield at + "ssm_conv1d.bias", (convolved,), None
            yield at + "ssm_dt.bias", (heads,), None
            yield at + "ssm_a", (heads, 1), None
            yield at + "ssm_d", (heads, 1), None
            yield at + "ssm_norm.weight", (groups, width // groups), None
            yield at + "ssm_out.weight", (hidden, width), plain
        bias = c.get("attention_bias", False)
        if "*" in kinds:
            for name, n, k in (("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden), ("output", hidden, queries)):
                yield at + f"attn_{name}.weight", (n, k), plain
                if bias:
                    yield at + f"attn_{name}.bias", (n,), None
        if c["model_type"] == "gpt_oss":
            experts = c["num_local_experts"]
            of_experts = TYPES.MXFP4 if kind == "mxfp4" else plain
            yield at + "attn_sinks.weight", (c["num_attention_heads"],), None
            yield at + "post_attention_norm.weight", (hidden,), None
            yield at + "ffn_gate_inp.weight", (experts, hidden), None
            yield at + "ffn_gate_inp.bias", (experts,), None
            for name, n, k in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
                yield at + f"ffn_{name}_exps.weight", (experts, n, k), of_experts
                yield at + f"ffn_{name}_exps.bias", (experts, n), None
        elif "-" in kinds:
            if c["model_type"] != "nemotron_h":
                yield at + "ffn_norm.weight", (hidden,), None
                yield at + "ffn_gate.weight", (inner, hidden), plain
            yield at + "ffn_up.weight", (inner, hidden), plain
            yield at + "ffn_down.weight", (hidden, inner), plain


def describe(w, c):
    """The keys that llama.cpp reads of the model's configuration."""
    heads = c["num_attention_heads"]
    head = c.get("head_dim", c["hidden_size"] // heads)
    kinds = c.get("hybrid_override_pattern", "")
    w.add_name("random")
    w.add_tokenizer_model("no_vocab")
    w.add_vocab_size(c["vocab_size"])
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_head_count(heads)
    w.add_key_length(head)
    w.add_value_length(head)
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_dimension_count(head)
    w.add_rope_freq_base(float(c.get("rope_theta", 10000.0)))
    if c["model_type"] == "nemotron_h":
        w.add_head_count_kv([c["num_key_value_heads"] if k == "*" else 0 for k in kinds])
        w.add_feed_forward_length([c["intermediate_size"] if k == "-" else 0 for k in kinds])
        w.add_layer_norm_eps(c["rms_norm_eps"])
        w.add_ssm_conv_kernel(c["conv_kernel"])
        w.add_ssm_inner_size(c["mamba_num_heads"] * c["mamba_head_dim"])
        w.add_ssm_state_size(c["ssm_state_size"])
        w.add_ssm_time_step_rank(c["mamba_num_heads"])
        w.add_ssm_group_count(c["n_groups"])
        return
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_feed_forward_length(c["intermediate_size"])
    if c["model_type"] == "gpt_oss":
        w.add_sliding_window(c["sliding_window"])
        w.add_expert_count(c["num_local_experts"])
        w.add_expert_used_count(c["num_experts_per_tok"])
        w.add_expert_feed_forward_length(c["intermediate_size"])
        scaling = c["rope_scaling"]
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(scaling["factor"])
        w.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("out")
    parser.add_argument("--type", default="q4_0", choices=("q4_0", "bf16", "mxfp4"))
    args = parser.parse_args()
    shapes = json.loads(SHAPES.read_text())
    if args.shape not in shapes:
        parser.error(f"no shape {args.shape}; there are {', '.join(shapes)}")
    c = shapes[args.shape]
    names = {"llama": "llama", "nemotron_h": "nemotron_h", "gpt_oss": "gpt-oss"}
    if c["model_type"] not in names or "E" in c.get("hybrid_override_pattern", ""):
        parser.error(f"{args.shape} is of a kind that this script does not write")
    writer = gguf.GGUFWriter(args.out, names[c["model_type"]])
    describe(writer, c)
    listed = list(tensors(c, args.type))
    for name, shape, kind in listed:
        block, size = gguf.GGML_QUANT_SIZES[kind or TYPES.F32]
        row = shape[-1] // block * size
        count = int(np.prod(shape[:-1], dtype=np.int64))
        if kind is None:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), count * row)
        else:
            writer.add_tensor_info(name, (*shape[:-1], row), np.dtype(np.uint8), count * row, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape, kind in listed:
        if kind is not None:
            writer.write_tensor_data(matrix(kind, *shape))
        else:
            # A state that decays, gains of one, small everything else.
            value = -1.0 if name.endswith("ssm_a") else 1.0 if "norm" in name else 0.01
            writer.write_tensor_data(np.full(shape, value, np.float32))
    writer.close()


main()
